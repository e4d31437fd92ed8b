//! What is counted of direct execution, for `--stats`.

use doppel_x86::EngineStats;

/// What is counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub runs: u64,
    pub ticks: u64,
    pub system_calls: u64,
    pub page_faults: u64,
    /// Page faults of pages that are mapped as they should be.
    pub unexplained: u64,
    pub other_traps: u64,
    pub calls: u64,
    pub sensitive: u64,
    /// Copies of pages of code that were patched, and reads of pages that are executed so.
    pub patched: u64,
    pub patched_reads: u64,
    pub gone: u64,
    pub pages_mapped: u64,
    pub revisions: u64,
    pub replaced: u64,
    pub opened: u64,
    pub opened_unknown: u64,
    pub explored: u64,
    pub closed: u64,
    pub emptied: u64,
    /// Looks that were asked for.
    pub looks: u64,
    /// Interruptions that found user code in a child, and translated.
    pub found: [u64; 2],
}

impl Counts {
    /// By their names, for a TSC of this frequency.
    pub fn stats(&self, tsc_hz: u64) -> EngineStats {
        let c = self;
        EngineStats::from([
            ("direct_runs", c.runs),
            ("direct_nanoseconds", nanoseconds(c.ticks, tsc_hz)),
            ("direct_stops_system_call", c.system_calls),
            ("direct_stops_page_fault", c.page_faults),
            ("direct_stops_unexplained", c.unexplained),
            ("direct_stops_other_trap", c.other_traps),
            ("direct_stops_called", c.calls),
            ("user_interruptions_direct", c.found[0]),
            ("user_interruptions_translated", c.found[1]),
            ("direct_entries_sensitive_page", c.sensitive),
            ("direct_pages_patched", c.patched),
            ("direct_reads_of_patched_pages", c.patched_reads),
            ("direct_children_lost", c.gone),
            ("direct_pages_mapped", c.pages_mapped),
            ("direct_shadow_revisions", c.revisions),
            ("direct_shadow_emptied", c.emptied),
            ("direct_programs_replaced", c.replaced),
            ("direct_switches_in", c.opened),
            ("direct_switches_in_unknown_code", c.opened_unknown),
            ("direct_pages_explored", c.explored),
            ("direct_switches_out", c.closed),
            ("direct_looks", c.looks),
        ])
    }
}

/// Ticks of a TSC of `hz` in nanoseconds.
pub(crate) fn nanoseconds(ticks: u64, hz: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(hz.max(1))) as u64
}

//! What the translator counts, for `--stats`.

use doppel_x86::EngineStats;

use crate::shared::Code;
use crate::translator::Translator;

/// Counters of the monitor's side; generated code counts in the context.
#[derive(Default)]
pub(crate) struct Counts {
    pub translations: u64,
    /// Those of them of 32-bit code.
    pub narrow: u64,
    pub short: u64,
    pub translated_instructions: u64,
    pub cache_flushes: u64,
    pub dispatches: u64,
    pub exit_direct: u64,
    pub exit_indirect: u64,
    pub exit_interpret: u64,
    pub exit_access: u64,
    pub exit_fault: u64,
    pub tlb_misses: u64,
    pub page_crossings: u64,
    pub careful: u64,
    pub beside_code: u64,
    pub pages_turned_to_data: u64,
    pub pins: u64,
    pub holds: u64,
    pub rebuilt_flags: u64,
    pub unencodable: u64,
    pub encoded: u64,
    pub shared_checks: u64,
    pub windowed: u64,
    pub rorx_checks: u64,
    pub fused: u64,
    pub state_moves: u64,
    pub kicks: u64,
    /// Windows made; runs of pages opened in them, and accesses that it turned away otherwise.
    pub windows: u64,
    pub window_opened: u64,
    pub window_faults: u64,
    pub untranslatable: u64,
    pub neighbours: u64,
    /// Physical pages of user code that were found at two linear addresses of an address space.
    pub pages_mapped_twice: u64,
    pub translated_nanoseconds: u64,
}

/// Of the code, whoever runs it.
#[derive(Default)]
struct CodeStats {
    bytes: u64,
    metadata: u64,
    invalidated: u64,
    links: u64,
    huge_pages: u64,
}

impl Translator {
    /// Everything counted so far.
    pub fn stats(&self) -> EngineStats {
        let c = &self.counts;
        let cpu = &self.context.cpu.counters;
        let code = self.code_stats();
        EngineStats::from([
            ("translations", c.translations),
            ("translations_of_32_bit_code", c.narrow - c.short),
            ("translations_of_16_bit_and_segmented_code", c.short),
            ("instructions_translated", c.translated_instructions),
            ("code_cache_bytes", code.bytes),
            ("code_cache_flushes", c.cache_flushes),
            ("translation_metadata_bytes", code.metadata),
            ("blocks_invalidated", code.invalidated),
            ("block_links", code.links),
            ("translated_blocks_run", self.context.blocks_run),
            ("translated_instructions_run", self.context.instructions_run),
            ("translated_code_nanoseconds", c.translated_nanoseconds),
            ("dispatches", c.dispatches),
            ("exits_unlinked_branch", c.exit_direct),
            ("exits_jump_cache_miss", c.exit_indirect),
            ("exits_sensitive_instruction", c.exit_interpret),
            ("exits_memory_access", c.exit_access),
            ("exits_fault", c.exit_fault),
            ("exits_kick", c.kicks),
            ("windows", c.windows),
            ("window_runs_opened", c.window_opened),
            ("window_faults", c.window_faults),
            ("untranslatable_instructions", c.untranslatable),
            ("tlb_hits", self.tlb_hits()),
            ("tlb_misses", c.tlb_misses),
            ("tlb_victims_recalled", self.context.victims_recalled),
            ("page_crossings_without_exit", c.page_crossings),
            ("page_crossings_without_monitor", self.context.crossings),
            ("second_jump_cache_hits", self.context.second_jumps),
            (
                "interrupt_returns_translated",
                self.context.interrupt_returns[0],
            ),
            (
                "interrupt_returns_to_kernel_translated",
                self.context.interrupt_returns[1],
            ),
            ("code_pages_entered_as_neighbours", c.neighbours),
            ("code_pages_mapped_twice", c.pages_mapped_twice),
            ("code_map_hits", self.context.map_jumps),
            ("vector_state_loads", self.context.vector_loads),
            ("checks_shared", c.shared_checks),
            ("accesses_through_window", c.windowed),
            ("checks_with_rorx", c.rorx_checks),
            ("comparisons_fused", c.fused),
            ("state_moves_translated", c.state_moves),
            ("code_cache_huge_pages", code.huge_pages),
            ("careful_entries", c.careful),
            ("writes_beside_code", c.beside_code),
            ("code_pages_turned_to_data", c.pages_turned_to_data),
            ("registers_borrowed", c.pins),
            ("bases_kept", c.holds),
            ("flags_rebuilt", c.rebuilt_flags),
            ("instructions_not_encodable", c.unencodable),
            ("instructions_encoded", c.encoded),
            ("tlb_flushes", cpu.tlb_flushes),
            ("address_spaces_resumed", cpu.spaces_resumed),
            ("page_walks", cpu.page_walks),
            ("interpreted_instructions", cpu.interpreted_instructions),
            ("exceptions", cpu.exceptions.iter().sum()),
            ("page_faults", cpu.exceptions[14]),
            ("interrupts", cpu.interrupts),
            ("port_accesses", cpu.port_accesses),
            ("mmio_accesses", cpu.mmio_accesses),
            ("msr_accesses", cpu.msr_accesses),
            ("code_writes", cpu.code_writes),
            ("spin_yields", cpu.spin_yields),
            ("monitor_waits", cpu.monitor_waits),
            ("counter_interrupts", cpu.counter_interrupts),
            ("split_locks", cpu.split_locks),
            ("hypercalls", cpu.hypercalls),
            ("deferred_tlb_flushes", cpu.deferred_flushes),
        ])
    }

    /// What is counted for all that share the code: the first tells it.
    fn code_stats(&self) -> CodeStats {
        let look = |code: &Code| CodeStats {
            bytes: code.cache.used() as u64,
            metadata: code.memory() as u64,
            invalidated: code.blocks.invalidated,
            links: code.blocks.links,
            huge_pages: code.cache.huge_pages,
        };
        let first = self.code.first.then(|| self.code.look(look));
        first.flatten().unwrap_or_default()
    }

    /// Lookups in translated code that found what they looked for. They are counted only where blocks count.
    fn tlb_hits(&self) -> u64 {
        (self.context.tlb_lookups).saturating_sub(self.counts.tlb_misses)
    }
}

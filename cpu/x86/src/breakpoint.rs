//! Breakpoints in DR0 to DR3 (Intel SDM vol. 3B, chapter 18): on instructions, on data, on ports.
//!
//! Problem: a data breakpoint concerns every memory access, and an access is a hit in the software TLB.
//! Idea: a page with a data breakpoint is never entered in the TLBs, so that every access to it takes the slow path, which looks here.
//! Invariant: no TLB holds the page of an enabled data breakpoint; a write to a debug register that enables one flushes them.
//! Hits are collected while an instruction executes and raise one #DB, a trap, after it.

use doppel_memory::PAGE_MASK;

use crate::{Cpu, CpuMode, Cr4, Exception, Seg};

/// What a breakpoint waits for: R/W in DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Execute,
    Write,
    Port,
    Access,
}

const ENABLES: u64 = 0xff;
/// DR6.BT: T of a TSS.
const DR6_BT: u64 = 1 << 15;
/// Among the hits: no bit of DR6.
const TASK_SWITCHED: u64 = 1 << 63;
const DEBUGCTL_LBR: u64 = 1;
const DEBUGCTL_BTF: u64 = 1 << 1;

impl Cpu {
    /// The breakpoints that are enabled: number, what for, first address, bytes.
    fn breakpoints(&self) -> impl Iterator<Item = (usize, Kind, u64, u64)> + '_ {
        let enabled = (0..4).filter(|n| self.dr[7] >> (2 * n) & 3 != 0);
        enabled.map(|n| {
            let control = self.dr[7] >> (16 + 4 * n);
            let kind = match control & 3 {
                0 => Kind::Execute,
                1 => Kind::Write,
                2 if self.cr4.contains(Cr4::DE) => Kind::Port,
                // Undefined without CR4.DE: processors watch for all accesses.
                _ => Kind::Access,
            };
            let bytes = [1, 2, 8, 4][control as usize >> 2 & 3];
            (n, kind, self.dr[n] & !(bytes - 1), bytes)
        })
    }

    /// True while some instruction would raise #DB: code then has to be interpreted.
    #[inline]
    pub fn has_instruction_breakpoints(&self) -> bool {
        self.has_breakpoints(|kind| kind == Kind::Execute)
    }

    /// True while accesses to some memory have to be looked at one by one.
    pub fn has_data_breakpoints(&self) -> bool {
        self.has_breakpoints(|kind| matches!(kind, Kind::Write | Kind::Access))
    }

    #[inline]
    fn has_breakpoints(&self, of: impl Fn(Kind) -> bool) -> bool {
        self.dr[7] & ENABLES != 0 && self.breakpoints().any(|(_, kind, ..)| of(kind))
    }

    /// True where accesses to the page of this linear address have to be looked at one by one.
    #[inline]
    pub fn page_is_watched(&self, linear: u64) -> bool {
        self.dr[7] & ENABLES != 0 && self.watches_page(linear)
    }

    #[cold]
    fn watches_page(&self, linear: u64) -> bool {
        self.breakpoints().any(|(_, kind, at, _)| {
            matches!(kind, Kind::Write | Kind::Access) && (at ^ linear) & !PAGE_MASK == 0
        })
    }

    /// Notes an access to memory that took place.
    #[inline]
    pub(crate) fn note_access(&mut self, linear: u64, size: u64, write: bool) {
        if self.dr[7] & ENABLES != 0 {
            self.note_hits(linear, size, |kind| {
                kind == Kind::Access || (write && kind == Kind::Write)
            });
        }
    }

    /// Notes an access to a port that took place.
    #[inline]
    pub(crate) fn note_port_access(&mut self, port: u16, size: u8) {
        if self.dr[7] & ENABLES != 0 {
            self.note_hits(port.into(), size.into(), |kind| kind == Kind::Port);
        }
    }

    #[cold]
    fn note_hits(&mut self, from: u64, size: u64, concerns: impl Fn(Kind) -> bool) {
        let hits = self
            .breakpoints()
            .filter(|&(_, kind, at, bytes)| {
                concerns(kind) && at < from.wrapping_add(size) && from < at.wrapping_add(bytes)
            })
            .fold(0, |hits, (n, ..)| hits | 1 << n);
        self.breakpoint_hits |= hits;
    }

    /// #DB, a fault, where an instruction breakpoint is enabled for RIP. (RF, which skips it, was looked at.)
    #[cold]
    pub(crate) fn check_instruction_breakpoints(&self) -> Result<(), Exception> {
        let linear = match self.mode() {
            CpuMode::Bits64 => self.rip,
            _ => self.segment(Seg::Cs).base.wrapping_add(self.rip) & 0xffff_ffff,
        };
        let hits = self
            .breakpoints()
            .filter(|&(n, kind, ..)| kind == Kind::Execute && self.dr[n] == linear)
            .fold(0, |hits, (n, ..)| hits | 1 << n);
        if hits == 0 {
            Ok(())
        } else {
            Err(Exception::db(hits, false))
        }
    }

    /// Whether TF leads to #DB after an instruction that set RIP, or one that did not: with DEBUGCTL.BTF after branches alone (Intel SDM vol. 3B, 18.4.3).
    pub(crate) fn steps_at(&self, branch: bool) -> bool {
        branch || !self.steps_on_branches()
    }

    /// True while TF stops at branches alone. (A host's processor would stop at each instruction.)
    pub fn steps_on_branches(&self) -> bool {
        self.msr.debugctl & DEBUGCTL_BTF != 0
    }

    /// A #DB ends branch steps, and the recording of branches.
    pub(crate) fn end_branch_steps(&mut self) {
        self.msr.debugctl &= !(DEBUGCTL_BTF | DEBUGCTL_LBR);
    }

    /// A task switch is complete. The instruction that led to it is no single step (Intel SDM vol. 3B, 18.3.1.4 and 18.3.1.5).
    pub(crate) fn note_task_switch(&mut self, traps: bool) {
        self.breakpoint_hits |= if traps {
            TASK_SWITCHED | DR6_BT
        } else {
            TASK_SWITCHED
        };
    }

    pub(crate) fn has_switched_task(&self) -> bool {
        self.breakpoint_hits & TASK_SWITCHED != 0
    }

    pub(crate) fn has_hits(&self) -> bool {
        self.breakpoint_hits != 0
    }

    /// What was hit, as bits of DR6; it is forgotten.
    pub(crate) fn take_hits(&mut self) -> u64 {
        std::mem::take(&mut self.breakpoint_hits) & !TASK_SWITCHED
    }

    /// The pages whose accesses are looked at one by one.
    fn watched_pages(&self) -> [Option<u64>; 4] {
        let mut pages = [None; 4];
        if self.dr[7] & ENABLES != 0 {
            for (n, kind, at, _) in self.breakpoints() {
                let data = matches!(kind, Kind::Write | Kind::Access);
                pages[n] = data.then_some(at & !PAGE_MASK);
            }
        }
        pages
    }

    /// Sets a debug register. A page that is watched from now on leaves the TLBs.
    pub(crate) fn set_debug_register(&mut self, n: usize, v: u64) {
        let before = self.watched_pages();
        self.dr[n] = v;
        let new = |page: &Option<u64>| page.is_some() && !before.contains(page);
        if self.watched_pages().iter().any(new) {
            self.empty_tlbs();
        }
    }
}

#[cfg(test)]
mod tests {
    use doppel_memory::Privilege;

    use crate::control::{write, write_debug};
    use crate::testing::{INTEL, TestBus, long_mode};
    use crate::{Cpu, Cr4};

    const PAGES: [u64; 2] = [0x9000, 0xa000];
    const PORT: u64 = 2;
    const ACCESS: u64 = 3;

    /// DR7 with breakpoint `n` enabled.
    fn enabled(n: u64, kind: u64) -> u64 {
        1 << (2 * n) | kind << (16 + 4 * n)
    }

    fn set(cpu: &mut Cpu, n: usize, v: u64) {
        write_debug(cpu, n, v).expect("a debug register");
    }

    /// Reads from both pages, of which the first is watched.
    fn with_a_breakpoint() -> Box<Cpu> {
        let mut cpu = long_mode(INTEL);
        cpu.cr4 |= Cr4::DE;
        set(&mut cpu, 0, PAGES[0] + 8);
        set(&mut cpu, 7, enabled(0, ACCESS));
        for at in PAGES {
            let loaded =
                cpu.load_bytes(&mut TestBus::default(), at, Privilege::Supervisor, &mut [0]);
            loaded.expect("a page");
        }
        cpu
    }

    fn in_tlb(cpu: &Cpu) -> [bool; 2] {
        let tlb = &cpu.tlb[Privilege::Supervisor as usize];
        PAGES.map(|at| tlb.lookup_read(at, 1).is_some())
    }

    #[test]
    fn a_watched_page_is_not_in_the_tlb() {
        assert_eq!(in_tlb(&with_a_breakpoint()), [false, true]);
    }

    #[test]
    fn a_page_leaves_the_tlb_when_it_is_watched() {
        let mut cpu = with_a_breakpoint();
        set(&mut cpu, 1, PAGES[1]);
        assert_eq!(in_tlb(&cpu), [false, true], "it is not enabled");
        set(&mut cpu, 7, enabled(0, ACCESS) | enabled(1, ACCESS));
        assert_eq!(in_tlb(&cpu), [false; 2]);

        let mut cpu = with_a_breakpoint();
        set(&mut cpu, 0, PAGES[1]);
        assert_eq!(in_tlb(&cpu), [false; 2], "the breakpoint has moved");
    }

    #[test]
    fn the_tlb_stays_where_no_page_is_watched_anew() {
        let mut cpu = with_a_breakpoint();
        set(&mut cpu, 0, PAGES[0] + 16);
        set(&mut cpu, 6, 0);
        set(&mut cpu, 1, PAGES[1]);
        set(&mut cpu, 7, enabled(0, ACCESS) | enabled(1, PORT));
        set(&mut cpu, 7, 0);
        assert_eq!(in_tlb(&cpu), [false, true]);
    }

    #[test]
    fn what_was_a_port_is_an_address_without_de() {
        let mut cpu = with_a_breakpoint();
        set(&mut cpu, 1, PAGES[1]);
        set(&mut cpu, 7, enabled(1, PORT));
        let cr4 = cpu.cr4.difference(Cr4::DE).bits();
        write(&mut cpu, &mut TestBus::default(), 4, cr4).expect("CR4");
        assert_eq!(in_tlb(&cpu), [false; 2]);
    }
}

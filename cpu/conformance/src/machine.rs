//! One test machine: a CPU in 64-bit mode with tables and handlers, on one engine.

use std::sync::Arc;

use doppel_memory::{Backing, GuestRam, Word};
use doppel_translate::SharedCode;
use doppel_x86::{
    Activity, Cpu, CpuChoice, CpuModelError, CpuidLeaf, CpuidModel, Cr0, Cr4, Dtr, Efer, Engine,
    Exit, Gpr, Kick, Rflags, Seg, Segment, TscFrequency,
};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, cr2, dr6, eax, ecx, edx, qword_ptr, r15, rax, rbx, rsp};

use crate::bus::TestBus;
use crate::engines::Row;
use crate::layout::*;
use crate::watchdog::Watchdog;

/// What a handler was called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Vector.
    pub vector: u64,
    /// Error code; [`Record::NO_ERROR`] for vectors that have none.
    pub error: u64,
    /// The frame.
    pub rip: u64,
    /// The frame.
    pub cs: u64,
    /// The frame.
    pub rflags: u64,
    /// The frame.
    pub rsp: u64,
    /// The frame.
    pub ss: u64,
    /// CR2 in the handler.
    pub cr2: u64,
    /// Where the stack began before the frame was pushed, aligned as the processor does.
    pub stack: u64,
    /// DR6 in the handler.
    pub dr6: u64,
}

impl Record {
    /// In place of an error code where the vector has none.
    pub const NO_ERROR: u64 = 0x5ead_0000;
    const WORDS: u64 = 10;
    /// Records that are kept; the guest is stopped after as many.
    pub const MOST: u64 = 256;

    /// RF in the frame.
    pub fn rf(&self) -> bool {
        self.rflags & Rflags::RF.bits() != 0
    }
}

/// What a handler does after its note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Action {
    /// Stops the guest.
    Stop = 0,
    /// Returns to where the frame says.
    Return = 1,
    /// Goes on at the address in R15, or stops where that is 0.
    Resume = 2,
}

const DEBUG: u8 = 1;
const NMI: u8 = 2;
const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;
const WITH_ERROR_CODE: [u8; 8] = [8, 10, 11, 12, 13, 14, 17, 21];

/// A machine that a test runs.
pub struct Machine {
    engine: Box<dyn Engine>,
    /// What the engines of its CPUs share.
    code: SharedCode,
    /// The machine around the CPU.
    pub bus: TestBus,
    /// Its RAM.
    pub ram: Arc<GuestRam>,
}

impl Machine {
    /// A machine at CPL 0 with RIP at [`CODE`] and interrupts off.
    pub fn new(row: &Row) -> Self {
        Self::with_model(row, Arc::new(CpuidModel::host(1)))
    }

    /// The same, but CPUID names this vendor, whose system calls then are the rule.
    pub fn of_vendor(row: &Row, vendor: &[u8; 12]) -> Self {
        Self::with_model(row, Arc::new(Self::model_of_vendor(vendor)))
    }

    /// The host's processor as one of this vendor.
    pub fn model_of_vendor(vendor: &[u8; 12]) -> CpuidModel {
        let ram = Arc::new(GuestRam::new(1 << 20).expect("RAM"));
        let host = Cpu::new(0, ram);
        let word =
            |n: usize| u32::from_le_bytes([vendor[n], vendor[n + 1], vendor[n + 2], vendor[n + 3]]);
        let read = |leaf, subleaf| {
            let found = host.cpuid(leaf, subleaf);
            if leaf & 0x7fff_ffff != 0 {
                return found;
            }
            CpuidLeaf {
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..found
            }
        };
        CpuidModel::from_host(&read, host.cpuid.xcr0(), host.tsc_hz, 1)
    }

    /// The processor of a machine with one, where the host can carry it.
    pub fn cpu_of(choice: impl Into<CpuChoice>) -> Result<Arc<CpuidModel>, CpuModelError> {
        Self::cpus_of(choice, 1)
    }

    /// The same of a machine with several.
    pub fn cpus_of(
        choice: impl Into<CpuChoice>,
        cpus: u32,
    ) -> Result<Arc<CpuidModel>, CpuModelError> {
        CpuidModel::of(choice, TscFrequency::of_host(), cpus).map(Arc::new)
    }

    pub(crate) fn with_model(row: &Row, model: Arc<CpuidModel>) -> Self {
        let ram = Arc::new(GuestRam::with_backing(RAM, Backing::Memfd).expect("RAM for a guest"));
        let machine = Self::cpu_on(
            row,
            Cpu::with_model(0, ram.clone(), model),
            ram,
            SharedCode::default(),
        );
        machine.write_page_tables();
        machine.write_descriptors();
        machine.write_handlers();
        machine
    }

    /// Another CPU on the same RAM.
    pub(crate) fn beside(&self, row: &Row, id: u32) -> Self {
        let (ram, model) = (self.ram.clone(), self.cpu().cpuid.clone());
        let cpu = Cpu::with_model(id, ram.clone(), model);
        Self::cpu_on(row, cpu, ram, self.code.clone())
    }

    fn cpu_on(row: &Row, cpu: Box<Cpu>, ram: Arc<GuestRam>, code: SharedCode) -> Self {
        let mut machine = Machine {
            engine: (row.make)(cpu, &code),
            code,
            bus: TestBus::new(ram.clone()),
            ram,
        };
        machine.bus.kick = Some(machine.kicker());
        machine.set_registers();
        machine
    }

    /// The CPU.
    pub fn cpu(&self) -> &Cpu {
        self.engine.cpu()
    }
    /// The CPU.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        self.engine.cpu_mut()
    }
    /// The engine's kicker.
    pub fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
    /// A general register.
    pub fn reg(&self, r: Gpr) -> u64 {
        self.cpu().reg(r)
    }
    /// Sets a general register.
    pub fn set_reg(&mut self, r: Gpr, v: u64) {
        self.cpu_mut().gpr[r as usize] = v;
    }
    /// Stores in RAM, before or between runs; not code.
    pub fn put<T: Word>(&self, gpa: u64, v: T) {
        self.ram.store(gpa, v).expect("an address in RAM");
    }
    /// Loads from RAM.
    pub fn get(&self, gpa: u64) -> u64 {
        self.ram.load(gpa).expect("an address in RAM")
    }
    /// Stores bytes in RAM, as a device does: code may be replaced.
    pub fn put_bytes(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write_from_device(gpa, bytes);
    }
    /// A quadword of the data page, by number.
    pub fn data(&self, n: u64) -> u64 {
        self.get(DATA + 8 * n)
    }

    /// Assembles code at its address; returns the address after it.
    pub fn place(&self, bits: u32, at: u64, code: impl Code) -> u64 {
        self.place_at(bits, at, at, code)
    }

    /// Assembles code for linear address `linear` and puts it at a physical one; returns the linear address after it.
    pub fn place_at(&self, bits: u32, gpa: u64, linear: u64, code: impl Code) -> u64 {
        let bytes = assemble(bits, linear, code);
        self.put_bytes(gpa, &bytes);
        linear + bytes.len() as u64
    }

    /// Places kernel code at [`CODE`], which ends in a stop, and runs it.
    pub fn run_code(&mut self, code: impl Code) {
        let end = self.place(64, CODE, code);
        self.place(64, end, stop);
        self.go(CODE);
        self.run();
    }

    /// The same for user code, at [`USER_CODE`].
    pub fn run_user(&mut self, code: impl Code) {
        self.to_user();
        let end = self.place(64, USER_CODE, code);
        self.place(64, end, stop);
        self.go(USER_CODE);
        self.run();
    }

    /// Runs `prepare` and then `code` at [`Machine::fault_at`] at the present privilege; faults go on after it. Returns the
    /// only record.
    pub fn faults(&mut self, prepare: impl Code, code: impl Code) -> Record {
        let base = self.fault_at() - 0x800;
        let recover = base + 0xc00;
        self.place(64, base, |a: &mut CodeAssembler| {
            prepare(a)?;
            a.mov(r15, recover)?;
            a.jmp(base + 0x800)
        });
        let end = self.place(64, base + 0x800, code);
        for at in [end, recover] {
            self.place(64, at, stop);
        }
        self.go(base);
        self.run();
        let records = self.records();
        assert_eq!(records.len(), 1, "one exception: {:x?}", first(&records));
        records[0]
    }

    /// Where [`Machine::faults`] puts the faulting instruction.
    pub fn fault_at(&self) -> u64 {
        let base = if self.cpu().cpl == 3 { USER_CODE } else { CODE };
        base + 0x800
    }

    /// Runs until the guest stops.
    pub fn run(&mut self) {
        let exit = self.run_to_exit();
        assert_eq!(
            exit,
            Exit::Halted,
            "rip {:#x}, records {:x?}",
            self.cpu().rip,
            first(&self.records())
        );
    }

    /// Runs until the engine comes back for another reason than a kick.
    pub fn run_to_exit(&mut self) -> Exit {
        let watchdog = Watchdog::new(self.kicker());
        loop {
            match self.engine.run(&mut self.bus) {
                Exit::Kicked if watchdog.has_bitten() => panic!(
                    "the guest does not stop: rip {:#x}, records {:x?}, {:#?}",
                    self.cpu().rip,
                    first(&self.records()),
                    self.engine.trace()
                ),
                Exit::Kicked => {}
                exit => return exit,
            }
        }
    }

    /// One call of the engine.
    pub fn run_once(&mut self) -> Exit {
        let _watchdog = Watchdog::new(self.kicker());
        self.run_once_unwatched()
    }

    pub(crate) fn run_once_unwatched(&mut self) -> Exit {
        self.engine.run(&mut self.bus)
    }

    /// What the handlers noted.
    pub fn records(&self) -> Vec<Record> {
        let end = self.get(HANDLER_DATA);
        (LOG..end)
            .step_by(8 * Record::WORDS as usize)
            .map(|at| self.record(at))
            .collect()
    }

    fn record(&self, at: u64) -> Record {
        let word = |n: u64| self.get(at + 8 * n);
        Record {
            vector: word(0),
            error: word(1),
            rip: word(2),
            cs: word(3),
            rflags: word(4),
            rsp: word(5),
            ss: word(6),
            cr2: word(7),
            stack: word(8),
            dr6: word(9),
        }
    }

    /// Vectors of the records.
    pub fn vectors(&self) -> Vec<u64> {
        self.records().iter().map(|r| r.vector).collect()
    }

    /// Forgets the records.
    pub fn forget(&self) {
        self.put(HANDLER_DATA, LOG);
    }

    /// Starts again at a place, with interrupts as they are.
    pub fn go(&mut self, rip: u64) {
        let cpu = self.cpu_mut();
        cpu.rip = rip;
        cpu.activity = Activity::Active;
    }

    /// What the handler of a vector does after its note.
    pub fn action(&self, vector: u8, action: Action) {
        self.put(HANDLER_DATA + 8 + 8 * u64::from(vector), action as u64);
    }

    /// A 64-bit gate: `kind` 0xe (interrupt) or 0xf (trap).
    pub fn gate(&self, vector: u8, handler: u64, kind: u64, ist: u64, dpl: u64) {
        let at = IDT + 16 * u64::from(vector);
        let low = (handler & 0xffff)
            | KERNEL_CS << 16
            | ist << 32
            | (0x80 | kind | dpl << 5) << 40
            | (handler >> 16 & 0xffff) << 48;
        self.put(at, low);
        self.put(at + 8, handler >> 32);
    }

    /// The gate of the noting handler, on a stack of the interrupt stack table.
    pub fn gate_on_ist(&self, vector: u8, ist: u64) {
        self.gate(vector, HANDLERS + 16 * u64::from(vector), 0xe, ist, 0);
    }

    /// Puts the CPU back to kernel mode at [`CODE`], as it was at the start.
    pub fn to_kernel(&mut self) {
        let cpu = self.cpu_mut();
        cpu.seg = [flat(KERNEL_DS, DATA_SEGMENT); 6];
        cpu.seg[Seg::Cs as usize] = flat(KERNEL_CS, CODE_SEGMENT);
        cpu.cpl = 0;
        cpu.rip = CODE;
        cpu.rflags = Rflags::ONE;
        cpu.gpr[Gpr::Rsp as usize] = KERNEL_STACK - 0x800;
    }

    /// Puts the CPU to user mode at [`USER_CODE`].
    pub fn to_user(&mut self) {
        let cpu = self.cpu_mut();
        cpu.seg = [flat(USER_DS, DATA_SEGMENT | DPL3); 6];
        cpu.seg[Seg::Cs as usize] = flat(USER_CS, CODE_SEGMENT | DPL3);
        cpu.cpl = 3;
        cpu.rip = USER_CODE;
        cpu.gpr[Gpr::Rsp as usize] = USER_STACK;
        cpu.rflags = Rflags::ONE | Rflags::IF;
    }

    /// Puts the CPU to 32-bit user mode at [`USER_CODE`].
    pub fn to_user32(&mut self) {
        self.to_user();
        self.cpu_mut().seg[Seg::Cs as usize] = flat(USER_CS32, CODE32_SEGMENT | DPL3);
    }

    /// Sets bits of CR4 before the guest runs.
    pub fn enable(&mut self, bits: Cr4) {
        self.cpu_mut().cr4 |= bits;
    }

    fn set_registers(&mut self) {
        let cpu = self.cpu_mut();
        cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET | Cr0::MP;
        cpu.cr4 = Cr4::PAE | Cr4::PGE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        cpu.efer = Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE;
        cpu.cr3 = PML4;
        cpu.gdtr = Dtr {
            base: GDT,
            limit: 0x5f,
        };
        cpu.idtr = Dtr {
            base: IDT,
            limit: 0xfff,
        };
        cpu.tr = Segment {
            base: TSS,
            limit: 0x67,
            attributes: 0x8b,
            selector: TSS_SELECTOR as u16,
        };
        cpu.gpr = [0; 16];
        self.to_kernel();
    }

    fn write_page_tables(&self) {
        self.put(PML4, PDPT | 7);
        self.put(PDPT, PD | 7);
        self.put(PDPT + 24, (3u64 << 30) | 0x83);
        self.put(PD, PT | 7);
        for n in 0..512u64 {
            let user = if n << 12 >= USER { 4 } else { 0 };
            self.put(PT + 8 * n, n << 12 | 3 | user);
        }
        for n in 1..RAM >> 21 {
            self.put(PD + 8 * n, n << 21 | 0x83);
        }
        self.put(PML4 + 8, X_PDPT | 7);
        self.put(X_PDPT, X_PD | 7);
        self.put(X_PD, X_PT | 7);
    }

    fn write_descriptors(&self) {
        let flat = |attributes: u64| 0x000f_0000_0000_ffff | attributes << 40;
        for (selector, descriptor) in [
            (KERNEL_CS, flat(0xa09b)),
            (KERNEL_DS, flat(0xc093)),
            (USER_CS32, flat(0xc0fb)),
            (USER_DS, flat(0xc0f3)),
            (USER_CS, flat(0xa0fb)),
            (TSS_SELECTOR, 0x67 | TSS << 16 | 0x8b << 40),
            (ABSENT_DS, flat(0xc013)),
        ] {
            self.put(GDT + (selector & !7), descriptor);
        }
        // No I/O permission map.
        self.put(TSS + 0x66, 0xffffu16);
        self.put(TSS + 4, KERNEL_STACK);
        for n in 0..7 {
            self.put(TSS + 0x24 + 8 * n, IST1 + 0x2000 * n);
        }
    }

    fn write_handlers(&self) {
        self.forget();
        for vector in 0..=255u8 {
            let at = HANDLERS + 16 * u64::from(vector);
            self.place(64, at, |a: &mut CodeAssembler| {
                if !WITH_ERROR_CODE.contains(&vector) {
                    a.push(Record::NO_ERROR as i32)?;
                }
                a.push(i32::from(vector))?;
                a.jmp(STOPPED_AT + 0x100)
            });
            let software = [BREAKPOINT, OVERFLOW].contains(&vector) || vector >= 0x80;
            self.gate(vector, at, 0xe, 0, if software { 3 } else { 0 });
            let returns = software || [DEBUG, NMI].contains(&vector) || vector >= 32;
            self.action(
                vector,
                if returns {
                    Action::Return
                } else {
                    Action::Resume
                },
            );
        }
        self.gate(STOP, STOPPED_AT, 0xe, 0, 3);
        self.place(64, STOPPED_AT, |a: &mut CodeAssembler| a.hlt());
        self.place(64, STOPPED_AT + 0x100, note);
    }
}

/// As many records as one reads.
fn first(records: &[Record]) -> &[Record] {
    &records[..records.len().min(4)]
}

/// Writes a value to an MSR, by way of EAX, ECX and EDX.
pub fn wrmsr(a: &mut CodeAssembler, msr: u32, v: u64) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, v as u32)?;
    a.mov(edx, (v >> 32) as u32)?;
    a.wrmsr()
}

/// Ends the guest.
pub fn stop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.int(u32::from(STOP))
}

/// Notes the frame below the vector and error code, then acts.
fn note(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut stop, mut leave) = (a.create_label(), a.create_label());
    a.push(rax)?;
    a.push(rbx)?;
    a.mov(rbx, qword_ptr(HANDLER_DATA))?;
    for word in 0..7 {
        a.mov(rax, qword_ptr(rsp + 16 + 8 * word))?;
        a.mov(qword_ptr(rbx + 8 * word), rax)?;
    }
    a.mov(rax, cr2)?;
    a.mov(qword_ptr(rbx + 56), rax)?;
    a.lea(rax, qword_ptr(rsp + 72))?;
    a.mov(qword_ptr(rbx + 64), rax)?;
    a.mov(rax, dr6)?;
    a.mov(qword_ptr(rbx + 72), rax)?;
    a.add(rbx, 8 * Record::WORDS as i32)?;
    a.mov(qword_ptr(HANDLER_DATA), rbx)?;
    a.cmp(rbx, (LOG + 8 * Record::WORDS * Record::MOST) as i32)?;
    a.jae(stop)?;
    a.mov(rbx, qword_ptr(rsp + 16))?;
    a.mov(rbx, qword_ptr(rbx * 8 + HANDLER_DATA + 8))?;
    a.cmp(rbx, Action::Return as i32)?;
    a.je(leave)?;
    a.jb(stop)?;
    a.test(r15, r15)?;
    a.jz(stop)?;
    a.mov(qword_ptr(rsp + 32), r15)?;
    a.set_label(&mut leave)?;
    a.pop(rbx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(&mut stop)?;
    a.hlt()
}

const DATA_SEGMENT: u32 = 0xc093;
const CODE_SEGMENT: u32 = 0xa09b;
const CODE32_SEGMENT: u32 = 0xc09b;
const DPL3: u32 = 0x60;

fn flat(selector: u64, attributes: u32) -> Segment {
    Segment {
        base: 0,
        limit: !0,
        attributes,
        selector: selector as u16,
    }
}

/// Instructions, as a closure on the assembler.
pub trait Code: Fn(&mut CodeAssembler) -> Result<(), IcedError> {}
impl<F: Fn(&mut CodeAssembler) -> Result<(), IcedError>> Code for F {}

/// Assembles code for a linear address.
pub fn assemble(bits: u32, linear: u64, code: impl Code) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("an assembler");
    code(&mut a).expect("instructions that exist");
    a.assemble(linear)
        .expect("instructions that can be encoded")
}

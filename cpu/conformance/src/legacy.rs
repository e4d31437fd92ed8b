//! One test machine outside of long mode, on one engine: real mode, virtual-8086 mode, and protected mode without paging, in segments that a test
//! chooses.

use std::sync::Arc;

use doppel_memory::{Backing, GuestRam, Word};
use doppel_translate::SharedCode;
use doppel_x86::{
    Activity, Cpu, Cr0, Cr4, Dtr, Efer, Engine, Exit, Gpr, Kick, Rflags, Seg, Segment,
};

use crate::bus::TestBus;
use crate::engines::{ENGINES, Row};
use crate::machine::{Code, assemble};
use crate::watchdog::Watchdog;

const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x5800;
const HANDLERS: u64 = 0x6000;
const HANDLER_STACK: u64 = 0x8000;
const HANDLER_CS: u16 = 8;
const HANDLER_SS: u16 = 16;
const TASK: u16 = 24;
const WITH_ERROR_CODE: [u64; 6] = [8, 10, 11, 12, 13, 14];
const HLT: u8 = 0xf4;

/// What the machine begins in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Legacy {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode with this IOPL.
    V86(u8),
    /// Protected mode at this CPL.
    Protected(u8),
}

/// How a guest ended: by HLT where it may, or by an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// `None` for HLT.
    pub vector: Option<u64>,
    /// The error code, or 0.
    pub error: u64,
    /// IP of the instruction that faulted, or behind HLT.
    pub ip: u64,
}

/// Attributes of segments, for [`LegacyMachine::set_segment`].
pub mod kind {
    /// Data that may be written.
    pub const DATA: u32 = 0x93;
    /// Data that may only be read.
    pub const READ_ONLY: u32 = 0x91;
    /// Data that expands down.
    pub const EXPAND_DOWN: u32 = 0x97;
    /// Code that may be read.
    pub const CODE: u32 = 0x9b;
    /// Code that may not.
    pub const EXECUTE_ONLY: u32 = 0x99;
    /// 32-bit code, a 32-bit stack.
    pub const BIG: u32 = 0x4000;
}

/// A machine that a test runs.
pub struct LegacyMachine {
    engine: Box<dyn Engine>,
    mode: Legacy,
    /// Its RAM.
    pub ram: Arc<GuestRam>,
}

/// Runs a test in a mode on every engine.
pub fn each_legacy(mode: Legacy, test: impl Fn(&mut LegacyMachine)) {
    for row in ENGINES {
        println!("on {} in {mode:?}", row.name);
        test(&mut LegacyMachine::new(row, mode));
    }
}

impl LegacyMachine {
    /// A machine with 16-bit code at 0x10000, 64 KiB of data at 0x20000 (DS, ES, FS, GS) and as much stack at 0x30000.
    pub fn new(row: &Row, mode: Legacy) -> Self {
        let ram = Arc::new(GuestRam::with_backing(1 << 20, Backing::Memfd).expect("RAM"));
        let cpu = Cpu::new(0, ram.clone());
        let mut m = LegacyMachine {
            engine: (row.make)(cpu, &SharedCode::default()),
            mode,
            ram,
        };
        m.start();
        m
    }

    /// Puts the CPU and its tables to what they are at the start; registers and the rest of memory stay.
    pub fn start(&mut self) {
        self.write_tables();
        let cpu = self.engine.cpu_mut();
        cpu.cr0 = Cr0::ET | Cr0::NE | Cr0::WP;
        cpu.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        cpu.efer = Efer::empty();
        cpu.rflags = Rflags::from_bits_retain(2);
        cpu.idtr = Dtr {
            base: 0,
            limit: 0xff,
        };
        cpu.activity = Activity::Active;
        self.set_mode();
        for (seg, base) in [
            (Seg::Cs, 0x1_0000),
            (Seg::Ss, 0x3_0000),
            (Seg::Ds, 0x2_0000),
            (Seg::Es, 0x2_0000),
            (Seg::Fs, 0x2_0000),
            (Seg::Gs, 0x2_0000),
        ] {
            let code = seg == Seg::Cs && matches!(self.mode, Legacy::Protected(_));
            let kind = if code { kind::CODE } else { kind::DATA };
            self.set_segment(seg, base, 0xffff, kind);
        }
        self.set(Gpr::Rsp, 0x8000);
    }

    /// One call of the engine.
    pub fn run_once(&mut self, bus: &mut TestBus) -> Exit {
        self.engine.run(bus)
    }

    /// What calls the engine out.
    pub fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }

    fn write_tables(&self) {
        for (selector, d) in [
            (HANDLER_CS, 0x00cf_9b00_0000_ffff),
            (HANDLER_SS, 0x00cf_9300_0000_ffff),
            (TASK, 0x67 | TSS << 16 | 0x8b << 40),
        ] {
            self.put(GDT + u64::from(selector), d);
        }
        for n in 0..32u64 {
            let at = HANDLERS + n;
            self.put(
                IDT + 8 * n,
                0x8e00_0000_0000 | u64::from(HANDLER_CS) << 16 | at,
            );
            self.put(4 * n, at as u32);
            self.put(at, HLT);
        }
        self.put(TSS + 4, HANDLER_STACK as u32);
        self.put(TSS + 8, u32::from(HANDLER_SS));
        self.put(TSS + 0x66, 0x68u16);
    }

    fn set_mode(&mut self) {
        let mode = self.mode;
        let cpu = self.engine.cpu_mut();
        cpu.gdtr = Dtr {
            base: GDT,
            limit: 0xff,
        };
        cpu.cpl = match mode {
            Legacy::Real => 0,
            Legacy::V86(_) => 3,
            Legacy::Protected(cpl) => cpl,
        };
        if let Legacy::V86(iopl) = mode {
            let iopl = Rflags::from_bits_retain(u64::from(iopl) << 12);
            cpu.rflags |= Rflags::VM | iopl;
        }
        if mode != Legacy::Real {
            cpu.cr0 |= Cr0::PE;
            cpu.idtr.base = IDT;
            cpu.tr = Segment {
                base: TSS,
                limit: 0x67,
                attributes: 0x8b,
                selector: TASK,
            };
        }
    }

    /// Gives a segment register this base, limit and attributes; the privilege is that of the mode.
    pub fn set_segment(&mut self, seg: Seg, base: u64, limit: u32, attributes: u32) {
        let cpu = self.engine.cpu_mut();
        let dpl = u32::from(cpu.cpl) << 5;
        cpu.seg[seg as usize] = Segment {
            base,
            limit,
            attributes: attributes | dpl,
            selector: (base >> 4) as u16,
        };
    }

    /// Makes this the descriptor of a selector from 0x20 on.
    pub fn describe(&self, selector: u16, base: u64, limit: u32, attributes: u32) {
        let (granular, limit) = match limit < 1 << 20 {
            true => (0, u64::from(limit)),
            false => (0x8000, u64::from(limit >> 12)),
        };
        let d = (limit & 0xffff)
            | (base & 0xff_ffff) << 16
            | u64::from(attributes | granular) << 40
            | (limit >> 16) << 48
            | (base >> 24) << 56;
        self.put(GDT + u64::from(selector & !7), d);
    }

    /// Places code at an offset of a segment at `base`; tells the offset behind it.
    pub fn place(&self, bits: u32, base: u64, ip: u64, code: impl Code) -> u64 {
        let bytes = assemble(bits, ip, code);
        self.ram.ptr(base + ip).expect("RAM").write(&bytes);
        ip + bytes.len() as u64
    }

    /// Runs the code at this offset of CS until it ends.
    pub fn run(&mut self, ip: u64) -> End {
        self.engine.cpu_mut().rip = ip;
        let watchdog = Watchdog::new(self.engine.kicker());
        let exit = self.engine.run(&mut TestBus::new(self.ram.clone()));
        assert!(!watchdog.has_bitten(), "the guest does not end");
        assert_eq!(exit, Exit::Halted);
        let cpu = self.engine.cpu();
        let at = cpu.seg[Seg::Cs as usize].base + cpu.rip;
        if !(HANDLERS..HANDLERS + 32).contains(&(at - 1)) {
            return End {
                vector: None,
                error: 0,
                ip: cpu.rip,
            };
        }
        let vector = at - 1 - HANDLERS;
        self.frame(vector)
    }

    fn frame(&self, vector: u64) -> End {
        let cpu = self.engine.cpu();
        let ss = cpu.seg[Seg::Ss as usize];
        let mask = if ss.big() { 0xffff_ffff } else { 0xffff };
        let frame = ss.base + (cpu.gpr[Gpr::Rsp as usize] & mask);
        let has_code = self.mode != Legacy::Real && WITH_ERROR_CODE.contains(&vector);
        let (error, ip) = match (self.mode, has_code) {
            (Legacy::Real, _) => (0, u64::from(self.get::<u16>(frame))),
            (_, true) => (
                self.get::<u32>(frame).into(),
                self.get::<u32>(frame + 4).into(),
            ),
            (_, false) => (0, self.get::<u32>(frame).into()),
        };
        End {
            vector: Some(vector),
            error,
            ip,
        }
    }

    /// Puts code behind HLT at this offset of 16-bit code at 0x10000, runs it, and sees that it comes to the HLT.
    pub fn finish(&mut self, ip: u64, code: impl Code) {
        let end = self.place(16, 0x1_0000, ip, code);
        self.put(0x1_0000 + end, HLT);
        let ended = self.run(ip);
        let halted = End {
            vector: None,
            error: 0,
            ip: end + 1,
        };
        let faulted = End {
            vector: Some(13),
            error: 0,
            ip: end,
        };
        let may_halt = matches!(self.mode, Legacy::Real | Legacy::Protected(0));
        assert_eq!(ended, if may_halt { halted } else { faulted });
    }

    /// The vector and error code of the fault that code raises at an offset of itself.
    pub fn fault(&mut self, ip: u64, code: impl Code) -> End {
        self.place(16, 0x1_0000, ip, code);
        self.run(ip)
    }

    /// A register's low half.
    pub fn reg(&self, r: Gpr) -> u64 {
        self.engine.cpu().gpr[r as usize] & 0xffff_ffff
    }

    /// Sets a register.
    pub fn set(&mut self, r: Gpr, v: u64) {
        self.engine.cpu_mut().gpr[r as usize] = v;
    }

    /// The CPU.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        self.engine.cpu_mut()
    }

    /// Writes a value.
    pub fn put<T: Word>(&self, at: u64, v: T) {
        self.ram.store(at, v).expect("RAM");
    }

    /// Reads a value.
    pub fn get<T: Word>(&self, at: u64) -> T {
        self.ram.load(at).expect("RAM")
    }
}

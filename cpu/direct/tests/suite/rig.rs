//! A machine with some RAM, code in it, and a child to run it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use doppel_direct::{Change, Child, CpuidFaults, KickFlag, Stop, UserState, Zygote};
use iced_x86::code_asm::CodeAssembler;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Bytes of RAM.
pub const RAM: u64 = 64 << 20;
/// Code: one page at offset 0 of RAM.
pub const CODE: u64 = 0x40_0000;
/// Data: 16 pages.
pub const DATA: u64 = 0x60_0000;
/// Offset of the data in RAM.
pub const DATA_OFFSET: u64 = 0x1_0000;
/// Bytes of data.
pub const DATA_SIZE: u64 = 0x1_0000;

/// A machine.
pub struct Rig {
    pub ram: File,
    pub zygote: Zygote,
}

/// A child of it with code and data mapped.
pub struct Runner {
    pub child: Child,
    pub user: UserState,
    pub kick: KickFlag,
}

/// Code pages, readable and executable.
pub fn map_code() -> Change {
    Change::Map {
        at: CODE,
        offset: 0,
        len: 0x1_0000,
        write: false,
        execute: true,
        populate: false,
    }
}

/// Data pages, readable and writable.
pub fn map_data() -> Change {
    Change::Map {
        at: DATA,
        offset: DATA_OFFSET,
        len: DATA_SIZE,
        write: true,
        execute: false,
        populate: false,
    }
}

impl Rig {
    pub fn new() -> Rig {
        Rig::of(|ram| Zygote::new(ram, RAM).unwrap())
    }

    pub fn with(faults: CpuidFaults) -> Rig {
        Rig::of(|ram| Zygote::with(ram, RAM, faults).unwrap())
    }

    fn of(zygote: impl FnOnce(&File) -> Zygote) -> Rig {
        let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&ram, RAM).unwrap();
        let zygote = zygote(&ram);
        Rig { ram, zygote }
    }

    /// Stores code and makes a child about to run it, with RSP at the middle of the data.
    pub fn runner(&self, write: impl FnOnce(&mut CodeAssembler)) -> Runner {
        let mut a = CodeAssembler::new(64).unwrap();
        write(&mut a);
        self.runner_of(&a.assemble(CODE).unwrap())
    }

    pub fn runner_of(&self, code: &[u8]) -> Runner {
        self.ram.write_all_at(code, 0).unwrap();
        let mut child = self.zygote.spawn().unwrap();
        child.apply(&[map_code(), map_data()]).unwrap();
        let mut user = UserState::new(CODE);
        user.gprs[4] = DATA + DATA_SIZE / 2;
        Runner {
            child,
            user,
            kick: KickFlag::new(),
        }
    }
}

impl Runner {
    pub fn run(&mut self) -> Stop {
        self.child.run(&mut self.user, &[], &self.kick).unwrap()
    }
}

/// What INT3 raises.
pub fn breakpoint() -> Stop {
    Stop::Trap {
        vector: 3,
        error: 0,
        address: 0,
    }
}

/// What an instruction raises that has no error code.
pub fn exception(vector: u8) -> Stop {
    Stop::Trap {
        vector,
        error: 0,
        address: 0,
    }
}

impl Rig {
    pub fn load(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn store(&self, offset: u64, value: u64) {
        self.ram.write_all_at(&value.to_le_bytes(), offset).unwrap();
    }
}

impl Rig {
    pub fn ram_write(&self, offset: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, offset).unwrap();
    }
}

/// What a process has mapped, or nothing where there is no such process.
pub fn maps(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default()
}

/// That a process has the mappings that it had, or none since it is dead. One that was killed loses them one by one.
pub fn keeps_its_maps(pid: u32, before: &str, what: impl std::fmt::Debug) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut now = maps(pid);
    while now != before && !now.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
        now = maps(pid);
    }
    assert!(now == before || now.is_empty(), "{what:?} {now}");
}

//! Guest code that finds the stub and the exchange area: it gets nothing by it, and the monitor goes on.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::rig::{
    CODE, DATA, DATA_OFFSET, Rig, Runner, breakpoint, exception, keeps_its_maps, maps,
};
use doppel_direct::{Change, KickFlag, Stop};
use fastrand::Rng;
use iced_x86::code_asm::*;

const PAGE: u64 = 4096;

/// Runs for a millisecond at most.
fn run_a_while(r: &mut Runner) -> Stop {
    run_for(r, Duration::from_millis(1))
}

/// Runs, and kicks at intervals, so that it ends.
fn run_for(r: &mut Runner, interval: Duration) -> Stop {
    let done = AtomicBool::new(false);
    let kick = KickFlag::new();
    std::thread::scope(|s| {
        let kicker = s.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::park_timeout(interval);
                kick.kick();
            }
        });
        let stop = r.child.run(&mut r.user, &[], &kick).unwrap();
        done.store(true, Ordering::Relaxed);
        kicker.thread().unpark();
        stop
    })
}

/// A child of the same machine still works.
fn all_is_well(rig: &Rig) {
    rig.ram_write(0x4000, &[0x0f, 0x0b]);
    let mut child = rig.zygote.spawn().unwrap();
    child.apply(&[crate::rig::map_code()]).unwrap();
    let mut user = doppel_direct::UserState::new(CODE + 0x4000);
    let stop = child.run(&mut user, &[], &KickFlag::new()).unwrap();
    assert_eq!(stop, exception(6));
}

/// The stub as guest code sees it, by a copy that it makes.
fn stub_bytes(rig: &Rig) -> Vec<u8> {
    let mut r = rig.runner(|a| {
        a.rep().movsb().unwrap();
        a.int3().unwrap();
    });
    r.user.gprs[6] = rig.zygote.reserved().start;
    r.user.gprs[7] = DATA;
    r.user.gprs[1] = PAGE;
    assert_eq!(r.run(), breakpoint());
    (0..PAGE / 8)
        .flat_map(|n| rig.load(DATA_OFFSET + 8 * n).to_le_bytes())
        .collect()
}

/// Offsets behind each SYSCALL of the stub.
fn system_calls(stub: &[u8]) -> Vec<u64> {
    let at = stub.windows(2).enumerate();
    at.filter(|(_, bytes)| *bytes == [0x0f, 0x05])
        .map(|(n, _)| n as u64)
        .collect()
}

#[test]
fn a_jump_to_any_byte_of_the_stub_is_survived() {
    let rig = Rig::new();
    let stub = stub_bytes(&rig);
    let code = stub.iter().rposition(|b| *b != 0xcc).unwrap() as u64 + 2;
    let mut random = Rng::with_seed(4);
    let before = maps(rig.zygote.pid());
    for offset in 0..code {
        // JMP RBX would lose a register: RIP is put there by the monitor, as a guest's IRET would.
        let mut r = rig.runner_of(&[0xcc]);
        let mapped = maps(r.child.pid());
        r.user.gprs = std::array::from_fn(|_| match random.u64(..4) {
            0 => random.u64(..),
            1 => rig.zygote.reserved().start + random.u64(..0x11000),
            2 => DATA + random.u64(..PAGE),
            _ => random.u64(..400),
        });
        r.user.rip = rig.zygote.reserved().start + offset;
        let stop = run_a_while(&mut r);
        match stop {
            // It found its way out, or the stub did what stubs do.
            Stop::Trap { .. } | Stop::SystemCall(_) | Stop::Kicked | Stop::Gone { .. } => {}
        }
        keeps_its_maps(r.child.pid(), &mapped, (format_args!("{offset:#x}"), &stop));
    }
    assert_eq!(maps(rig.zygote.pid()), before);
    all_is_well(&rig);
}

/// Jumps to every system call of the stub with registers of one's choice, all others as the stub has them: each is refused, at that place.
fn at_every_call(rig: &Rig, registers: [(usize, u64); 7]) {
    let Range { start, .. } = rig.zygote.reserved();
    for offset in system_calls(&stub_bytes(rig)) {
        let mut r = rig.runner_of(&[0xcc]);
        for (register, value) in registers {
            r.user.gprs[register] = value;
        }
        r.user.gprs[3] = registers[0].1;
        r.user.gprs[12] = start + PAGE + 0x1040;
        r.user.gprs[15] = 1;
        r.user.rip = start + offset;
        let refused = Stop::Trap {
            vector: 14,
            error: 0x14,
            address: start + offset + 2,
        };
        let stop = run_for(&mut r, Duration::from_secs(5));
        assert_eq!(stop, refused, "{registers:x?}");
        let after = r.run();
        assert_eq!(after, Stop::Gone { lost: false }, "it is not used again");
    }
}

#[test]
fn the_stubs_system_calls_do_nothing_for_a_guest_without_the_key() {
    let rig = Rig::new();
    let own = u64::from(std::process::id());
    let call = |number, arguments: [u64; 6]| {
        // RAX, RDI, RSI, RDX, R10, R8, R9.
        let [a, b, c, d, e, f] = arguments;
        [(0, number), (7, a), (6, b), (2, c), (10, d), (8, e), (9, f)]
    };
    // All of RAM, writable; the code writable; nothing left.
    at_every_call(&rig, call(9, [DATA, PAGE, 3, 0x11, 0, 0]));
    at_every_call(&rig, call(10, [CODE, PAGE, 7, 0, 0, 0]));
    at_every_call(&rig, call(11, [0, 1 << 46, 0, 0, 0, 0]));
    // Another's orders; other files.
    at_every_call(&rig, call(17, [2, DATA, PAGE, 0, 0, 0]));
    at_every_call(&rig, call(17, [0, DATA, PAGE, 0, 0, 0]));
    // write, kill, clone, execve, ptrace, process_vm_readv, exit_group.
    at_every_call(&rig, call(1, [0, CODE, 8, 0, 0, 0]));
    at_every_call(&rig, call(62, [own, 9, 0, 0, 0, 0]));
    at_every_call(&rig, call(56, [17, 0, 0, 0, 0, 0]));
    at_every_call(&rig, call(59, [DATA, 0, 0, 0, 0, 0]));
    at_every_call(&rig, call(101, [16, own, 0, 0, 0, 0]));
    at_every_call(&rig, call(310, [own, DATA, 1, DATA, 1, 0]));
    at_every_call(&rig, call(231, [0; 6]));
    at_every_call(&rig, call(335, [0; 6]));
    all_is_well(&rig);
}

#[test]
fn random_bytes_over_the_exchange_area_are_survived() {
    let rig = Rig::new();
    let mut random = Rng::with_seed(5);
    // Writes the words of a list to addresses of a list, then traps: UD2.
    let code = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(rax, qword_ptr(rsi)).unwrap();
        a.mov(rdi, qword_ptr(rsi + 8)).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.add(rsi, 16).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.ud2().unwrap();
    };
    let exchange = rig.zygote.reserved().start + PAGE;
    let mut gone = 0;
    for round in 0..400 {
        let mut r = rig.runner(code);
        let count = 1 + random.u64(..60);
        for n in 0..count {
            // The words that the stub looks at, its orders, the frame, anywhere.
            let at = match random.u64(..4) {
                0 => random.u64(..0x100),
                1 => 0x1000 + random.u64(..0x100),
                2 => 0xf000 + random.u64(..0x1000),
                _ => random.u64(..0x1_0000),
            };
            let value = match random.u64(..4) {
                0 => 0,
                1 => random.u64(..8),
                2 => exchange + random.u64(..0x1_0000),
                _ => random.u64(..),
            };
            let entry = DATA_OFFSET + 16 * n;
            rig.store(entry, value);
            rig.store(entry + 8, exchange + at / 8 * 8);
        }
        r.user.gprs[6] = DATA;
        r.user.gprs[1] = count;
        let mapped = maps(r.child.pid());
        for _ in 0..4 {
            let stop = run_a_while(&mut r);
            gone += u32::from(matches!(stop, Stop::Gone { .. }));
            keeps_its_maps(r.child.pid(), &mapped, (round, &stop));
        }
    }
    eprintln!("{gone} of 1600 runs ended with the child's death");
    all_is_well(&rig);
}

#[test]
fn random_code_that_knows_where_the_stub_is_is_survived() {
    const ROUNDS: u32 = 3000;
    let rig = Rig::new();
    let Range { start, .. } = rig.zygote.reserved();
    let calls = system_calls(&stub_bytes(&rig));
    let mut random = Rng::with_seed(6);
    let mut r = rig.runner_of(&[0xcc]);
    let mut mapped = maps(r.child.pid());
    let mut gone = 0;
    for round in 0..ROUNDS {
        // Many of the instructions that change control or memory, between any bytes.
        let mut code: Vec<u8> = (0..64).map(|_| random.u8(..)).collect();
        for _ in 0..4 {
            let often: [&[u8]; 8] = [
                &[0xff, 0xe0],
                &[0xff, 0xe3],
                &[0xff, 0xd1],
                &[0xc3],
                &[0x0f, 0x05],
                &[0x48, 0x89, 0x03],
                &[0xf3, 0xa4],
                &[0x48, 0x89, 0xcc],
            ];
            let piece = often[random.usize(..often.len())];
            let at = random.usize(..code.len() - piece.len());
            code[at..at + piece.len()].copy_from_slice(piece);
        }
        rig.ram_write(0, &code);
        r.user = doppel_direct::UserState::new(CODE);
        r.user.gprs = std::array::from_fn(|_| match random.u64(..5) {
            0 => start + calls[random.usize(..calls.len())],
            1 => start + random.u64(..0x11000),
            2 => start + PAGE + 8 * random.u64(..32),
            3 => DATA + random.u64(..PAGE),
            _ => random.u64(..400),
        });
        let stop = run_a_while(&mut r);
        keeps_its_maps(r.child.pid(), &mapped, (round, &stop));
        if matches!(stop, Stop::Gone { .. }) || maps(r.child.pid()).is_empty() {
            gone += 1;
            r = rig.runner_of(&[0xcc]);
            mapped = maps(r.child.pid());
        }
    }
    assert!(gone < ROUNDS / 2, "{gone} children were needed");
    all_is_well(&rig);
}

#[test]
fn the_key_is_gone_when_the_guest_runs() {
    let rig = Rig::new();
    let Range { start, end } = rig.zygote.reserved();
    // All of the exchange area is copied, to where it is looked at.
    let mut r = rig.runner(|a| {
        a.rep().movsb().unwrap();
        a.int3().unwrap();
    });
    let map = Change::Map {
        at: 0x7000_0000,
        offset: 0x10_0000,
        len: 0x1_0000,
        write: true,
        execute: false,
        populate: false,
    };
    for round in 0..4 {
        r.user.rip = CODE;
        r.user.gprs[6] = start + PAGE;
        r.user.gprs[7] = 0x7000_0000;
        r.user.gprs[1] = end - start - PAGE;
        let stop = r.child.run(&mut r.user, &[map; 3], &r.kick).unwrap();
        assert_eq!(stop, breakpoint());
        let area: Vec<u64> = (0..0x2000).map(|n| rig.load(0x10_0000 + 8 * n)).collect();
        assert_eq!(
            area[0x1000 / 8 + 8],
            9,
            "the list is where it is looked for"
        );
        // A key has its bits in the upper half; nothing else in the area does and is as random.
        let keys: Vec<_> = area
            .iter()
            .enumerate()
            .filter(|(_, w)| **w & 0xffff_ffff == 0 && (**w >> 32).count_ones() > 4)
            .collect();
        assert!(keys.is_empty(), "{round}: {keys:x?}");
    }
}

#[test]
fn a_guest_that_only_claims_to_have_stopped_does_not_get_at_the_key() {
    let rig = Rig::new();
    let exchange = rig.zygote.reserved().start + PAGE;
    // It gives the monitor the turn without leaving, and watches where the key would be, in the exchange area and in the frames.
    let mut r = rig.runner(|a| {
        let mut again = a.create_label();
        a.mov(dword_ptr(rbx), 0).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rax, qword_ptr(rbx + 0x1000)).unwrap();
        a.or(rax, qword_ptr(rbx + 0x1008)).unwrap();
        a.or(qword_ptr(rsi), rax).unwrap();
        a.mov(dword_ptr(rbx), 0).unwrap();
        a.jmp(again).unwrap();
    });
    r.user.gprs[3] = exchange;
    r.user.gprs[6] = DATA;
    let map = Change::Map {
        at: 0x7000_0000,
        offset: 0x8000,
        len: PAGE,
        write: false,
        execute: false,
        populate: false,
    };
    let start = Instant::now();
    for _ in 0..20 {
        let stop = run_a_while(&mut r);
        let changed = r.child.apply(&[map]);
        if matches!(stop, Stop::Gone { .. }) || changed.is_err() {
            break;
        }
    }
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(rig.load(DATA_OFFSET), 0, "the key was seen");
    all_is_well(&rig);
}

#[test]
fn a_guest_that_only_claims_to_have_stopped_is_stopped() {
    let rig = Rig::new();
    let page = 0x7000_0000;
    let map = Change::Map {
        at: page,
        offset: 0x10_0000,
        len: PAGE,
        write: true,
        execute: false,
        populate: true,
    };
    // It says that the monitor has the turn and that all calls were made, and writes on. The frame of a stop before is there to be found.
    let mut r = rig.runner(|a| {
        let mut again = a.create_label();
        a.int3().unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbx), 0).unwrap();
        a.mov(dword_ptr(rbx + 0x14), 1).unwrap();
        a.inc(qword_ptr(rsi)).unwrap();
        a.jmp(again).unwrap();
    });
    r.user.gprs[3] = rig.zygote.reserved().start + PAGE;
    r.user.gprs[6] = page;
    r.child.apply(&[map]).unwrap();
    assert_eq!(r.run(), breakpoint());
    for _ in 0..3 {
        // The monitor looks by itself before that.
        let stop = run_for(&mut r, Duration::from_millis(200));
        assert_eq!(stop, Stop::Kicked, "what it claims is not believed");
        // When the run is over it does not write any more,
        let counted = rig.load(0x10_0000);
        assert_ne!(counted, 0, "it has run");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rig.load(0x10_0000), counted);
    }
    // and when its page is taken away it has lost it.
    let unmap = Change::Unmap {
        at: page,
        len: PAGE,
    };
    r.child.apply(&[unmap]).unwrap();
    let counted = rig.load(0x10_0000);
    let stop = run_a_while(&mut r);
    let lost = Stop::Trap {
        vector: 14,
        error: 6,
        address: page,
    };
    assert!(stop == lost || stop == Stop::Kicked, "{stop:?}");
    assert_eq!(rig.load(0x10_0000), counted);
    all_is_well(&rig);
}

#[test]
fn a_guest_that_blocks_its_signals_is_killed_when_it_is_kicked() {
    let rig = Rig::new();
    let stub = stub_bytes(&rig);
    // The last system call of the stub is its way to the guest. The frame says: all signals blocked, on at an endless loop.
    let sigreturn = rig.zygote.reserved().start + *system_calls(&stub).last().unwrap();
    rig.ram_write(0x800, &[0xeb, 0xfe]);
    let mut r = rig.runner(|a| {
        a.jmp(rbx).unwrap();
    });
    rig.ram_write(0x800, &[0xeb, 0xfe]);
    let frame = DATA_OFFSET + 0x1000;
    rig.store(frame + 168, DATA + 0x4000);
    rig.store(frame + 176, CODE + 0x800);
    rig.store(frame + 184, 0x202);
    rig.store(frame + 192, 0x33 | 0x2b << 48);
    rig.store(frame + 304, u64::MAX);
    r.user.gprs[3] = sigreturn;
    r.user.gprs[4] = DATA + 0x1008;
    r.user.gprs[0] = 15;
    let start = Instant::now();
    let stop = run_a_while(&mut r);
    assert_eq!(stop, Stop::Gone { lost: true });
    assert!(start.elapsed() < Duration::from_secs(25));
    all_is_well(&rig);
}

#[test]
fn a_state_that_only_a_kernel_has_does_not_come_out() {
    let rig = Rig::new();
    let Range { start, end } = rig.zygote.reserved();
    let stub = stub_bytes(&rig);
    // Where the stub tells of a stop: MOV EAX, [RBX]; TEST EAX, EAX.
    let publish = [0x8b, 0x03, 0x85, 0xc0];
    let publish = stub.windows(4).position(|b| b == publish).unwrap() as u64;
    for (code, stack) in [(0x10, 0x18), (0x33, 0x2b), (0x30, 0x28), (0x33, 0)] {
        let mut r = rig.runner(|a| {
            let (mut next, mut skip) = (a.create_label(), a.create_label());
            // A frame is where a word looks like CS and SS: its state and its cause are forged.
            a.set_label(&mut next).unwrap();
            a.cmp(rax, qword_ptr(rdi)).unwrap();
            a.jne(skip).unwrap();
            a.mov(qword_ptr(rdi), rdx).unwrap();
            // Vector 14, SIGSEGV, SEGV_MAPERR.
            a.mov(dword_ptr(rdi + 16), 14).unwrap();
            a.mov(dword_ptr(rdi + 120), 11).unwrap();
            a.mov(dword_ptr(rdi + 128), 1).unwrap();
            a.set_label(&mut skip).unwrap();
            a.add(rdi, 8).unwrap();
            a.cmp(rdi, rsi).unwrap();
            a.jb(next).unwrap();
            a.xor(eax, eax).unwrap();
            a.jmp(r8).unwrap();
        });
        r.user.gprs[0] = 0x33 | 0x2b << 48;
        r.user.gprs[2] = code | stack << 48;
        r.user.gprs[3] = start + PAGE;
        r.user.gprs[6] = end;
        r.user.gprs[7] = start + PAGE + 0x5000;
        r.user.gprs[8] = start + publish;
        let stop = run_for(&mut r, Duration::from_secs(2));
        assert_eq!((r.user.cs, r.user.ss), (0x33, 0x2b));
        match (code, stack) {
            (0x33, 0x2b) => assert!(matches!(stop, Stop::Trap { vector: 14, .. }), "{stop:?}"),
            _ => assert_eq!(stop, Stop::Gone { lost: true }),
        }
    }
    all_is_well(&rig);
}

#[test]
fn signals_from_outside_are_not_the_guests() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 400_000_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.int3().unwrap();
    });
    let pid = rustix::process::Pid::from_raw(r.child.pid() as i32).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            use rustix::process::{Signal, kill_process};
            let all = [
                Signal::HUP,
                Signal::INT,
                Signal::QUIT,
                Signal::ILL,
                Signal::TRAP,
                Signal::ABORT,
                Signal::BUS,
                Signal::FPE,
                Signal::USR1,
                Signal::SEGV,
                Signal::USR2,
                Signal::PIPE,
                Signal::ALARM,
                Signal::TERM,
                Signal::CHILD,
                Signal::CONT,
                Signal::TSTP,
                Signal::SYS,
                Signal::WINCH,
            ];
            while !done.load(Ordering::Relaxed) {
                for signal in all {
                    kill_process(pid, signal).unwrap();
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        let stop = r.child.run(&mut r.user, &[], &r.kick).unwrap();
        done.store(true, Ordering::Relaxed);
        assert_eq!(stop, breakpoint());
    });
    assert_eq!(r.user.gprs[1], 0);
}

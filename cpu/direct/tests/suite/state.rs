//! Registers go into a child and come out of it.

use crate::rig::Rig;
use doppel_direct::{Entry, Stop};
use iced_x86::code_asm::*;

#[test]
fn a_system_call_comes_to_the_monitor_with_the_registers_of_the_guest() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.mov(rax, 0x1234u64).unwrap();
        a.mov(r15, 0x1122_3344_5566_7788u64).unwrap();
        a.syscall().unwrap();
    });
    let stop = r.run();
    assert_eq!(stop, Stop::SystemCall(Entry::Syscall), "{:x?}", r.user);
    assert_eq!(r.user.gprs[0], 0x1234);
    assert_eq!(r.user.gprs[15], 0x1122_3344_5566_7788);
}

#[test]
fn traps_say_what_the_processor_says() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.mov(rax, 0x1122_3344u64).unwrap();
        a.mov(qword_ptr(rax), 1).unwrap();
    });
    let stop = r.run();
    assert_eq!(
        stop,
        Stop::Trap {
            vector: 14,
            error: 6,
            address: 0x1122_3344
        }
    );
    assert_eq!(r.user.gprs[0], 0x1122_3344);
    let mut r = rig.runner(|a| {
        a.ud2().unwrap();
    });
    assert_eq!(
        r.run(),
        Stop::Trap {
            vector: 6,
            error: 0,
            address: 0
        }
    );
    let mut r = rig.runner(|a| {
        let mut l = a.create_label();
        a.set_label(&mut l).unwrap();
        a.jmp(l).unwrap();
    });
    let kick = &r.kick;
    std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kick.kick();
        });
        let stop = r.child.run(&mut r.user, &[], kick).unwrap();
        assert_eq!(stop, Stop::Kicked);
    });
}

//! Instructions that no guest is offered, whatever the host has: #UD on every engine, in the guest's kernel and its user code. AMX has state of its own, which
//! no guest's kernel would save; transactions would hide what happens in them.

use doppel_fuzz::guest::{Kind, run_code};
use doppel_fuzz::layout::{DATA, UD2};
use doppel_fuzz::native_unsafe::exclusive;
use doppel_x86::{Cpu, EmptyBus, Gpr};

const INVALID_OPCODE: u8 = 6;

const CODES: &[(&str, &[u8])] = &[
    ("ldtilecfg [rdi]", &[0xc4, 0xe2, 0x78, 0x49, 0x07]),
    ("sttilecfg [rdi]", &[0xc4, 0xe2, 0x79, 0x49, 0x07]),
    ("tilerelease", &[0xc4, 0xe2, 0x78, 0x49, 0xc0]),
    ("tilezero tmm0", &[0xc4, 0xe2, 0x7b, 0x49, 0xc0]),
    ("xbegin", &[0xc7, 0xf8, 0, 0, 0, 0]),
    ("xabort", &[0xc6, 0xf8, 7]),
    ("xend", &[0x0f, 0x01, 0xd5]),
    ("xsusldtrk", &[0xf2, 0x0f, 0x01, 0xe8]),
    ("xresldtrk", &[0xf2, 0x0f, 0x01, 0xe9]),
    ("movdiri [rdi], eax", &[0x0f, 0x38, 0xf9, 0x07]),
    ("movdir64b rdi, [rdi]", &[0x66, 0x0f, 0x38, 0xf8, 0x3f]),
    ("enqcmd rdi, [rdi]", &[0xf2, 0x0f, 0x38, 0xf8, 0x3f]),
    ("ptwrite eax", &[0xf3, 0x0f, 0xae, 0xe0]),
    ("clzero", &[0x0f, 0x01, 0xfc]),
    ("monitorx", &[0x0f, 0x01, 0xfa]),
    ("mwaitx", &[0x0f, 0x01, 0xfb]),
    ("mcommit", &[0xf3, 0x0f, 0x01, 0xfa]),
    ("rdpru", &[0x0f, 0x01, 0xfd]),
    ("rdpkru", &[0x0f, 0x01, 0xee]),
    ("wrpkru", &[0x0f, 0x01, 0xef]),
    ("tpause eax", &[0x66, 0x0f, 0xae, 0xf0]),
    ("umonitor rdi", &[0xf3, 0x0f, 0xae, 0xf7]),
    ("umwait eax", &[0xf2, 0x0f, 0xae, 0xf0]),
    ("femms", &[0x0f, 0x0e]),
    ("pfadd mm0, mm1", &[0x0f, 0x0f, 0xc1, 0x9e]),
    ("llwpcb eax", &[0x8f, 0xe9, 0x78, 0x12, 0xc0]),
    ("vmrun", &[0x0f, 0x01, 0xd8]),
    ("vmload", &[0x0f, 0x01, 0xda]),
    ("vmsave", &[0x0f, 0x01, 0xdb]),
    ("stgi", &[0x0f, 0x01, 0xdc]),
    ("clgi", &[0x0f, 0x01, 0xdd]),
    ("skinit", &[0x0f, 0x01, 0xde]),
    ("invlpga", &[0x0f, 0x01, 0xdf]),
    ("invlpgb", &[0x0f, 0x01, 0xfe]),
    ("tlbsync", &[0x0f, 0x01, 0xff]),
    ("pvalidate", &[0xf2, 0x0f, 0x01, 0xff]),
    ("psmash", &[0xf3, 0x0f, 0x01, 0xff]),
    ("rmpadjust", &[0xf3, 0x0f, 0x01, 0xfe]),
    ("rmpupdate", &[0xf2, 0x0f, 0x01, 0xfe]),
    ("enclu", &[0x0f, 0x01, 0xd7]),
    ("vmfunc", &[0x0f, 0x01, 0xd4]),
    ("stui", &[0xf3, 0x0f, 0x01, 0xef]),
    ("senduipi rax", &[0xf3, 0x0f, 0xc7, 0xf0]),
    ("aesenc128kl xmm0, [rdi]", &[0xf3, 0x0f, 0x38, 0xdc, 0x07]),
    ("cmpnpxadd [rdi], eax, eax", &[0xc4, 0xe2, 0x79, 0xeb, 0x07]),
    ("getsec", &[0x0f, 0x37]),
    ("xsaves [rdi]", &[0x0f, 0xc7, 0x2f]),
    ("xsaves64 [rdi]", &[0x48, 0x0f, 0xc7, 0x2f]),
    ("xrstors [rdi]", &[0x0f, 0xc7, 0x1f]),
];

/// XTEST is not executed otherwise than by the host's processor (`cpu/direct/src/hazard.rs`): without a transaction it tells nothing.
const BUT_DIRECT: &[(&str, &[u8])] = &[("xtest", &[0x0f, 0x01, 0xd6])];

fn is_undefined(kind: Kind, cpl: u8, name: &str, code: &[u8]) {
    let code = [code, &UD2].concat();
    let mut at = 0;
    let prepare = |cpu: &mut Cpu| {
        cpu.gpr[Gpr::Rdi as usize] = DATA.base;
        cpu.gpr[Gpr::Rax as usize] = 0;
        at = cpu.rip;
    };
    let ended = run_code(kind, cpl, &code, &mut EmptyBus, prepare).unwrap();
    let ended = ended.unwrap_or_else(|| panic!("{name} at CPL {cpl} on {kind:?} does not end"));
    assert_eq!(
        (ended.exception, ended.rip),
        (Some((INVALID_OPCODE, 0)), at),
        "{name} at CPL {cpl} on {kind:?}"
    );
}

#[test]
fn what_no_guest_is_offered_is_undefined_on_every_engine() {
    let _alone = exclusive();
    for (name, code) in CODES.iter().chain(BUT_DIRECT) {
        for cpl in [0, 3] {
            is_undefined(Kind::Interpret, cpl, name, code);
            is_undefined(Kind::Translate, cpl, name, code);
        }
    }
    for (name, code) in CODES {
        is_undefined(Kind::Direct, 3, name, code);
    }
}

/// The host's hypervisor, where there is one, would answer as well; none of them may be asked.
#[test]
fn a_call_of_the_hypervisor_is_a_call_of_the_monitor() {
    let _alone = exclusive();
    let calls: [&[u8]; 3] = [
        &[0x0f, 0x01, 0xc1],       // vmcall
        &[0x0f, 0x01, 0xd9],       // vmmcall
        &[0x66, 0x0f, 0x01, 0xd9], // vmmcall, with a prefix that says nothing
    ];
    for code in calls {
        let code = [code, &UD2].concat();
        for (kind, cpl) in [
            (Kind::Interpret, 0),
            (Kind::Interpret, 3),
            (Kind::Translate, 0),
            (Kind::Translate, 3),
            (Kind::Direct, 3),
        ] {
            let ended = run_code(kind, cpl, &code, &mut EmptyBus, |_| ()).unwrap();
            let ended = ended.unwrap_or_else(|| panic!("{code:x?} on {kind:?} does not end"));
            let undefined = ended.exception == Some((INVALID_OPCODE, 0));
            assert!(undefined, "{code:x?} on {kind:?}: {:?}", ended.exception);
            assert_eq!(ended.hypercalls, 1, "{code:x?} at CPL {cpl} on {kind:?}");
        }
    }
}

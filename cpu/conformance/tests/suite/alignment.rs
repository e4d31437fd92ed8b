//! #AC: misaligned accesses of user code that asks for it.

use doppel_conformance::*;
use doppel_x86::{Cr0, Rflags};
use iced_x86::code_asm::*;

use super::exceptions::{Emit, check, fault, nothing};

#[test]
fn alignment_is_checked_for_users_who_ask() {
    each_engine(|m| {
        m.cpu_mut().cr0.insert(Cr0::AM);
        m.to_user();
        m.cpu_mut().rflags.insert(Rflags::AC);
        let load: Emit = |a| a.mov(eax, dword_ptr(USER_DATA + 1));
        check(m, &fault("#AC", nothing, load, 17, 0));
        m.forget();
        m.to_user();
        m.run_user(load);
        assert!(m.records().is_empty(), "without AC");
        // The offset of a far pointer is aligned to its size, as measured.
        for (far, checked) in [
            ((|a| a.lgs(ax, ptr(USER_DATA + 2))) as Emit, false),
            (|a| a.lgs(eax, ptr(USER_DATA + 4)), false),
            (|a| a.lgs(rax, ptr(USER_DATA + 8)), false),
            (|a| a.lgs(ax, ptr(USER_DATA + 1)), true),
            (|a| a.lgs(eax, ptr(USER_DATA + 2)), true),
            (|a| a.lgs(rax, ptr(USER_DATA + 4)), true),
        ] {
            m.forget();
            m.put_bytes(USER_DATA, &[0; 32]);
            m.to_user();
            m.cpu_mut().rflags.insert(Rflags::AC);
            match checked {
                true => {
                    check(m, &fault("#AC of a far pointer", nothing, far, 17, 0));
                }
                false => {
                    m.run_user(far);
                    assert!(m.records().is_empty(), "aligned");
                }
            }
        }
    });
}

/// As measured.
#[test]
fn the_stack_of_far_transfers_is_checked_too() {
    const STACK: u64 = USER_STACK - 0x100;
    let misaligned: Emit = |a| a.mov(rsp, STACK + 4);
    let transfers: [(&str, Emit); 4] = [
        ("RETF", |a| a.db(&[0x48, 0xcb])),
        ("RETF with parameters", |a| a.db(&[0x48, 0xca, 8, 0])),
        ("IRET", |a| a.iretq()),
        ("CALL", |a| {
            // 32 bits of offset, after which the stack is misaligned by 2.
            a.call(fword_ptr(USER_DATA))
        }),
    ];
    each_engine(|m| {
        m.cpu_mut().cr0.insert(Cr0::AM);
        for (what, code) in transfers {
            let prepare: Emit = match what {
                "CALL" => |a| a.mov(rsp, STACK + 2),
                _ => misaligned,
            };
            m.forget();
            m.put(USER_DATA, USER_CODE | USER_CS << 32);
            m.put_bytes(STACK, &[0; 64]);
            m.to_user();
            m.cpu_mut().rflags.insert(Rflags::AC);
            let r = check(m, &fault(what, prepare, code, 17, 0));
            assert_eq!(r.rsp & !7, STACK, "{what}");
            // Without AC the selector is looked at.
            if what != "CALL" {
                m.forget();
                m.to_user();
                check(m, &fault(what, prepare, code, 13, 0));
            }
        }
        // Aligned to what is popped: the selector is looked at.
        m.forget();
        m.to_user();
        m.cpu_mut().rflags.insert(Rflags::AC);
        check(
            m,
            &fault("RETF of 32 bits", misaligned, |a| a.db(&[0xcb]), 13, 0),
        );
        m.cpu_mut().cr0.remove(Cr0::AM);
    });
}

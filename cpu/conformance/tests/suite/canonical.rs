//! The end of the lower half: what reaches beyond it is #GP(0), or #SS(0) through the stack segment, and never asks the page tables.

use doppel_conformance::paging::A;
use doppel_conformance::*;

/// The first address that is not canonical.
pub const END: u64 = 1 << 47;
/// The page below, and the one that a walk would find beyond.
const LAST: u64 = SPARE;
const BEYOND: u64 = SPARE + 0x1000;

/// Maps [`LAST`] below the end of the lower half under this root, of so many levels, and [`BEYOND`] where a walk from the end on arrives.
pub fn map_the_end(m: &Machine, root: u64, levels: u64) {
    let mut table = root;
    for level in 1..levels {
        let next = TABLES + 0x1000 * level;
        // The root's lower half ends in its middle.
        let last = if level == 1 { 255 } else { 511 };
        m.put(table + 8 * last, next | 7);
        m.put(table + 8 * ((last + 1) % 512), next | 7);
        table = next;
    }
    m.put(table + 8 * 511, LAST | 7);
    m.put(table, BEYOND | 7);
    m.put_bytes(LAST, &[0; 0x1000]);
    m.put_bytes(BEYOND, &[0; 0x1000]);
}

/// Fails where the page beyond was walked to.
fn assert_not_walked(m: &Machine, levels: u64) {
    let entry = m.get(TABLES + 0x1000 * (levels - 1));
    assert_eq!(entry & A, 0, "the accessed bit beyond the end");
}

/// Runs instructions that reach the end from below, as the kernel and as a user.
pub fn fetch_across(m: &mut Machine, end: u64, levels: u64) {
    // MOV EAX, imm32, of which two bytes are there; NOP as the last one.
    for (bytes, faults_at) in [(&[0xb8, 0x90][..], end - 2), (&[0x90], end)] {
        for user in [false, true] {
            println!("{bytes:x?}, user {user}");
            m.forget();
            m.to_kernel();
            if user {
                m.to_user();
            }
            m.action(13, Action::Stop);
            m.action(14, Action::Stop);
            m.put_bytes(LAST + 0x1000 - bytes.len() as u64, bytes);
            m.go(end - bytes.len() as u64);
            m.run();
            let records = m.records();
            assert_eq!(records.len(), 1);
            let r = records[0];
            assert_eq!((r.vector, r.error, r.rip), (13, 0, faults_at));
            assert_not_walked(m, levels);
        }
    }
}

#[test]
fn instructions_do_not_go_on_behind_the_end() {
    each_engine_and_vendor(|m| {
        map_the_end(m, PML4, 4);
        fetch_across(m, END, 4);
    });
}

//! Tests of the tables of blocks.

use super::*;

const PAGE: u64 = 0x5000;

struct Rig {
    blocks: Blocks,
    cache: CodeCache,
    tracker: PageTracker,
}

impl Rig {
    fn new() -> Rig {
        let cache = CodeCache::new(1 << 20, false, false).unwrap();
        let tracker = PageTracker::new(64);
        Rig {
            blocks: Blocks::new(cache.range(), tracker.join()).unwrap(),
            cache,
            tracker,
        }
    }

    /// A block of 16 bytes of guest and 32 bytes of host code, with two exits and a boundary every 8 bytes.
    fn add(&mut self, gpa: u64, second_page: Option<u64>) -> BlockId {
        let exit = |n: u32| ExitSite {
            target: 0x100,
            patch: Some(4 + 4 * n),
            stub: 16,
            flags: FlagPlace::Saved,
            gate: None,
            interpret: false,
            slot: None,
            changes_mode: false,
        };
        let boundary = |n: u16| Boundary {
            host: 8 * u32::from(n),
            guest: n,
            flags: FlagPlace::Registers,
            borrowed: None,
        };
        let code = Translated {
            exits: (0..2).map(exit).collect(),
            boundaries: (0..4).map(boundary).collect(),
            ..Translated::default()
        };
        let key = Key {
            gpa,
            privilege: 1,
            simd: Simd::None,
            mode: Mode::LONG,
            base: Base::Fixed(0),
            form: Form::Normal,
        };
        let made = Made {
            second_page,
            guest_len: 16,
            host: self.cache.append(&[0x90; 32]),
            len: 32,
            code: &code,
        };
        let id = self.blocks.insert(key, made, &self.tracker);
        self.blocks.publish(id);
        id
    }

    fn link(&mut self, exit: u32, to: BlockId) {
        self.blocks.link(exit, to, false, &mut self.cache);
    }

    fn write(&mut self, gpa: u64) -> Vec<BlockId> {
        let before = self.blocks.removed.len();
        self.blocks
            .invalidate(gpa, 1, &mut self.cache, &self.tracker);
        self.blocks.removed[before..].to_vec()
    }

    fn incoming(&self, id: BlockId) -> Vec<u32> {
        let link = |n: u32| (n != NONE).then_some(n);
        let next = |n: &u32| link(self.blocks.exits[*n as usize].next);
        std::iter::successors(link(self.blocks.record(id).incoming), next).collect()
    }

    fn find(&self, id: BlockId) -> Option<BlockId> {
        self.blocks.find_packed(self.blocks.record(id).key)
    }
}

#[test]
fn a_write_takes_the_blocks_of_its_bytes_only() {
    let mut rig = Rig::new();
    let ids: Vec<_> = (0..5).map(|n| rig.add(PAGE + 64 * n, None)).collect();
    for (at, gone) in [(2, vec![ids[2]]), (0, vec![ids[0]]), (4, vec![ids[4]])] {
        assert_eq!(rig.write(PAGE + 64 * at + 15), gone);
        assert!(rig.write(PAGE + 64 * at + 15).is_empty());
    }
    assert_eq!(
        rig.blocks.in_page(PAGE).collect::<Vec<_>>(),
        [ids[3], ids[1]]
    );
    for (n, id) in ids.iter().enumerate() {
        let alive = n % 2 == 1;
        assert_eq!(rig.find(*id), alive.then_some(*id));
        assert_eq!(rig.tracker.touches_code(PAGE + 64 * n as u64, 1), alive);
    }
    assert!(rig.tracker.has_code(PAGE));
    rig.write(PAGE + 64);
    rig.write(PAGE + 192);
    assert!(!rig.tracker.has_code(PAGE));
    assert_eq!(rig.blocks.invalidated, 5);
}

#[test]
fn a_block_of_two_pages_goes_with_either() {
    for at in [PAGE + 0xff8, 0x9000] {
        let mut rig = Rig::new();
        let id = rig.add(PAGE + 0xff8, Some(0x9000));
        assert_eq!(rig.blocks.get(id).second_page, Some(0x9000));
        assert!(rig.tracker.has_code(PAGE) && rig.tracker.has_code(0x9000));
        assert_eq!(rig.write(at), [id]);
        assert!(!rig.blocks.get(id).alive && rig.find(id).is_none());
        assert!(rig.write(PAGE + 0xff8).is_empty() && rig.write(0x9000).is_empty());
    }
}

#[test]
fn a_block_whose_pages_are_one_goes_alone() {
    let mut rig = Rig::new();
    let other = rig.add(PAGE + 0x100, None);
    let id = rig.add(PAGE + 0xff8, Some(PAGE));
    rig.add(PAGE + 0x200, None);
    rig.blocks
        .invalidate(PAGE, 4096, &mut rig.cache, &rig.tracker);
    assert!(rig.blocks.removed.contains(&id));
    assert!(!rig.blocks.get(other).alive);
    assert_eq!(rig.blocks.in_page(PAGE).count(), 0);
    assert_eq!(rig.blocks.invalidated, 3);
}

#[test]
fn the_latest_block_of_a_key_is_found() {
    let mut rig = Rig::new();
    let old = rig.add(PAGE, None);
    let new = rig.add(PAGE, None);
    assert_eq!(rig.find(old), Some(new));
    assert_eq!(rig.write(PAGE).len(), 2);
    assert_eq!(rig.find(old), None);
}

#[test]
fn an_exit_is_in_the_list_of_the_block_it_leads_to() {
    let mut rig = Rig::new();
    let ids: Vec<_> = (0..3).map(|n| rig.add(PAGE + 64 * n, None)).collect();
    for exit in [0, 2, 4] {
        rig.link(exit, ids[1]);
    }
    assert_eq!(rig.incoming(ids[1]), [4, 2, 0]);
    rig.link(2, ids[1]);
    assert_eq!(rig.incoming(ids[1]), [2, 4, 0], "it is there once");
    rig.link(4, ids[2]);
    assert_eq!(rig.incoming(ids[1]), [2, 0]);
    assert_eq!(rig.incoming(ids[2]), [4]);
    rig.write(PAGE + 64);
    assert!(rig.incoming(ids[1]).is_empty());
    rig.link(0, ids[2]);
    assert_eq!(rig.incoming(ids[2]), [0, 4]);
}

#[test]
fn links_across_pages_are_cut_and_made_again() {
    let mut rig = Rig::new();
    let ids: Vec<_> = (0..2).map(|n| rig.add(PAGE + 64 * n, None)).collect();
    for _ in 0..3 {
        rig.blocks.link(0, ids[1], true, &mut rig.cache);
        assert_eq!(rig.incoming(ids[1]), [0]);
        rig.blocks.unlink_cross_page(false, &mut rig.cache);
        assert!(rig.incoming(ids[1]).is_empty());
    }
}

#[test]
fn host_addresses_lead_to_guest_instructions() {
    let mut rig = Rig::new();
    let start = rig.cache.cursor();
    let ids: Vec<_> = (0..2).map(|n| rig.add(PAGE + 64 * n, None)).collect();
    for (pc, id, guest) in [
        (0, 0, 0),
        (7, 0, 0),
        (8, 0, 1),
        (31, 0, 3),
        (32, 1, 0),
        (63, 1, 3),
    ] {
        let at = rig.blocks.at_host(start + pc).unwrap();
        assert_eq!((at.block, at.boundary.guest), (ids[id], guest), "{pc}");
    }
    assert!(rig.blocks.at_host(start + 64).is_none());
    assert!(rig.blocks.at_host(start - 1).is_none());
}

#[test]
fn nothing_is_left_after_a_clear() {
    let mut rig = Rig::new();
    let id = rig.add(PAGE + 0xff8, Some(0x9000));
    let key = rig.blocks.get(id).key;
    rig.blocks.clear(&rig.tracker);
    assert!(rig.blocks.find(&key).is_none());
    assert!(!rig.tracker.has_code(PAGE) && !rig.tracker.has_code(0x9000));
}

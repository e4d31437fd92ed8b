//! The page walk against tables of every format.

use super::*;

const ROOT: u64 = 0x1000;
/// Lower tables, in the order of the walk.
const TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
const PAGE: u64 = 0x7000;
const RAM: u64 = 16 << 20;

fn ram() -> GuestRam {
    GuestRam::new(RAM).expect("RAM")
}

fn paging(mode: PagingMode) -> Paging {
    Paging {
        mode,
        root: ROOT,
        write_protect: true,
        no_execute: true,
        smep: false,
        smap: false,
        global_pages: true,
        pkru: None,
        physical_bits: 40,
        upper_global_reserved: false,
    }
}

/// 4-level tables that map linear 0x1234000 to [`PAGE`]; the entries have the given bits.
const LINEAR: u64 = 0x123_4000;

fn level4(ram: &GuestRam, bits: [u64; 4]) -> [u64; 4] {
    let at = [
        ROOT,
        TABLES[0],
        TABLES[1] + 8 * (LINEAR >> 21 & 511),
        TABLES[2] + 8 * (LINEAR >> 12 & 511),
    ];
    let next = [TABLES[0], TABLES[1], TABLES[2], PAGE];
    for n in 0..4 {
        ram.store(at[n], next[n] | bits[n]).expect("RAM");
    }
    at
}

const ALL: u64 = P | RW | US;

fn code(r: Result<Translation, PageFault>) -> u32 {
    r.expect_err("a page fault").error_code
}

#[test]
fn with_paging_off_linear_is_physical() {
    let t = walk(
        &ram(),
        &paging(PagingMode::Off),
        0xffff_f123,
        AccessKind::Write,
        Privilege::User,
    );
    assert_eq!(t.unwrap().gpa, 0xffff_f123);
}

#[test]
fn four_levels_of_4_kib_pages() {
    let ram = ram();
    let at = level4(&ram, [ALL; 4]);
    let p = paging(PagingMode::Level4);
    let t = walk(&ram, &p, LINEAR | 0x567, AccessKind::Read, Privilege::User).unwrap();
    assert_eq!((t.gpa, t.page_shift, t.dirty), (PAGE | 0x567, 12, false));
    for a in at {
        assert_eq!(ram.load::<u64>(a).unwrap() & (A | D), A);
    }
    let t = walk(&ram, &p, LINEAR, AccessKind::Write, Privilege::User).unwrap();
    assert!(t.dirty);
    assert_eq!(ram.load::<u64>(at[3]).unwrap() & (A | D), A | D);
    assert_eq!(ram.load::<u64>(at[2]).unwrap() & D, 0);
}

#[test]
fn large_pages_of_every_level() {
    let ram = ram();
    let p = paging(PagingMode::Level4);
    level4(&ram, [ALL; 4]);
    ram.store(TABLES[0], 0x4000_0000 | ALL | PS).unwrap();
    let t = walk(&ram, &p, LINEAR | 5, AccessKind::Write, Privilege::User).unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x4000_0000 | LINEAR | 5, 30));
    assert_eq!(ram.load::<u64>(TABLES[0]).unwrap() & (A | D), A | D);

    level4(&ram, [ALL; 4]);
    let pde = TABLES[1] + 8 * (LINEAR >> 21);
    // Bit 12 is the PAT bit of a large page, not an address bit.
    ram.store(pde, 0x80_0000 | 1 << 12 | ALL | PS | G).unwrap();
    let t = walk(&ram, &p, LINEAR | 5, AccessKind::Read, Privilege::User).unwrap();
    assert_eq!(t.gpa, 0x80_0000 | (LINEAR & 0x1f_ffff) | 5);
    assert_eq!((t.page_shift, t.global), (21, true));
    // A reserved address bit.
    ram.store(pde, 0x80_2000 | ALL | PS).unwrap();
    let e = code(walk(&ram, &p, LINEAR, AccessKind::Read, Privilege::User));
    assert_eq!(e, PF_P | PF_U | PF_RSVD);
    // PS in the root is reserved.
    level4(&ram, [ALL | PS, ALL, ALL, ALL]);
    let e = code(walk(
        &ram,
        &p,
        LINEAR,
        AccessKind::Write,
        Privilege::Supervisor,
    ));
    assert_eq!(e, PF_P | PF_W | PF_RSVD);
}

#[test]
fn global_is_reserved_in_the_root_alone_and_as_the_maker_has_it() {
    let ram = ram();
    for reserved in [false, true] {
        let p = Paging {
            upper_global_reserved: reserved,
            ..paging(PagingMode::Level4)
        };
        for level in 0..4 {
            let mut bits = [ALL; 4];
            bits[level] |= G;
            level4(&ram, bits);
            let wrong = reserved && level == 0;
            let found = walk(&ram, &p, LINEAR, AccessKind::Read, Privilege::User);
            let expected = if wrong { PF_P | PF_U | PF_RSVD } else { 0 };
            assert_eq!(error(found), expected);
        }
    }
}

#[test]
fn a_missing_entry_at_each_level_faults_and_marks_only_the_levels_above() {
    for missing in 0..4 {
        let ram = ram();
        let at = level4(&ram, [ALL; 4]);
        ram.store(at[missing], PAGE | RW | US).unwrap();
        let p = paging(PagingMode::Level4);
        let e = code(walk(&ram, &p, LINEAR, AccessKind::Write, Privilege::User));
        assert_eq!(e, PF_W | PF_U);
        for (n, a) in at.into_iter().enumerate() {
            let accessed = ram.load::<u64>(a).unwrap() & A != 0;
            assert_eq!(accessed, n < missing, "level {n}, missing {missing}");
        }
    }
}

#[test]
fn rights_are_the_least_of_all_levels() {
    let p = paging(PagingMode::Level4);
    for weak in 0..4 {
        let ram = ram();
        let mut bits = [ALL; 4];
        bits[weak] = P | US;
        let at = level4(&ram, bits);
        let e = code(walk(&ram, &p, LINEAR, AccessKind::Write, Privilege::User));
        assert_eq!(e, PF_P | PF_W | PF_U);
        assert_eq!(ram.load::<u64>(at[3]).unwrap() & (A | D), 0);
        assert!(walk(&ram, &p, LINEAR, AccessKind::Read, Privilege::User).is_ok());

        bits[weak] = P | RW;
        level4(&ram, bits);
        let e = code(walk(&ram, &p, LINEAR, AccessKind::Read, Privilege::User));
        assert_eq!(e, PF_P | PF_U);
        assert!(walk(&ram, &p, LINEAR, AccessKind::Write, Privilege::Supervisor).is_ok());

        bits[weak] = ALL | XD;
        level4(&ram, bits);
        let e = code(walk(&ram, &p, LINEAR, AccessKind::Execute, Privilege::User));
        assert_eq!(e, PF_P | PF_U | PF_ID);
        assert!(walk(&ram, &p, LINEAR, AccessKind::Write, Privilege::User).is_ok());
    }
}

#[test]
fn write_protection_binds_the_supervisor_only_with_wp() {
    let ram = ram();
    level4(&ram, [P | US; 4]);
    let mut p = paging(PagingMode::Level4);
    let write = |p: &Paging, who| walk(&ram, p, LINEAR, AccessKind::Write, who);
    assert_eq!(code(write(&p, Privilege::Supervisor)), PF_P | PF_W);
    p.write_protect = false;
    assert!(write(&p, Privilege::Supervisor).is_ok());
    assert_eq!(code(write(&p, Privilege::User)), PF_P | PF_W | PF_U);
}

#[test]
fn smep_and_smap_keep_the_supervisor_from_user_pages() {
    let ram = ram();
    level4(&ram, [ALL; 4]);
    let mut p = paging(PagingMode::Level4);
    let go = |p: &Paging, kind, who| walk(&ram, p, LINEAR, kind, who);
    use AccessKind::{Execute, Read, Write};
    use Privilege::{Supervisor, SupervisorAc, User};
    assert!(go(&p, Execute, Supervisor).is_ok());
    p.smep = true;
    p.smap = true;
    assert_eq!(code(go(&p, Execute, Supervisor)), PF_P | PF_ID);
    assert_eq!(code(go(&p, Read, Supervisor)), PF_P);
    assert_eq!(code(go(&p, Write, Supervisor)), PF_P | PF_W);
    assert!(go(&p, Write, SupervisorAc).is_ok());
    assert_eq!(code(go(&p, Execute, SupervisorAc)), PF_P | PF_ID);
    assert!(go(&p, Execute, User).is_ok());
    // A supervisor page is no user page if any level says so.
    level4(&ram, [ALL, ALL, P | RW, ALL]);
    assert!(go(&p, Execute, Supervisor).is_ok());
    assert!(go(&p, Read, Supervisor).is_ok());
}

#[test]
fn xd_is_reserved_without_nxe_and_id_is_reported_with_it_or_smep() {
    let ram = ram();
    level4(&ram, [ALL, ALL, ALL, ALL | XD]);
    let mut p = paging(PagingMode::Level4);
    p.no_execute = false;
    let go = |p: &Paging, kind| code(walk(&ram, p, LINEAR, kind, Privilege::User));
    assert_eq!(go(&p, AccessKind::Read), PF_P | PF_U | PF_RSVD);
    assert_eq!(go(&p, AccessKind::Execute), PF_P | PF_U | PF_RSVD);
    p.smep = true;
    assert_eq!(go(&p, AccessKind::Execute), PF_P | PF_U | PF_RSVD | PF_ID);
}

#[test]
fn address_bits_beyond_the_physical_width_are_reserved() {
    let p = paging(PagingMode::Level4);
    for level in 0..4 {
        let ram = ram();
        let mut bits = [ALL; 4];
        bits[level] |= 1 << 40;
        level4(&ram, bits);
        let e = code(walk(
            &ram,
            &p,
            LINEAR,
            AccessKind::Read,
            Privilege::Supervisor,
        ));
        assert_eq!(e, PF_P | PF_RSVD);
        // Bits 52 to 62 are the software's in this format.
        bits[level] = ALL | 0x7ff << 52;
        level4(&ram, bits);
        assert!(walk(&ram, &p, LINEAR, AccessKind::Read, Privilege::Supervisor).is_ok());
    }
}

#[test]
fn global_pages_need_pge() {
    let ram = ram();
    level4(&ram, [ALL, ALL, ALL, ALL | G]);
    let mut p = paging(PagingMode::Level4);
    let go = |p: &Paging| walk(&ram, p, LINEAR, AccessKind::Read, Privilege::User).unwrap();
    assert!(go(&p).global);
    p.global_pages = false;
    assert!(!go(&p).global);
}

#[test]
fn tables_outside_ram_are_a_reserved_bit_fault() {
    let ram = ram();
    let mut p = paging(PagingMode::Level4);
    p.root = RAM;
    let e = code(walk(&ram, &p, 0, AccessKind::Read, Privilege::Supervisor));
    assert_eq!(e, PF_P | PF_RSVD);
}

#[test]
fn a_probe_leaves_no_trace() {
    let ram = ram();
    let at = level4(&ram, [P; 4]);
    let t = probe(&ram, &paging(PagingMode::Level4), LINEAR | 1).unwrap();
    assert_eq!(t.gpa, PAGE | 1);
    for a in at {
        assert_eq!(ram.load::<u64>(a).unwrap() & (A | D), 0);
    }
    assert!(probe(&ram, &paging(PagingMode::Level4), 0).is_none());
}

#[test]
fn bits32_pages_of_4_kib() {
    let ram = ram();
    let linear = 0xc040_3abc;
    let pde = ROOT + 4 * (linear >> 22);
    let pte = TABLES[0] + 4 * (linear >> 12 & 1023);
    ram.store(pde, (TABLES[0] | ALL) as u32).unwrap();
    ram.store(pte, (PAGE | ALL | PS) as u32).unwrap();
    let p = paging(PagingMode::Bits32 { pse: true });
    let t = walk(&ram, &p, linear, AccessKind::Write, Privilege::User).unwrap();
    assert_eq!((t.gpa, t.page_shift), (PAGE | 0xabc, 12));
    assert_eq!(u64::from(ram.load::<u32>(pde).unwrap()) & (A | D), A);
    assert_eq!(u64::from(ram.load::<u32>(pte).unwrap()) & (A | D), A | D);
    // The neighbour is untouched: entries are 4 bytes.
    assert_eq!(ram.load::<u32>(pte + 4), Some(0));
    // NXE has no part in this format: fetches are not told apart.
    ram.store(pte, PAGE as u32).unwrap();
    let e = code(walk(&ram, &p, linear, AccessKind::Execute, Privilege::User));
    assert_eq!(e, PF_U);
}

#[test]
fn bits32_pages_of_4_mib_and_pse36() {
    let ram = ram();
    let linear = 0x0080_1234;
    let pde = ROOT + 4 * (linear >> 22);
    ram.store(pde, (0x40_0000 | 0x5 << 13 | ALL | PS) as u32)
        .unwrap();
    let mut p = paging(PagingMode::Bits32 { pse: true });
    let go = |p: &Paging| walk(&ram, p, linear, AccessKind::Read, Privilege::User);
    let t = go(&p).unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x5_0040_1234, 22));
    // 34 physical bits leave two of the eight.
    p.physical_bits = 34;
    assert_eq!(code(go(&p)), PF_P | PF_U | PF_RSVD);
    p.physical_bits = 40;
    ram.store(pde, (0x40_0000 | 1 << 21 | ALL | PS) as u32)
        .unwrap();
    assert_eq!(code(go(&p)), PF_P | PF_U | PF_RSVD);
    // Without PSE the bit means nothing, and this is a page table.
    ram.store(pde, (TABLES[0] | ALL | PS) as u32).unwrap();
    ram.store(TABLES[0] + 4, (PAGE | ALL) as u32).unwrap();
    p.mode = PagingMode::Bits32 { pse: false };
    assert_eq!(go(&p).unwrap().gpa, PAGE | 0x234);
}

#[test]
fn pae_pages_of_both_sizes() {
    let ram = ram();
    let linear = 0xc060_3abc_u64;
    let pde = TABLES[1] + 8 * (linear >> 21 & 511);
    let pte = TABLES[2] + 8 * (linear >> 12 & 511);
    ram.store(pde, TABLES[2] | ALL).unwrap();
    ram.store(pte, PAGE | ALL | XD).unwrap();
    let mut p = paging(PagingMode::Pae {
        pdpte: [0, 0, 0, TABLES[1] | P],
    });
    let go = |p: &Paging, kind| walk(&ram, p, linear, kind, Privilege::User);
    let t = go(&p, AccessKind::Write).unwrap();
    assert_eq!((t.gpa, t.page_shift), (PAGE | 0xabc, 12));
    assert_eq!(code(go(&p, AccessKind::Execute)), PF_P | PF_U | PF_ID);
    p.no_execute = false;
    assert_eq!(code(go(&p, AccessKind::Read)), PF_P | PF_U | PF_RSVD);

    ram.store(pde, 0x60_0000 | ALL | PS).unwrap();
    let t = go(&p, AccessKind::Read).unwrap();
    assert_eq!(
        (t.gpa, t.page_shift),
        (0x60_0000 | (linear & 0x1f_ffff), 21)
    );
    // Bits 52 to 62 are reserved here.
    ram.store(pde, 0x60_0000 | ALL | PS | 1 << 52).unwrap();
    assert_eq!(code(go(&p, AccessKind::Read)), PF_P | PF_U | PF_RSVD);

    p.mode = PagingMode::Pae { pdpte: [0; 4] };
    assert_eq!(code(go(&p, AccessKind::Write)), PF_W | PF_U);
}

#[test]
fn racing_processors_never_make_a_read_only_page_dirty() {
    let ram = ram();
    let at = level4(&ram, [ALL; 4]);
    let p = paging(PagingMode::Level4);
    std::thread::scope(|s| {
        s.spawn(|| {
            for n in 0..20_000 {
                let bits = if n % 2 == 0 { P | US } else { ALL };
                ram.store(at[3], PAGE | bits).unwrap();
            }
        });
        s.spawn(|| {
            for _ in 0..20_000 {
                let _ = walk(&ram, &p, LINEAR, AccessKind::Write, Privilege::User);
                let entry = ram.load::<u64>(at[3]).unwrap();
                assert!(entry & (RW | D) != D, "{entry:#x}");
            }
        });
    });
}

#[test]
fn neighbours_are_what_user_code_may_execute_without_a_walk() {
    let ram = ram();
    let p = paging(PagingMode::Level4);
    let at = level4(&ram, [ALL | A; 4]);
    let first = LINEAR & !0xffff;
    let entry = |n: u64| TABLES[2] + 8 * (first >> 12 & 511) + 8 * n;
    let own = (LINEAR - first) >> 12;
    for (n, bits) in [
        (0, ALL | A),
        (1, ALL),
        (2, RW | US | A),
        (3, P | RW | A),
        (own + 1, ALL | A | XD),
        (own + 2, ALL | A | 1 << 45),
        (15, P | US | A),
        (16, ALL | A),
    ] {
        ram.store(entry(n), (0x9000 + (n << 12)) | bits)
            .expect("RAM");
    }
    let before: Vec<_> = (0..17).map(|n| ram.load::<u64>(entry(n))).collect();
    let found = || code_neighbours(&ram, &p, LINEAR).collect::<Vec<_>>();
    assert_eq!(
        found(),
        [(first, 0x9000), (first + 0xf000, 0x9000 + 0xf000)]
    );
    let after: Vec<_> = (0..17).map(|n| ram.load::<u64>(entry(n))).collect();
    assert_eq!(before, after, "only looked at");
    for (level, bits) in [
        (0, P | RW | A),
        (1, ALL | A | XD),
        (2, ALL | A | PS),
        (2, ALL),
    ] {
        level4(&ram, [ALL | A; 4]);
        let entry: u64 = ram.load(at[level]).expect("RAM");
        ram.store(at[level], entry & !(ALL | A) | bits)
            .expect("RAM");
        assert_eq!(found(), [], "level {level} {bits:x}");
    }
    level4(&ram, [ALL | A; 4]);
    assert_eq!(found().len(), 2);
    let off = paging(PagingMode::Off);
    assert_eq!(code_neighbours(&ram, &off, LINEAR).count(), 0);
}

/// The error code, or 0.
fn error(r: Result<Translation, PageFault>) -> u32 {
    r.err().map_or(0, |f| f.error_code)
}

#[test]
fn a_protection_key_forbids_data_of_the_users_pages_alone() {
    use AccessKind::{Execute, Read, Write};
    use Privilege::{Supervisor, SupervisorAc, User};
    const KEY: u64 = 5 << 59;
    const NO_ACCESS: u32 = 1 << 10;
    const NO_WRITE: u32 = 2 << 10;
    let ram = ram();
    let keyed = |bits: u64| level4(&ram, [ALL, ALL, ALL, bits | KEY]);
    let with = |pkru, write_protect| Paging {
        pkru,
        write_protect,
        ..paging(PagingMode::Level4)
    };
    let try_to = |p: &Paging, kind, privilege| error(walk(&ram, p, LINEAR, kind, privilege));
    let at = keyed(ALL);
    let p = with(Some(NO_ACCESS), true);
    assert_eq!(try_to(&p, Read, User), PF_P | PF_U | PF_PK);
    assert_eq!(try_to(&p, Write, User), PF_P | PF_U | PF_W | PF_PK);
    assert_eq!(try_to(&p, Read, Supervisor), PF_P | PF_PK);
    assert_eq!(try_to(&p, Write, SupervisorAc), PF_P | PF_W | PF_PK);
    assert_eq!(ram.load::<u64>(at[3]).unwrap() & (A | D), 0);
    assert_eq!(try_to(&p, Execute, User), 0);

    let p = with(Some(NO_WRITE), true);
    assert_eq!(try_to(&p, Read, User), 0);
    assert_eq!(try_to(&p, Write, User), PF_P | PF_U | PF_W | PF_PK);
    assert_eq!(try_to(&p, Write, Supervisor), PF_P | PF_W | PF_PK);
    let p = with(Some(NO_WRITE), false);
    assert_eq!(try_to(&p, Write, Supervisor), 0);
    assert_eq!(try_to(&p, Write, User), PF_P | PF_U | PF_W | PF_PK);

    // Other keys, and no keys.
    for pkru in [Some(!(3 << 10)), None] {
        assert_eq!(try_to(&with(pkru, true), Write, User), 0);
    }
    // The bits of key 0 where there are no keys.
    for mode in [PagingMode::Off, PagingMode::Bits32 { pse: true }] {
        ram.store(TABLES[0], 0x87u32).unwrap();
        let p = Paging {
            mode,
            root: TABLES[0],
            ..with(Some(1), true)
        };
        assert_eq!(error(walk(&ram, &p, 0x5000, Read, User)), 0, "{mode:?}");
    }
    // A page that cannot be written anyway; a page of the supervisor's.
    keyed(P | US);
    let p = with(Some(NO_WRITE), true);
    assert_eq!(try_to(&p, Write, User), PF_P | PF_U | PF_W | PF_PK);
    keyed(P | RW);
    let p = with(Some(NO_ACCESS), true);
    assert_eq!(try_to(&p, Write, Supervisor), 0);
    assert_eq!(try_to(&p, Read, User), PF_P | PF_U);
}

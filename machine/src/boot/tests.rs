//! Loaders on synthetic images: what a right one leads to, and that a damaged one is an error, never a panic.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use doppel_memory::GuestRam;
use doppel_x86::{
    Activity, Cpu, CpuMode, Cr0, EmptyBus, Engine, Exit, Gpr, Rflags, Seg, interpret::Interpret,
};
use fastrand::Rng;

use super::params::{MemoryKind, memory_map};
use super::*;

const MIB: u64 = 1 << 20;
const LOAD: u64 = 16 * MIB;
const PAYLOAD: usize = 0x3000;
const CMDLINE_AT: u64 = 0x2_0000;

/// A file that goes away with the value.
struct TempFile(PathBuf);

impl TempFile {
    fn new(content: &[u8]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("doppel-boot-test-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).unwrap();
        TempFile(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of one setup sector whose protected-mode part counts its bytes.
fn bzimage() -> Vec<u8> {
    let mut b = vec![0; 1024];
    b[0x1f1] = 1;
    put(&mut b, 0x1f4, &(PAYLOAD as u32 / 16).to_le_bytes());
    put(&mut b, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut b, 0x202, b"HdrS");
    put(&mut b, 0x206, &0x020fu16.to_le_bytes());
    b[0x211] = 1; // LOADED_HIGH
    put(&mut b, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut b, 0x230, &(2 * MIB as u32).to_le_bytes());
    b[0x234] = 1; // relocatable
    put(&mut b, 0x236, &1u16.to_le_bytes()); // XLF_KERNEL_64
    put(&mut b, 0x238, &2047u32.to_le_bytes());
    put(&mut b, 0x258, &LOAD.to_le_bytes());
    put(&mut b, 0x260, &(4 * MIB as u32).to_le_bytes());
    b.extend((0..PAYLOAD).map(|i| i as u8));
    b
}

/// An ELF file with one segment at LOAD and the PVH note behind another vendor's note.
fn elf() -> Vec<u8> {
    let mut b = vec![0; 0x200];
    put(&mut b, 0, b"\x7fELF\x02\x01\x01");
    put(&mut b, 18, &62u16.to_le_bytes());
    put(&mut b, 32, &64u64.to_le_bytes());
    put(&mut b, 54, &56u16.to_le_bytes());
    put(&mut b, 56, &3u16.to_le_bytes());
    let segments: [(u32, u64, u64, u64, u64); 3] = [
        (4, 0x100, 0, 40, 40),
        (1, 0x200, LOAD, PAYLOAD as u64, MIB),
        (4, 0x180, 0, 0, 0),
    ];
    for (i, (kind, offset, paddr, filesz, memsz)) in segments.into_iter().enumerate() {
        let at = 64 + i * 56;
        put(&mut b, at, &kind.to_le_bytes());
        put(&mut b, at + 8, &offset.to_le_bytes());
        put(&mut b, at + 24, &paddr.to_le_bytes());
        put(&mut b, at + 32, &filesz.to_le_bytes());
        put(&mut b, at + 40, &memsz.to_le_bytes());
    }
    put(&mut b, 0x100, &[3, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut b, 0x10c, b"GN\0\0\xff\0\0\0"); // name and description, each padded to 4
    put(&mut b, 0x114, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut b, 0x120, b"Xen\0");
    put(&mut b, 0x124, &(LOAD as u32 + 0x40).to_le_bytes());
    b.extend((0..PAYLOAD).map(|i| i as u8));
    b
}

fn boot(ram: &GuestRam, kernel: &[u8], initrd: Option<&[u8]>) -> Result<Entry, BootError> {
    let kernel = TempFile::new(kernel);
    let initrd = initrd.map(TempFile::new);
    let source = BootSource {
        kernel: (&kernel.0).into(),
        initrd: initrd.as_ref().map(|f| (&f.0).into()),
        cmdline: "console=ttyS0".into(),
        ..BootSource::default()
    };
    load(ram, &source, 0xe0000)
}

/// A kernel that is in memory goes to the same place as one of the host.
#[test]
fn files_in_memory_are_loaded_like_files_of_the_host() {
    let load = |kernel, initrd| {
        let ram = GuestRam::new(64 * MIB).unwrap();
        let source = BootSource {
            kernel,
            initrd: Some(initrd),
            cmdline: "console=ttyS0".into(),
            ..BootSource::default()
        };
        let entry = load(&ram, &source, 0xe0000).unwrap();
        let bytes = bytes(&ram, MIB, 63 * MIB);
        (format!("{entry:?}"), bytes)
    };
    for kernel in [bzimage(), elf()] {
        let (a, b) = (TempFile::new(&kernel), TempFile::new(&[7; 5000]));
        let memory = |bytes: &[u8]| BootFile::Memory("name".into(), bytes.to_vec());
        let from_host = load((&a.0).into(), (&b.0).into());
        assert!(from_host == load(memory(&kernel), memory(&[7; 5000])));
    }
}

fn error(kernel: &[u8]) -> String {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let e = boot(&ram, kernel, None).unwrap_err().to_string();
    let (_path, what) = e.split_once(": ").unwrap();
    what.to_owned()
}

fn bytes(ram: &GuestRam, gpa: u64, n: u64) -> Vec<u8> {
    (gpa..gpa + n).map(|a| ram.load::<u8>(a).unwrap()).collect()
}

#[test]
fn a_bzimage_is_placed_and_entered_in_long_mode() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let entry = boot(&ram, &bzimage(), Some(b"initrd")).unwrap();
    let expected = Entry::Linux64 {
        rip: LOAD + 0x200,
        params: 0x7000,
    };
    assert_eq!(entry, expected);
    assert_eq!(bytes(&ram, LOAD + 0x200, 3), [0, 1, 2]);
    assert_eq!(bytes(&ram, CMDLINE_AT, 14), b"console=ttyS0\0");
    let initrd = u64::from(ram.load::<u32>(0x7000 + 0x218).unwrap());
    assert_eq!(initrd, 64 * MIB - 4096);
    assert_eq!(ram.load::<u32>(0x7000 + 0x21c), Some(6));
    assert_eq!(bytes(&ram, initrd, 6), b"initrd");
    assert_eq!(ram.load::<u64>(0x7000 + 0x70), Some(0xe0000), "RSDP");
    assert!(ram.tracker().is_dirty(LOAD));
}

/// Where XLF_KERNEL_64 is clear, and where the protocol is too old to have it.
#[test]
fn a_bzimage_without_a_64_bit_entry_is_entered_in_protected_mode() {
    for (at, value) in [(0x236, &[0, 0]), (0x206, &[0x0b, 0x02])] {
        let mut kernel = bzimage();
        put(&mut kernel, at, value);
        let ram = std::sync::Arc::new(GuestRam::new(64 * MIB).unwrap());
        let entry = boot(&ram, &kernel, None).unwrap();
        let expected = Entry::Linux32 {
            eip: LOAD as u32,
            params: 0x7000,
        };
        assert_eq!(entry, expected);
        let mut cpu = Cpu::new(0, ram);
        entry.apply(&mut cpu);
        assert_eq!((cpu.mode(), cpu.rip), (CpuMode::Bits32, LOAD));
        let registers: Vec<_> = (0..16).filter(|&r| cpu.gpr[r] != 0).collect();
        assert_eq!(registers, [Gpr::Rsi as usize]);
        assert_eq!(cpu.reg(Gpr::Rsi), 0x7000);
        let selectors = [Seg::Cs, Seg::Ds, Seg::Es, Seg::Ss].map(|s| cpu.seg[s as usize].selector);
        assert_eq!(selectors, [0x10, 0x18, 0x18, 0x18]);
        assert!(!cpu.cr0.contains(Cr0::PG));
    }
}

#[test]
fn the_long_mode_entry_maps_memory_to_itself() {
    let ram = std::sync::Arc::new(GuestRam::new(64 * MIB).unwrap());
    let entry = boot(&ram, &bzimage(), None).unwrap();
    let mut cpu = Cpu::new(0, ram.clone());
    entry.apply(&mut cpu);
    assert_eq!(cpu.mode(), CpuMode::Bits64);
    assert_eq!(cpu.reg(Gpr::Rsi), 0x7000);
    let paging = cpu.paging();
    for address in [0x7000, LOAD + 0x200, 0xfee0_0030, 0xffff_ffff] {
        let t = doppel_memory::walk(
            &ram,
            &paging,
            address,
            doppel_memory::AccessKind::Read,
            doppel_memory::Privilege::Supervisor,
        );
        assert_eq!(t.unwrap().gpa, address, "{address:#x}");
    }
}

#[test]
fn the_memory_map_covers_the_ram_and_keeps_the_tables_back() {
    let ram = GuestRam::new(5 << 30).unwrap();
    let map = memory_map(&ram);
    for pair in map.windows(2) {
        assert!(pair[0].range.end <= pair[1].range.start, "{pair:?}");
    }
    let kind = |a: u64| map.iter().find(|m| m.range.contains(&a)).map(|m| m.kind);
    assert_eq!(kind(0), Some(MemoryKind::Ram));
    assert_eq!(kind(0x9_fc00), Some(MemoryKind::Reserved));
    assert_eq!(kind(0xa_0000), None);
    assert_eq!(kind(0xe_0000), Some(MemoryKind::Reserved));
    assert_eq!(kind(MIB), Some(MemoryKind::Ram));
    assert_eq!(kind(0xbfff_ffff), Some(MemoryKind::Ram));
    assert_eq!(kind(0xe000_0000), Some(MemoryKind::Reserved));
    assert_eq!(kind((6 << 30) - 1), Some(MemoryKind::Ram));
    assert_eq!(kind(6 << 30), None);
}

#[test]
fn a_kernel_without_room_at_its_preferred_address_is_refused() {
    for (mib, enough) in [(8, false), (19, false), (20, true)] {
        let ram = GuestRam::new(mib * MIB).unwrap();
        let outcome = boot(&ram, &bzimage(), None);
        assert_eq!(outcome.is_ok(), enough, "{mib} MiB");
        if let Err(e) = outcome {
            assert!(matches!(e, BootError::TooBig { need_mib: 20, .. }), "{e}");
        }
    }
}

#[test]
fn low_memory_is_as_a_bios_leaves_it() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    boot(&ram, &bzimage(), None).unwrap();
    assert_eq!(ram.load::<u16>(0x40e), Some(0x9fc0), "segment of the EBDA");
    assert_eq!(ram.load::<u16>(0x413), Some(639), "KiB below it");
    assert_eq!(ram.load::<u16>(0x400), Some(0x3f8), "COM1");
    assert_eq!(ram.load::<u8>(0x9_fc00), Some(1), "KiB of the EBDA");
}

/// Kernels that call a BIOS in real mode are told that it does not have the service; interrupts of hardware change nothing.
#[test]
fn bios_services_are_refused() {
    let flags_after = |vector: u8| {
        let ram = std::sync::Arc::new(GuestRam::new(64 * MIB).unwrap());
        boot(&ram, &bzimage(), None).unwrap();
        // mov sp, 0x7000; clc; int vector; hlt
        let code = [0xbc, 0x00, 0x70, 0xf8, 0xcd, vector, 0xf4];
        place(&ram, 0x8000, &code).unwrap();
        let mut cpu = Cpu::new(0, ram);
        cpu.activity = Activity::WaitForSipi;
        cpu.start_up(8);
        let mut engine = Interpret::new(cpu);
        assert_eq!(engine.run(&mut EmptyBus), Exit::Halted, "{vector:#x}");
        let cpu = engine.cpu();
        assert_eq!((cpu.rip, cpu.reg(Gpr::Rsp)), (7, 0x7000), "{vector:#x}");
        cpu.rflags
    };
    for service in [0x10, 0x13, 0x15, 0x1a, 0xff] {
        assert!(flags_after(service).contains(Rflags::CF), "{service:#x}");
    }
    for interrupt in [0x08, 0x0d, 0x70, 0x77] {
        assert!(
            !flags_after(interrupt).contains(Rflags::CF),
            "{interrupt:#x}"
        );
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let ram = GuestRam::new(24 * MIB).unwrap();
    let e = boot(&ram, &bzimage(), Some(&vec![0; 5 << 20])).unwrap_err();
    assert!(matches!(e, BootError::TooBig { .. }), "{e}");
}

#[test]
fn files_that_are_no_kernel_are_named_so() {
    for content in [&b""[..], b"MZ", &[0; 4096]] {
        assert!(error(content).starts_with("not a kernel"));
    }
    let ram = GuestRam::new(64 * MIB).unwrap();
    let mut source = BootSource {
        kernel: std::env::temp_dir().into(),
        ..BootSource::default()
    };
    let e = load(&ram, &source, 0).unwrap_err();
    assert!(matches!(e, BootError::NotAFile(_)), "{e}");
    source.kernel = Path::new("/nonexistent/vmlinuz").into();
    let e = load(&ram, &source, 0).unwrap_err();
    assert!(e.to_string().contains("/nonexistent/vmlinuz"), "{e}");
}

#[test]
fn bzimages_that_cannot_be_entered_are_refused() {
    let with = |at: usize, value: &[u8]| {
        let mut b = bzimage();
        put(&mut b, at, value);
        error(&b)
    };
    assert!(with(0x206, &[0x09, 0x02]).contains("2.09 is too old"));
    assert!(with(0x211, &[0]).contains("zImage"));
    assert!(with(0x1f4, &[0; 4]).contains("empty"));
    assert!(with(0x1f4, &[0xff; 4]).contains("truncated"));
    assert!(with(0x260, &[0xff; 4]).contains("does not fit"));
    let long = BootSource {
        cmdline: "x".repeat(2048),
        ..BootSource::default()
    };
    let kernel = TempFile::new(&bzimage());
    let ram = GuestRam::new(64 * MIB).unwrap();
    let source = BootSource {
        kernel: (&kernel.0).into(),
        ..long
    };
    let e = load(&ram, &source, 0).unwrap_err();
    assert!(
        matches!(e, BootError::CmdlineTooLong { max: 2047, .. }),
        "{e}"
    );
}

#[test]
fn an_elf_kernel_is_entered_at_its_pvh_note() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let entry = boot(&ram, &elf(), Some(b"initrd")).unwrap();
    let expected = Entry::Pvh {
        eip: LOAD as u32 + 0x40,
        start_info: 0x6000,
    };
    assert_eq!(entry, expected);
    assert_eq!(bytes(&ram, LOAD + 0x40, 2), [0x40, 0x41]);
    assert_eq!(ram.load::<u32>(0x6000), Some(0x336e_c578));
    let modules = ram.load::<u64>(0x6010).unwrap();
    let initrd = ram.load::<u64>(modules).unwrap();
    assert_eq!(bytes(&ram, initrd, 6), b"initrd");
    assert_eq!(ram.load::<u64>(modules + 8), Some(6));
    let map = ram.load::<u64>(0x6028).unwrap();
    assert_eq!(ram.load::<u64>(map + 8), Some(0x9_fc00));
}

#[test]
fn elf_files_that_cannot_be_entered_are_refused() {
    let with = |at: usize, value: &[u8]| {
        let mut b = elf();
        put(&mut b, at, value);
        error(&b)
    };
    let segment = 64 + 56;
    assert!(with(18, &[3]).contains("it is an ELF file, but not one for x86"));
    assert!(with(0x120, b"Xen!").contains("without a PVH entry"));
    assert!(with(0x124, &[0; 4]).contains("outside"));
    assert!(with(segment + 24, &[0; 8]).contains("impossible address"));
    assert!(with(segment + 24, &[0xff; 8]).contains("impossible address"));
    assert!(with(segment + 40, &(1u64 << 40).to_le_bytes()).contains("does not fit"));
    assert!(with(segment + 8, &[0xff; 8]).contains("truncated"));
    assert!(with(32, &[0xff; 8]).contains("truncated"));
    assert!(with(54, &[57]).contains("odd size"));
    assert!(with(64 + 32, &[0xff; 8]).contains("notes are too long"));
}

/// 65,535 segments or notes of a sparse file, each as long as it may be, would take hours to be read.
#[test]
fn what_an_elf_file_names_again_and_again_is_refused() {
    let many = |kind: u32, len: usize| {
        let mut b = elf();
        let headers = b.len();
        put(&mut b, 32, &(headers as u64).to_le_bytes());
        put(&mut b, 56, &100u16.to_le_bytes());
        b.resize(headers + 100 * 56 + len, 0);
        for n in 0..100 {
            let at = headers + n * 56;
            // The first is what the file needs to be booted.
            let (kind, offset) = match (n, kind) {
                (0, 1) => (4, 0x100),
                (0, _) => (1, 0x200),
                (_, kind) => (kind, headers as u64),
            };
            let len = if n == 0 { 40 } else { len as u64 };
            put(&mut b, at, &kind.to_le_bytes());
            put(&mut b, at + 8, &offset.to_le_bytes());
            put(&mut b, at + 24, &LOAD.to_le_bytes());
            put(&mut b, at + 32, &len.to_le_bytes());
            put(&mut b, at + 40, &len.to_le_bytes());
        }
        error(&b)
    };
    assert!(many(1, MIB as usize).contains("its segments overlap"));
    assert!(many(4, 20_000).contains("notes are too long"));
}

/// Whatever a header says, loading ends in a value.
#[test]
fn damaged_kernels_never_panic() {
    let number = |name: &str, usual: u64| {
        let given = std::env::var(name).ok();
        given.map_or(usual, |text| text.parse().expect("a number"))
    };
    let rounds = number("DOPPEL_BOOT_FUZZ", 900);
    let ram = GuestRam::new(32 * MIB).unwrap();
    let mut random = Rng::with_seed(number("DOPPEL_BOOT_SEED", 1));
    let (mut loaded, mut refused) = (0, 0);
    for round in 0..rounds {
        let addresses = [0x10_0000, 0x10_0000, 0x10_1000, 0x10_2000, 0x10_0040];
        let (mut image, header) = match round % 3 {
            0 => (bzimage(), 0x1f1..0x270),
            1 => (elf(), 0..0x130),
            _ => (multiboot(7 | (round as u32 & 1) << 16, addresses), 0..0x100),
        };
        for _ in 0..1 + random.u8(..4) {
            let at = random.usize(header.clone());
            image[at] = [0, 1, 0x7f, 0x80, 0xff, random.u8(..)][random.usize(..6)];
        }
        if round % 5 == 0 {
            image.truncate(random.usize(..image.len()));
        }
        let initrd = vec![0x5a; random.usize(..8192)];
        match boot(&ram, &image, (round % 2 == 0).then_some(&initrd[..])) {
            Ok(_) => loaded += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(loaded > 50 && refused > 50, "{loaded} {refused}");
}

/// A 32-bit ELF file with a Multiboot header at its beginning; `flags` of the header and `addresses` as the header says them.
fn multiboot(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let mut b = vec![0; 0x100];
    put(&mut b, 0, b"\x7fELF\x01\x01\x01");
    put(&mut b, 18, &3u16.to_le_bytes());
    put(&mut b, 24, &0xc000_0010u32.to_le_bytes());
    put(&mut b, 28, &52u32.to_le_bytes());
    put(&mut b, 42, &[32, 0, 1]);
    let segment = [
        1,
        0x100,
        0xc000_0000,
        LOAD as u32,
        PAYLOAD as u32,
        MIB as u32,
    ];
    for (n, field) in segment.into_iter().enumerate() {
        put(&mut b, 52 + 4 * n, &field.to_le_bytes());
    }
    let sum = 0u32.wrapping_sub(0x1bad_b002u32.wrapping_add(flags));
    for (n, field) in [0x1bad_b002, flags, sum]
        .into_iter()
        .chain(addresses)
        .enumerate()
    {
        put(&mut b, 0x80 + 4 * n, &field.to_le_bytes());
    }
    b.extend((0..PAYLOAD).map(|i| i as u8));
    b
}

fn boot_with_modules(ram: &GuestRam, kernel: &[u8], count: usize) -> Result<Entry, BootError> {
    let (kernel, initrd, module) = (
        TempFile::new(kernel),
        TempFile::new(b"one"),
        TempFile::new(b"two"),
    );
    let source = BootSource {
        kernel: (&kernel.0).into(),
        initrd: Some((&initrd.0).into()),
        modules: vec![((&module.0).into(), "quiet".into()); count],
        cmdline: "console=ttyS0".into(),
    };
    load(ram, &source, 0xe0000)
}

fn text(ram: &GuestRam, at: u32) -> String {
    let bytes = (u64::from(at)..).map(|gpa| ram.load::<u8>(gpa).unwrap());
    String::from_utf8(bytes.take_while(|b| *b != 0).collect()).unwrap()
}

#[test]
fn a_multiboot_kernel_gets_its_modules_and_the_memory_map() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let entry = boot_with_modules(&ram, &multiboot(3, [0; 5]), 1).unwrap();
    let (eip, info) = match entry {
        Entry::Multiboot { eip, info } => (eip, u64::from(info)),
        other => panic!("{other:?}"),
    };
    assert_eq!(eip, LOAD as u32 + 0x10, "a virtual address in the file");
    assert_eq!(ram.load::<u8>(LOAD + 7), Some(7));
    let word = |at: u64| ram.load::<u32>(at).unwrap();
    assert_eq!(
        word(info) & 0x4d,
        0x4d,
        "memory, command line, modules, map"
    );
    assert_eq!(word(info + 8), 63 << 10, "KiB above the first MiB");
    assert!(text(&ram, word(info + 16)).ends_with(" console=ttyS0"));
    assert_eq!(word(info + 20), 2);
    let list = u64::from(word(info + 24));
    for (n, (content, ending)) in [("one", ""), ("two", " quiet")].into_iter().enumerate() {
        let at = list + 16 * n as u64;
        let (start, end) = (word(at), word(at + 4));
        assert_eq!(end - start, 3);
        assert_eq!(start % 4096, 0);
        let found: Vec<u8> = (start..end)
            .map(|gpa| ram.load(gpa.into()).unwrap())
            .collect();
        assert_eq!(found, content.as_bytes());
        assert!(text(&ram, word(at + 8)).ends_with(ending));
    }
    let (len, map) = (u64::from(word(info + 44)), u64::from(word(info + 48)));
    let usable = (map..map + len).step_by(24).filter(|at| word(at + 20) == 1);
    let bytes: u64 = usable.map(|at| ram.load::<u64>(at + 12).unwrap()).sum();
    assert!(bytes > 62 * MIB && bytes < 64 * MIB, "{bytes:#x}");
    let mut cpu = doppel_x86::Cpu::new(0, std::sync::Arc::new(ram));
    entry.apply(&mut cpu);
    assert_eq!((cpu.gpr[0], cpu.gpr[3]), (0x2bad_b002, info));
}

#[test]
fn the_addresses_of_a_multiboot_header_place_the_file() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let base = 0x20_0000;
    let addresses = [base + 0x80, base, 0, base + 0x10_0000, base + 0x100];
    let entry = boot(&ram, &multiboot(1 << 16, addresses), None).unwrap();
    assert!(matches!(entry, Entry::Multiboot { eip, .. } if eip == base + 0x100));
    assert_eq!(ram.load::<u32>(u64::from(base) + 0x80), Some(0x1bad_b002));
    assert_eq!(ram.load::<u8>(u64::from(base) + 0x105), Some(5));
    for bad in [
        [base, base + 1, 0, 0, base],
        [base + 0x90, base, 0, 0, base],
        [base + 0x80, base, base - 1, 0, base],
        [base + 0x80, base, 0, 0, base - 1],
        [0x9_0080, 0x9_0000, 0, 0, 0x9_0000],
    ] {
        let e = boot(&ram, &multiboot(1 << 16, bad), None).unwrap_err();
        assert!(matches!(e, BootError::Damaged { .. }), "{bad:x?}: {e}");
    }
    let far = [base + 0x80, base, 0, 0x7000_0000, base];
    let e = boot(&ram, &multiboot(1 << 16, far), None).unwrap_err();
    assert!(matches!(e, BootError::TooBig { .. }), "{e}");
}

/// Between the boot information and the command line, where a kernel that goes to real mode may want to be.
#[test]
fn kernels_without_boot_params_may_lie_in_conventional_memory() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let at = |paddr: u32, memsz: u32| {
        let mut kernel = multiboot(0, [0; 5]);
        put(&mut kernel, 52 + 12, &paddr.to_le_bytes());
        put(&mut kernel, 52 + 20, &memsz.to_le_bytes());
        kernel
    };
    let entry = boot(&ram, &at(0x8000, 0x1_8000), None).unwrap();
    let Entry::Multiboot { eip, info } = entry else {
        panic!("{entry:?}");
    };
    assert_eq!(eip, 0x8010);
    assert_eq!(bytes(&ram, 0x8000, 3), [0, 1, 2]);
    let text_at = ram.load::<u32>(u64::from(info) + 16).unwrap();
    assert!(text_at >= 0x2_0000);
    for (paddr, memsz) in [
        (0x8000, 0x1_8001),
        (0x6fff, 0x4000),
        (0x500, 0x4000),
        (0x3_0000, 0x4000),
        (0x9_c000, 0x4000),
        (0xf_f000, 0x4000),
        (0x8000, 0x20_0000),
    ] {
        let e = boot(&ram, &at(paddr, memsz), None).unwrap_err();
        assert!(matches!(e, BootError::Damaged { .. }), "{paddr:#x}: {e}");
    }
    let at = 0x8000;
    let addresses = [at + 0x80, at, 0, at + 0x1000, at + 0x100];
    let entry = boot(&ram, &multiboot(1 << 16, addresses), None).unwrap();
    assert!(matches!(entry, Entry::Multiboot { eip, .. } if eip == at + 0x100));
    assert_eq!(ram.load::<u32>(0x8080), Some(0x1bad_b002));
    let addresses = [at + 0x80, at, 0, 0x2_0001, at + 0x100];
    let e = boot(&ram, &multiboot(1 << 16, addresses), None).unwrap_err();
    assert!(matches!(e, BootError::Damaged { .. }), "{e}");
}

#[test]
fn a_command_line_stays_in_its_room() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    for kernel in [multiboot(0, [0; 5]), elf()] {
        let source = BootSource {
            kernel: BootFile::Memory("name".into(), kernel),
            cmdline: "x".repeat(0x1_0000),
            ..BootSource::default()
        };
        let e = load(&ram, &source, 0xe0000).unwrap_err();
        assert!(matches!(e, BootError::CmdlineTooLong { .. }), "{e}");
    }
}

#[test]
fn modules_are_bounded_and_not_for_linux() {
    let ram = GuestRam::new(64 * MIB).unwrap();
    let e = boot_with_modules(&ram, &multiboot(0, [0; 5]), 32).unwrap_err();
    assert!(matches!(e, BootError::TooManyModules(32)), "{e}");
    let e = boot_with_modules(&ram, &bzimage(), 1).unwrap_err();
    assert!(matches!(e, BootError::Unsupported { .. }), "{e}");
    let e = boot(&ram, &multiboot(1 << 3, [0; 5]), None).unwrap_err();
    assert!(matches!(e, BootError::Unsupported { .. }), "{e}");
    assert!(boot_with_modules(&ram, &elf(), 31).is_ok());
}

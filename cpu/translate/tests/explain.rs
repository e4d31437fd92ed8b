//! What `doppel explain` says of instructive code, compared with golden files: `BLESS=1 cargo test -p doppel-translate --test explain`
//! writes them anew, for the change to be read.

use std::path::Path;

use doppel_translate::TranslateOptions;
use doppel_translate::explain::{ExplainError, Sample, Symbols};
use doppel_x86::{CpuModel, HiddenInstructions};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const ADDRESS: u64 = 0xffff_ffff_8100_1000;
const USER_ADDRESS: u64 = 0x40_1000;

fn assemble(
    address: u64,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(address).unwrap()
}

fn explain(bytes: &[u8], user: bool) -> String {
    let address = if user { USER_ADDRESS } else { ADDRESS };
    let sample = Sample {
        bytes,
        address,
        user,
        hidden: HiddenInstructions::NONE,
    };
    // As on a processor with BMI2, whatever this one is.
    let options = TranslateOptions {
        rorx: true,
        ..TranslateOptions::default()
    };
    sample.explain(&options, &Symbols::default()).unwrap()
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        expected,
        text,
        "{} differs; BLESS=1 takes what is new",
        path.display()
    );
}

fn kernel(name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    golden(name, &explain(&assemble(ADDRESS, build), false));
}

fn user(name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    golden(name, &explain(&assemble(USER_ADDRESS, build), true));
}

#[test]
fn a_load_is_checked_and_flags_that_live_are_saved() {
    kernel("load", |a| {
        a.add(rax, rcx)?;
        a.mov(rdx, qword_ptr(rbx + rcx * 8 + 16))?;
        a.adc(rdx, 0)?;
        a.ret()
    });
}

#[test]
fn accesses_off_one_base_share_a_check() {
    kernel("shared", |a| {
        a.push(rbp)?;
        a.push(rbx)?;
        a.mov(rax, qword_ptr(rdi + 8))?;
        a.mov(dword_ptr(rdi + 16), ecx)?;
        a.add(qword_ptr(rdi + 24), rax)?;
        a.pop(rbx)?;
        a.pop(rbp)?;
        a.ret()
    });
}

#[test]
fn bases_that_code_comes_back_to_are_kept() {
    user("kept", |a| {
        for (to, base) in [(rax, rdi), (rcx, rsi), (rdx, rbx)] {
            a.mov(to, qword_ptr(base))?;
        }
        for (to, base) in [(rax, rdi), (rcx, rsi), (rdx, rbx)] {
            a.add(to, qword_ptr(base + 8))?;
        }
        a.ret()
    });
}

#[test]
fn a_loop_of_user_code_polls() {
    user("loop", |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.add(r10, qword_ptr(r11 + rax * 8))?;
        a.inc(rax)?;
        a.cmp(rax, rcx)?;
        a.jne(again)
    });
}

#[test]
fn branches_leave_a_block_in_its_middle_and_go_to_other_pages() {
    user("branches", |a| {
        let mut over = a.create_label();
        a.test(edi, edi)?;
        a.je(over)?;
        a.inc(ecx)?;
        a.jmp(USER_ADDRESS + 0x3000)?;
        a.set_label(&mut over)?;
        a.ret()
    });
}

#[test]
fn sensitive_instructions_act_on_the_virtual_state() {
    kernel("sensitive", |a| {
        a.pushfq()?;
        a.cli()?;
        a.swapgs()?;
        a.popfq()?;
        a.cld()?;
        a.mov(rax, cr2)?;
        a.mov(rax, cr0)
    });
}

#[test]
fn calls_push_guest_addresses_and_go_through_the_jump_cache() {
    user("calls", |a| {
        let mut f = a.create_label();
        a.call(f)?;
        a.call(rax)?;
        a.set_label(&mut f)?;
        a.movaps(xmm0, xmmword_ptr(USER_ADDRESS + 0x100))?;
        a.jmp(qword_ptr(rdx + rax * 8))
    });
}

#[test]
fn smap_has_a_tlb_of_its_own() {
    kernel("smap", |a| {
        a.stac()?;
        a.mov(eax, dword_ptr(rsi))?;
        a.clac()
    });
}

#[test]
fn what_is_cut_off_is_an_error() {
    let sample = |bytes| Sample {
        bytes,
        address: ADDRESS,
        user: false,
        hidden: HiddenInstructions::NONE,
    };
    let explain = |bytes| {
        let (options, symbols) = (TranslateOptions::default(), Symbols::default());
        sample(bytes).explain(&options, &symbols).unwrap_err()
    };
    assert_eq!(explain(&[]), ExplainError::Empty);
    assert_eq!(explain(&[0x48, 0x8b]), ExplainError::Incomplete(ADDRESS));
    assert_eq!(
        explain(&[0x90, 0x48, 0x8b]),
        ExplainError::Incomplete(ADDRESS + 1)
    );
}

#[test]
fn an_instruction_may_straddle_a_page() {
    let code = [0x48, 0x8b, 0x03, 0x90];
    let sample = Sample {
        bytes: &code,
        address: ADDRESS - 1,
        user: false,
        hidden: HiddenInstructions::NONE,
    };
    let text = sample
        .explain(&TranslateOptions::default(), &Symbols::default())
        .unwrap();
    assert_eq!(text.matches("\nblock").count(), 1, "{text}");
    assert!(text.contains("mov rax, [rbx]"), "{text}");
}

#[test]
fn what_the_guests_processor_has_not_is_left_to_the_monitor() {
    let explain = |cpu: CpuModel| {
        let sample = Sample {
            bytes: &[0xf3, 0x0f, 0xb8, 0xc1], // popcnt eax, ecx
            address: ADDRESS,
            user: true,
            hidden: cpu.hidden(),
        };
        let (options, symbols) = (TranslateOptions::default(), Symbols::default());
        sample.explain(&options, &symbols).unwrap()
    };
    for cpu in [CpuModel::Host, CpuModel::V2] {
        assert!(explain(cpu).contains("as it is"), "{cpu}");
    }
    let hidden = explain(CpuModel::V1);
    assert!(
        hidden.contains("not as the guest's processor has it"),
        "{hidden}"
    );
}

#[test]
fn any_bytes_can_be_explained() {
    let (options, symbols) = (TranslateOptions::default(), Symbols::default());
    let (mut random, mut blocks) = (fastrand::Rng::with_seed(1), 0);
    for n in 0..3000 {
        let mut bytes = [0; 24];
        random.fill(&mut bytes);
        let sample = Sample {
            bytes: &bytes,
            address: (n * 0x7ff) ^ ADDRESS,
            user: n % 2 == 0,
            hidden: [HiddenInstructions::NONE, CpuModel::V1.hidden()][n as usize % 3 % 2],
        };
        match sample.explain(&options, &symbols) {
            Ok(text) => blocks += text.matches("block").count(),
            Err(e) => assert!(matches!(e, ExplainError::Incomplete(_)), "{e}"),
        }
    }
    assert!(blocks > 3000, "{blocks}");
}

//! The cases: code that ends in a trap of every kind.

use crate::system;
use crate::trial::{self, CODE, Look};
use std::arch::asm;

/// Code and how it is looked at.
struct Case {
    name: &'static str,
    code: &'static [u8],
    look: Look,
}

/// The bytes of instructions, which must not name places outside of themselves.
macro_rules! code {
    ($($line:literal),* $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: the instructions are jumped over, not executed.
        unsafe {
            asm!("lea {0}, [rip + 2f]", "lea {1}, [rip + 3f]", "jmp 3f", "2:", $($line,)* "3:", out(reg) start, out(reg) end);
            // SAFETY: both labels are in this function, in this order.
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}

/// Cases that end at their first trap.
macro_rules! cases {
    ($($name:literal => [$($line:literal),* $(,)?],)*) => {
        vec![$(Case { name: $name, code: code!($($line),*), look: Look::Exactly },)*]
    };
}

fn page_faults() -> Vec<Case> {
    // 0x2000_0000 is data; a page of read-only, one of none, one of all rights follow it, and then nothing.
    cases! {
        "read where nothing is" => ["movabs rdi, 0x20005123", "mov rax, [rdi]"],
        "read of one byte" => ["movabs rdi, 0x20005fff", "movzx eax, byte ptr [rdi]"],
        "write where nothing is" => ["movabs rdi, 0x20005123", "mov [rdi], rax"],
        "execution where nothing is" => ["movabs rdi, 0x20005123", "jmp rdi"],
        "call where nothing is" => ["movabs rdi, 0x20005123", "call rdi"],
        "return to where nothing is" => ["movabs rdi, 0x20005123", "push rdi", "ret 16"],
        "read of address 0" => ["xor edi, edi", "mov rax, [rdi + 8]"],
        "call of address 0" => ["xor edi, edi", "call rdi"],
        "write to a page for reading" => ["movabs rdi, 0x20001000", "mov [rdi], eax"],
        "a locked addition to a page for reading" => ["movabs rdi, 0x20001ff0", "lock add qword ptr [rdi], 1"],
        "a comparison and exchange that would not write" => ["movabs rdi, 0x20001ff0", "lock cmpxchg [rdi], rcx"],
        "a read that would write" => ["movabs rdi, 0x20001ff0", "xadd [rdi], rcx"],
        "a read of a page without rights" => ["movabs rdi, 0x20002010", "mov rax, [rdi]"],
        "a write to a page without rights" => ["movabs rdi, 0x20002010", "mov [rdi], rax"],
        "execution of a page without rights" => ["movabs rdi, 0x20002010", "jmp rdi"],
        "execution of data" => ["movabs rdi, 0x20000010", "jmp rdi"],
        "execution beyond the end of a file" => ["movabs rdi, 0x40001010", "jmp rdi"],
        "a read beyond the end of a file" => ["movabs rdi, 0x40001010", "mov eax, [rdi]"],
        "a write beyond the end of a file" => ["movabs rdi, 0x40001010", "mov [rdi], eax"],
        "a read of the kernel" => ["movabs rdi, 0xffffffff81000000", "mov rax, [rdi]"],
        "a write to the kernel" => ["movabs rdi, 0xffff888000000000", "mov [rdi], rax"],
        "execution of the kernel" => ["movabs rdi, 0xffffffff81000000", "jmp rdi"],
        "a read of the last user page" => ["movabs rdi, 0x7ffffffff000", "mov rax, [rdi]"],
        "a read across the last user page" => ["movabs rdi, 0x7ffffffffffc", "mov rax, [rdi]"],
        "a write across two pages, the second for reading" => ["movabs rdi, 0x20000ffc", "mov [rdi], rax"],
        "a read across two pages, the second without rights" => ["movabs rdi, 0x20001ffc", "mov rax, [rdi]"],
        "a vector across two pages" => ["movabs rdi, 0x20001ff8", "movups xmm3, [rdi]"],
        "a string that ends in the middle" => ["movabs rdi, 0x20000f80", "movabs rsi, 0x20000000", "mov ecx, 300", "rep movsb"],
        "a string of words that ends in the middle" => ["movabs rdi, 0x20000f84", "mov ecx, 300", "mov eax, 7", "rep stosq"],
        "a string that goes down" => ["movabs rsi, 0x20000100", "movabs rdi, 0x1f000100", "mov ecx, 300", "std", "rep movsq"],
        "a comparison of strings" => ["movabs rdi, 0x20001f00", "movabs rsi, 0x20001f00", "mov ecx, 999", "repe cmpsb"],
        "a push where nothing is" => ["movabs rsp, 0x20005000", "push rax"],
        "a push across two pages" => ["movabs rsp, 0x20002004", "push rax"],
        "a pop where nothing is" => ["movabs rsp, 0x20005000", "pop rax"],
        "a call with no stack" => ["movabs rsp, 0x20005000", "call 4f", "4:"],
        "a pop into memory where nothing is" => ["movabs rdi, 0x20005000", "pop qword ptr [rdi]"],
        "enter with no stack" => ["movabs rsp, 0x20005000", "enter 16, 0"],
        "leave with no stack" => ["movabs rbp, 0x20005000", "leave"],
        "an exchange of a page without rights" => ["movabs rdi, 0x20002000", "xchg [rdi], rax"],
        "a masked store whose masked part has no page" => [
            "movabs rdi, 0x20000ff0", "vpcmpeqd xmm1, xmm1, xmm1", "vmaskmovps [rdi], ymm1, ymm2", "ud2"],
        "a gather that ends in the middle" => [
            "movabs rdi, 0x20001000", "vpcmpeqd ymm1, ymm1, ymm1", "mov eax, 0x1000", "vmovd xmm2, eax", "vpslldq xmm2, xmm2, 8",
            "vpgatherdd ymm0, [rdi + ymm2], ymm1"],
        "a prefetch of nothing" => ["movabs rdi, 0x20005000", "prefetcht0 [rdi]", "ud2"],
        "flags that nobody reads, at a fault" => ["movabs rdi, 0x20005000", "mov eax, 1", "sub eax, 2", "mov [rdi], eax", "add eax, eax", "int3"],
        "flags before a fault" => ["movabs rdi, 0x20005000", "mov eax, 1", "sub eax, 2", "mov [rdi], eax"],
        "a comparison with nothing" => ["movabs rdi, 0x20005000", "mov eax, 1", "sub eax, 2", "cmp [rdi], eax"],
        "cmpxchg16b of a page for reading" => ["movabs rdi, 0x20001000", "lock cmpxchg16b [rdi]"],
        "cmpxchg16b that is misaligned" => ["movabs rdi, 0x20000008", "lock cmpxchg16b [rdi]"],
        "a system call with a bad address" => ["mov eax, 1", "mov edi, 99", "movabs rsi, 0x20005000", "mov edx, 1", "syscall", "ud2"],
    }
}

/// Operands of many parts: which byte of the page is named, nobody specifies.
fn operands_of_parts() -> Vec<Case> {
    let cases = cases! {
        "a masked store whose part has no page" => [
            "movabs rdi, 0x20000ff0", "vpcmpeqd ymm1, ymm1, ymm1", "vmaskmovps [rdi], ymm1, ymm2", "ud2"],
        "an xsave where nothing is" => ["movabs rdi, 0x20005000", "mov eax, 7", "xor edx, edx", "xsave64 [rdi]"],
        "an fxsave to a page for reading" => ["movabs rdi, 0x20001000", "fxsave64 [rdi]"],
    };
    looked_at(cases, Look::Page)
}

fn looked_at(cases: Vec<Case>, look: Look) -> Vec<Case> {
    cases.into_iter().map(|case| Case { look, ..case }).collect()
}

fn exceptions() -> Vec<Case> {
    cases! {
        "a division by zero" => ["xor ecx, ecx", "mov eax, 17", "xor edx, edx", "div ecx"],
        "a division of bytes by zero" => ["xor ecx, ecx", "idiv cl"],
        "a quotient that is too large" => ["mov edx, 5", "mov eax, 1", "mov ecx, 5", "div rcx"],
        "the least number divided by -1" => ["movabs rax, 0x8000000000000000", "cqo", "mov rcx, -1", "idiv rcx"],
        "ud2" => ["ud2"],
        "ud1" => [".byte 0x0f, 0xb9, 0xc0"],
        "ud0" => [".byte 0x0f, 0xff, 0xc0"],
        "push es" => [".byte 0x06"],
        "daa" => [".byte 0x27"],
        "pusha" => [".byte 0x60"],
        "into" => [".byte 0xce"],
        "a far call in the opcode" => [".byte 0x9a, 0, 0, 0, 0, 0, 0"],
        "lock nop" => [".byte 0xf0, 0x90"],
        "lock mov" => [".byte 0xf0, 0x48, 0x89, 0x07"],
        "lea of a register" => [".byte 0x48, 0x8d, 0xc0"],
        "vex with a prefix before" => [".byte 0x66, 0xc5, 0xf8, 0x58, 0xc1"],
        "rex before vex" => [".byte 0x48, 0xc5, 0xf8, 0x58, 0xc1"],
        "a reserved register" => [".byte 0x0f, 0x20, 0xc8"],
        "sixteen bytes" => [".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90"],
        "hlt" => ["mov eax, 5", "hlt"],
        "cli" => ["cli"],
        "sti" => ["sti"],
        "in" => ["in al, dx"],
        "out" => ["out 0x80, al"],
        "rep insb" => ["movabs rdi, 0x20000000", "mov ecx, 3", "rep insb"],
        "mov to cr0" => ["mov cr0, rax"],
        "mov from cr3" => ["mov rax, cr3"],
        "mov from cr8" => ["mov rax, cr8"],
        "mov to dr7" => ["mov dr7, rax"],
        "mov from dr6" => ["mov rax, dr6"],
        "wrmsr" => ["wrmsr"],
        "rdmsr" => ["mov ecx, 0x10", "rdmsr"],
        "rdpmc" => ["xor ecx, ecx", "rdpmc"],
        "lgdt" => ["movabs rdi, 0x20000000", "lgdt [rdi]"],
        "lidt" => ["movabs rdi, 0x20000000", "lidt [rdi]"],
        "lldt" => ["xor eax, eax", "lldt ax"],
        "ltr" => ["mov eax, 0x40", "ltr ax"],
        "lmsw" => ["lmsw ax"],
        "clts" => ["clts"],
        "invlpg" => ["invlpg [rdi]"],
        "invd" => ["invd"],
        "wbinvd" => ["wbinvd"],
        "swapgs" => ["swapgs"],
        "sysret" => ["sysretq"],
        "sysexit" => ["sysexit"],
        "stac" => ["stac"],
        "xsetbv" => ["xor ecx, ecx", "xsetbv"],
        "monitor" => ["monitor"],
        "mwait" => ["mwait"],
        "iret to a kernel's segment" => ["push 0x18", "push rsp", "push 0x202", "push 0x10", "push 0", "iretq"],
        "iret to itself" => ["mov rcx, rsp", "push 0x2b", "push rcx", "push 0x246", "push 0x33", "lea rax, [rip + 4f]", "push rax", "iretq", "nop", "4:", "ud2"],
        "iret with flags of a kernel" => ["mov rcx, rsp", "push 0x2b", "push rcx", "push 0x3ced7", "push 0x33", "lea rax, [rip + 4f]", "push rax", "iretq", "4:", "ud2"],
        "a far return to a null segment" => ["push 0", "push 0", "retfq"],
        "a far return to itself" => ["push 0x33", "lea rax, [rip + 4f]", "push rax", "retfq", "4:", "ud2"],
        "a far return to 32-bit code" => ["push 0x23", "lea rax, [rip + 4f]", "push rax", "retfq", "4:", ".byte 0x40, 0x40, 0x0f, 0x0b"],
        "int 0x20" => ["int 0x20"],
        "int 0x0d" => ["int 0x0d"],
        "int 0x0e" => ["int 0x0e"],
        "int 1" => [".byte 0xcd, 0x01"],
        "int 2" => ["int 2"],
        "int 0x81" => ["int 0x81"],
        "int 0xff" => ["int 0xff"],
        "int3" => ["mov eax, 5", "int3"],
        "int 3 of two bytes" => [".byte 0xcd, 0x03"],
        "int 4" => [".byte 0xcd, 0x04"],
        "int1" => [".byte 0xf1"],
        "a read of an address that is not canonical" => ["movabs rdi, 0x800000000000", "mov rax, [rdi]"],
        "a write to an address that is not canonical" => ["movabs rdi, 0xffff7fffffffffff", "mov [rdi], al"],
        "a read across the end of canonical addresses" => ["movabs rdi, 0x7fffffffffff", "mov ax, [rdi]"],
        "a push with a stack that is not canonical" => ["movabs rsp, 0x800000000008", "push rax"],
        "a base pointer that is not canonical" => ["movabs rbp, 0x1234567812345678", "mov eax, [rbp]"],
        "a jump to an address that is not canonical" => ["movabs rax, 0x800000000000", "jmp rax"],
        "a call of an address that is not canonical" => ["movabs rax, 0x1234567812345678", "lea rcx, [rip + 4f]", "push rcx", "pop rcx", "call rax", "4:"],
        "a return to an address that is not canonical" => ["movabs rax, 0x8000000000000000", "push rax", "ret"],
        "an aligned move that is not aligned" => ["movabs rdi, 0x20000008", "movaps xmm0, [rdi]"],
        "an aligned move of 32 bytes that is not aligned" => ["movabs rdi, 0x20000010", "vmovaps ymm0, [rdi]"],
        "a bad segment" => ["mov eax, 0x1234", "mov ds, eax"],
        "a segment of the kernel" => ["mov eax, 0x18", "mov es, eax"],
        "a code segment that may be read" => ["mov eax, 0x33", "mov fs, eax", "mov ecx, fs", "ud2"],
        "a null stack segment" => ["xor eax, eax", "mov ss, eax"],
        "a base that is not canonical" => ["movabs rax, 0x800000000000", "wrfsbase rax"],
        "ldmxcsr of a reserved bit" => ["push -1", "ldmxcsr [rsp]"],
        "fxrstor of a reserved bit" => ["movabs rdi, 0x20000000", "mov dword ptr [rdi + 24], -1", "fxrstor64 [rdi]"],
        "xrstor of a bad header" => ["movabs rdi, 0x20000000", "mov eax, 7", "xor edx, edx", "xrstor64 [rdi]"],
        "alignment checks, a read" => ["pushfq", "or dword ptr [rsp], 0x40000", "popfq", "movabs rdi, 0x20000001", "mov eax, [rdi]"],
        "alignment checks, a write of two bytes" => ["pushfq", "or dword ptr [rsp], 0x40000", "popfq", "movabs rdi, 0x20000001", "mov [rdi], ax"],
        "alignment checks, a push" => ["pushfq", "or dword ptr [rsp], 0x40000", "popfq", "add rsp, 2", "push rax"],
        "alignment checks, an x87 load" => ["pushfq", "or dword ptr [rsp], 0x40000", "popfq", "movabs rdi, 0x20000004", "fld qword ptr [rdi]"],
        "alignment checks, a byte and a vector" => [
            "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "movabs rdi, 0x20000001", "mov al, [rdi]", "movups xmm0, [rdi + 15]", "ud2"],
        "alignment checks, over a system call" => [
            "pushfq", "or dword ptr [rsp], 0x40401", "popfq", "mov eax, 110", "syscall", "xor eax, eax", "ud2"],
    }
}

fn floating() -> Vec<Case> {
    cases! {
        "x87, a division by zero" => ["push 0x37b", "fldcw [rsp]", "fldz", "fld1", "fdivrp", "fwait", "ud2"],
        "x87, an invalid operation" => ["push 0x37e", "fldcw [rsp]", "fldz", "fldz", "fdivp", "fwait", "ud2"],
        "x87, a stack that overflows" => ["push 0x37e", "fldcw [rsp]", "fld1", "fld1", "fld1", "fld1", "fld1", "fwait", "ud2"],
        "x87, a stack that underflows" => ["fninit", "push 0x37e", "fldcw [rsp]", "fadd st, st(3)", "fwait", "ud2"],
        "x87, a denormal operand" => ["push 0x37d", "fldcw [rsp]", "mov dword ptr [rsp], 1", "fld dword ptr [rsp]", "fwait", "ud2"],
        "x87, an overflow" => ["push 0x377", "fldcw [rsp]", "mov eax, 30000", "push rax", "fild dword ptr [rsp]", "fld1", "fscale", "fmul st, st", "fwait", "ud2"],
        "x87, an underflow" => ["push 0x36f", "fldcw [rsp]", "mov eax, -16000", "push rax", "fild dword ptr [rsp]", "fld1", "fscale", "fmul st, st", "fwait", "ud2"],
        "x87, an inexact result" => ["push 0x35f", "fldcw [rsp]", "fld1", "fldpi", "fdivp", "fwait", "ud2"],
        "x87, an exception that is seen by the next instruction" => ["push 0x37b", "fldcw [rsp]", "fldz", "fld1", "fdiv st, st(1)", "mov eax, 1", "fnop", "ud2"],
        "x87, an exception that waits, and a store without a wait" => [
            "push 0x37b", "fldcw [rsp]", "fldz", "fld1", "fdiv st, st(1)", "fnstsw ax", "fnclex", "fwait", "ud2"],
        "x87, state after a fault" => ["fldpi", "fld1", "fld st(1)", "fstp st(4)", "ud2"],
        "x87, a store to a page for reading" => ["movabs rdi, 0x20001000", "fldpi", "fstp tbyte ptr [rdi]"],
        "mmx, state" => ["pxor mm0, mm0", "movq mm1, rax", "paddw mm1, mm1", "ud2"],
        "sse, an invalid operation" => ["push 0x1f00", "ldmxcsr [rsp]", "xorps xmm0, xmm0", "divss xmm0, xmm0", "ud2"],
        "sse, a denormal operand" => ["push 0x1e80", "ldmxcsr [rsp]", "mov eax, 1", "movd xmm0, eax", "addss xmm0, xmm0", "ud2"],
        "sse, a division by zero" => ["push 0x1d80", "ldmxcsr [rsp]", "xorps xmm0, xmm0", "movd xmm1, eax", "divps xmm1, xmm0", "ud2"],
        "sse, an overflow" => ["push 0x1b80", "ldmxcsr [rsp]", "movabs rax, 0x7fe0000000000000", "movq xmm0, rax", "mulsd xmm0, xmm0", "ud2"],
        "sse, an underflow" => ["push 0x1780", "ldmxcsr [rsp]", "movabs rax, 0x0010000000000001", "movq xmm0, rax", "mulsd xmm0, xmm0", "ud2"],
        "sse, an inexact result" => ["push 0x0f80", "ldmxcsr [rsp]", "movabs rax, 0x3ff0000000000001", "movq xmm0, rax", "mulsd xmm0, xmm0", "ud2"],
        "sse, flags that are masked" => ["movabs rax, 0x3ff0000000000001", "movq xmm0, rax", "mulsd xmm0, xmm0", "sqrtsd xmm1, xmm0", "ud2"],
        "sse, rounding up, flushed to zero" => ["push 0xdf80", "ldmxcsr [rsp]", "mov eax, 3", "movd xmm0, eax", "cvtsi2ss xmm1, rax", "divss xmm1, xmm0", "ud2"],
        "sse, a conversion out of range" => ["push 0x1f00", "ldmxcsr [rsp]", "movabs rax, 0x7ff0000000000000", "movq xmm0, rax", "cvttsd2si eax, xmm0", "ud2"],
        "avx, a comparison with a quiet operand" => ["push 0x1f00", "ldmxcsr [rsp]", "vpcmpeqd ymm0, ymm0, ymm0", "vcmppd ymm1, ymm0, ymm0, 1", "ud2"],
        "avx, a division of eight" => ["push 0x1d80", "ldmxcsr [rsp]", "vxorps ymm0, ymm0, ymm0", "vdivps ymm1, ymm2, ymm0", "ud2"],
        "avx, upper halves" => ["vaddps xmm1, xmm2, xmm3", "vpaddd ymm4, ymm5, ymm6", "pxor xmm7, xmm7", "ud2"],
        "avx, nothing left" => ["vzeroall", "ud2"],
        "avx, no upper halves left" => ["vzeroupper", "ud2"],
    }
}

fn avx_512() -> Vec<Case> {
    cases! {
        "avx-512, masks and all registers" => ["kmovq k1, rax", "vpaddd zmm17{{k1}}, zmm18, zmm19", "vpternlogd zmm0, zmm1, zmm31, 0x96", "kaddb k2, k1, k1", "ud2"],
        "avx-512, a division by zero that is masked" => [
            "push 0x1d80", "ldmxcsr [rsp]", "vpxord zmm16, zmm16, zmm16", "mov eax, 0xff00", "kmovd k1, eax", "vdivps zmm17{{k1}}, zmm2, zmm16", "ud2"],
        "avx-512, no exceptions" => ["push 0x1d80", "ldmxcsr [rsp]", "vpxord zmm16, zmm16, zmm16", "vdivps zmm17, zmm2, zmm16, {{rn-sae}}", "ud2"],
        "avx-512, a store whose masked part has no page" => ["movabs rdi, 0x20000ff0", "mov eax, 0xf", "kmovd k1, eax", "vmovups [rdi]{{k1}}, zmm20", "ud2"],
        "avx-512, a scatter that ends in the middle" => [
            "movabs rdi, 0x20000000", "mov eax, 0xff", "kmovd k1, eax", "mov eax, 0x1000", "vmovd xmm2, eax", "vpslldq xmm2, xmm2, 8",
            "vpscatterdd [rdi + ymm2]{{k1}}, ymm20"],
    }
}

fn calls() -> Vec<Case> {
    cases! {
        "syscall, registers and flags" => ["stc", "mov eax, 110", "syscall", "mov eax, 0", "ud2"],
        "syscall, all flags of user code" => ["push 0x240cd7", "popfq", "mov eax, 110", "syscall", "mov eax, 0", "pushfq", "pop rbx", "ud2"],
        "syscall, of no number" => ["mov eax, 9999", "syscall", "ud2"],
        "syscall, vectors are kept" => ["mov eax, 24", "syscall", "ud2"],
        "int 0x80, sched_yield" => ["mov eax, 158", "int 0x80", "ud2"],
        "int 0x80, of no number" => ["mov eax, 9999", "int 0x80", "ud2"],
        "int 0x80, all flags" => ["push 0x240cd7", "popfq", "mov eax, 158", "int 0x80", "pushfq", "pop rbx", "ud2"],
        "flags, all that user code can have" => ["push -1", "and dword ptr [rsp], ~0x4100", "popfq", "pushfq", "pop rax", "ud2"],
        "flags, none" => ["push 0", "popfq", "pushfq", "pop rax", "ud2"],
        "flags, of 16 bits" => ["push 0x7ed5", "popfw", "pushfw", "pop rax", "ud2"],
        "flags, direction over a fault" => ["std", "movabs rdi, 0x20005000", "mov [rdi], eax"],
        "bases, set and read back" => ["movabs rax, 0x123456789a", "wrfsbase rax", "lea rax, [rax * 8]", "wrgsbase rax", "rdfsbase rbx", "rdgsbase rcx", "ud2"],
        "bases, of 32 bits" => ["mov eax, 0x87654321", "wrfsbase eax", "rdfsbase rbx", "rdfsbase ecx", "ud2"],
        "bases, used" => ["movabs rax, 0x20000100", "wrfsbase rax", "wrgsbase rax", "mov rbx, fs:[8]", "mov gs:[16], rbx", "ud2"],
        "bases, over a system call" => ["movabs rax, 0x20000100", "wrfsbase rax", "lea rax, [rax * 2]", "wrgsbase rax", "mov eax, 24", "syscall", "rdfsbase rbx", "rdgsbase rcx", "ud2"],
        "bases, by arch_prctl" => [
            "movabs rsi, 0x20000100", "mov edi, 0x1002", "mov eax, 158", "syscall", "rdfsbase rbx",
            "add rsi, 8", "mov edi, 0x1001", "mov eax, 158", "syscall", "rdgsbase rdx", "ud2"],
        "bases, read by arch_prctl" => [
            "movabs rax, 0x20000777", "wrfsbase rax", "movabs rsi, 0x20000100", "mov edi, 0x1003", "mov eax, 158", "syscall", "mov rbx, [rsi]", "ud2"],
        "bases, a null selector" => ["movabs rax, 0x20000100", "wrfsbase rax", "wrgsbase rax", "xor ecx, ecx", "mov fs, ecx", "rdfsbase rbx", "rdgsbase rdx", "ud2"],
        "bases, a selector of data" => ["movabs rax, 0x20000100", "wrgsbase rax", "mov ecx, 0x2b", "mov gs, ecx", "rdgsbase rbx", "mov edx, gs", "ud2"],
        "bases, not canonical when used" => ["movabs rax, 0x7fffffffffff", "wrgsbase rax", "mov rbx, gs:[8]"],
        "selectors" => ["mov eax, cs", "mov ebx, ss", "mov ecx, ds", "mov edx, es", "mov esi, fs", "mov edi, gs", "ud2"],
        "selectors, of data" => ["mov eax, 0x2b", "mov ds, eax", "mov es, eax", "mov eax, 1", "mov ecx, ds", "mov edx, es", "ud2"],
        "selectors, descriptors that all have" => [
            "mov eax, 0x33", "lar rbx, rax", "lsl rcx, rax", "mov eax, 0x2b", "lar rsi, rax", "lsl rdi, rax",
            "mov eax, 0x23", "lar r8, rax", "verr ax", "setz r9b", "verw ax", "setz r10b", "mov eax, 0x10", "lar r11, rax", "setz r12b", "ud2"],
        "code that writes code" => [
            "movabs rdi, 0x20003000", "mov dword ptr [rdi], 0x0b0f90c3", "call rdi", "mov byte ptr [rdi], 0x90", "call rdi", "ud2"],
        "code that writes the next instruction" => [
            "movabs rdi, 0x20003000", "movabs rax, 0x90f40000000005c6", "mov [rdi], rax", "mov dword ptr [rdi + 8], 0x0b0f0b0f", "jmp rdi"],
    }
}

fn parts_of_avx_512() -> Vec<Case> {
    let cases = cases! {
        "avx-512, a store whose part has no page" => ["movabs rdi, 0x20000ff0", "mov eax, 0x1f", "kmovd k1, eax", "vmovups [rdi]{{k1}}, zmm20"],
    };
    looked_at(cases, Look::Page)
}

/// Cases that are stepped through.
fn steps() -> Vec<Case> {
    let cases = cases! {
        "steps, plain" => ["pushfq", "or dword ptr [rsp], 0x100", "popfq", "mov eax, 1", "add eax, eax", "jmp 4f", "nop", "4:", "pushfq", "pop rbx", "ud2"],
        "steps, ended by popf" => [
            "pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "pushfq", "and dword ptr [rsp], ~0x100", "popfq", "nop", "nop", "ud2"],
        "steps, strings" => [
            "movabs rdi, 0x20000000", "mov ecx, 3", "pushfq", "or dword ptr [rsp], 0x100", "popfq", "rep stosb", "nop", "ud2"],
        "steps, over a system call" => ["pushfq", "or dword ptr [rsp], 0x100", "popfq", "mov eax, 110", "syscall", "mov eax, 0", "ud2"],
        "steps, over int 0x80" => ["pushfq", "or dword ptr [rsp], 0x100", "popfq", "mov eax, 158", "int 0x80", "mov eax, 0", "ud2"],
        "steps, a stack segment holds one up" => [
            "mov ecx, ss", "pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "mov ss, ecx", "nop", "nop", "ud2"],
        "steps, into a fault" => ["movabs rdi, 0x20005000", "pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "mov [rdi], eax"],
        "steps, a page fault that is none" => [
            "movabs rdi, 0x20000000", "pushfq", "or dword ptr [rsp], 0x100", "popfq", "mov eax, [rdi]", "mov [rdi + 8], eax", "ud2"],
        "steps, int3" => ["pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "int3", "nop", "ud2"],
        "steps, iret" => [
            "mov rcx, rsp", "push 0x2b", "push rcx", "push 0x302", "push 0x33", "lea rax, [rip + 4f]", "push rax", "iretq", "4:", "nop", "nop", "ud2"],
        "steps, calls" => ["pushfq", "or dword ptr [rsp], 0x100", "popfq", "call 4f", "nop", "ud2", "4:", "ret"],
        "steps, cpuid and rdtsc" => ["pushfq", "or dword ptr [rsp], 0x100", "popfq", "xor eax, eax", "cpuid", "mov eax, 1", "rdtsc",
            "xor eax, eax", "xor ebx, ebx", "xor ecx, ecx", "xor edx, edx", "ud2"],
    };
    looked_at(cases, Look::Steps)
}

/// Every case's name and what was seen, the same in all repetitions.
pub fn all(repeat: u64, warm: u64) -> Vec<(String, String)> {
    let kinds = [page_faults, operands_of_parts, exceptions, floating, calls, steps];
    let mut cases: Vec<Case> = kinds.iter().flat_map(|kind| kind()).collect();
    if is_x86_feature_detected!("avx512bw") {
        cases.extend(avx_512());
        cases.extend(parts_of_avx_512());
    }
    place(&cases);
    let targets = (0..).map(|n| CODE + (n << 12) + OFFSET);
    let said = cases.iter().zip(targets).map(|(case, target)| {
        let first = trial::run(target, case.look);
        for n in 1..repeat {
            spin(warm);
            let again = trial::run(target, case.look);
            if again != first {
                return format!("{first}\n    but in repetition {n}: {again}");
            }
        }
        first
    });
    cases.iter().map(|c| c.name.to_owned()).zip(said).collect()
}

/// Where code begins in its page.
const OFFSET: u64 = 0x100;

/// Gives each case's code a page of its own, in which everything else traps: what reads the flags is never far.
fn place(cases: &[Case]) {
    const INT3: u8 = 0xcc;
    let pages = cases.len();
    system::map(CODE, pages, system::READ | system::WRITE);
    for (n, case) in cases.iter().enumerate() {
        let at = CODE + ((n as u64) << 12) + OFFSET;
        // SAFETY: pages that were mapped for this.
        unsafe {
            std::ptr::write_bytes((at & !0xfff) as *mut u8, INT3, 0x1000);
            std::ptr::copy_nonoverlapping(case.code.as_ptr(), at as *mut u8, case.code.len());
        }
    }
    system::protect(CODE, pages, system::READ | system::EXECUTE);
}

/// User code of some length.
fn spin(turns: u64) {
    for n in 0..turns {
        std::hint::black_box(n);
    }
}

//! Runs one instruction of the guest's on the host's processor, between a load and a save of the register state.
//!
//! Problem: writing out the semantics of some three thousand x87, SSE and AVX instructions would be the largest and least
//! trustworthy part of an emulator, while the processor underneath knows them all.
//! Idea: a *snippet*, one re-encoded instruction and `ret`, is called from [`enter`], which first loads the extended
//! state (XRSTOR), the flags and every general register but RSP from a [`Frame`], and afterwards stores them all back (XSAVE).
//! Invariant: a snippet is made by `snippet::compile` alone, which lets only instructions through that
//! cannot leave the snippet, and whose only memory operand is the [`Bounce`] buffer; native exceptions are excluded
//! beforehand (SIMD exceptions are masked, a pending x87 exception and misalignment are looked for). Nothing
//! of the host's own state is in the vector registers across the call: the ABI makes them all scratch.
//! Code pages are never writable and executable at once.

use std::io;
use std::ptr::NonNull;

use super::vector;
use crate::FpuArea;

/// Registers around a snippet; the layout is known to [`enter`].
#[repr(C)]
#[derive(Clone, Default)]
pub(super) struct Frame {
    pub gpr: [u64; 16],
    pub flags: u64,
    code: u64,
    fpu: u64,
    components: u64,
    /// Whether what was not changed since it was loaded need not be saved.
    optimize: u64,
}

const FLAGS: usize = std::mem::offset_of!(Frame, flags);
const CODE: usize = std::mem::offset_of!(Frame, code);
const FPU: usize = std::mem::offset_of!(Frame, fpu);
const COMPONENTS: usize = std::mem::offset_of!(Frame, components);
const OPTIMIZE: usize = std::mem::offset_of!(Frame, optimize);

/// What the memory operand of a snippet is replaced by: room for the largest of them (FNSAVE's 108 bytes), aligned as
/// strictly as any instruction wants it.
#[repr(C, align(64))]
pub(super) struct Bounce(pub [u8; 128]);

impl Bounce {
    /// Where a snippet finds it.
    pub(super) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// Executable memory that snippets are appended to.
pub(super) struct CodeBuffer {
    base: NonNull<u8>,
    used: usize,
    limits: Limits,
}

/// What the host's processor accepts in an XSAVE area.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// State components.
    pub components: u64,
    /// Bits of MXCSR.
    pub mxcsr: u32,
    /// It has XSAVEOPT.
    optimize: bool,
}

const SIZE: usize = 1 << 20;

/// A snippet in a [`CodeBuffer`].
#[derive(Clone, Copy)]
pub(super) struct SnippetCode(usize);

// SAFETY: the mapping is owned by this value alone, and written only through `&mut`.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    /// An empty buffer; `components` are those that the host has.
    pub fn new(components: u64) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SIZE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(p.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        let limits = Limits {
            components,
            mxcsr: mxcsr_mask(),
            optimize: std::is_x86_feature_detected!("xsaveopt"),
        };
        Ok(CodeBuffer {
            base,
            used: 0,
            limits,
        })
    }

    /// What the host accepts.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Appends the code of a snippet that `snippet::compile` made; `None` where the buffer is full.
    pub fn append(&mut self, code: &[u8]) -> Option<SnippetCode> {
        let at = self.used;
        let end = at.checked_add(code.len()).filter(|end| *end <= SIZE)?;
        self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: in bounds of the mapping (checked), which is writable now and which nothing else refers to.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.base.as_ptr().add(at), code.len())
        };
        self.protect(libc::PROT_READ | libc::PROT_EXEC)?;
        self.used = end;
        Some(SnippetCode(at))
    }

    /// Forgets every snippet; the caller drops every [`SnippetCode`].
    pub fn clear(&mut self) {
        self.used = 0;
    }

    fn protect(&self, protection: i32) -> Option<()> {
        // SAFETY: the range is this value's own mapping, and no snippet runs while `&mut self` is held.
        let r = unsafe { libc::mprotect(self.base.as_ptr().cast(), SIZE, protection) };
        (r == 0).then_some(())
    }

    /// Runs a snippet with the state components in `components` (a mask as XCR0's) loaded from and saved to `fpu`.
    ///
    /// What the host would not accept there is cleared.
    pub fn run(&self, code: SnippetCode, frame: &mut Frame, fpu: &mut FpuArea, components: u64) {
        sanitize(fpu, self.limits);
        let components = components & self.limits.components;
        frame.code = self.base.as_ptr() as u64 + code.0 as u64;
        frame.fpu = fpu.bytes.as_mut_ptr() as u64;
        frame.components = components;
        // The x87 control word is looked at in the area whether it is in use or not.
        frame.optimize = (self.limits.optimize && components & vector::component::X87 == 0).into();
        // SAFETY: the snippet is code of `compile`'s (see the head of this file), executable now; the area is 64-byte
        // aligned, large enough for the components that a guest may have, and sanitized, so that XRSTOR accepts it.
        unsafe { enter(frame) }
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: we own the mapping, and no snippet runs.
        unsafe { libc::munmap(self.base.as_ptr().cast(), SIZE) };
    }
}

/// Loads the state that the frame describes, calls its snippet, and saves the state.
///
/// # Safety
/// The frame's `code` is a snippet of `compile`'s, its `fpu` an area that XRSTOR accepts with `components`.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter(frame: *mut Frame) {
    // Stack: [rsp] MXCSR, [rsp + 8] the frame, [rsp + 16] the snippet, later the guest's RDI.
    core::arch::naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "sub rsp, 24",
        "stmxcsr [rsp]",
        "mov [rsp + 8], rdi",
        "mov rax, [rdi + {code}]",
        "mov [rsp + 16], rax",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {components}]",
        "xor edx, edx",
        "xrstor64 [rcx]",
        "push qword ptr [rdi + {flags}]",
        "popfq",
        "mov rax, [rdi]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]", "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "call qword ptr [rsp + 16]",
        "mov [rsp + 16], rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax", "mov [rdi + 8], rcx", "mov [rdi + 16], rdx", "mov [rdi + 24], rbx",
        "mov [rdi + 40], rbp", "mov [rdi + 48], rsi",
        "mov [rdi + 64], r8", "mov [rdi + 72], r9", "mov [rdi + 80], r10", "mov [rdi + 88], r11",
        "mov [rdi + 96], r12", "mov [rdi + 104], r13", "mov [rdi + 112], r14", "mov [rdi + 120], r15",
        "mov rax, [rsp + 16]",
        "mov [rdi + 56], rax",
        "pushfq",
        "pop qword ptr [rdi + {flags}]",
        "cld",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {components}]",
        "xor edx, edx",
        "cmp qword ptr [rdi + {optimize}], 0",
        "jne 4f",
        "xsave64 [rcx]",
        "jmp 5f",
        // The same area was loaded from, so that only what the snippet has changed is written (Intel SDM vol. 1, 13.9).
        "4: xsaveopt64 [rcx]",
        "5:",
        // The ABI wants an empty x87 stack, and the upper halves clean for speed.
        "test al, 1",
        "jz 2f",
        "fninit",
        "2: test al, 4",
        "jz 3f",
        "vzeroupper",
        "3: ldmxcsr [rsp]",
        "add rsp, 24",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        code = const CODE,
        fpu = const FPU,
        flags = const FLAGS,
        components = const COMPONENTS,
        optimize = const OPTIMIZE,
    )
}

/// Clears what XRSTOR refuses: reserved bits of MXCSR and of the header.
fn sanitize(fpu: &mut FpuArea, limits: Limits) {
    let mxcsr = fpu.mxcsr() & limits.mxcsr;
    vector::set_mxcsr(fpu, mxcsr);
    let in_use = vector::in_use(fpu) & limits.components;
    vector::set_in_use(fpu, in_use);
    fpu.bytes[vector::HEADER + 8..vector::EXTENDED].fill(0);
}

/// The bits of MXCSR that the host's processor implements.
fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; 512]);
    let mut area = Area([0; 512]);
    // SAFETY: FXSAVE, part of x86-64, writes 512 bytes to a 16-byte aligned buffer of that size.
    unsafe { core::arch::x86_64::_fxsave(area.0.as_mut_ptr()) };
    match u32::from_le_bytes([area.0[28], area.0[29], area.0[30], area.0[31]]) {
        0 => 0xffbf,
        mask => mask,
    }
}

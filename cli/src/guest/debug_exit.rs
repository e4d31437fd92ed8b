//! A program for the guest that writes its argument to the debug-exit port, assembled here.
//!
//! Debian's cloud kernel has no `/dev/port`, and busybox no `outl`, so the guest's init could not report how a script
//! ended. The program asks for the port with ioperm(2), writes the number that its first argument spells, and exits with
//! that number where nothing listens at the port.

use anyhow::Result;
use iced_x86::code_asm::*;

/// The port of `--debug-exit` (the address that QEMU's isa-debug-exit is commonly given).
const PORT: u32 = 0xf4;
const IOPERM: u32 = 173;
const EXIT: u32 = 60;
const LOAD_ADDRESS: u64 = 0x40_0000;
const HEADERS: usize = 64 + 56;

/// The program as a static ELF file.
pub fn program() -> Result<Vec<u8>> {
    let entry = LOAD_ADDRESS + HEADERS as u64;
    let code = code()?.assemble(entry)?;
    let size = (HEADERS + code.len()) as u64;
    let mut file = file_header(entry);
    file.extend(program_header(size));
    file.extend(code);
    Ok(file)
}

fn code() -> Result<CodeAssembler> {
    let mut a = CodeAssembler::new(64)?;
    let (mut digit, mut done) = (a.create_label(), a.create_label());
    a.xor(ebx, ebx)?;
    a.mov(rsi, qword_ptr(rsp + 16))?; // argv[1], or the null that ends argv
    a.test(rsi, rsi)?;
    a.je(done)?;
    a.set_label(&mut digit)?;
    a.movzx(eax, byte_ptr(rsi))?;
    a.test(eax, eax)?;
    a.je(done)?;
    a.imul_3(ebx, ebx, 10)?;
    a.lea(ebx, dword_ptr(rbx + rax - i32::from(b'0')))?;
    a.inc(rsi)?;
    a.jmp(digit)?;
    a.set_label(&mut done)?;
    a.mov(edi, PORT)?;
    a.mov(esi, 4)?;
    a.mov(edx, 1)?;
    a.mov(eax, IOPERM)?;
    a.syscall()?;
    a.mov(edx, PORT)?;
    a.mov(eax, ebx)?;
    a.out(dx, eax)?;
    a.mov(edi, ebx)?;
    a.mov(eax, EXIT)?;
    a.syscall()?;
    Ok(a)
}

/// ELF-64 file header (System V ABI, figure 4-3) of an executable with one program header.
fn file_header(entry: u64) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    header.extend(2u16.to_le_bytes()); // ET_EXEC
    header.extend(62u16.to_le_bytes()); // EM_X86_64
    header.extend(1u32.to_le_bytes());
    header.extend(entry.to_le_bytes());
    header.extend(64u64.to_le_bytes()); // the program header follows
    header.extend(0u64.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        header.extend(half.to_le_bytes());
    }
    header
}

/// One PT_LOAD segment, readable and executable: the whole file.
fn program_header(size: u64) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(1u32.to_le_bytes());
    header.extend(5u32.to_le_bytes());
    for word in [0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000] {
        header.extend(word.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;

    /// The host refuses the port to an ordinary user, so the program dies at its OUT; it gets that far only if the file
    /// is a program that the kernel takes.
    #[test]
    fn the_host_runs_it_to_the_port_instruction() {
        let directory =
            std::env::temp_dir().join(format!("doppel-debug-exit-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("debug-exit");
        std::fs::write(&path, program().unwrap()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let status = std::process::Command::new(&path).arg("42").status();
        std::fs::remove_dir_all(&directory).unwrap();
        let status = status.unwrap();
        assert!(
            status.signal() == Some(libc::SIGSEGV) || status.code() == Some(42),
            "{status:?}"
        );
    }
}

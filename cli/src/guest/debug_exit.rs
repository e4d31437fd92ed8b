//! A program for the guest that writes its argument to the debug-exit port, assembled here.
//!
//! Debian's cloud kernel has no `/dev/port`, and busybox no `outl`, so the guest's init could not report how a script
//! ended. The program asks for the port with ioperm(2), writes the number that its first argument spells, and exits with
//! that number where nothing listens at the port.

use anyhow::Result;
use iced_x86::code_asm::*;

/// The port of `--debug-exit` (the address that QEMU's isa-debug-exit is commonly given).
const PORT: u32 = 0xf4;
const LOAD_ADDRESS: u32 = 0x40_0000;
/// Sizes of the file header and of a program header in ELF-64 and ELF-32.
const HEADERS_64: (u16, u16) = (64, 56);
const HEADERS_32: (u16, u16) = (52, 32);

/// The program as a static ELF file for an architecture by Debian's name: amd64, else i386.
pub fn program(architecture: &str) -> Result<Vec<u8>> {
    let bits = if architecture == "amd64" { 64 } else { 32 };
    let (file, segment) = if bits == 64 { HEADERS_64 } else { HEADERS_32 };
    let headers = u32::from(file + segment);
    let entry = LOAD_ADDRESS + headers;
    let mut code = match bits {
        64 => code_64()?,
        _ => code_32()?,
    };
    let code = code.assemble(entry.into())?;
    let size = headers + code.len() as u32;
    let mut elf = Elf {
        bits,
        bytes: vec![],
    };
    elf.file_header(entry);
    elf.program_header(size);
    elf.bytes.extend(code);
    Ok(elf.bytes)
}

/// System calls by their numbers of x86-64: ioperm 173, exit 60.
fn code_64() -> Result<CodeAssembler> {
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
    a.mov(eax, 173)?;
    a.syscall()?;
    a.mov(edx, PORT)?;
    a.mov(eax, ebx)?;
    a.out(dx, eax)?;
    a.mov(edi, ebx)?;
    a.mov(eax, 60)?;
    a.syscall()?;
    Ok(a)
}

/// System calls by their numbers of i386: ioperm 101, exit 1.
fn code_32() -> Result<CodeAssembler> {
    let mut a = CodeAssembler::new(32)?;
    let (mut digit, mut done) = (a.create_label(), a.create_label());
    a.xor(edi, edi)?;
    a.mov(esi, dword_ptr(esp + 8))?; // argv[1], or the null that ends argv
    a.test(esi, esi)?;
    a.je(done)?;
    a.set_label(&mut digit)?;
    a.movzx(eax, byte_ptr(esi))?;
    a.test(eax, eax)?;
    a.je(done)?;
    a.imul_3(edi, edi, 10)?;
    a.lea(edi, dword_ptr(edi + eax - i32::from(b'0')))?;
    a.inc(esi)?;
    a.jmp(digit)?;
    a.set_label(&mut done)?;
    a.mov(ebx, PORT)?;
    a.mov(ecx, 4)?;
    a.mov(edx, 1)?;
    a.mov(eax, 101)?;
    a.int(0x80)?;
    a.mov(edx, PORT)?;
    a.mov(eax, edi)?;
    a.out(dx, eax)?;
    a.mov(ebx, edi)?;
    a.mov(eax, 1)?;
    a.int(0x80)?;
    Ok(a)
}

/// An ELF file being written.
struct Elf {
    bits: u32,
    bytes: Vec<u8>,
}

impl Elf {
    fn halves(&mut self, values: &[u16]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        self.bytes.extend(bytes);
    }

    /// A field of 4 bytes in both.
    fn word(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }

    /// An address, offset or size: 8 bytes in ELF-64.
    fn wide(&mut self, value: u32) {
        self.word(value);
        if self.bits == 64 {
            self.word(0);
        }
    }

    /// The file header (System V ABI, figure 4-3) of an executable with one program header.
    fn file_header(&mut self, entry: u32) {
        let is_64 = self.bits == 64;
        let (class, machine) = if is_64 { (2, 62) } else { (1, 3) };
        let (file, segment) = if is_64 { HEADERS_64 } else { HEADERS_32 };
        self.bytes.extend([0x7f, b'E', b'L', b'F', class, 1, 1]);
        self.bytes.resize(16, 0);
        self.halves(&[2, machine]); // ET_EXEC; EM_X86_64 or EM_386
        self.word(1);
        self.wide(entry);
        self.wide(file.into()); // the program header follows
        self.wide(0);
        self.word(0);
        self.halves(&[file, segment, 1, 0, 0, 0]);
    }

    /// One PT_LOAD segment, readable and executable: the whole file. The flags have another place in either.
    fn program_header(&mut self, size: u32) {
        const READ_EXECUTE: u32 = 5;
        self.word(1);
        if self.bits == 64 {
            self.word(READ_EXECUTE);
        }
        for value in [0, LOAD_ADDRESS, LOAD_ADDRESS, size, size] {
            self.wide(value);
        }
        if self.bits == 32 {
            self.word(READ_EXECUTE);
        }
        self.wide(0x1000);
    }
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
        for architecture in ["amd64", "i386"] {
            let directory = std::env::temp_dir().join(format!(
                "doppel-debug-exit-{architecture}-{}",
                std::process::id()
            ));
            std::fs::create_dir_all(&directory).unwrap();
            let path = directory.join("debug-exit");
            std::fs::write(&path, program(architecture).unwrap()).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            let status = std::process::Command::new(&path).arg("42").status();
            std::fs::remove_dir_all(&directory).unwrap();
            let status = match status {
                Err(e) if architecture == "i386" => {
                    eprintln!("SKIPPED: this host runs no 32-bit programs ({e})");
                    continue;
                }
                status => status.unwrap(),
            };
            assert!(
                status.signal() == Some(libc::SIGSEGV) || status.code() == Some(42),
                "{architecture}: {status:?}"
            );
        }
    }
}

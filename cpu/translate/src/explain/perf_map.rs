//! `/tmp/perf-PID.map`: names for translated code, so that `perf report` shows hot guest code.
//!
//! A line a block (host address, size, name) is appended when the block is made. When the code cache is emptied the file begins
//! anew: perf takes a map to hold for the whole run, so samples from before are then put down to what came after.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::Symbols;

/// A map that is being written.
#[derive(Debug)]
pub struct PerfMap {
    file: Mutex<BufWriter<File>>,
    symbols: Symbols,
}

impl PerfMap {
    /// Makes the file, which may be one from an earlier process of the same number but no symbolic link.
    pub fn create(path: &Path, symbols: Symbols) -> io::Result<PerfMap> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        Ok(PerfMap {
            file: Mutex::new(BufWriter::new(file)),
            symbols,
        })
    }

    /// Enters a block of the guest's code; `lstar` tells where its kernel lies.
    pub(crate) fn block(
        &self,
        host: u64,
        len: u32,
        linear: u64,
        user: bool,
        form: &str,
        lstar: u64,
    ) {
        let name = match (user, lstar) {
            (true, _) => format!("u:{linear:x}"),
            (false, lstar) => format!("k:{}", self.kernel_name(linear, lstar)),
        };
        self.line(host, u64::from(len), &format!("{name}{form}"));
    }

    fn kernel_name(&self, linear: u64, lstar: u64) -> String {
        let at = linear.wrapping_sub(self.symbols.slide(lstar));
        let name = self.symbols.name(at);
        name.unwrap_or_else(|| format!("{linear:x}"))
    }

    /// Enters code with a name of its own. A map that cannot be written (a full disk) ends early and nothing else.
    pub(crate) fn line(&self, host: u64, len: u64, name: &str) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(file, "{host:x} {len:x} {name}");
    }

    /// Begins anew.
    pub(crate) fn clear(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.flush();
        let _ = file.get_ref().set_len(0);
        let _ = file.seek(SeekFrom::Start(0));
    }

    pub(crate) fn flush(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.flush();
    }
}

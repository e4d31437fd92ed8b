//! Open files and directories of a guest.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

/// What is open.
#[derive(Debug)]
pub struct Open {
    pub descriptor: OwnedFd,
    pub node: u64,
    /// Opened with O_DIRECTORY.
    pub directory: bool,
    /// The flags that the guest opened it with, as far as they count.
    pub flags: u32,
    /// Who reads a directory has its position for as long.
    pub reading: Mutex<()>,
}

/// Handles by number. A number is not used twice.
pub struct Handles {
    table: HashMap<u64, Arc<Open>>,
    next: u64,
    most: usize,
}

impl Handles {
    pub fn new(most: usize) -> Self {
        Handles {
            table: HashMap::new(),
            next: 1,
            most,
        }
    }

    /// True where no more can be opened.
    pub fn is_full(&self) -> bool {
        self.table.len() >= self.most
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Open)> {
        self.table.iter().map(|(number, open)| (*number, &**open))
    }

    pub fn add(&mut self, open: Open) -> Result<u64, Errno> {
        let number = self.next;
        self.insert(number, open)?;
        Ok(number)
    }

    pub fn insert(&mut self, number: u64, open: Open) -> Result<(), Errno> {
        if self.is_full() {
            return Err(Errno::NFILE);
        }
        self.next = self.next.max(number.saturating_add(1));
        self.table.insert(number, Arc::new(open));
        Ok(())
    }

    pub fn get(&self, number: u64, directory: bool) -> Result<Arc<Open>, Errno> {
        let open = self.table.get(&number).ok_or(Errno::BADF)?;
        match open.directory == directory {
            true => Ok(open.clone()),
            false => Err(Errno::BADF),
        }
    }

    /// Takes one away; the node that it was of.
    pub fn remove(&mut self, number: u64) -> Result<u64, Errno> {
        let open = self.table.remove(&number).ok_or(Errno::BADF)?;
        Ok(open.node)
    }
}

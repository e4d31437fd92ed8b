//! What the monitor takes of the host's memory for itself, kept small: the C library's allocator (mallopt(3)), and the program's own pages.
//!
//! Problem: left to itself, glibc gives nearly every thread an arena of its own, of which none gives memory back; and once a large block was
//! freed (a kernel that was read, say) it takes blocks of that size from the arenas, where tables that grow leave holes behind.
//! Idea: an arena for each processor of the guest, since the other threads allocate little; blocks of a size from which the holes would hurt
//! are mappings of their own, which are grown by mremap and given back.
//! Cost: a mapping is slower to make than a block, so the limit is above what any device takes for a request.
//!
//! Much of the program runs only once, before the guest does or while it boots, and stays mapped. And heap that was needed once, and lies
//! between what is still in use, stays with the process. So both go back every ten seconds: what is needed again comes back from the host's page cache,
//! or as zeros. At a fault the host maps not only the page but 64 KiB around it, as far as they are of the same mapping; what a running machine
//! needs lies scattered over the program, so that this would bring most of it back. So the program is cut into mappings of 8 KiB, by an
//! attribute that means nothing for it and that every other piece has.
//! Cost: some 200 faults in ten seconds, and of the host's kernel some 0.2 MiB for 900 mappings.

#[cfg(target_env = "gnu")]
use std::ffi::c_int;
use std::fs;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use doppel_footprint::smaps::{self, Mapping};
use doppel_seccomp::{Kind, narrowed};

#[cfg(target_env = "gnu")]
/// Bytes of a block that becomes a mapping, and of free memory at the end of the heap that is given back.
const LARGE: c_int = 512 << 10;

#[cfg(target_env = "gnu")]
/// The same until the guest runs: what is read then goes again, and buffers for later stay untouched.
const LARGE_AT_START: c_int = 48 << 10;

/// Prepares the allocator for a machine with so many processors. To be called before threads are started.
#[cfg(target_env = "gnu")]
pub fn prepare_allocator(cpus: u32) {
    let arenas = c_int::try_from(cpus).unwrap_or(c_int::MAX);
    for (parameter, value) in [
        (libc::M_ARENA_MAX, arenas),
        (libc::M_MMAP_THRESHOLD, LARGE_AT_START),
        (libc::M_TRIM_THRESHOLD, LARGE),
    ] {
        set_allocator(parameter, value);
    }
}

#[cfg(target_env = "gnu")]
fn set_allocator(parameter: c_int, value: c_int) {
    // SAFETY: sets a number of the allocator, under its own lock. Where it refuses, nothing changes.
    unsafe { libc::mallopt(parameter, value) };
}

/// Does nothing: the allocator is another.
#[cfg(not(target_env = "gnu"))]
pub fn prepare_allocator(_cpus: u32) {}

/// How long memory stays that is not needed.
const PERIOD: Duration = Duration::from_secs(10);

/// Gives back, now and from time to time until the process ends, what is not needed for now: pages of the program that are as they are in its file,
/// until they are needed again; and heap that is free. Where the host does not tell which pages these are, or has no thread left, they stay.
pub fn keep_small() {
    let program = Program::own();
    program.split();
    program.let_go();
    #[cfg(target_env = "gnu")]
    set_allocator(libc::M_MMAP_THRESHOLD, LARGE);
    give_back_free_heap();
    let again = narrowed(Kind::Console, move || {
        loop {
            thread::sleep(PERIOD);
            program.let_go();
            give_back_free_heap();
        }
    });
    let _ = thread::Builder::new().name("memory".into()).spawn(again);
}

/// Has the allocator give the host all whole pages that are free, wherever they are (malloc_trim(3)).
#[cfg(target_env = "gnu")]
fn give_back_free_heap() {
    // SAFETY: any thread may call it at any time; it changes nothing that is in use.
    unsafe { libc::malloc_trim(0) };
}

/// Does nothing: the allocator is another.
#[cfg(not(target_env = "gnu"))]
fn give_back_free_heap() {}

/// Bytes of the program that come back at once.
const PIECE: usize = 8 << 10;

/// Where the program's own file is mapped, and nothing was written.
#[derive(Debug, PartialEq, Eq)]
struct Program(Vec<Range<usize>>);

impl Program {
    fn own() -> Program {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        Program(unchanged(
            &smaps::parse(&smaps),
            Program::own as *const () as usize,
        ))
    }

    /// Makes a mapping of each piece. What is a file's comes back in runs of pages that do not cross the border of a mapping.
    fn split(&self) {
        let pieces = self.0.iter().flat_map(pieces);
        for every_other in pieces.step_by(2) {
            // SAFETY: all that changes is what a core dump has of pages that nobody can write to.
            unsafe {
                libc::madvise(
                    every_other.start as *mut _,
                    every_other.len(),
                    libc::MADV_DONTDUMP,
                )
            };
        }
    }

    fn let_go(&self) {
        for pages in &self.0 {
            // SAFETY: a private mapping of the program's file, for reading or execution alone, no page of which differs from the file:
            // what is read there next, by whatever thread, is the same. These mappings stay as long as the process.
            unsafe { libc::madvise(pages.start as *mut _, pages.len(), libc::MADV_DONTNEED) };
        }
    }
}

/// Of the file that is mapped at address `at`: the private mappings that cannot be written to and in which no page was.
fn unchanged(mappings: &[Mapping], at: usize) -> Vec<Range<usize>> {
    let file = |m: &Mapping| (m.inode, m.name.clone());
    let Some(program) = mappings.iter().find(|m| m.range.contains(&at)).map(file) else {
        return Vec::new();
    };
    let fixed = |m: &&Mapping| m.permissions.starts_with("r-") && m.permissions.ends_with('p');
    let same = mappings
        .iter()
        .filter(|m| m.inode != 0 && file(m) == program);
    let unchanged = same.filter(fixed).filter(|m| m.anonymous == 0);
    unchanged.map(|m| m.range.clone()).collect()
}

/// Ranges between multiples of [`PIECE`].
fn pieces(pages: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *pages;
    let first = start / PIECE;
    let count = end.div_ceil(PIECE) - first;
    (first..first + count).map(move |n| start.max(n * PIECE)..end.min((n + 1) * PIECE))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
1000-3000 r--p 00000000 fe:00 17 /bin/doppel
Size:  8 kB
Anonymous:  0 kB
3000-5000 r-xp 00002000 fe:00 17 /bin/doppel
Anonymous:  0 kB
5000-6000 r--p 00004000 fe:00 17 /bin/doppel
Anonymous:  4 kB
6000-7000 rw-p 00005000 fe:00 17 /bin/doppel
Anonymous:  0 kB
8000-9000 r-xp 00000000 fe:00 18 /lib/libc.so.6
Anonymous:  0 kB
9000-a000 r--p 00000000 00:00 0
Anonymous:  0 kB
";

    #[test]
    fn only_pages_that_are_as_in_the_file_go() {
        let mappings = smaps::parse(SMAPS);
        assert_eq!(
            unchanged(&mappings, 0x3010),
            [0x1000..0x3000, 0x3000..0x5000]
        );
        assert_eq!(
            unchanged(&mappings, 0x8010).first(),
            Some(&(0x8000..0x9000))
        );
        assert_eq!(unchanged(&mappings, 0x9010), []);
        assert_eq!(unchanged(&[], 0x3010), []);
    }

    #[test]
    fn pieces_end_at_multiples_of_their_size() {
        let split = |pages: Range<usize>| pieces(&pages).collect::<Vec<_>>();
        assert_eq!(
            split(0x1000..0x5000),
            [0x1000..0x2000, 0x2000..0x4000, 0x4000..0x5000]
        );
        assert_eq!(split(0x2000..0x4000).len(), 1);
        assert_eq!(split(0x2000..0x2000), []);
    }

    #[test]
    fn the_program_goes_on_without_its_pages() {
        let own = Program::own();
        let here = unchanged as *const () as usize;
        assert!(own.0.iter().any(|pages| pages.contains(&here)));
        own.split();
        own.let_go();
        let pieces = Program::own().0;
        assert!(pieces.iter().all(|piece| piece.len() <= PIECE));
        let bytes = |of: &[Range<usize>]| of.iter().map(ExactSizeIterator::len).sum::<usize>();
        assert_eq!(bytes(&pieces), bytes(&own.0));
    }
}

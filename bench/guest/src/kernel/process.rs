//! Processes, threads, and what passes between them.

use super::system_unsafe::{self, Child};
use crate::NOTHING;
use crate::row::measured;
use anyhow::{Context, Result, ensure};
use std::ffi::CString;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::time::Duration;

/// A program that is linked with the C library dynamically and does nothing.
const DYNAMIC: &str = "/bin/true";
const RING: usize = 16;

pub fn fork_wait(count: u64) -> Result<u64> {
    for _ in 0..count {
        succeeded(system_unsafe::fork(|| 0)?)?;
    }
    Ok(count)
}

fn succeeded(child: Child) -> Result<()> {
    ensure!(child.wait()? == 0, "a child failed");
    Ok(())
}

pub fn exec_static(count: u64) -> Result<u64> {
    let own = std::env::args().next().context("finding this program")?;
    exec(&own, count)
}

pub fn exec_dynamic(count: u64) -> Result<u64> {
    exec(DYNAMIC, count)
}

fn exec(program: &str, count: u64) -> Result<u64> {
    let (program, nothing) = (CString::new(program)?, CString::new(NOTHING)?);
    for _ in 0..count {
        let child = system_unsafe::fork(|| system_unsafe::exec(&program, &nothing))?;
        succeeded(child)?;
    }
    Ok(count)
}

pub fn thread(count: u64) -> Result<u64> {
    let mut sum = 0;
    for n in 0..count {
        let thread = std::thread::spawn(move || n);
        sum += thread.join().ok().context("a thread panicked")?;
    }
    Ok(sum)
}

/// A byte to another process and back.
pub fn pipe(count: u64) -> Result<(u64, Duration)> {
    around(1, count)
}

/// A byte around a ring of 16 processes, this one among them.
pub fn switch(count: u64) -> Result<(u64, Duration)> {
    around(RING - 1, count)
}

fn around(others: usize, count: u64) -> Result<(u64, Duration)> {
    let (mut from, first) = std::io::pipe()?;
    let mut children = Vec::new();
    for _ in 0..others {
        let (reader, mut writer) = std::io::pipe()?;
        let mut before = std::mem::replace(&mut from, reader);
        // The child holds a copy of the first pipe's writer as well, so it is told how often to pass the byte on.
        children.push(system_unsafe::fork(|| {
            i32::from(pass_on(&mut before, &mut writer, count + 1).is_err())
        })?);
    }
    let (mut writer, mut reader) = (first, from);
    once_around(&mut writer, &mut reader, 0)?; // every process has run
    let done = measured((writer, reader), |(writer, reader)| {
        let mut sum = 0;
        for n in 0..count {
            sum += once_around(writer, reader, n as u8)?;
        }
        Ok(sum)
    })?;
    children.into_iter().try_for_each(succeeded)?;
    Ok(done)
}

fn once_around(writer: &mut PipeWriter, reader: &mut PipeReader, byte: u8) -> Result<u64> {
    let mut buffer = [byte];
    writer.write_all(&buffer)?;
    reader.read_exact(&mut buffer)?;
    Ok(u64::from(buffer[0]))
}

fn pass_on(reader: &mut PipeReader, writer: &mut PipeWriter, count: u64) -> Result<()> {
    let mut byte = [0];
    for _ in 0..count {
        reader.read_exact(&mut byte)?;
        byte[0] = byte[0].wrapping_add(1);
        writer.write_all(&byte)?;
    }
    Ok(())
}

/// A signal to this process, caught by a handler that counts.
pub fn signal(count: u64) -> Result<u64> {
    let before = system_unsafe::catch_signals()?;
    (0..count).try_for_each(|_| system_unsafe::raise_signal())?;
    Ok(system_unsafe::catch_signals()? - before)
}

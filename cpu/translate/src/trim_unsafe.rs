//! Memory that tables of translations leave behind when the cache is emptied.
//!
//! They are blocks of the C library's heap, which gives back what is at its end alone: a monitor would keep for ever what
//! its fullest cache took. Emptying is rare and this takes milliseconds.

/// Has the allocator give the host all whole pages that are free, wherever they are (malloc_trim(3)).
#[cfg(target_env = "gnu")]
pub(crate) fn give_back_free_memory() {
    // SAFETY: any thread may call it at any time; it changes nothing that is in use.
    unsafe { libc::malloc_trim(0) };
}

/// Does nothing: the allocator is another.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_back_free_memory() {}

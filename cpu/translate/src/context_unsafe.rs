//! The owned context: allocated once, at one address for the life of the engine, and shared with kickers; behind it the CPU's slots, which
//! whoever translates code for it fills in.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use doppel_x86::{Cpu, Kick};

use crate::context::{Context, SLOTS};
use crate::jump_cache::{FIRST_INDEX_MASK, KICKED_MASK};
use crate::table_unsafe::{NAMED, name_page};

/// The owned context, at a fixed address; shared with kickers, which touch nothing but `poll`.
pub(crate) struct ContextBox {
    shared: Arc<Shared>,
}

struct Shared {
    at: NonNull<Context>,
    memory: Arc<Memory>,
    kicked: AtomicBool,
    /// Who executes user code by other means, and has to be called as well.
    user_code: OnceLock<Arc<dyn Kick>>,
}

// SAFETY: kickers only use the atomics; everything else is reached through the one `ContextBox`.
unsafe impl Send for Shared {}
// SAFETY: as for Send.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: initialized in `ContextBox::new`, and this is the last owner; the memory goes after it.
        unsafe { self.at.as_ptr().drop_in_place() };
    }
}

/// What the context and its slots lie in.
struct Memory {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: owned memory; `Shared` and `Slots` say who reaches which part of it.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed, for a context and so many slots.
    fn new(slots: usize) -> io::Result<Self> {
        let len = SLOTS + (8 * slots).next_multiple_of(4096);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        let memory = match NonNull::new(p.cast()) {
            Some(at) if p != libc::MAP_FAILED => Memory { at, len },
            _ => return Err(io::Error::last_os_error()),
        };
        // SAFETY: the page between context and slots, which neither uses.
        unsafe { name_page(memory.at.as_ptr().add(SLOTS - NAMED))? };
        Ok(memory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody has it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// The slots of one CPU: host addresses that its code jumps through.
pub(crate) struct Slots(Arc<Memory>);

impl Slots {
    fn slot(&self, n: u32) -> &AtomicU64 {
        let at = SLOTS + 8 * n as usize;
        assert!(at + 8 <= self.0.len);
        // SAFETY: in bounds (asserted) and aligned; everybody, translated code too, accesses it atomically.
        unsafe { &*self.0.at.as_ptr().add(at).cast::<AtomicU64>() }
    }

    /// Forgets all; the host has their memory back. No code may lead through one until it is set again.
    pub fn give_back(&self) {
        // SAFETY: the slots are whole pages of the memory behind the context, and nothing but slots.
        unsafe {
            let at = self.0.at.as_ptr().add(SLOTS).cast();
            libc::madvise(at, self.0.len - SLOTS, libc::MADV_DONTNEED);
        }
    }

    /// Lets a slot lead to a host address.
    pub fn set(&self, n: u32, target: u64) {
        self.slot(n).store(target, Ordering::Release);
    }

    /// Where it leads.
    pub fn get(&self, n: u32) -> u64 {
        self.slot(n).load(Ordering::Acquire)
    }
}

impl ContextBox {
    /// With so many slots behind it.
    pub fn new(cpu: Box<Cpu>, slots: usize) -> io::Result<Self> {
        let memory = Arc::new(Memory::new(slots)?);
        let place = memory.at.cast::<Context>();
        let at = place.as_ptr();
        // SAFETY: the memory is ours alone, zeroed, whole pages and long enough. `cpu` is moved bitwise into its field, and its box is freed
        // without dropping the value; every other field is plain data (integers, atomics) for which zero is valid.
        let ctx = unsafe {
            let raw = Box::into_raw(cpu);
            std::ptr::copy_nonoverlapping(raw, &raw mut (*at).cpu, 1);
            drop(Box::from_raw(raw.cast::<std::mem::MaybeUninit<Cpu>>()));
            &mut *at
        };
        for cache in &mut ctx.jump_cache {
            cache.initialize();
        }
        ctx.code_map.initialize();
        ctx.host_mxcsr = 0x1f80;
        ctx.bounce_at = &raw const ctx.bounce as u64;
        Ok(ContextBox {
            shared: Arc::new(Shared {
                at: place,
                memory,
                kicked: AtomicBool::new(false),
                user_code: OnceLock::new(),
            }),
        })
    }

    pub fn slots(&self) -> Slots {
        Slots(self.shared.memory.clone())
    }

    pub fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(self.shared.clone()))
    }

    /// Calls the engine out of translated code, and no further. Does not keep the context, which holds who keeps this.
    pub fn nudge(&self) -> impl Fn() + Send + Sync + use<> {
        let shared = Arc::downgrade(&self.shared);
        move || {
            if let Some(shared) = shared.upgrade() {
                shared.call_out();
            }
        }
    }

    /// Calls this one too, from now on, whenever the engine is called out of translated code.
    pub fn call_also(&self, user_code: Arc<dyn Kick>) {
        let _ = self.shared.user_code.set(user_code);
    }

    /// Has the engine's loop come by soon.
    pub fn call_out(&self) {
        self.shared.call_out();
    }

    /// Takes a kick, and lets back edges pass again.
    pub fn take_kick(&mut self) -> bool {
        if !self.is_kicked() {
            return false;
        }
        let target = &raw const self.poll_target as u64;
        self.poll.store(target, Ordering::SeqCst);
        let mask = FIRST_INDEX_MASK as u32;
        self.jump_mask.store(mask, Ordering::SeqCst);
        self.shared.kicked.swap(false, Ordering::SeqCst)
    }

    /// True while a kick waits to be taken.
    pub fn is_kicked(&self) -> bool {
        self.poll.load(Ordering::SeqCst) != &raw const self.poll_target as u64
    }

    /// The CPU, and whether a kick waits to be taken.
    pub fn cpu_and_call(&mut self) -> (&mut Cpu, impl Fn() -> bool + use<>) {
        let shared = self.shared.clone();
        let called = move || {
            let context = shared.at.as_ptr();
            // SAFETY: the context lives as long as `shared`; the field is atomic, and the address of another is only compared with.
            unsafe {
                (*context).poll.load(Ordering::SeqCst) != &raw const (*context).poll_target as u64
            }
        };
        (&mut self.cpu, called)
    }

    pub fn as_ptr(&self) -> *mut Context {
        self.shared.at.as_ptr()
    }
}

impl std::ops::Deref for ContextBox {
    type Target = Context;
    fn deref(&self) -> &Context {
        // SAFETY: alive while `shared` is; kickers only touch atomics, so a shared borrow is sound.
        unsafe { self.shared.at.as_ref() }
    }
}

impl std::ops::DerefMut for ContextBox {
    fn deref_mut(&mut self) -> &mut Context {
        // SAFETY: `ContextBox` is the only way to the non-atomic fields and is borrowed mutably.
        unsafe { &mut *self.shared.at.as_ptr() }
    }
}

struct Kicker(Arc<Shared>);

/// An address at which nothing is ever mapped (below vm.mmap_min_addr).
const NOWHERE: u64 = 8;

impl Kick for Kicker {
    fn kick(&self) {
        self.0.kicked.store(true, Ordering::SeqCst);
        self.0.call_out();
    }
}

impl Shared {
    /// Makes every back edge and indirect branch leave translated code.
    fn call_out(&self) {
        let context = self.at.as_ptr();
        // SAFETY: the context lives as long as `shared`; both fields are atomic and the only ones that are touched.
        unsafe {
            (*context).jump_mask.store(KICKED_MASK, Ordering::SeqCst);
            (*context).poll.store(NOWHERE, Ordering::SeqCst);
        }
        if let Some(user_code) = self.user_code.get() {
            user_code.kick();
        }
    }
}

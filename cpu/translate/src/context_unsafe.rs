//! The owned context: allocated once, at one address for the life of the engine, and shared with kickers.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use doppel_x86::{Cpu, Kick};

use crate::context::Context;
use crate::jump_cache::FIRST_INDEX_MASK;

/// The owned context, at a fixed address; shared with kickers, which touch nothing but `poll`.
pub(crate) struct ContextBox {
    shared: Arc<Shared>,
}

struct Shared {
    at: NonNull<Context>,
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
        // SAFETY: made by `Box::into_raw` in `ContextBox::new`, and this is the last owner.
        drop(unsafe { Box::from_raw(self.at.as_ptr()) });
    }
}

impl ContextBox {
    pub fn new(cpu: Box<Cpu>) -> Self {
        let mut place = Box::<Context>::new_zeroed();
        let at = place.as_mut_ptr();
        // SAFETY: `cpu` is moved bitwise into its field, and its box is freed without dropping the value;
        // every other field is plain data (integers, atomics) for which zero is valid.
        let mut ctx = unsafe {
            let raw = Box::into_raw(cpu);
            std::ptr::copy_nonoverlapping(raw, &raw mut (*at).cpu, 1);
            drop(Box::from_raw(raw.cast::<std::mem::MaybeUninit<Cpu>>()));
            place.assume_init()
        };
        for cache in &mut ctx.jump_cache {
            cache.initialize();
        }
        ctx.code_map.initialize();
        ctx.host_mxcsr = 0x1f80;
        ctx.bounce_at = &raw const ctx.bounce as u64;
        let at = NonNull::from(Box::leak(ctx));
        ContextBox {
            shared: Arc::new(Shared {
                at,
                kicked: AtomicBool::new(false),
                user_code: OnceLock::new(),
            }),
        }
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
            (*context).jump_mask.store(0, Ordering::SeqCst);
            (*context).poll.store(NOWHERE, Ordering::SeqCst);
        }
        if let Some(user_code) = self.user_code.get() {
            user_code.kick();
        }
    }
}

//! The host side of a serial port or a console.
//!
//! A back-end is connected once, but a reboot makes a new device: [`CharLink`] is what the back-end knows, and it
//! passes calls on to the device of the day.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use doppel_device::{Backed, CharSink, CharSource, Disconnected};

/// Where a serial port's bytes go and come from.
#[derive(Clone)]
pub struct SerialBackend {
    /// Takes what the guest sends.
    pub sink: Arc<dyn CharSink>,
    /// Gives what the guest receives.
    pub source: Arc<dyn CharSource>,
}

impl SerialBackend {
    /// Nobody listens, nobody speaks.
    pub fn none() -> Self {
        SerialBackend {
            sink: Arc::new(Disconnected),
            source: Arc::new(Disconnected),
        }
    }
}

impl std::fmt::Debug for SerialBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialBackend")
    }
}

/// A device as its back-end sees it, whichever boot it belongs to.
#[derive(Default)]
pub struct CharLink(Mutex<Option<Weak<dyn Backed>>>);

impl CharLink {
    /// From now on this is the device.
    pub fn connect(&self, device: Weak<dyn Backed>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(device);
    }

    fn device(&self) -> Option<Arc<dyn Backed>> {
        let device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        device.as_ref().and_then(Weak::upgrade)
    }
}

impl Backed for CharLink {
    fn backend_ready(&self) {
        if let Some(device) = self.device() {
            device.backend_ready();
        }
    }
}

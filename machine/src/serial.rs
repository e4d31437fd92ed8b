//! The serial port's host side.
//!
//! A back-end is connected once, but a reboot makes a new UART: [`SerialLink`] is what the back-end knows, and it
//! passes calls on to the UART of the day.

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

/// The UART as the back-end sees it, whichever boot it belongs to.
#[derive(Default)]
pub struct SerialLink(Mutex<Option<Weak<dyn Backed>>>);

impl SerialLink {
    /// From now on this is the UART.
    pub fn connect(&self, uart: Weak<dyn Backed>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(uart);
    }

    fn uart(&self) -> Option<Arc<dyn Backed>> {
        let uart = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        uart.as_ref().and_then(Weak::upgrade)
    }
}

impl Backed for SerialLink {
    fn backend_ready(&self) {
        if let Some(uart) = self.uart() {
            uart.backend_ready();
        }
    }
}

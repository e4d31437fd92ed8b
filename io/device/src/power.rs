//! What a guest may ask of the machine as a whole.

/// A request that ends or restarts the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off (ACPI S5).
    PowerOff,
    /// Reset of the whole machine (i8042, port 0x92, 0xcf9, ACPI reset register).
    Reset,
    /// The debug-exit port: end with this status.
    Exit(u8),
}

/// Who carries requests out. Called by chips under their lock, so it only notes the request and wakes somebody.
pub trait PowerControl: Send + Sync {
    /// Notes a request; the first one counts.
    fn request(&self, request: PowerRequest);
}

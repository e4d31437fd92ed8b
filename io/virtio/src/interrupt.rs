//! How a device reaches its driver.

/// Interrupts of a device, as its threads see them. Every call goes straight to the interrupt controller.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used. Whether the driver wants to know is for the caller to ask the ring.
    fn queue(&self, index: u16);

    /// The configuration space changed.
    fn config(&self);

    /// The device can go on only after a reset (virtio 1.2, 2.1.1: DEVICE_NEEDS_RESET). `why` is for the log.
    fn needs_reset(&self, why: &str);
}

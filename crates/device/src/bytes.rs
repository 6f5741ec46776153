//! Streams of bytes that leave a device.

/// Takes the output of a serial port or a debug console.
pub trait ByteSink: Send + Sync {
    /// Takes as many bytes from the front of `bytes` as there is room for and returns how many. Does not block: when
    /// it returns less than `bytes.len()` the owner calls the device's own "there is room again" method later.
    fn write(&self, bytes: &[u8]) -> usize;
}

//! What a guest can ask of the machine as a whole.

/// A request that a guest made through a power control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PowerRequest {
    /// Switch the machine off (ACPI S5).
    PowerOff,
    /// Restart the machine.
    Reset,
    /// End the machine and report this status to whoever started it (`isa-debug-exit`).
    Exit(u32),
}

/// Takes power requests. The vCPU that made the request may run on for a few instructions: the sink only notes it.
pub trait PowerSink: Send + Sync {
    /// Notes a request. The first one that ends or restarts the machine wins.
    fn request(&self, request: PowerRequest);
}

//! What the core asks of its engine.

/// The host side of a guest physical page.
#[derive(Clone, Copy, Debug)]
pub struct HostPage {
    /// Host address of the page's first byte.
    pub host: *mut u8,
    /// Stores may go there directly (false for ROM).
    pub writable: bool,
}

/// How a device access ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum IoOutcome {
    /// Done.
    Done,
    /// The answer comes later.
    Parked,
}

/// The vCPU's surroundings. All calls come from the thread that runs the vCPU.
pub trait Env {
    /// The host memory behind guest physical page number `page`; `None` where
    /// there is none (device registers, holes).
    fn host_page(&mut self, page: u64) -> Option<HostPage>;
    /// Page `page` is about to get a write tag in this vCPU's TLB. `false`
    /// refuses it: the page holds translated code or is watched, and every
    /// store must be announced by [`Self::code_written`].
    fn allow_write_tag(&mut self, page: u64) -> bool;
    /// `len` bytes at guest physical address `gpa`, in one page without a write
    /// tag, have been stored. `true` if code was invalidated: the block being
    /// executed may be among it.
    fn code_written(&mut self, gpa: u64, len: u64) -> bool;
    /// Reads a device register of 1 to 64 bytes.
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> IoOutcome;
    /// Writes a device register of 1 to 64 bytes.
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> IoOutcome;
    /// Reads a port of 1, 2 or 4 bytes.
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> IoOutcome;
    /// Writes a port of 1, 2 or 4 bytes.
    fn port_write(&mut self, port: u16, data: &[u8]) -> IoOutcome;
    /// CPUID.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// An MSR that the core does not own (APIC, TSC, MTRR…). `None` is #GP(0).
    fn read_msr(&mut self, index: u32) -> Option<u64>;
    /// As [`Self::read_msr`]; `false` is #GP(0).
    fn write_msr(&mut self, index: u32, value: u64) -> bool;
    /// The guest's time stamp counter.
    fn tsc(&mut self) -> u64;
    /// CR8: bits 7:4 of the task priority.
    fn cr8(&mut self) -> u8;
    /// Sets CR8.
    fn set_cr8(&mut self, value: u8);
    /// Stops all other vCPUs at instruction borders until
    /// [`Self::end_exclusive`]. For locked accesses that one host instruction
    /// cannot make.
    fn begin_exclusive(&mut self);
    /// Lets the other vCPUs go on.
    fn end_exclusive(&mut self);
    /// Code is about to be decoded from page `page`: `granules` has a bit for
    /// each 64 bytes of it. From now on stores there must reach
    /// [`Self::code_written`] on every vCPU. `true` if this vCPU has to take back
    /// its own write tags of the page.
    fn code_page(&mut self, page: u64, granules: u64) -> bool;
    /// `len` bytes of the engine's own memory at `at`, whole pages, are about to
    /// be filled for the first time: bringing them in together is cheaper than
    /// by a page fault each. Doing nothing is right too.
    fn populate(&mut self, at: *mut u8, len: usize) {
        let _ = (at, len);
    }
    /// The guest executed PAUSE.
    fn pause(&mut self);
    /// Executable memory for native thunks is wanted: places `code` and returns
    /// its address, or `None` when there is no room.
    fn place_thunk(&mut self, code: &[u8]) -> Option<*const u8>;
}

//! The driver's side of rings, devices wired to fakes, and what a hostile driver does: for tests and fuzz targets.

mod driver;
mod hostile;
mod sources;

use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind,
    host::{HugePages, Mapping},
};

pub use driver::Driver;
pub use hostile::{exercise_device, exercise_ring};
pub use sources::{Counting, Counts};

/// Bytes of RAM that [`memory`] has, from address 0 on.
pub const RAM: u64 = 1 << 20;

/// One MiB of guest memory.
///
/// # Panics
/// When the host has none.
pub fn memory() -> MemoryView {
    let mapping = Mapping::new("virtio-test", RAM, HugePages::Off).expect("a megabyte of memory");
    let region = mapping.region("ram", Gpa(0), 0, RAM, RegionKind::Ram);
    MemoryView::new(GuestMemory::new(alloc::vec![region]).expect("one region"))
}

//! Feature bits that belong to no device type (§6).

/// Indirect descriptors (`VIRTIO_F_INDIRECT_DESC`).
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Notifications at an index (`VIRTIO_F_EVENT_IDX`).
pub const EVENT_IDX: u64 = 1 << 29;
/// The device follows version 1 of the specification (`VIRTIO_F_VERSION_1`).
pub const VERSION_1: u64 = 1 << 32;
/// Packed virtqueues (`VIRTIO_F_RING_PACKED`).
pub const RING_PACKED: u64 = 1 << 34;
/// Buffers are used in the order in which they were made available (`VIRTIO_F_IN_ORDER`).
pub const IN_ORDER: u64 = 1 << 35;
/// A single queue can be reset (`VIRTIO_F_RING_RESET`).
pub const RING_RESET: u64 = 1 << 40;

/// What every device of ours offers.
pub const OFFERED: u64 =
    INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | IN_ORDER | RING_RESET;

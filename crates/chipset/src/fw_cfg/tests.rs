use super::*;
use alloc::sync::Arc;
use caisson_device::testing::{port_read, port_write};
use caisson_memory::{
    GuestMemory, RegionKind,
    host::{HugePages, Mapping},
};

const RAM: u64 = 4 << 20;

fn memory() -> MemoryView {
    let mapping = Mapping::new("test", RAM, HugePages::Off).unwrap();
    let region = mapping.region("ram", Gpa(0), 0, RAM, RegionKind::Ram);
    MemoryView::new(GuestMemory::new(vec![region]).unwrap())
}

fn device() -> (FwCfg, MemoryView) {
    let mut items = Items::new();
    items.add_u16(keys::CPU_COUNT, 4).unwrap();
    items
        .add(keys::CMDLINE_DATA, Arc::new(*b"console=ttyS0\0"))
        .unwrap();
    items
        .add_file("etc/zebra", Arc::new(vec![0xAA; 5000]))
        .unwrap();
    items.add_file("bootorder", Arc::new(*b"disk")).unwrap();
    items
        .add_writable_file("etc/note", vec![1, 2, 3, 4])
        .unwrap();
    let memory = memory();
    (FwCfg::new(items, memory.clone()), memory)
}

fn bytes(device: &mut FwCfg, key: u64, len: usize) -> Vec<u8> {
    port_write(device, 0x510, 2, key);
    (0..len)
        .map(|_| port_read(device, 0x511, 1) as u8)
        .collect()
}

const REQUEST: u64 = 0x1000;
const BUFFER: u64 = 0x10_0000;

/// Runs a DMA request and gives the control word that it leaves.
fn dma(device: &mut FwCfg, memory: &MemoryView, control: u32, len: u32, address: u64) -> u32 {
    let mut request = vec![];
    request.extend_from_slice(&control.to_be_bytes());
    request.extend_from_slice(&len.to_be_bytes());
    request.extend_from_slice(&address.to_be_bytes());
    memory.write(Gpa(REQUEST), &request).unwrap();
    port_write(device, 0x514, 4, 0);
    port_write(device, 0x518, 4, u64::from((REQUEST as u32).swap_bytes()));
    let mut status = [0; 4];
    memory.read(Gpa(REQUEST), &mut status).unwrap();
    u32::from_be_bytes(status)
}

fn at(memory: &MemoryView, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(Gpa(address), &mut bytes).unwrap();
    bytes
}

#[test]
fn the_interface_announces_itself() {
    let (mut device, _) = device();
    assert_eq!(bytes(&mut device, 0, 6), b"QEMU\0\0");
    assert_eq!(bytes(&mut device, 1, 4), [3, 0, 0, 0]);
    assert_eq!(
        port_read(&mut device, 0x514, 8),
        u64::from_le_bytes(*b"QEMU CFG")
    );
    assert_eq!(
        port_read(&mut device, 0x518, 4),
        u64::from(u32::from_le_bytes(*b" CFG"))
    );
    assert_eq!(bytes(&mut device, 5, 2), [4, 0]);
    assert_eq!(bytes(&mut device, 0x7777, 2), [0, 0], "no such item");
}

#[test]
fn the_directory_is_sorted_and_leads_to_the_files() {
    let (mut device, _) = device();
    let directory = bytes(&mut device, 0x19, 4 + 3 * 64);
    assert_eq!(directory[..4], [0, 0, 0, 3]);
    let entries: Vec<_> = directory[4..]
        .chunks(64)
        .map(|entry| {
            let name = entry[8..].split(|byte| *byte == 0).next().unwrap();
            (big_endian(&entry[..4]), big_endian(&entry[4..6]), name)
        })
        .collect();
    let expected: [(u64, u64, &[u8]); 3] = [
        (4, 0x20, b"bootorder"),
        (4, 0x21, b"etc/note"),
        (5000, 0x22, b"etc/zebra"),
    ];
    assert_eq!(entries, expected);
    assert_eq!(bytes(&mut device, 0x20, 5), b"disk\0");
    assert_eq!(device.file("bootorder"), Some(&b"disk"[..]));
    assert_eq!(device.file("none"), None);
}

#[test]
fn dma_reads_in_steps() {
    let (mut device, memory) = device();
    let select = 0x15 << 16 | control::SELECT | control::READ;
    assert_eq!(dma(&mut device, &memory, select, 7, BUFFER), 0);
    assert_eq!(at(&memory, BUFFER, 8), b"console\0");
    assert_eq!(dma(&mut device, &memory, control::SKIP, 1, 0), 0);
    assert_eq!(dma(&mut device, &memory, control::READ, 10, BUFFER), 0);
    assert_eq!(
        at(&memory, BUFFER, 10),
        b"ttyS0\0\0\0\0\0",
        "zeros after the end"
    );
    assert_eq!(
        dma(&mut device, &memory, 0x20 << 16 | control::SELECT, 9, 0),
        0
    );
    assert_eq!(port_read(&mut device, 0x511, 1), u64::from(b'd'));
}

#[test]
fn one_eight_byte_write_starts_a_transfer_too() {
    let (mut device, memory) = device();
    let mut request = vec![0, 0x20, 0, 10, 0, 0, 0, 4];
    request.extend_from_slice(&BUFFER.to_be_bytes());
    memory.write(Gpa(REQUEST), &request).unwrap();
    port_write(&mut device, 0x514, 8, REQUEST.swap_bytes());
    assert_eq!(at(&memory, BUFFER, 4), b"disk");
}

#[test]
fn only_declared_items_can_be_written() {
    let (mut device, memory) = device();
    memory.write(Gpa(BUFFER), &[9, 8, 7, 6, 5]).unwrap();
    let write = |key: u32| key << 16 | control::SELECT | control::WRITE;
    assert_eq!(dma(&mut device, &memory, write(0x21), 2, BUFFER), 0);
    assert_eq!(dma(&mut device, &memory, control::WRITE, 1, BUFFER), 0);
    assert_eq!(device.file("etc/note"), Some(&[9, 8, 9, 4][..]));
    assert_eq!(
        dma(&mut device, &memory, control::WRITE, 2, BUFFER),
        control::ERROR,
        "too long"
    );
    for key in [0x00, 0x19, 0x20, 0x7777] {
        assert_eq!(
            dma(&mut device, &memory, write(key), 1, BUFFER),
            control::ERROR,
            "{key:#x}"
        );
    }
    device.reset(ResetKind::System);
    assert_eq!(device.file("etc/note"), Some(&[1, 2, 3, 4][..]));
}

#[test]
fn bad_addresses_and_lengths_are_errors() {
    let (mut device, memory) = device();
    let read = 0x22 << 16 | control::SELECT | control::READ;
    for (len, address) in [
        (5000, RAM - 4999),
        (5000, u64::MAX),
        (5000, u64::MAX - 4999),
        (6000, RAM - 5500),
        (u32::MAX, BUFFER),
        (MAX_PADDING + 5001, BUFFER),
    ] {
        assert_eq!(
            dma(&mut device, &memory, read, len, address),
            control::ERROR,
            "{len} {address:#x}"
        );
    }
    assert_eq!(
        dma(&mut device, &memory, read, MAX_PADDING + 5000, BUFFER),
        0
    );
    assert_eq!(dma(&mut device, &memory, control::READ, 0, BUFFER), 0);
    for request in [RAM - 15, RAM, u64::MAX, u64::MAX - 15] {
        port_write(&mut device, 0x514, 8, request.swap_bytes());
    }
}

#[test]
fn offsets_do_not_wrap() {
    let (mut device, memory) = device();
    let skip = 0x22 << 16 | control::SELECT | control::SKIP;
    assert_eq!(dma(&mut device, &memory, skip, u32::MAX, 0), 0);
    assert_eq!(dma(&mut device, &memory, control::SKIP, u32::MAX, 0), 0);
    assert_eq!(port_read(&mut device, 0x511, 1), 0);
    assert_eq!(
        dma(&mut device, &memory, control::WRITE, 1, BUFFER),
        control::ERROR
    );
}

#[test]
fn other_widths_do_nothing() {
    let (mut device, _) = device();
    bytes(&mut device, 0, 1);
    port_write(&mut device, 0x510, 1, 0x20);
    port_write(&mut device, 0x511, 1, 0x20);
    port_write(&mut device, 0x514, 2, 0x20);
    port_write(&mut device, 0x516, 4, 0x20);
    assert_eq!(port_read(&mut device, 0x511, 1), u64::from(b'E'));
    assert_eq!(port_read(&mut device, 0x510, 2), 0xFFFF);
}

#[test]
fn items_are_checked_when_added() {
    let mut items = Items::new();
    let data: ItemData = Arc::new([0u8; 0]);
    assert_eq!(items.add(0, data.clone()), Err(ItemError::DuplicateKey(0)));
    for key in [0x19, 0x20, 0x3FFF, 0x7FFF] {
        assert_eq!(
            items.add(key, data.clone()),
            Err(ItemError::ReservedKey(key))
        );
    }
    assert_eq!(items.add(0x8000, data.clone()), Ok(()));
    assert_eq!(items.add_file("a", data.clone()), Ok(()));
    assert_eq!(
        items.add_writable_file("a", vec![]),
        Err(ItemError::DuplicateFile("a".into()))
    );
    for name in ["", "white space", "é", &"x".repeat(56)] {
        assert_eq!(
            items.add_file(name, data.clone()),
            Err(ItemError::BadName(name.into()))
        );
    }
    assert_eq!(items.add_file(&"x".repeat(55), data), Ok(()));
}

#[test]
fn state_survives_save_and_restore() {
    let (mut device, memory) = device();
    memory.write(Gpa(BUFFER), &[9, 8]).unwrap();
    let write = 0x21 << 16 | control::SELECT | control::WRITE;
    assert_eq!(dma(&mut device, &memory, write, 2, BUFFER), 0);
    let record = device.save().unwrap();
    let (mut other, _) = self::device();
    other.restore(&record).unwrap();
    assert_eq!(other.file("etc/note"), Some(&[9, 8, 3, 4][..]));
    assert_eq!(port_read(&mut other, 0x511, 1), 3);
    let mut different = FwCfg::new(Items::new(), memory);
    assert!(different.restore(&record).is_err());
}

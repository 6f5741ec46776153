//! A machine on the software CPU that is saved and restored.

use std::sync::{Arc, OnceLock};

use caisson_config::{HugePages, OnReboot};
use caisson_hypervisor_soft::Soft;
use caisson_machine::{
    BootSpec, CpuSpec, Input, Machine, MachineSpec, MemorySpec, OnCrash, SavedMachine, StreamEnd,
};

/// A Multiboot 1 kernel (specification 0.6.96 §3.1) of one instruction, a jump to itself.
fn kernel() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES: u32 = 1 << 16;
    const AT: u32 = 0x10_0000;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES);
    let header = [MAGIC, ADDRESSES, checksum, AT, AT, 0, 0, AT + 32];
    let mut image: Vec<u8> = header
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect();
    image.extend([0xeb, 0xfe]);
    image
}

fn spec() -> MachineSpec {
    MachineSpec {
        name: "fuzz".into(),
        hypervisor: Arc::new(Soft::default()),
        vcpus: 1,
        cpu: CpuSpec::host(),
        memory: MemorySpec {
            bytes: 16 << 20,
            hugepages: HugePages::Off,
        },
        boot: BootSpec {
            kernel: Input::bytes("kernel", kernel()),
            initrd: None,
            modules: vec![],
            cmdline: String::new(),
        },
        serial: [
            Some(Box::new(StreamEnd::new(std::io::sink()))),
            None,
            None,
            None,
        ],
        debugcon: None,
        debug_exit: Some(0xf4),
        virtio: Default::default(),
        rng: true,
        disks: Vec::new(),
        nets: Vec::new(),
        consoles: vec![Box::new(StreamEnd::new(std::io::sink()))],
        on_reboot: OnReboot::Stop,
        on_crash: OnCrash::End,
    }
}

/// The machine before its first instruction.
///
/// # Panics
/// It cannot be made.
pub fn sound() -> &'static SavedMachine {
    static SOUND: OnceLock<SavedMachine> = OnceLock::new();
    SOUND.get_or_init(|| {
        let machine = Machine::new(spec()).expect("a machine");
        machine.save_state().expect("it stands still")
    })
}

/// Restores `saved` and lets it run for a moment, or has it refused.
pub fn restore(saved: &SavedMachine) {
    if let Ok(machine) = Machine::restore_state(spec(), saved, |_| Ok(())) {
        let _ = machine
            .save_state()
            .expect("what was restored can be saved");
        if machine.start().is_ok() {
            std::thread::yield_now();
            machine.stop();
            machine.wait();
        }
    }
}

//! A partition with a little memory, and what its guest does to the bus.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use caisson_hypervisor::{
    Access, Availability, BusAnswer, Completion, Exit, Hypervisor, IoBus, Partition,
    PartitionConfig, Pending, Space, Vcpu,
    x86::{DescriptorTable, Gprs, Segment, VcpuState},
};
use caisson_hypervisor_kvm::Kvm;
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind, Vtl,
    host::{HugePages, Mapping},
};

/// Bytes of RAM.
pub(crate) const RAM: u64 = 2 << 20;
/// Where the guest's code begins.
pub(crate) const CODE: u64 = 0x8000;
/// Long mode: page tables from 0x1000 on map the first 8 MiB to themselves.
const PML4: u64 = 0x1000;
const LARGE_PAGES: u64 = 4;
/// Interrupts: table, descriptors and handlers.
const IDT: u64 = 0x10000;
const GDT: u64 = 0x11000;
const HANDLERS: u64 = 0x12000;
const HANDLER_LEN: u64 = 32;
/// The port that handlers write their vector to.
pub(crate) const TOLD: u64 = 0x70;

/// A partition and its memory.
pub(crate) struct Board {
    pub(crate) partition: Arc<dyn Partition>,
    pub(crate) memory: MemoryView,
}

/// `len` bytes of RAM from address zero on.
pub(crate) fn ram(len: u64) -> GuestMemory {
    let mapping = Mapping::new("test", len, HugePages::Off).unwrap();
    let region = mapping.region("ram", Gpa(0), 0, len, RegionKind::Ram);
    GuestMemory::new(vec![region]).unwrap()
}

/// A partition of `backend`.
pub(crate) fn board_with(backend: &dyn Hypervisor, config: PartitionConfig) -> Board {
    let memory = MemoryView::new(config.memory.clone());
    Board {
        partition: backend.create_partition(config).unwrap(),
        memory,
    }
}

/// With 2 MiB of RAM.
pub(crate) fn board_of(backend: &dyn Hypervisor, vcpus: u32) -> Board {
    board_with(backend, PartitionConfig::new(vcpus, ram(RAM)))
}

/// Whether there is KVM. Says so where there is none.
pub(crate) fn has_kvm() -> bool {
    let probe = Kvm.probe();
    if probe.availability == Availability::Absent {
        println!("not tested: {}", probe.reason);
        return false;
    }
    true
}

/// `None` where KVM is absent.
pub(crate) fn board() -> Option<Board> {
    has_kvm().then(|| board_of(&Kvm, 1))
}

impl Board {
    /// The state in which the vCPU starts `code` in 64-bit mode at CPL 0.
    pub(crate) fn long_mode(&self, vcpu: &dyn Vcpu, code: &[u8]) -> VcpuState {
        let table = |at: u64, entry: u64| self.memory.write(Gpa(at), &entry.to_le_bytes()).unwrap();
        table(PML4, PML4 + 0x1003);
        table(PML4 + 0x1000, PML4 + 0x2003);
        for page in 0..LARGE_PAGES {
            table(PML4 + 0x2000 + 8 * page, page << 21 | 0x83);
        }
        self.memory.write(Gpa(CODE), code).unwrap();
        let mut state = vcpu.state(Vtl::VTL0).unwrap();
        state.gprs = Gprs {
            rip: CODE,
            rflags: 2,
            ..Gprs::default()
        };
        state.gprs.regs[4] = 0x7000;
        state.cr0 = 0x8000_0031;
        state.cr3 = PML4;
        // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
        state.cr4 = 0x4_0620;
        state.efer = 0x500;
        let flat = |attributes| Segment {
            selector: 8,
            base: 0,
            limit: u32::MAX,
            attributes,
            unusable: false,
        };
        state.segments.cs = flat(0xa09b);
        state.segments.ss = flat(0xc093);
        (state.segments.ds, state.segments.es) = (flat(0xc093), flat(0xc093));
        state.xsave.xcr0 = 3;
        state
    }

    /// vCPU 0, about to start `code`.
    pub(crate) fn vcpu(&self, code: &[u8]) -> Box<dyn Vcpu> {
        let mut vcpu = self.partition.create_vcpu(0).unwrap();
        let state = self.long_mode(&*vcpu, code);
        vcpu.set_state(Vtl::VTL0, &state).unwrap();
        vcpu
    }

    /// vCPU 0, about to start `code` with its local APIC on (x2APIC). Each
    /// interrupt writes its vector to port [`TOLD`] and ends itself.
    pub(crate) fn vcpu_with_interrupts(&self, code: &[u8]) -> Box<dyn Vcpu> {
        for vector in 0..256u64 {
            let handler = HANDLERS + vector * HANDLER_LEN;
            let code = [
                // push rax; push rcx; push rdx; mov al, vector; out 0x70, al
                &[0x50u8, 0x51, 0x52, 0xb0, vector as u8, 0xe6, TOLD as u8][..],
                // mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr
                &[0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30],
                // pop rdx; pop rcx; pop rax; iretq
                &[0x5a, 0x59, 0x58, 0x48, 0xcf],
            ]
            .concat();
            self.memory.write(Gpa(handler), &code).unwrap();
            // A present 64-bit interrupt gate.
            let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            let gate = u128::from(gate).to_le_bytes();
            self.memory.write(Gpa(IDT + 16 * vector), &gate).unwrap();
        }
        let code_segment = 0x00af_9b00_0000_ffffu64;
        let descriptors = [0u64, code_segment, 0x00cf_9300_0000_ffff];
        for (n, descriptor) in (0..).zip(descriptors) {
            let at = Gpa(GDT + 8 * n);
            self.memory.write(at, &descriptor.to_le_bytes()).unwrap();
        }
        let mut vcpu = self.partition.create_vcpu(0).unwrap();
        let mut state = self.long_mode(&*vcpu, code);
        state.gdtr = DescriptorTable {
            base: GDT,
            limit: 23,
        };
        state.idtr = DescriptorTable {
            base: IDT,
            limit: 0xfff,
        };
        // Enabled, x2APIC; spurious vector with the software switch on.
        state.apic.base |= 3 << 10;
        state.apic.regs[0x0f] = 0x1ff;
        vcpu.set_state(Vtl::VTL0, &state).unwrap();
        vcpu
    }
}

/// Notes what is written and gives what was prepared; parks what it is told to.
#[derive(Default)]
pub(crate) struct Log {
    pub(crate) writes: Mutex<Vec<(Space, u64, Vec<u8>)>>,
    pub(crate) park: Mutex<Vec<u64>>,
    pub(crate) ends: Mutex<Vec<u8>>,
}

impl Log {
    /// The vectors that the guest's handlers told.
    pub(crate) fn vectors(&self) -> Vec<u8> {
        let writes = self.writes.lock().unwrap();
        let told = writes.iter().filter(|(_, address, _)| *address == TOLD);
        told.map(|(.., data)| data[0]).collect()
    }

    /// Waits until the handlers told `vectors` since the last time.
    pub(crate) fn wait_for(&self, vectors: &[u8]) {
        let started = Instant::now();
        while self.vectors().len() < vectors.len() && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.vectors(), vectors);
        self.writes.lock().unwrap().clear();
    }
}

impl IoBus for Log {
    fn read(&self, access: Access, data: &mut [u8]) -> BusAnswer {
        if self.park.lock().unwrap().contains(&access.address.0) {
            return BusAnswer::Park;
        }
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = (access.address.0 as u8).wrapping_add(n as u8);
        }
        BusAnswer::Done
    }
    fn write(&self, access: Access, data: &[u8]) -> BusAnswer {
        if self.park.lock().unwrap().contains(&access.address.0) {
            return BusAnswer::Park;
        }
        let entry = (access.space, access.address.0, data.to_vec());
        self.writes.lock().unwrap().push(entry);
        BusAnswer::Done
    }
    fn eoi(&self, _: Vtl, vector: u8) {
        self.ends.lock().unwrap().push(vector);
    }
    fn acknowledge_pic(&self) -> u8 {
        0x20
    }
}

/// Runs until the guest writes to port 0xF4, which parks.
pub(crate) fn run(vcpu: &mut dyn Vcpu, log: &Log) {
    *log.park.lock().unwrap() = vec![0xf4];
    let exit = vcpu.run(log);
    let end = Pending::Write {
        space: Space::Pio,
        address: Gpa(0xf4),
        data: vec![0],
    };
    assert_eq!(exit, Exit::Pending(end), "{:x?}", vcpu.state(Vtl::VTL0));
    vcpu.complete(Completion::Abandoned).unwrap();
}

/// xor eax, eax; out 0xf4, al
pub(crate) const END: [u8; 4] = [0x31, 0xc0, 0xe6, 0xf4];

/// sti; l: hlt; jmp l
pub(crate) const SLEEP: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];

/// Runs `vcpu` in a thread of its own while `outside` does what it does.
pub(crate) fn while_running(vcpu: &mut dyn Vcpu, log: &Log, outside: impl FnOnce()) {
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| vcpu.run(log));
        // Also where `outside` fails: the scope waits for the guest.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(outside));
        kick.kick();
        let exit = guest.join().unwrap();
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
        assert_eq!(exit, Exit::Kicked);
    });
}

//! The least that runs a guest on KVM: opens `/dev/kvm`, makes a virtual machine with local APICs, one vCPU and memory,
//! loads a PVH kernel, runs it, and knows three things that a guest may do at ports: power off, write to the debug
//! console, and anything else, which does nothing. No CPUID, no tables, no threads, no options: what a virtual machine
//! monitor takes beyond this is its own.
//!
//! `bare-kvm MEBIBYTES KERNEL`

mod elf;

use std::{
    error::Error,
    fs,
    io::{self, Write},
    process::ExitCode,
};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

/// The debug console's port.
const DEBUG_CONSOLE: u16 = 0xe9;
/// PM1a control, and what switches the machine off there: sleep type 5 and sleep enable.
const PM1_CONTROL: u16 = 0x604;
const OFF: u16 = 5 << 10 | 1 << 13;
/// Inputs of an I/O APIC that nobody has.
const IOAPIC_PINS: u64 = 24;
/// CR0.PE and ET.
const CR0: u64 = 0x11;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bare-kvm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(mib), Some(path)) = (arguments.next(), arguments.next()) else {
        return Err("usage: bare-kvm MEBIBYTES KERNEL".into());
    };
    let bytes: u64 = mib.parse::<u64>()? << 20;

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    // The kind of interrupt controller that Caisson asks for, and the cheaper one.
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [IOAPIC_PINS, 0, 0, 0],
        ..Default::default()
    })?;
    let mut memory = Memory::new(usize::try_from(bytes)?)?;
    let entry = elf::load(&fs::read(&path)?, memory.bytes()).ok_or("not a PVH kernel that fits")?;
    let slot = kvm_userspace_memory_region {
        memory_size: bytes,
        userspace_addr: memory.start as u64,
        ..Default::default()
    };
    // SAFETY: the mapping lives until the process ends, and nothing refers into it from here on.
    unsafe { vm.set_user_memory_region(slot)? };
    let mut vcpu = vm.create_vcpu(0)?;
    enter_at(&vcpu, entry)?;
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(DEBUG_CONSOLE, bytes) => {
                let mut out = io::stdout();
                out.write_all(bytes)?;
                out.flush()?;
            }
            VcpuExit::IoOut(PM1_CONTROL, bytes) if bytes == OFF.to_le_bytes() => return Ok(()),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::IoIn(_, bytes) | VcpuExit::MmioRead(_, bytes) => bytes.fill(0xff),
            other => return Err(format!("the guest ends with {other:?}").into()),
        }
    }
}

/// The state in which PVH enters a kernel: flat 32-bit segments, no paging.
fn enter_at(vcpu: &VcpuFd, entry: u32) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = kvm_segment {
        limit: u32::MAX,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { type_: 11, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 = CR0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.into(),
        rflags: 2,
        ..Default::default()
    })
}

/// Guest memory.
struct Memory {
    start: *mut u8,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice disturbs nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    /// The memory, before any guest has it.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as the process lives; who calls this sees to it that no guest writes there yet.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

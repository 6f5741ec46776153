//! The vCPU runs 64-bit code set up by hand.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use caisson_hypervisor::{
    Access, BusAnswer, Exit, Hypervisor, IoBus, KickHandle, PartitionConfig, Space, Vcpu,
    x86::{Segment, VcpuState},
};
use caisson_hypervisor_soft::Soft;
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind, Vtl,
    host::{HugePages, Mapping},
};

/// Kicks the vCPU when the guest writes port 0xF4; keeps the value.
#[derive(Default)]
struct Bus {
    value: AtomicU64,
    kick: Mutex<Option<Arc<dyn KickHandle>>>,
}

impl IoBus for Bus {
    fn read(&self, _: Access, data: &mut [u8]) -> BusAnswer {
        data.fill(0xff);
        BusAnswer::Done
    }
    fn write(&self, access: Access, data: &[u8]) -> BusAnswer {
        if access.space == Space::Pio && access.address == Gpa(0xf4) {
            let mut v = [0; 8];
            v[..data.len()].copy_from_slice(data);
            self.value.store(u64::from_le_bytes(v), Ordering::SeqCst);
            if let Some(k) = &*self.kick.lock().unwrap() {
                k.kick();
            }
        }
        BusAnswer::Done
    }
    fn eoi(&self, _: Vtl, _: u8) {}
    fn acknowledge_pic(&self) -> u8 {
        0
    }
}

fn long_mode() -> VcpuState {
    let code = Segment {
        selector: 8,
        base: 0,
        limit: !0,
        attributes: 0xa09b,
        unusable: false,
    };
    let data = Segment {
        selector: 16,
        base: 0,
        limit: !0,
        attributes: 0xc093,
        unusable: false,
    };
    let mut s = VcpuState {
        cr0: 0x8000_0031,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0x500,
        ..VcpuState::default()
    };
    s.segments.cs = code;
    for d in [&mut s.segments.ss, &mut s.segments.ds, &mut s.segments.es] {
        *d = data;
    }
    s.segments.tr = Segment {
        selector: 24,
        base: 0,
        limit: 0x67,
        attributes: 0x8b,
        unusable: false,
    };
    s.segments.ldtr.unusable = true;
    s.gprs.rflags = 2;
    s.gprs.rip = 0x8000;
    s.gprs.regs[4] = 0x7000;
    s.xsave.xcr0 = 1;
    s
}

fn run(code: &[u8]) -> (u64, Box<dyn Vcpu>) {
    let (mut v, _) = start(code);
    let bus = Bus::default();
    *bus.kick.lock().unwrap() = Some(v.kick_handle());
    let exit = v.run(&bus);
    assert_eq!(exit, Exit::Kicked);
    (bus.value.load(Ordering::SeqCst), v)
}

/// A vCPU that will execute `code` at 0x8000, and its memory.
fn start(code: &[u8]) -> (Box<dyn Vcpu>, MemoryView) {
    let m = Mapping::new("guest", 2 << 20, HugePages::Off).unwrap();
    let memory =
        GuestMemory::new(vec![m.region("ram", Gpa(0), 0, 2 << 20, RegionKind::Ram)]).unwrap();
    let view = MemoryView::new(memory.clone());
    view.write_obj(Gpa(0x1000), &0x2003u64).unwrap();
    view.write_obj(Gpa(0x2000), &0x3003u64).unwrap();
    view.write_obj(Gpa(0x3000), &0x83u64).unwrap();
    view.write(Gpa(0x8000), code).unwrap();
    let p = Soft::default()
        .create_partition(PartitionConfig {
            vcpus: 1,
            memory,
            cpuid: None,
            tsc_hz: None,
            dirty: Default::default(),
        })
        .unwrap();
    let mut v = p.create_vcpu(0).unwrap();
    v.set_state(Vtl::VTL0, &long_mode()).unwrap();
    (v, view)
}

#[test]
fn loops_and_writes_a_port() {
    // xor eax,eax; mov ecx,N; l: add rax,rcx; dec ecx; jnz l; out 0xf4,eax; hlt
    let n: u32 = 50_000_000;
    let mut code = vec![0x31, 0xc0, 0xb9];
    code.extend(n.to_le_bytes());
    code.extend([0x48, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xf9, 0xe7, 0xf4, 0xf4]);
    let t = std::time::Instant::now();
    let (v, vcpu) = run(&code);
    println!("{:?} {:?}", t.elapsed(), vcpu.stats());
    let sum = u64::from(n) * (u64::from(n) + 1) / 2;
    assert_eq!(v, sum & 0xffff_ffff);
    assert_eq!(vcpu.stats().instructions, Some(2 + 3 * u64::from(n) + 1));
}

/// A device that loads other code where the guest just executed some, as a disk
/// does.
struct Loader {
    view: MemoryView,
    kick: Arc<dyn KickHandle>,
    values: Mutex<Vec<u8>>,
}

impl IoBus for Loader {
    fn read(&self, _: Access, data: &mut [u8]) -> BusAnswer {
        data.fill(0xff);
        BusAnswer::Done
    }
    fn write(&self, _: Access, data: &[u8]) -> BusAnswer {
        let mut values = self.values.lock().unwrap();
        values.push(data[0]);
        if values.len() == 3 {
            self.kick.kick();
        }
        // The immediate operand of MOV AL.
        self.view.write(Gpa(0x9001), &[data[0] + 1]).unwrap();
        BusAnswer::Done
    }
    fn eoi(&self, _: Vtl, _: u8) {}
    fn acknowledge_pic(&self) -> u8 {
        0
    }
}

#[test]
fn code_that_a_device_writes_is_executed() {
    // l: call 0x9000; out 0xf4,al; jmp l. At 0x9000: mov al,1; ret.
    let (mut vcpu, view) = start(&[0xe8, 0xfb, 0x0f, 0, 0, 0xe6, 0xf4, 0xeb, 0xf7]);
    view.write(Gpa(0x9000), &[0xb0, 1, 0xc3]).unwrap();
    let bus = Loader {
        view,
        kick: vcpu.kick_handle(),
        values: Mutex::default(),
    };
    assert_eq!(vcpu.run(&bus), Exit::Kicked);
    assert_eq!(*bus.values.lock().unwrap(), [1, 2, 3]);
}

#[test]
fn state_survives_a_save_and_restore() {
    let (_, mut vcpu) = run(&[0xb8, 0x2a, 0, 0, 0, 0xe7, 0xf4, 0xf4]);
    let s = vcpu.state(Vtl::VTL0).unwrap();
    vcpu.reset(Vtl::VTL0, false);
    assert_ne!(vcpu.state(Vtl::VTL0).unwrap().gprs, s.gprs);
    vcpu.set_state(Vtl::VTL0, &s).unwrap();
    let mut again = vcpu.state(Vtl::VTL0).unwrap();
    // Time has gone on.
    again.msrs.clone_from(&s.msrs);
    assert_eq!(again, s);
    assert_eq!(s.gprs.regs[0], 42);
}

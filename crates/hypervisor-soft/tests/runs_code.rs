//! The vCPU runs 64-bit code set up by hand.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use caisson_hypervisor::{
    Access, BusAnswer, Exit, Hypervisor, IoBus, KickHandle, PartitionConfig, Space, Vcpu,
    x86::{Segment, VcpuState},
};
use caisson_hypervisor_soft::{Soft, Tier};
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

const TIERS: [Tier; 2] = [Tier::Interpreted, Tier::Native];

fn run(tier: Tier, code: &[u8]) -> (u64, Box<dyn Vcpu>) {
    let (mut v, _) = start(tier, code);
    let bus = Bus::default();
    *bus.kick.lock().unwrap() = Some(v.kick_handle());
    let exit = v.run(&bus);
    assert_eq!(exit, Exit::Kicked);
    (bus.value.load(Ordering::SeqCst), v)
}

/// A vCPU that will execute `code` at 0x8000, and its memory.
fn start(tier: Tier, code: &[u8]) -> (Box<dyn Vcpu>, MemoryView) {
    let m = Mapping::new("guest", 2 << 20, HugePages::Off).unwrap();
    let memory =
        GuestMemory::new(vec![m.region("ram", Gpa(0), 0, 2 << 20, RegionKind::Ram)]).unwrap();
    let view = MemoryView::new(memory.clone());
    view.write_obj(Gpa(0x1000), &0x2003u64).unwrap();
    view.write_obj(Gpa(0x2000), &0x3003u64).unwrap();
    view.write_obj(Gpa(0x3000), &0x83u64).unwrap();
    view.write(Gpa(0x8000), code).unwrap();
    let p = Soft::new(tier)
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
    for tier in TIERS {
        let t = std::time::Instant::now();
        let (v, vcpu) = run(tier, &code);
        println!("{tier:?} {:?} {:?}", t.elapsed(), vcpu.stats());
        let sum = u64::from(n) * (u64::from(n) + 1) / 2;
        assert_eq!(v, sum & 0xffff_ffff);
        assert_eq!(
            vcpu.stats().instructions,
            Some(2 + 3 * u64::from(n) + 1),
            "{tier:?}"
        );
    }
}

#[test]
fn an_endless_loop_is_left_when_somebody_asks() {
    // Loops with live flags, through a call, over pages, and through a register.
    let loops: [&[u8]; 5] = [
        &[0xeb, 0xfe],
        // l: adc eax, 1; jnz l (never zero for long); jmp l
        &[0x83, 0xd0, 1, 0x75, 0xfb, 0xeb, 0xf9],
        // l: call f; jmp l; f: ret
        &[0xe8, 2, 0, 0, 0, 0xeb, 0xf9, 0xc3],
        // lea rax, [rip - 7]; jmp rax
        &[0x48, 0x8d, 5, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xe0],
        // jmp 0x9000, where a jump leads back
        &[0xe9, 0xfb, 0x0f, 0, 0],
    ];
    for tier in TIERS {
        for code in loops {
            let (mut vcpu, view) = start(tier, code);
            // jmp 0x8000
            view.write(Gpa(0x9000), &[0xe9, 0xfb, 0xef, 0xff, 0xff])
                .unwrap();
            let kick = vcpu.kick_handle();
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(30));
                kick.kick();
            });
            assert_eq!(vcpu.run(&Bus::default()), Exit::Kicked, "{tier:?}");
            kicker.join().unwrap();
        }
    }
}

#[test]
fn code_that_writes_itself_runs_as_written() {
    // A loop that changes the immediate of the instruction that comes next, in
    // its own block, and adds it up.
    // mov ecx, 1000; xor ebx, ebx; xor edx, edx
    let mut code = vec![0xb9, 0xe8, 3, 0, 0, 0x31, 0xdb, 0x31, 0xd2];
    let l = code.len();
    // l: inc edx; mov [rip + 1], edx; mov eax, imm32; add ebx, eax; dec ecx; jnz l
    code.extend([0xff, 0xc2, 0x89, 0x15, 1, 0, 0, 0]);
    code.extend([0xb8, 0, 0, 0, 0, 0x01, 0xc3, 0xff, 0xc9, 0x75]);
    code.push((l as i64 - code.len() as i64 - 1) as u8);
    // mov eax, ebx; out 0xf4, eax
    code.extend([0x89, 0xd8, 0xe7, 0xf4, 0xf4]);
    // The same from another page, which writes over a function here after each
    // few calls: mov ecx, 3000; xor ebx, ebx; l: call 0x9000; test cl, 63; jnz n;
    // mov [0x9001], ecx; n: dec ecx; jnz l; mov eax, ebx; out 0xf4, eax
    let mut other = vec![0xb9, 0xb8, 0x0b, 0, 0, 0x31, 0xdb];
    let l = other.len() as i64;
    other.push(0xe8);
    let distance = 0x1000 - (other.len() as i32 + 4);
    other.extend(distance.to_le_bytes());
    other.extend([0xf6, 0xc1, 63, 0x75, 7]);
    other.extend([0x89, 0x0c, 0x25, 0x01, 0x90, 0, 0]);
    other.extend([0xff, 0xc9, 0x75]);
    other.push((l - other.len() as i64 - 1) as u8);
    other.extend([0x89, 0xd8, 0xe7, 0xf4, 0xf4]);
    let mut expected = 0u32;
    let mut imm = 7u32;
    for ecx in (1..=3000u32).rev() {
        expected = expected.wrapping_add(imm);
        if ecx & 63 == 0 {
            imm = ecx;
        }
    }
    for tier in TIERS {
        let (sum, _) = run(tier, &code);
        assert_eq!(sum, 1000 * 1001 / 2, "{tier:?}");
        let (mut vcpu, view) = start(tier, &other);
        // mov eax, 7; add ebx, eax; ret
        view.write(Gpa(0x9000), &[0xb8, 7, 0, 0, 0, 0x01, 0xc3, 0xc3])
            .unwrap();
        let bus = Bus::default();
        *bus.kick.lock().unwrap() = Some(vcpu.kick_handle());
        assert_eq!(vcpu.run(&bus), Exit::Kicked);
        assert_eq!(
            bus.value.load(Ordering::SeqCst),
            u64::from(expected),
            "{tier:?}"
        );
        if tier == Tier::Native {
            let stats = vcpu.stats();
            assert!(stats.code_invalidations >= 40, "{stats:?}");
        }
    }
}

/// How often [`Loader`] does so.
const LOADS: usize = 200;

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
        if values.len() == LOADS {
            self.kick.kick();
        }
        // The immediate operand of MOV AL.
        self.view
            .write(Gpa(0x9001), &[data[0].wrapping_add(1)])
            .unwrap();
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
    for tier in TIERS {
        let (mut vcpu, view) = start(tier, &[0xe8, 0xfb, 0x0f, 0, 0, 0xe6, 0xf4, 0xeb, 0xf7]);
        view.write(Gpa(0x9000), &[0xb0, 1, 0xc3]).unwrap();
        let bus = Loader {
            view,
            kick: vcpu.kick_handle(),
            values: Mutex::default(),
        };
        assert_eq!(vcpu.run(&bus), Exit::Kicked);
        // Often enough for the caller to be translated.
        let expected: Vec<u8> = (1..=LOADS as u8).collect();
        assert_eq!(*bus.values.lock().unwrap(), expected);
    }
}

#[test]
fn state_survives_a_save_and_restore() {
    let (_, mut vcpu) = run(Tier::Interpreted, &[0xb8, 0x2a, 0, 0, 0, 0xe7, 0xf4, 0xf4]);
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

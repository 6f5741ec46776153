//! Whether KVM works here, and whether it is worth it.
//!
//! Some hosts (kvm_pvm, nested without hardware help) have a KVM that runs the
//! guest's user code natively and emulates its kernel, at about a microsecond
//! per instruction. A loop of a few thousand instructions tells.

use std::{
    arch::x86_64::__cpuid,
    fmt,
    time::{Duration, Instant},
};

use caisson_hypervisor::{Availability, Probe};
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind,
    host::{HugePages, Mapping},
};
use kvm_bindings::kvm_segment;
use kvm_ioctls::{Cap, Kvm, VcpuExit};

use crate::memslots::Memslots;

/// The only version of the interface there is.
const API_VERSION: i32 = 12;
/// Rounds of the probe's loop, of two instructions each.
const ROUNDS: u32 = 2_000;
/// What they may take. Hardware needs 2 µs, an emulating kernel over 2 ms.
const PATIENCE: Duration = Duration::from_micros(400);
/// A slow answer is asked again: something else may have run meanwhile.
const ATTEMPTS: u32 = 3;

/// Why KVM cannot be used.
#[derive(Debug)]
pub(crate) struct Refusal {
    reason: String,
    remedy: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl From<Refusal> for Probe {
    fn from(refusal: Refusal) -> Self {
        Self {
            availability: Availability::Absent,
            reason: refusal.reason,
            remedy: refusal.remedy,
        }
    }
}

/// Opens KVM and sees whether it is new enough.
pub(crate) fn open() -> Result<Kvm, Refusal> {
    let kvm = Kvm::new().map_err(|e| refusal(e.errno(), has_virtualisation()))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Refusal {
            reason: format!("/dev/kvm speaks version {version}, not {API_VERSION}"),
            remedy: None,
        });
    }
    let needed = [
        (Cap::UserMemory, "memslots", "2.6.25"),
        (Cap::SplitIrqchip, "local APICs without the rest", "4.5"),
        (Cap::SignalMsi, "message-signalled interrupts", "3.5"),
        (Cap::ReadonlyMem, "read-only memory", "3.7"),
        (Cap::X2ApicApi, "wide APIC ids", "4.7"),
        (Cap::ImmediateExit, "immediate exit", "4.12"),
        (Cap::Xcrs, "XCR0", "2.6.35"),
        (Cap::VcpuEvents, "pending events", "2.6.33"),
    ];
    for (cap, what, since) in needed {
        if !kvm.check_extension(cap) {
            return Err(Refusal {
                reason: format!("this kernel's KVM is too old: it has no {what}"),
                remedy: Some(format!("use Linux {since} or newer")),
            });
        }
    }
    Ok(kvm)
}

fn refusal(errno: i32, virtualisation: bool) -> Refusal {
    let (reason, remedy) = match errno {
        libc::ENOENT if virtualisation => (
            "/dev/kvm does not exist: the kernel's KVM module is not loaded".into(),
            Some("load it (`sudo modprobe kvm_intel` or `kvm_amd`); in a container, pass the device in (`--device /dev/kvm`)".into()),
        ),
        libc::ENOENT => (
            "/dev/kvm does not exist, and this processor shows no virtualisation".into(),
            Some("enable VT-x or AMD-V in the firmware's settings or, in a virtual machine, nested virtualisation".into()),
        ),
        libc::EACCES | libc::EPERM => (
            "this user may not open /dev/kvm".into(),
            Some("join its group (`sudo usermod -aG kvm $USER`, then log in again)".into()),
        ),
        libc::ENODEV | libc::ENXIO => (
            "/dev/kvm is there, but no KVM behind it".into(),
            Some("load its module (`sudo modprobe kvm_intel` or `kvm_amd`); the kernel's log says what keeps it away".into()),
        ),
        errno => (
            format!("cannot open /dev/kvm: {}", std::io::Error::from_raw_os_error(errno)),
            None,
        ),
    };
    Refusal { reason, remedy }
}

/// Whether the processor has VMX or SVM (CPUID.1:ECX, CPUID.8000_0001h:ECX).
pub(crate) fn has_virtualisation() -> bool {
    let vmx = __cpuid(1).ecx >> 5 & 1 != 0;
    let svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx >> 2 & 1 != 0;
    vmx || svm
}

pub(crate) fn probe() -> Probe {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(refusal) => return refusal.into(),
    };
    let mut least: Option<Duration> = None;
    for _ in 0..ATTEMPTS {
        match time_guest(&kvm) {
            Ok(took) => least = Some(least.map_or(took, |least| least.min(took))),
            Err(what) => {
                return Probe {
                    availability: Availability::Absent,
                    reason: format!(
                        "KVM is there, but a guest of four instructions does not run on it: {what}"
                    ),
                    remedy: None,
                };
            }
        }
        if least.is_some_and(|least| least <= PATIENCE) {
            break;
        }
    }
    let least = least.unwrap_or_default();
    let rate = f64::from(2 * ROUNDS) / least.as_secs_f64().max(1e-9) / 1e6;
    if least <= PATIENCE {
        return Probe {
            availability: Availability::Usable,
            reason: "hardware virtualisation through /dev/kvm".into(),
            remedy: None,
        };
    }
    Probe {
        availability: Availability::Slow,
        reason: format!(
            "/dev/kvm works, but emulates the guest's kernel ({rate:.1} million instructions a second)"
        ),
        remedy: Some("on a host with VT-x or AMD-V (bare metal, or nested virtualisation enabled) it would be fast".into()),
    }
}

/// Where the probe's code and page tables lie.
const CODE: u64 = 0;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const LEN: u64 = 0x4000;
/// Page table entries: present and writable; a page of 2 MiB.
const TABLE: u64 = 3;
const LARGE_PAGE: u64 = 0x83;
/// CR0.PE and PG; CR4.PAE; EFER.LME and LMA.
const CR0: u64 = 0x8000_0001;
const CR4: u64 = 1 << 5;
const EFER: u64 = 0x500;

/// Runs a loop in 64-bit mode at CPL 0 and says how long it took.
fn time_guest(kvm: &Kvm) -> Result<Duration, String> {
    let text = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let mapping = Mapping::new("probe", LEN, HugePages::Off).map_err(|e| e.to_string())?;
    let region = mapping.region("probe", Gpa(0), 0, LEN, RegionKind::Ram);
    let memory = GuestMemory::new(vec![region]).map_err(|e| e.to_string())?;
    let view = MemoryView::new(memory.clone());
    // mov ecx, ROUNDS; dec ecx; jnz -4; out 0x80, al; hlt
    let mut code = vec![0xb9];
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80, 0xf4]);
    for (at, bytes) in [
        (CODE, code.as_slice()),
        (PML4, &(PDPT | TABLE).to_le_bytes()),
        (PDPT, &(DIRECTORY | TABLE).to_le_bytes()),
        (DIRECTORY, &LARGE_PAGE.to_le_bytes()),
    ] {
        view.write(Gpa(at), bytes).map_err(|e| e.to_string())?;
    }
    let vm = kvm.create_vm().map_err(text("KVM_CREATE_VM"))?;
    let mut memslots = Memslots::new(1);
    memslots.set(&vm, &memory).map_err(|e| e.to_string())?;
    let mut vcpu = vm.create_vcpu(0).map_err(text("KVM_CREATE_VCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(text("KVM_GET_SREGS"))?;
    let segment = kvm_segment {
        limit: u32::MAX,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        type_: 11,
        db: 0,
        l: 1,
        ..segment
    };
    (sregs.ds, sregs.es, sregs.ss) = (segment, segment, segment);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    vcpu.set_sregs(&sregs).map_err(text("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(text("KVM_GET_REGS"))?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).map_err(text("KVM_SET_REGS"))?;
    let started = Instant::now();
    match vcpu.run().map_err(text("KVM_RUN"))? {
        VcpuExit::IoOut(0x80, _) => Ok(started.elapsed()),
        other => Err(format!("it ended with {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_says_why_and_what_to_do() {
        for errno in [libc::ENOENT, libc::EACCES, libc::ENODEV] {
            let refusal = refusal(errno, false);
            assert!(refusal.remedy.is_some(), "{refusal}");
        }
        let loaded = refusal(libc::ENOENT, true);
        assert!(loaded.to_string().contains("modprobe"), "{loaded}");
        assert!(
            refusal(libc::EMFILE, true)
                .to_string()
                .contains("open files")
        );
    }

    #[test]
    fn the_probe_is_of_one_mind() {
        // Whatever this host is: the answer does not depend on the moment.
        let first = probe();
        println!("{first:?}");
        assert_eq!(first.availability, probe().availability);
        assert_eq!(
            first.availability == Availability::Absent,
            open().is_err(),
            "{first:?}"
        );
    }
}

//! Calls on a vCPU.

use std::{arch::x86_64::_rdtsc, io};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr, kvm_interrupt, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

use super::{check, error};

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Bytes of the vector registers' area where the kernel does not say otherwise
/// (KVM_CAP_XSAVE2), and its fixed part where it does.
pub(crate) const XSAVE_LEN: usize = size_of::<kvm_xsave>();
const WORD: usize = size_of::<u32>();

/// The host's TSC.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC is part of the x86-64 baseline.
    unsafe { _rdtsc() }
}

/// Queues an external interrupt that user space's interrupt controller
/// acknowledged (KVM API §4.16).
///
/// # Errors
/// The host's. EEXIST: one is queued already.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let argument = kvm_interrupt { irq: vector.into() };
    // SAFETY: the argument is the structure that the call reads, and outlives it.
    check(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &argument) })?;
    Ok(())
}

fn tsc_offset_attribute(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// What is added to the host's TSC to give the vCPU's (Linux 5.16). `None`
/// where this kernel does not tell.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut value = 0;
    let attribute = tsc_offset_attribute(&mut value);
    // SAFETY: the attribute is the structure that the call reads, its address
    // that of eight bytes that the call writes; both outlive it.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) }).ok()?;
    Some(value)
}

/// See [`tsc_offset`].
///
/// # Errors
/// The host's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> io::Result<()> {
    let attribute = tsc_offset_attribute(&mut value);
    // SAFETY: as in `tsc_offset`; the call reads the eight bytes.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })?;
    Ok(())
}

/// An area of zeros with room for `len` bytes, and never less than the fixed part.
fn empty(len: usize) -> io::Result<Xsave> {
    let extra = len.saturating_sub(XSAVE_LEN).div_ceil(WORD);
    Xsave::new(extra).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

fn bytes(xsave: &Xsave) -> Vec<u8> {
    let fixed = xsave.as_fam_struct_ref().xsave.region.iter();
    let words = fixed.chain(xsave.as_slice());
    words.flat_map(|word| word.to_le_bytes()).collect()
}

fn fill(xsave: &mut Xsave, area: &[u8]) {
    let word = |bytes: &[u8]| {
        let mut word = [0; WORD];
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    };
    let (fixed, extra) = area.split_at(area.len().min(XSAVE_LEN));
    // SAFETY: the flexible part's length stays what it is.
    let whole = unsafe { xsave.as_mut_fam_struct() };
    for (to, bytes) in whole.xsave.region.iter_mut().zip(fixed.chunks(WORD)) {
        *to = word(bytes);
    }
    for (to, bytes) in xsave.as_mut_slice().iter_mut().zip(extra.chunks(WORD)) {
        *to = word(bytes);
    }
}

/// The x87 and vector registers as an area in standard format of `len` bytes,
/// which is what KVM_CAP_XSAVE2 says, or [`XSAVE_LEN`].
///
/// # Errors
/// The host's.
pub(crate) fn get_xsave(vcpu: &VcpuFd, len: usize) -> io::Result<Vec<u8>> {
    let mut xsave = empty(len)?;
    if len <= XSAVE_LEN {
        let fixed = vcpu.get_xsave().map_err(error)?;
        fill(&mut xsave, &fixed.region.map(u32::to_le_bytes).concat());
    } else {
        // SAFETY: the area has the length that the kernel asks for, and nothing
        // in this process enables further state dynamically (arch_prctl).
        unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(error)?;
    }
    Ok(bytes(&xsave))
}

/// Sets the x87 and vector registers from an area in standard format; `len` as
/// in [`get_xsave`].
///
/// # Errors
/// The host's; an area that is longer than the kernel's.
pub(crate) fn set_xsave(vcpu: &VcpuFd, area: &[u8], len: usize) -> io::Result<()> {
    if area.len() > len.max(XSAVE_LEN) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut xsave = empty(len)?;
    fill(&mut xsave, area);
    // SAFETY: as in `get_xsave`: the kernel reads no more than it asks for.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_of_any_length_survive_the_way() {
        for len in [0, 576, XSAVE_LEN, XSAVE_LEN + 4, 11_008] {
            let mut xsave = empty(len).unwrap();
            let area: Vec<u8> = (0..len).map(|n| ((n * 31) >> 2) as u8).collect();
            fill(&mut xsave, &area);
            let back = bytes(&xsave);
            assert_eq!(back.len(), len.max(XSAVE_LEN));
            assert_eq!(back[..len], area);
            assert!(back[len..].iter().all(|&byte| byte == 0));
        }
    }
}

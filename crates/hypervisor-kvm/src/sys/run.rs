//! The fields of a vCPU's run page.

use caisson_hypervisor::Space;
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
};
use kvm_ioctls::VcpuFd;

/// The kernel's account of an internal error.
#[derive(Debug)]
pub(crate) struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub(crate) suberror: u32,
    /// The instruction's bytes, if it says.
    pub(crate) instruction: Vec<u8>,
}

/// To be called after an exit with an internal error.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> InternalError {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason, which the caller has seen, says that this field
    // is valid; all of its bits are integers.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let mut instruction = Vec::new();
    if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
        // SAFETY: as above: for this suberror the kernel fills this structure.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        // SAFETY: a union of integers.
        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        if failure.ndata >= 3
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
        {
            let len = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            instruction = bytes.insn_bytes[..len].to_vec();
        }
    }
    InternalError {
        suberror: error.suberror,
        instruction,
    }
}

/// The device access that a vCPU left the guest for.
pub(crate) struct DeviceExit<'a> {
    pub(crate) space: Space,
    pub(crate) address: u64,
    /// Bytes of one element; only port accesses are repeated. Never zero.
    pub(crate) width: usize,
    pub(crate) data: Data<'a>,
}

/// The bytes of an access, in the run page.
pub(crate) enum Data<'a> {
    In(&'a mut [u8]),
    Out(&'a [u8]),
}

/// The device access of the last exit; `None` after exits of other kinds.
pub(crate) fn device_exit(vcpu: &mut VcpuFd) -> Option<DeviceExit<'_>> {
    let run = vcpu.get_kvm_run();
    let page = std::ptr::from_mut(run).cast::<u8>();
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says that this field of the union is valid.
            let io = unsafe { run.__bindgen_anon_1.io };
            let len = io.count as usize * usize::from(io.size);
            // SAFETY: the kernel puts the data at this offset of the mapping, of
            // which `run` is the beginning; the answer borrows the vCPU.
            let data =
                unsafe { std::slice::from_raw_parts_mut(page.add(io.data_offset as usize), len) };
            Some(DeviceExit {
                space: Space::Pio,
                address: io.port.into(),
                width: usize::from(io.size).max(1),
                data: if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                    Data::Out(data)
                } else {
                    Data::In(data)
                },
            })
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            let data = &mut mmio.data[..len];
            Some(DeviceExit {
                space: Space::Mmio,
                address: mmio.phys_addr,
                width: len.max(1),
                data: if mmio.is_write != 0 {
                    Data::Out(data)
                } else {
                    Data::In(data)
                },
            })
        }
        _ => None,
    }
}

//! The Linux/x86 boot protocol, entered in 64-bit mode.
//!
//! Source: the kernel's `Documentation/arch/x86/boot.rst` ("64-bit BOOT
//! PROTOCOL") and `zero-page.rst`. Left out: the real-mode, 32-bit and EFI
//! entry points, `setup_data`, and loading a kernel anywhere but at its
//! preferred address (a relocatable kernel moves up to that address anyway, so
//! lower does not help, and there is nothing in the way of it here).

pub(crate) mod bzimage;
mod header;
pub(crate) mod vmlinux;
mod zero_page;

use crate::{
    BootMode, BootState, GpaRange, KernelKind, LoadError, LoadRequest, layout, paging,
    stage::{ANYWHERE, Search, Stage},
};

/// What differs between kernels at the hand-over.
struct Handover<'h> {
    kind: KernelKind,
    /// Guest physical address of the 64-bit entry point.
    entry: u64,
    /// The kernel's setup header as it goes into the zero page.
    setup_header: &'h [u8],
    /// Longest command line in bytes, without its NUL.
    cmdline_max: u64,
    /// Highest address that a byte of the initrd may have.
    initrd_addr_max: u64,
    /// Whether the initrd may be anywhere.
    above_4g: bool,
}

/// Places all that a Linux kernel gets beside itself; the kernel has been placed.
fn hand_over<'a>(
    h: &Handover<'_>,
    request: &LoadRequest<'a>,
    stage: &mut Stage<'a, '_>,
) -> Result<BootState, LoadError> {
    if !request.modules.is_empty() {
        return Err(LoadError::Unsupported {
            kind: h.kind,
            reason: "Linux takes an initrd, not modules".into(),
        });
    }
    if request.cmdline.len() as u64 > h.cmdline_max {
        return Err(LoadError::CmdlineTooLong {
            len: request.cmdline.len(),
            max: h.cmdline_max,
        });
    }
    let initrd = match request.initrd {
        Some(data) if !data.is_empty() => Some(place_initrd(h, data, stage)?),
        _ => None,
    };
    let cr3 = paging::identity_map(stage)?;
    let mode = BootMode::Long64 { cr3 };
    let gdt = stage.gdt(mode)?;
    let cmdline = stage.string("command line", request.cmdline)?;
    let zero_page = zero_page::build(&zero_page::Contents {
        setup_header: h.setup_header,
        cmdline,
        initrd,
        acpi_rsdp: request.acpi_rsdp,
        memory_map: request.memory_map,
    });
    let rsi = stage.structure("zero page", caisson_memory::PAGE_SIZE, false, zero_page)?;
    Ok(BootState {
        mode,
        rip: h.entry,
        rax: 0,
        rbx: 0,
        rsi,
        rsp: 0,
        gdt,
    })
}

/// As high as the kernel allows, out of the way of what it unpacks.
fn place_initrd<'a>(
    h: &Handover<'_>,
    data: &'a [u8],
    stage: &mut Stage<'a, '_>,
) -> Result<GpaRange, LoadError> {
    let len = data.len() as u64;
    let name = "initrd";
    let low = GpaRange {
        start: layout::EXTENDED_MEMORY,
        end: h.initrd_addr_max.saturating_add(1).min(layout::HIGH_RAM),
    };
    let page = caisson_memory::PAGE_SIZE;
    let gpa = match stage.find(name, len, page, low, Search::Highest) {
        Err(LoadError::NoRoom { .. }) if h.above_4g => {
            stage.find(name, len, page, ANYWHERE, Search::Highest)?
        }
        other => other?,
    };
    stage.image(name, gpa, data)?;
    Ok(GpaRange {
        start: gpa,
        end: gpa + len,
    })
}

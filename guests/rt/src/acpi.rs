//! The few ACPI facts a guest needs: processors and the power block.

use crate::boot;
use crate::memory::read;

fn rsdp() -> Option<u64> {
    let valid = |at: u64| {
        read::<u64>(at) == u64::from_le_bytes(*b"RSD PTR ")
            && (0..20).fold(0u8, |sum, i| sum.wrapping_add(read::<u8>(at + i))) == 0
    };
    if boot::protocol() == boot::PVH_MAGIC {
        let at: u64 = read(boot::info() + 32);
        if at != 0 {
            return valid(at).then_some(at);
        }
    }
    let ebda = u64::from(read::<u16>(0x40E)) << 4;
    let scan = |start: u64, len: u64| (start..start + len).step_by(16).find(|&at| valid(at));
    let low = if ebda >= 0x8_0000 {
        scan(ebda, 1024)
    } else {
        None
    };
    low.or_else(|| scan(0xE_0000, 0x2_0000))
}

/// Address of the table with the given signature.
pub fn table(signature: &[u8; 4]) -> Option<u64> {
    let rsdp = rsdp()?;
    let (root, width) = if read::<u8>(rsdp + 15) >= 2 {
        (read::<u64>(rsdp + 24), 8)
    } else {
        (read::<u32>(rsdp + 16).into(), 4)
    };
    let count = (u64::from(read::<u32>(root + 4)) - 36) / width;
    (0..count)
        .map(|i| {
            if width == 8 {
                read::<u64>(root + 36 + i * 8)
            } else {
                read::<u32>(root + 36 + i * 4).into()
            }
        })
        .find(|&at| read::<u32>(at) == u32::from_le_bytes(*signature))
}

/// Calls `each` with the APIC ID of every enabled processor.
pub fn processors(mut each: impl FnMut(u32)) {
    let Some(madt) = table(b"APIC") else { return };
    let end = madt + u64::from(read::<u32>(madt + 4));
    let mut at = madt + 44;
    while at + 2 <= end {
        let (kind, len) = (read::<u8>(at), u64::from(read::<u8>(at + 1)));
        match kind {
            0 if read::<u32>(at + 4) & 1 != 0 => each(read::<u8>(at + 3).into()),
            9 if read::<u32>(at + 8) & 1 != 0 => each(read::<u32>(at + 4)),
            _ => {}
        }
        if len < 2 {
            break;
        }
        at += len;
    }
}

/// Number of enabled processors.
pub fn processor_count() -> usize {
    let mut n = 0;
    processors(|_| n += 1);
    n
}

/// I/O port of the PM timer, from the FADT.
pub fn pm_timer() -> Option<u16> {
    let fadt = table(b"FACP")?;
    let port: u32 = read(fadt + 76);
    u16::try_from(port).ok().filter(|&p| p != 0)
}

/// I/O port of PM1a control, from the FADT.
pub fn pm1a_control() -> Option<u16> {
    let fadt = table(b"FACP")?;
    u16::try_from(read::<u32>(fadt + 64))
        .ok()
        .filter(|&p| p != 0)
}

/// Sleep type of S5 from the DSDT's `\_S5` package.
pub fn s5_sleep_type() -> Option<u8> {
    let fadt = table(b"FACP")?;
    let dsdt = u64::from(read::<u32>(fadt + 40));
    let dsdt = if dsdt == 0 {
        read::<u64>(fadt + 140)
    } else {
        dsdt
    };
    let len = u64::from(read::<u32>(dsdt + 4));
    let at = (36..len.saturating_sub(8))
        .find(|&i| read::<u32>(dsdt + i) == u32::from_le_bytes(*b"_S5_"))?;
    // NameString, PackageOp, PkgLength (one byte), NumElements, first element.
    let p = dsdt + at + 4;
    if read::<u8>(p) != 0x12 {
        return None;
    }
    match read::<u8>(p + 3) {
        0x0A => Some(read(p + 4)),
        0x00 => Some(0),
        0x01 => Some(1),
        _ => None,
    }
}

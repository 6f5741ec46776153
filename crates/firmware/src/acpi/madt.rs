//! The Multiple APIC Description Table (5.2.12).

use alloc::vec::Vec;

use super::{AcpiSpec, table};
use crate::layout;

/// There are two 8259s that must be masked.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
/// An 8-bit UID that means every processor.
const ALL_8: u8 = 0xff;
const ALL_32: u32 = 0xffff_ffff;
/// Local APIC IDs from here on need the x2APIC structure.
const FIRST_X2APIC: u32 = 255;
/// MPS INTI flags: as the bus has it; active high and level-triggered.
const CONFORMS: u16 = 0;
const HIGH_LEVEL: u16 = 0b11_01;
/// Local interrupt input that carries the NMI.
const NMI_LINT: u8 = 1;

/// Builds the table: vCPUs in order, the I/O APIC, and how ISA interrupts reach
/// it. IRQ 0 arrives at input 2, as on every PC; the SCI is level-triggered;
/// the others are one to one.
pub(super) fn build(spec: &AcpiSpec) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend((layout::LAPIC as u32).to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    let mut x2apic = false;
    for (uid, &id) in spec.apic_ids.iter().enumerate() {
        let uid = uid as u32;
        match (u8::try_from(uid), u8::try_from(id)) {
            (Ok(uid), Ok(id)) if uid != ALL_8 && u32::from(id) < FIRST_X2APIC => {
                body.extend([0, 8, uid, id]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                x2apic = true;
                body.extend([9, 16, 0, 0]);
                body.extend(id.to_le_bytes());
                body.extend(ENABLED.to_le_bytes());
                body.extend(uid.to_le_bytes());
            }
        }
    }
    body.extend([1, 12, spec.ioapic.id, 0]);
    body.extend(spec.ioapic.address.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    interrupt_override(&mut body, 0, 2, CONFORMS);
    interrupt_override(&mut body, spec.power.sci, spec.power.sci, HIGH_LEVEL);
    body.extend([4, 6, ALL_8]);
    body.extend(CONFORMS.to_le_bytes());
    body.push(NMI_LINT);
    if x2apic {
        body.extend([10, 12]);
        body.extend(CONFORMS.to_le_bytes());
        body.extend(ALL_32.to_le_bytes());
        body.extend([NMI_LINT, 0, 0, 0]);
    }
    table(*b"APIC", 5, &body)
}

fn interrupt_override(body: &mut Vec<u8>, irq: u8, gsi: u8, flags: u16) {
    const ISA_BUS: u8 = 0;
    body.extend([2, 10, ISA_BUS, irq]);
    body.extend(u32::from(gsi).to_le_bytes());
    body.extend(flags.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type and bytes of each structure.
    fn structures(t: &[u8]) -> Vec<(u8, &[u8])> {
        let mut rest = &t[44..];
        let mut out = Vec::new();
        while let [kind, len, ..] = *rest {
            let (one, more) = rest.split_at(len.into());
            out.push((kind, one));
            rest = more;
        }
        assert!(rest.is_empty());
        out
    }

    #[test]
    fn describes_small_machines_with_xapic_entries() {
        let spec = AcpiSpec {
            apic_ids: alloc::vec![0, 1, 4],
            ..AcpiSpec::default()
        };
        let t = build(&spec);
        assert_eq!(t[36..44], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
        let s = structures(&t);
        let kinds: Vec<_> = s.iter().map(|(k, _)| *k).collect();
        assert_eq!(kinds, [0, 0, 0, 1, 2, 2, 4]);
        assert_eq!(s[2].1, [0, 8, 2, 4, 1, 0, 0, 0]);
        assert_eq!(s[3].1, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(s[4].1, [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(s[5].1, [2, 10, 0, 9, 9, 0, 0, 0, 13, 0]);
        assert_eq!(s[6].1, [4, 6, 255, 0, 0, 1]);
    }

    #[test]
    fn high_ids_and_uids_get_x2apic_entries() {
        let spec = AcpiSpec {
            apic_ids: (0..300).collect(),
            ..AcpiSpec::default()
        };
        let t = build(&spec);
        let s = structures(&t);
        assert_eq!(s.iter().filter(|(k, _)| *k == 0).count(), 255);
        let x2: Vec<_> = s.iter().filter(|(k, _)| *k == 9).collect();
        assert_eq!(x2.len(), 45);
        assert_eq!(
            x2[0].1,
            [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]
        );
        assert!(s.iter().any(|(k, _)| *k == 10));
    }
}

//! The Fixed ACPI Description Table (5.2.9).

use alloc::vec::Vec;

use acpi_tables::{
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
};

use super::{AcpiSpec, OEM_ID, OEM_REVISION, OEM_TABLE_ID, to_bytes};

/// IAPC_BOOT_ARCH (5.2.9.3): there are devices on the ISA bus.
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;
/// Latencies that say that there is no C2 (over 100) and no C3 (over 1000).
const NO_C_STATE: u16 = 0xfff;

fn port(bits: u8, access: AccessSize, port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

/// Builds the table; `facs` and `dsdt` are guest physical addresses.
pub(super) fn build(spec: &AcpiSpec, facs: u32, dsdt: u32) -> Vec<u8> {
    let pm = &spec.power;
    let mut t = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.fadt_minor_version = 3;
    // The FACS in one width only, as 5.2.9 asks; the DSDT in both, for systems
    // that know only one.
    t.firmware_ctrl = facs.into();
    t.x_firmware_ctrl = 0.into();
    t.dsdt = dsdt.into();
    t.x_dsdt = u64::from(dsdt).into();
    t.sci_int = u16::from(pm.sci).into();
    t.pm1a_evt_blk = u32::from(pm.event_port).into();
    t.pm1a_cnt_blk = u32::from(pm.control_port).into();
    t.pm_tmr_blk = u32::from(pm.timer_port).into();
    t.pm1_evt_len = 4;
    t.pm1_cnt_len = 2;
    t.pm_tmr_len = 4;
    t.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, pm.event_port);
    t.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, pm.control_port);
    t.x_pm_tmr_blk = port(32, AccessSize::DwordAccess, pm.timer_port);
    if let Some(gpe0) = spec.gpe0_port {
        t.gpe0_blk = u32::from(gpe0).into();
        t.gpe0_blk_len = 4;
        t.x_gpe0_blk = port(32, AccessSize::ByteAccess, gpe0);
    }
    t.p_lvl2_lat = NO_C_STATE.into();
    t.p_lvl3_lat = NO_C_STATE.into();
    t.century = spec.rtc_century.unwrap_or(0);

    let mut boot_arch = LEGACY_DEVICES | NO_VGA;
    if spec.i8042.is_some() {
        boot_arch |= HAS_8042;
    }
    if !spec.rtc {
        boot_arch |= NO_CMOS_RTC;
    }
    t.iapc_boot_arch = boot_arch.into();

    // The sleep button and the RTC wake event are not in PM1: that is what
    // their flags say when set. The power button's is set when there is none.
    let mut flags = alloc::vec![
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::SlpButton,
        Flags::FixRtc
    ];
    if !pm.power_button {
        flags.push(Flags::PwrButton);
    }
    if pm.timer_32_bit {
        flags.push(Flags::TmrValExt);
    }
    if let Some(reset) = spec.reset {
        flags.push(Flags::ResetRegSup);
        t.reset_reg = port(8, AccessSize::ByteAccess, reset.port);
        t.reset_value = reset.value;
    }
    let t = flags.into_iter().fold(t, FADTBuilder::flag);
    to_bytes(&t.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::I8042;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let spec = AcpiSpec {
            i8042: Some(I8042 {
                keyboard: true,
                mouse: false,
            }),
            ..AcpiSpec::default()
        };
        let t = build(&spec, 0xe_0040, 0xe_0100);
        assert_eq!(t.len(), 276);
        assert_eq!(t[46..48], 9u16.to_le_bytes());
        assert_eq!(
            t[48..52],
            [0; 4],
            "no SMI command port: always in ACPI mode"
        );
        assert_eq!(t[56..60], 0x600u32.to_le_bytes());
        assert_eq!(t[64..68], 0x604u32.to_le_bytes());
        assert_eq!(t[76..80], 0x608u32.to_le_bytes());
        assert_eq!((&t[80..84], t[92]), (&0x620u32.to_le_bytes()[..], 4));
        assert_eq!(t[108], 0x32);
        assert_eq!(t[109..111], 0b111u16.to_le_bytes());
        let flags = u32::from_le_bytes(t[112..116].try_into().unwrap());
        assert_eq!(flags, 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10);
        assert_eq!(t[116..128], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0]);
        assert_eq!(t[128], 6);
    }

    #[test]
    fn absent_things_are_absent() {
        let mut spec = AcpiSpec {
            reset: None,
            rtc: false,
            rtc_century: None,
            ..AcpiSpec::default()
        };
        spec.power.power_button = false;
        spec.gpe0_port = None;
        let t = build(&spec, 0, 0);
        let flags = u32::from_le_bytes(t[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 4 | 1 << 10), 1 << 4);
        assert_eq!(t[109..111], 0b10_0101u16.to_le_bytes());
        assert_eq!((&t[80..84], t[92]), (&[0; 4][..], 0));
        assert_eq!((t[108], &t[116..129]), (0, &[0; 13][..]));
    }
}

//! The tables that tell the guest what is there.

use caisson_chipset::{
    acpi_pm::{AcpiPmConfig, SCI_LINE, SLEEP_TYPE_S5},
    fw_cfg,
    power::{RESET_CONTROL_PORT, RESET_CONTROL_VALUE},
    rtc,
};
use caisson_firmware::{
    ImportList,
    acpi::{self, AcpiSpec, I8042, PowerManagement, ResetRegister},
    smbios::{self, SmbiosSpec},
};
use caisson_hypervisor::Partition;

use super::{Pc, PcSpec};
use crate::MachineError;

/// Tables in their places, and where the guest starts to read them.
pub(crate) struct Tables {
    pub(crate) imports: ImportList<'static>,
    pub(crate) rsdp: u64,
}

/// Describes the machine of `spec`.
pub(crate) fn tables(
    spec: &PcSpec<'_>,
    pc: &Pc,
    partition: &dyn Partition,
) -> Result<Tables, MachineError> {
    let fail = |error: &dyn core::fmt::Display| MachineError::Tables(error.to_string());
    let pm = AcpiPmConfig::default();
    let acpi = AcpiSpec {
        apic_ids: (0..spec.vcpus).collect(),
        power: PowerManagement {
            event_port: pm.event,
            control_port: pm.control,
            timer_port: pm.timer,
            timer_32_bit: pm.wide_timer,
            sci: SCI_LINE as u8,
            power_button: true,
            s5_sleep_type: SLEEP_TYPE_S5,
        },
        reset: Some(ResetRegister {
            port: RESET_CONTROL_PORT,
            value: RESET_CONTROL_VALUE,
        }),
        com_ports: spec.serial.map(|port| port.is_some()),
        rtc: true,
        rtc_century: Some(rtc::CENTURY),
        i8042: Some(I8042 {
            keyboard: true,
            mouse: true,
        }),
        fw_cfg_port: Some(fw_cfg::BASE),
        pci: pc.virtio.root.clone(),
        virtio_mmio: pc.virtio.mmio.clone(),
        ..AcpiSpec::default()
    };
    let mut tables = acpi::build(&acpi, spec.map).map_err(|error| fail(&error))?;
    let smbios = smbios_spec(spec, partition);
    let smbios = smbios::build(&smbios, spec.map).map_err(|error| fail(&error))?;
    tables
        .imports
        .append(spec.map, smbios)
        .map_err(|error| fail(&error))?;
    Ok(Tables {
        imports: tables.imports,
        rsdp: tables.rsdp,
    })
}

fn smbios_spec(spec: &PcSpec<'_>, partition: &dyn Partition) -> SmbiosSpec {
    let [_, ebx, ecx, edx] = partition.cpuid().get(0, 0);
    let vendor: Vec<u8> = [ebx, edx, ecx]
        .iter()
        .flat_map(|part| part.to_le_bytes())
        .collect();
    let [eax, .., features] = partition.cpuid().get(1, 0);
    SmbiosSpec {
        vcpus: u16::try_from(spec.vcpus).unwrap_or(u16::MAX),
        processor_id: u64::from(eax) | u64::from(features) << 32,
        processor_vendor: String::from_utf8_lossy(&vendor).replace('\0', ""),
        ..SmbiosSpec::default()
    }
}

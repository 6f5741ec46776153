//! The ACPI tables against `iasl`, the reference compiler: it must disassemble
//! each table, find nothing to remark in it, and make the same bytes of it again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_firmware::{
    ImportData, MemoryMap,
    acpi::{self, AcpiSpec, I8042, PciRoot, VirtioMmio},
};
use caisson_image::{ImageStore, Silent};

/// Table header bytes that say who compiled it: checksum, creator, its revision.
const COMPILER: [std::ops::Range<usize>; 2] = [9..10, 28..36];

fn iasl() -> Result<PathBuf> {
    let package = ImageStore::open_default()?.package("acpica-tools", &Silent)?;
    Ok(package.root.join("usr/bin/iasl"))
}

fn run(iasl: &Path, dir: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new(iasl)
        .args(args)
        .current_dir(dir)
        .output()
        .with_context(|| format!("cannot run {}", iasl.display()))?;
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    ensure!(out.status.success(), "iasl {args:?} failed:\n{text}");
    Ok(text)
}

fn without_compiler(table: &[u8]) -> Vec<u8> {
    let mut t = table.to_vec();
    for range in COMPILER {
        if let Some(bytes) = t.get_mut(range) {
            bytes.fill(0);
        }
    }
    t
}

fn check(spec: &AcpiSpec) -> Result<()> {
    let iasl = iasl()?;
    let dir = tempfile::tempdir()?;
    let map = MemoryMap::new(1 << 30, 40)?;
    let mut tables = 0;
    for import in &acpi::build(spec, &map)?.imports {
        let ImportData::Bytes(bytes) = &import.data else {
            bail!("{} has no bytes", import.name)
        };
        if import.name == "ACPI RSDP" {
            continue;
        }
        let name = import.name.replace(' ', "-");
        fs::write(dir.path().join(format!("{name}.bin")), bytes)?;
        let text = run(&iasl, dir.path(), &["-d", &format!("{name}.bin")])?;
        for word in ["Error", "Warning", "Remark", "Invalid"] {
            ensure!(!text.contains(word), "{name}: {text}");
        }
        let text = run(&iasl, dir.path(), &[&format!("{name}.dsl")])?;
        ensure!(
            text.contains("0 Errors, 0 Warnings, 0 Remarks"),
            "{name}: {text}"
        );
        let again = fs::read(dir.path().join(format!("{name}.aml")))?;
        // The FACS has no common header.
        let same = if name == "ACPI-FACS" {
            again == **bytes
        } else {
            without_compiler(&again) == without_compiler(bytes)
        };
        ensure!(same, "{name} changes when compiled again");
        tables += 1;
    }
    let expected = if spec.pci.is_some() { 7 } else { 6 };
    ensure!(tables == expected, "{tables} tables");
    Ok(())
}

#[test]
fn the_default_machine() -> Result<()> {
    check(&AcpiSpec::default())
}

#[test]
fn a_machine_with_everything() -> Result<()> {
    check(&AcpiSpec {
        apic_ids: (0..300).collect(),
        com_ports: [true; 4],
        i8042: Some(I8042 {
            keyboard: true,
            mouse: true,
        }),
        fw_cfg_port: Some(0x510),
        pci: Some(PciRoot {
            mem64: MemoryMap::new(1 << 30, 40)?.pci_memory_high(),
            ..PciRoot::default()
        }),
        virtio_mmio: (0..20)
            .map(|n| VirtioMmio {
                address: 0xf000_0000 + 0x1000 * n,
                interrupt: 20 + (n % 4) as u8,
            })
            .collect(),
        ..AcpiSpec::default()
    })
}

#[test]
fn a_machine_with_next_to_nothing() -> Result<()> {
    let mut spec = AcpiSpec {
        com_ports: [false; 4],
        rtc: false,
        rtc_century: None,
        reset: None,
        ..AcpiSpec::default()
    };
    spec.power.power_button = false;
    spec.gpe0_port = None;
    spec.power.timer_32_bit = false;
    check(&spec)
}

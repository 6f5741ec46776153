//! Writes the ACPI and SMBIOS tables of a machine into a directory, one file
//! per table, for `iasl -d` and other tools.
//!
//!     cargo run -p caisson-firmware --example dump_tables -- DIR [VCPUS]

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

use caisson_firmware::{
    ImportData, MemoryMap,
    acpi::{self, AcpiSpec, I8042},
    smbios::{self, SmbiosSpec},
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: dump_tables DIR [VCPUS]")?);
    let vcpus: u16 = args.next().map_or(Ok(4), |n| n.parse())?;
    fs::create_dir_all(&dir)?;

    let map = MemoryMap::new(6 << 30, 40)?;
    let spec = AcpiSpec {
        apic_ids: (0..vcpus.into()).collect(),
        com_ports: [true; 4],
        i8042: Some(I8042 {
            keyboard: true,
            mouse: true,
        }),
        fw_cfg_port: Some(0x510),
        ..AcpiSpec::default()
    };
    let tables = acpi::build(&spec, &map)?.imports;
    let names = smbios::build(
        &SmbiosSpec {
            vcpus,
            ..SmbiosSpec::default()
        },
        &map,
    )?;
    for import in tables.iter().chain(&names) {
        if let ImportData::Bytes(bytes) = &import.data {
            let file = dir.join(format!(
                "{}.bin",
                import.name.to_lowercase().replace(' ', "-")
            ));
            fs::write(&file, bytes)?;
            println!("{} {} bytes at {}", file.display(), bytes.len(), import.gpa);
        }
    }
    Ok(())
}

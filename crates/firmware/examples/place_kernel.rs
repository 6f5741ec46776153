//! Shows how a kernel file would be laid out in memory.
//!
//!     cargo run -p caisson-firmware --example place_kernel -- KERNEL [MIB [INITRD]]

use std::{error::Error, fs, process::ExitCode};

use caisson_firmware::{LoadRequest, MemoryMap, load};

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
    let kernel = fs::read(
        args.next()
            .ok_or("usage: place_kernel KERNEL [MIB [INITRD]]")?,
    )?;
    let mib: u64 = args.next().map_or(Ok(512), |n| n.parse())?;
    let initrd = args.next().map(fs::read).transpose()?;
    let map = MemoryMap::new(mib << 20, 46)?;
    let request = LoadRequest {
        name: "kernel",
        cmdline: "console=ttyS0",
        initrd: initrd.as_deref(),
        acpi_rsdp: Some(0xe_0000),
        ..LoadRequest::new(&map)
    };
    let loaded = load(&kernel, &request)?;
    print!(
        "{}\n{}{:#x?}\n",
        loaded.kind,
        loaded.imports.describe(),
        loaded.boot
    );
    Ok(())
}

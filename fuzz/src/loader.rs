//! The property of every kernel loader: whatever the file, it is refused or
//! laid out so that nothing of it is outside the RAM that the guest may use.

use caisson_firmware::{
    BootMode, GpaRange, KernelKind, LoadRequest, MemoryMap, Module, layout, load,
};

/// Loads a file as `protocol`, or as what it is. The first four bytes of `data`
/// choose the machine: MiB of RAM, length of the command line, and lengths of an
/// initrd and a module, which are taken from the end of the file.
pub fn check(protocol: Option<KernelKind>, data: &[u8]) {
    let Some((&[mib, cmdline, initrd, module], file)) = data.split_first_chunk() else {
        return;
    };
    // From 1 MiB to beyond 4 GiB, most often little.
    let mib = match mib {
        0..200 => u64::from(mib) + 1,
        n => u64::from(n - 199) * 256,
    };
    let Ok(map) = MemoryMap::new(mib << 20, 40) else {
        return;
    };
    let cmdline = "x".repeat(usize::from(cmdline) * 16);
    let tail = |len: u8| &file[file.len().saturating_sub(usize::from(len) * 64)..];
    let modules = [Module {
        data: tail(module),
        cmdline: "module",
    }];
    let request = LoadRequest {
        name: "kernel",
        cmdline: &cmdline,
        initrd: (initrd > 0).then(|| tail(initrd)),
        modules: if module > 0 { &modules } else { &[] },
        acpi_rsdp: Some(layout::ACPI_TABLES.start),
        protocol,
        ..LoadRequest::new(&map)
    };
    let loaded = match load(file, &request) {
        Ok(loaded) => loaded,
        Err(e) => {
            assert!(!e.to_string().is_empty());
            return;
        }
    };
    let mut end = 0;
    for import in &loaded.imports {
        let range = import.range();
        assert!(
            !range.is_empty() && range.start >= end,
            "{} overlaps",
            import.name
        );
        assert!(
            import.name == "EBDA" || map.is_usable(&range),
            "{} at {range}",
            import.name
        );
        end = range.end;
    }
    let entry = GpaRange {
        start: loaded.boot.rip,
        end: loaded.boot.rip + 1,
    };
    assert!(map.is_usable(&entry), "entry point at {entry}");
    match loaded.boot.mode {
        BootMode::Real => panic!("no protocol starts in real mode"),
        BootMode::Protected32 => assert!(loaded.boot.rip < 1 << 32 && loaded.boot.rbx < 1 << 32),
        BootMode::Long64 { cr3 } => assert!(cr3 != 0 && cr3 % 4096 == 0 && loaded.boot.rsi != 0),
    }
}

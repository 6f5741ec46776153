//! Virtio devices as Debian's own drivers use them, over each transport, on every backend.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_config::{DiskBus, VirtioTransport};
use caisson_image::{ImageStore, Silent};
use caisson_machine::Outcome;
use caisson_tests::{
    debian::{BOOT, virtio_spec},
    vm::{Moves, Vm, backends},
};

/// The end of the shell's prompt.
const PROMPT: &str = "# ";

/// A booted Debian with an entropy device and a console, at its prompt.
struct Guest {
    vm: Vm,
    at: usize,
}

impl Guest {
    /// Runs `line` at the shell and gives what it printed.
    fn run(&mut self, line: &str) -> String {
        // The line itself is echoed, with its arithmetic not done.
        let line = format!("echo begin-$((40 + 2)); {line}; echo end-$((40 + 2))\n");
        self.vm.type_text(&line).unwrap();
        let com1 = &self.vm.com1;
        let answers = "the shell answers";
        let from = com1.wait_for("begin-42\r\n", self.at, BOOT).expect(answers);
        self.at = com1.wait_for("end-42\r\n", from, BOOT).expect(answers);
        let text = com1.text();
        let printed = text.get(from..self.at).unwrap_or_default();
        printed
            .replace('\r', "")
            .trim_end_matches("end-42\n")
            .trim()
            .into()
    }
}

fn boot(transport: VirtioTransport, moves: Moves) -> Vec<Guest> {
    let carrier = match transport {
        VirtioTransport::Pci => "virtio_pci",
        VirtioTransport::Mmio => "virtio_mmio",
    };
    let modules = [carrier, "virtio_rng", "virtio_console"];
    let boot_one = |backend| {
        let mut spec = virtio_spec(backend, transport, &modules).expect("there is an image");
        spec.moves = moves.clone();
        let vm = Vm::start(&spec).expect("the machine starts");
        let at = vm.com1.wait_for(PROMPT, 0, BOOT).expect("a prompt");
        let mut guest = Guest { vm, at };
        // What the kernel says from now on is for dmesg, not among answers.
        guest.run("dmesg -n 1");
        guest
    };
    backends().iter().map(boot_one).collect()
}

/// What Debian's drivers do with the devices, with the machine moved in the middle of it.
fn use_devices(guest: &mut Guest) {
    assert_eq!(
        guest.run("cat /sys/class/misc/hw_random/rng_current"),
        "virtio_rng.0"
    );
    let distinct = guest
        .run("for n in 1 2 3 4; do head -c 1000 /dev/hwrng | sha256sum; done | sort -u | wc -l");
    assert_eq!(distinct, "4");

    guest.run("echo out-$((6 * 7)) > /dev/hvc0");
    let heard = guest
        .vm
        .hvc0
        .wait_for("out-42", 0, BOOT)
        .expect("the console speaks");

    // Held open: a terminal that nobody has open forgets what was typed.
    guest.run("exec 3<>/dev/hvc0");
    // A request of each kind under way, or waiting, while the machine goes elsewhere.
    guest.run("(head -c 60000 /dev/hwrng | wc -c > /tmp/count) & (read line <&3; echo heard-$line > /tmp/line) & \
        (i=0; while [ $i -lt 400 ]; do echo line-$i; i=$((i + 1)); done > /dev/hvc0; echo all > /tmp/sent) & true");
    guest.vm.change_process().expect("the machine moves");
    guest.vm.type_at_hvc0("typed\n").unwrap();
    let wait = "while ! [ -s /tmp/count -a -s /tmp/line -a -s /tmp/sent ]; do sleep 0.1; done";
    guest.run(wait);
    assert_eq!(
        guest.run("cat /tmp/count /tmp/line /tmp/sent"),
        "60000\nheard-typed\nall"
    );
    guest
        .vm
        .hvc0
        .wait_for("line-399", heard, BOOT)
        .expect("all of it");
    let console = guest.vm.hvc0.text().replace('\r', "");
    let expected: String = (0..400).map(|n| format!("line-{n}\n")).collect();
    let without_echo = console.replace("typed\n", "");
    assert!(
        without_echo.contains(&expected),
        "in order and once each: {console}"
    );

    guest.vm.resize_hvc0(132, 43).unwrap();
    let size = guest.run("while [ \"$(stty -F /dev/hvc0 size)\" != '43 132' ]; do sleep 0.1; done; stty -F /dev/hvc0 size");
    assert_eq!(size, "43 132");

    let complaints = guest.run(
        "dmesg | grep -iE 'pci|acpi|virtio|hvc|irq|mem 0x' | grep -iE 'bug|warn|fail|error|conflict|invalid|can.t' \
         | grep -v 'if necessary'",
    );
    assert_eq!(complaints, "", "{}", guest.run("dmesg"));
    let shown = guest.vm.inspect().unwrap();
    assert!(!shown.contains("needs reset because"), "{shown}");
    guest.vm.type_text("poweroff -f\n").unwrap();
    assert_eq!(
        guest.vm.wait(BOOT).expect("it powers off"),
        Outcome::PowerOff
    );
}

#[test]
fn debian_uses_entropy_and_console_over_pci_across_a_move() {
    for mut guest in boot(VirtioTransport::Pci, Moves::Chance) {
        let drivers = guest.run("ls /sys/bus/pci/drivers/virtio-pci");
        assert!(
            drivers.contains("0000:00:01.0") && drivers.contains("0000:00:02.0"),
            "{drivers}"
        );
        // A vector for the configuration and one for each queue.
        let vectors = guest.run("grep -c PCI-MSI /proc/interrupts");
        assert!(
            vectors.parse::<u32>().is_ok_and(|vectors| vectors >= 4),
            "{vectors}"
        );
        use_devices(&mut guest);
    }
}

/// What `lspci -vvv` makes of the guest's functions: their configuration space as the guest's kernel reads it, given to
/// the program on the host.
fn lspci(guest: &mut Guest) -> Result<String> {
    let dump = guest.run(
        "for f in /sys/bus/pci/devices/*; do echo function ${f##*/}; od -An -v -tx1 $f/config; done",
    );
    let mut text = String::new();
    let mut row = 0;
    for line in dump.lines() {
        match line.strip_prefix("function 0000:") {
            Some(name) => {
                row = 0;
                text.push_str(&format!("\n{name} a function\n"));
            }
            None => {
                text.push_str(&format!("{row:02x}: {}\n", line.trim()));
                row += 16;
            }
        }
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("dump");
    std::fs::write(&file, text)?;
    let store = ImageStore::open_default()?;
    let library = |name| -> Result<_> {
        let root = store.package(name, &Silent)?.root;
        Ok(root.join("usr/lib/x86_64-linux-gnu"))
    };
    let libraries = [library("libpci3")?, library("libkmod2")?];
    let program = store
        .package("pciutils", &Silent)?
        .root
        .join("usr/bin/lspci");
    let output = Command::new(&program)
        .args(["-vvv", "-F"])
        .arg(&file)
        .env("LD_LIBRARY_PATH", std::env::join_paths(&libraries)?)
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "lspci: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn lspci_finds_nothing_amiss() {
    for mut guest in boot(VirtioTransport::Pci, Moves::Chance) {
        let text = lspci(&mut guest).expect("lspci runs");
        for part in [
            "00:00.0 Class 0600",
            "00:01.0 Class ff00",
            "00:02.0 Class 0780",
            "Control: I/O- Mem+ BusMaster+",
            "Interrupt: pin A routed to IRQ",
            "Region 0: Memory at c0000000 (64-bit, non-prefetchable)",
            "Region 2: Memory at c0004000 (32-bit, non-prefetchable)",
            "Capabilities: [40] Vendor Specific Information: VirtIO: CommonCfg",
            "VirtIO: ISR",
            "VirtIO: DeviceCfg",
            "VirtIO: Notify",
            "multiplier=00000004",
            "VirtIO: <unknown>",
            "MSI-X: Enable+ Count=2 Masked-",
            "MSI-X: Enable+ Count=3 Masked-",
            "Vector table: BAR=2 offset=00000000",
            "PBA: BAR=2 offset=00000800",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
        for word in ["broken", "!!!", "chain looped", "<access denied>"] {
            assert!(!text.contains(word), "{word}:\n{text}");
        }
    }
}

#[test]
fn debian_uses_entropy_and_console_without_pci_across_a_move() {
    for mut guest in boot(VirtioTransport::Mmio, Moves::Chance) {
        assert_eq!(
            guest.run("ls /sys/bus/pci/devices 2>/dev/null | wc -l"),
            "0"
        );
        use_devices(&mut guest);
    }
}

#[test]
fn debian_keeps_what_it_wrote_to_its_virtio_disk_across_moves() {
    write_across_moves(DiskBus::Virtio, "vda", &["virtio_pci", "virtio_blk"]);
}

#[test]
fn debian_keeps_what_it_wrote_to_its_nvme_disk_across_moves() {
    write_across_moves(DiskBus::Nvme, "nvme0n1", &["virtio_pci"]);
}

/// Has a guest write to its disk, which it calls `name`, while its machine moves; discard and zero some of it; and read it.
fn write_across_moves(bus: DiskBus, name: &str, modules: &[&str]) {
    for backend in backends() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(24 << 20).expect("room");
        let mut spec =
            virtio_spec(&backend, VirtioTransport::Pci, modules).expect("there is an image");
        spec.cpus = 2;
        spec.moves = Moves::After(vec![Duration::from_millis(800); 8]);
        spec.disk = Some(file.path().to_owned());
        spec.disk_bus = bus;
        let vm = Vm::start(&spec).expect("the machine starts");
        let at = vm.com1.wait_for(PROMPT, 0, BOOT).expect("a prompt");
        let mut guest = Guest { vm, at };
        guest.run("dmesg -n 1");
        assert_eq!(
            guest.run(&format!(
                "cat /sys/block/{name}/size $(find /sys/block/{name}/ /sys/block/{name}/device/ -maxdepth 1 -name serial)"
            )),
            "49152\ntest-disk",
        );
        assert_eq!(guest.run(&format!("ls /sys/block/{name}/mq | wc -l")), "2");
        guest.run("dd if=/dev/urandom of=/tmp/data bs=64k count=256 2>/dev/null; sha256sum < /tmp/data > /tmp/sum");
        guest.vm
            .type_text(&format!("(dd if=/tmp/data of=/dev/{name} bs=64k conv=fsync 2>/dev/null; echo all > /tmp/written) &\n"))
            .unwrap();
        guest
            .vm
            .com1
            .wait_for("written) &", guest.at, BOOT)
            .expect("an echo");
        guest.vm.change_process().expect("the machine moves");
        guest.run(
            "while ! [ -s /tmp/written ]; do sleep 0.1; done; echo 3 > /proc/sys/vm/drop_caches",
        );
        let same = guest.run(&format!(
            "head -c 16777216 /dev/{name} | sha256sum | cmp - /tmp/sum && echo same"
        ));
        assert_eq!(same, "same");
        // Discards, told by the driver to be there.
        let discard = guest.run(&format!(
            "cat /sys/block/{name}/queue/discard_max_bytes /sys/block/{name}/queue/write_zeroes_max_bytes /sys/block/{name}/queue/write_cache; \
             dd if=/tmp/data of=/dev/{name} bs=1M seek=20 count=1 conv=fsync 2>/dev/null; \
             dd if=/dev/{name} bs=1M skip=20 count=1 2>/dev/null | cmp -n 1048576 - /tmp/data || echo not written; \
             blkdiscard -o 20971520 -l 1048576 /dev/{name} && dd if=/dev/{name} bs=1M skip=20 count=1 2>/dev/null | tr -d '\\0' | wc -c"
        ));
        assert!(
            !discard.starts_with("0\n")
                && !discard.contains("\n0\nwrite")
                && discard.ends_with("write back\n0"),
            "{discard}"
        );
        assert_eq!(
            guest.run(&format!(
                "dmesg | grep -iE 'i/o error|buffer i/o|(nvme|{name}).*(fail|timeout|error)'"
            )),
            ""
        );
        guest.vm.change_process().expect("the machine moves");
        let on_disk = std::fs::read(file.path()).expect("it was written");
        assert!(
            on_disk[..16 << 20]
                .chunks(4096)
                .all(|page| page.iter().any(|byte| *byte != 0))
        );
        let copied = guest.run(&format!(
            "mkdir /tmp/m; mke2fs /dev/{name} > /dev/null && mount -t ext2 /dev/{name} /tmp/m && cp /bin/busybox /tmp/m && umount /tmp/m; \
             mount -t ext2 /dev/{name} /tmp/m && cmp /bin/busybox /tmp/m/busybox && echo same; umount /tmp/m"
        ));
        assert_eq!(copied, "same");
        guest.vm.type_text("poweroff -f\n").unwrap();
        assert_eq!(
            guest.vm.wait(BOOT).expect("it powers off"),
            Outcome::PowerOff
        );
    }
}

#[test]
fn many_moves_while_the_drivers_start_change_nothing() {
    let moves = Moves::After(vec![Duration::from_millis(400); 8]);
    for mut guest in boot(VirtioTransport::Pci, moves) {
        use_devices(&mut guest);
    }
}

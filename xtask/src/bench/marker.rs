//! A program for the guest to start with that says at once that it runs.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use anyhow::Result;

/// What it writes to its console.
pub(super) const TEXT: &str = "caisson-bench: first userland instruction\n";

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// Length of the ELF header and one program header.
const HEADERS: u64 = 64 + 56;

/// What the program does afterwards.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Switches the machine off.
    PowerOff,
    /// Sleeps for ever.
    Sleep,
}

/// The program: a static ELF executable of a few dozen instructions.
pub(super) fn program(then: Then) -> Vec<u8> {
    let mut code = Vec::new();
    let mov = |code: &mut Vec<u8>, opcode: u8, value: u32| {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    };
    const EAX: u8 = 0xb8;
    const EDX: u8 = 0xba;
    const ESI: u8 = 0xbe;
    const EDI: u8 = 0xbf;
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const JUMP_BACK: u8 = 0xeb;
    // write(1, TEXT)
    mov(&mut code, EAX, 1);
    mov(&mut code, EDI, 1);
    let text_pointer = code.len() + 1;
    mov(&mut code, ESI, 0);
    mov(&mut code, EDX, TEXT.len() as u32);
    code.extend(SYSCALL);
    let start = code.len();
    match then {
        Then::PowerOff => {
            // reboot(MAGIC1, MAGIC2, POWER_OFF)
            mov(&mut code, EAX, 169);
            mov(&mut code, EDI, 0xfee1_dead);
            mov(&mut code, ESI, 0x2812_1969);
            mov(&mut code, EDX, 0x4321_fedc);
        }
        // pause()
        Then::Sleep => mov(&mut code, EAX, 34),
    }
    code.extend(SYSCALL);
    let back = start as i64 - (code.len() as i64 + 2);
    code.extend([JUMP_BACK, back as i8 as u8]);
    let text = BASE + HEADERS + code.len() as u64;
    code[text_pointer..text_pointer + 4].copy_from_slice(&(text as u32).to_le_bytes());
    code.extend(TEXT.as_bytes());

    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    // An x86-64 executable, entered behind the headers, with one program header and no sections.
    half(&mut elf, 2);
    half(&mut elf, 62);
    word(&mut elf, 1);
    long(&mut elf, BASE + HEADERS);
    long(&mut elf, 64);
    long(&mut elf, 0);
    word(&mut elf, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut elf, value);
    }
    // The whole file, readable and executable.
    let len = HEADERS + code.len() as u64;
    word(&mut elf, 1);
    word(&mut elf, 5);
    for value in [0, BASE, BASE, len, len, 0x1000] {
        long(&mut elf, value);
    }
    elf.extend(code);
    elf
}

/// Copies `initramfs` to `target` with `init` in place of its init: of two archives in one file the kernel takes the
/// later one's files.
pub(super) fn initramfs_with(initramfs: &Path, init: &[u8], target: &Path) -> Result<()> {
    let mut out = File::create(target)?;
    let len = io::copy(&mut File::open(initramfs)?, &mut out)?;
    // Archives start at multiples of four.
    out.write_all(&vec![0; (len.next_multiple_of(4) - len) as usize])?;
    out.write_all(&archived("init", 0o100_755, init))?;
    out.write_all(&archived("TRAILER!!!", 0, &[]))?;
    Ok(())
}

/// One entry of a `newc` archive (cpio(5)).
fn archived(name: &str, mode: u32, contents: &[u8]) -> Vec<u8> {
    let size = contents.len() as u32;
    // Inode, mode, owner, group, links, time, size, four device numbers, length of the name, no checksum.
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        size,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    let mut entry = b"070701".to_vec();
    for field in fields {
        entry.extend(format!("{field:08x}").into_bytes());
    }
    entry.extend(name.as_bytes());
    entry.push(0);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry.extend(contents);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, process::Command};

    use super::*;

    #[test]
    fn the_program_runs_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("init");
        fs::write(&path, program(Then::Sleep)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut text = vec![0; TEXT.len()];
        io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut text).unwrap();
        assert_eq!(text, TEXT.as_bytes());
        assert_eq!(child.try_wait().unwrap(), None, "it sleeps");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

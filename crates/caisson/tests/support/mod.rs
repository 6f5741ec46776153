//! Running the binary, and kernels small enough to write by hand.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

/// No run here takes seconds; one that lasts this long does not end by itself.
const LONGEST: Duration = Duration::from_secs(240);

/// A folder of its own for one test, with an empty image cache.
pub(crate) struct Bench {
    folder: TempDir,
}

/// What a run of the binary came to.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file and gives its path.
    pub(crate) fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The binary, unaffected by the caller's settings.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_caisson"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("CAISSON_LOG")
            .env_remove("COLUMNS")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null());
        command
    }

    /// Runs the binary to its end.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        output(&mut self.command(args))
    }
}

/// Starts a process that is killed if it goes on and on, which shows in its status.
pub(crate) fn spawn(command: &mut Command) -> Child {
    let child = command.spawn().unwrap();
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    thread::spawn(move || {
        thread::sleep(LONGEST);
        if pidfd_send_signal(process, Signal::KILL).is_ok() {
            eprintln!("a process was killed: it ran for {LONGEST:?}");
        }
    });
    child
}

/// Runs a command to its end, for what it says.
pub(crate) fn output(command: &mut Command) -> Run {
    let child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    finish(child.wait_with_output().unwrap())
}

pub(crate) fn finish(output: Output) -> Run {
    Run {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Compares text with a file beside the tests; `UPDATE_GOLDEN=1` writes the file instead.
pub(crate) fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, expected,
        "{name}; if this is meant, run with UPDATE_GOLDEN=1"
    );
}

/// Where the kernels of these tests are loaded.
const LOAD: u32 = 0x10_0000;
/// Length of a Multiboot header with address fields (Multiboot 0.6.96 §3.1.1).
const HEADER: u32 = 32;

/// A Multiboot 1 kernel that runs `code`, which starts in 32-bit protected mode without paging or
/// a stack. Addresses in it count from [`code_base`].
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES: u32 = 1 << 16;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES);
    let fields = [MAGIC, ADDRESSES, checksum, LOAD, LOAD, 0, 0, LOAD + HEADER];
    let mut image: Vec<u8> = fields
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect();
    image.extend_from_slice(code);
    image
}

/// Instructions of 32-bit x86 that the kernels are made of (Intel SDM Vol. 2).
pub(crate) mod asm {
    /// Writes `text` to COM1, byte by byte; the port's transmitter is taken to be ready.
    pub(crate) fn print(text: &str) -> Vec<u8> {
        let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
        for byte in text.bytes() {
            code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
        }
        code
    }

    /// Writes `value` to the debug-exit port at 0xf4.
    pub(crate) fn debug_exit(value: u32) -> Vec<u8> {
        let mut code = vec![0xb8]; // mov eax, value
        code.extend(value.to_le_bytes());
        code.extend([0xe7, 0xf4]); // out 0xf4, eax
        code.extend(halt());
        code
    }

    /// Sleeps for ever.
    pub(crate) fn halt() -> Vec<u8> {
        vec![0xfa, 0xf4, 0xeb, 0xfd] // cli; l: hlt; jmp l
    }

    /// Writes every byte from COM1 back to it, until a `q`, which falls through.
    pub(crate) fn echo_until_q() -> Vec<u8> {
        vec![
            0x66, 0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
            0xec, //                         in al, dx
            0xa8, 0x01, //                   test al, 1
            0x74, 0xf7, //                   jz wait
            0x66, 0xba, 0xf8, 0x03, //       mov dx, 0x3f8
            0xec, //                         in al, dx
            0x3c, b'q', //                   cmp al, 'q'
            0x74, 0x03, //                   je end
            0xee, //                         out dx, al
            0xeb, 0xeb, //                   jmp wait
        ] //                           end:
    }

    /// Asks the keyboard controller for a reset.
    pub(crate) fn reset() -> Vec<u8> {
        let mut code = vec![0xb0, 0xfe, 0xe6, 0x64]; // mov al, 0xfe; out 0x64, al
        code.extend(halt());
        code
    }

    /// Faults with an empty interrupt table.
    pub(crate) fn triple_fault() -> Vec<u8> {
        vec![
            0x0f, 0x01, 0x1d, 0x00, 0x00, 0x00, 0x00, // lidt [0], where there are zeros
            0x0f, 0x0b, //                               ud2
        ]
    }
}

//! Starting programs.

use crate::memory;
use crate::sys::{self, Errno, Fd};
use crate::text::{Path, write_all};
use crate::wire::StartHeader;
use core::ffi::CStr;

const SHELL: &CStr = c"/bin/busybox";
const DEFAULT_PATH: &[u8] = b"/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin";

/// Becomes busybox with these arguments as the superuser; returns only if that fails.
pub fn execute_busybox(arguments: &[&CStr], terminal: &CStr) {
    let mut pointers = [core::ptr::null(); 8];
    for (slot, argument) in pointers
        .iter_mut()
        .zip(&arguments[..arguments.len().min(7)])
    {
        *slot = argument.as_ptr().cast();
    }
    let environment: [*const u8; 7] = [
        c"PATH=/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin"
            .as_ptr()
            .cast(),
        c"HOME=/root".as_ptr().cast(),
        c"USER=root".as_ptr().cast(),
        c"LOGNAME=root".as_ptr().cast(),
        c"SHELL=/bin/sh".as_ptr().cast(),
        terminal.as_ptr().cast(),
        core::ptr::null(),
    ];
    // SAFETY: both arrays end in null and hold NUL-terminated strings that outlive the call.
    unsafe { sys::execute(SHELL, pointers.as_ptr(), environment.as_ptr()) };
}

/// Runs busybox with these arguments and waits for it.
pub fn run_to_end(arguments: &[&CStr]) {
    match sys::fork() {
        Ok(None) => {
            sys::set_blocked_signals(0);
            execute_busybox(arguments, c"TERM=dumb");
            sys::exit(127)
        }
        Ok(Some(child)) => while sys::wait().is_ok_and(|pid| pid != child) {},
        Err(_) => {}
    }
}

/// A command as the host described it, ready to run.
pub struct Command {
    pub header: StartHeader,
    folder: &'static CStr,
    /// The arguments behind one free place, for the shell that runs a script without `#!`.
    arguments: &'static mut [*const u8],
    environment: &'static mut [*const u8],
}

impl Command {
    /// Reads a start record; `None` if it is not sound.
    pub fn parse(record: &'static [u8]) -> Option<Command> {
        let (header, strings) = StartHeader::parse(record)?;
        let arguments = pointers(usize::from(header.arguments) + 2)?;
        let environment = pointers(usize::from(header.variables).max(8) + 1)?;
        let mut strings = strings.split_inclusive(|&byte| byte == 0);
        let folder = CStr::from_bytes_with_nul(strings.next()?).ok()?;
        for slot in &mut arguments[1..=usize::from(header.arguments)] {
            *slot = strings.next()?.as_ptr();
        }
        for slot in &mut environment[..usize::from(header.variables)] {
            *slot = strings.next()?.as_ptr();
        }
        (header.arguments > 0).then_some(Command {
            header,
            folder,
            arguments,
            environment,
        })
    }

    fn program(&self) -> &'static [u8] {
        string(self.arguments[1])
    }

    /// Gives the command the usual environment if the host sent none.
    pub fn complete_environment(&mut self, terminal: &'static CStr) {
        if self.header.variables > 0 {
            return;
        }
        let own: [&CStr; 6] = if self.header.uid == 0 {
            [
                c"PATH=/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin",
                c"HOME=/root",
                c"USER=root",
                c"LOGNAME=root",
                c"SHELL=/bin/sh",
                terminal,
            ]
        } else {
            [
                c"PATH=/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin",
                c"HOME=/",
                c"SHELL=/bin/sh",
                c"LANG=C.UTF-8",
                c"PWD=/",
                terminal,
            ]
        };
        for (slot, variable) in self.environment.iter_mut().zip(own) {
            *slot = variable.as_ptr().cast();
        }
    }

    /// Turns the present process, a fresh child whose standard files are in place, into the
    /// command. If that fails, says why on standard error and exits as a shell would.
    pub fn become_program(&mut self) -> ! {
        let folder = match self.folder.to_bytes() {
            [] if self.header.uid == 0 => c"/root",
            [] => c"/",
            _ => self.folder,
        };
        if let Err(errno) = sys::change_folder(folder) {
            fail(folder.to_bytes(), reason(errno), 126);
        }
        if (self.header.uid, self.header.gid) != (0, 0)
            && let Err(errno) = sys::become_user(self.header.uid, self.header.gid)
        {
            fail(b"cannot become the user", reason(errno), 126);
        }
        let program = self.program();
        let mut failure = sys::ENOENT;
        if program.contains(&b'/') {
            failure = self.try_path(&[program]);
        } else {
            for folder in self.search_path().split(|&byte| byte == b':') {
                let folder = if folder.is_empty() { &b"."[..] } else { folder };
                let errno = self.try_path(&[folder, b"/", program]);
                if errno != sys::ENOENT && errno != sys::ENOTDIR {
                    failure = errno;
                    if errno != sys::EACCES {
                        break;
                    }
                }
            }
        }
        let status = if failure == sys::ENOENT || failure == sys::ENOTDIR {
            127
        } else {
            126
        };
        fail(program, reason(failure), status)
    }

    fn search_path(&self) -> &'static [u8] {
        self.environment
            .iter()
            .take_while(|variable| !variable.is_null())
            .find_map(|variable| string(*variable).strip_prefix(b"PATH="))
            .unwrap_or(DEFAULT_PATH)
    }

    fn try_path(&mut self, pieces: &[&[u8]]) -> Errno {
        let Some(path) = Path::new(pieces) else {
            return sys::ENOENT;
        };
        let path = path.as_c_str();
        // SAFETY: both arrays end in a null pointer, because they were made one longer than what
        // was filled in, and hold strings of the start record or static ones.
        let errno = unsafe {
            sys::execute(
                path,
                self.arguments[1..].as_ptr(),
                self.environment.as_ptr(),
            )
        };
        if errno != sys::ENOEXEC {
            return errno;
        }
        // A script without an interpreter line: a shell's, by the convention of execvp(3).
        self.arguments[0] = c"sh".as_ptr().cast();
        self.arguments[1] = path.as_ptr().cast();
        // SAFETY: as above; `path` outlives the call.
        unsafe { sys::execute(SHELL, self.arguments.as_ptr(), self.environment.as_ptr()) }
    }
}

/// Zeroed places for pointers.
fn pointers(count: usize) -> Option<&'static mut [*const u8]> {
    let bytes = memory::allocate(count * size_of::<*const u8>());
    // SAFETY: any bytes make raw pointers, and `align_to_mut` keeps to their alignment.
    let (_, places, _) = unsafe { bytes.align_to_mut::<*const u8>() };
    (places.len() >= count).then_some(places)
}

/// The string at `start`, without its NUL.
fn string(start: *const u8) -> &'static [u8] {
    // SAFETY: every pointer here is to a NUL-terminated string in the start record, whose mapping
    // is never unmapped, or to a static one.
    unsafe { CStr::from_ptr(start.cast()) }.to_bytes()
}

fn reason(errno: Errno) -> &'static [u8] {
    match errno {
        sys::ENOENT => b"not found",
        sys::EACCES => b"permission denied",
        sys::ENOEXEC => b"not an executable for this machine",
        sys::ENOTDIR => b"not a directory",
        _ => b"cannot be run",
    }
}

fn fail(name: &[u8], why: &[u8], status: u8) -> ! {
    for piece in [b"caisson: ", name, b": ", why, b"\n"] {
        write_all(Fd(2), piece);
    }
    sys::exit(status)
}

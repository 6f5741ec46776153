//! What every mode needs before it starts, and the end of the machine.

use crate::memory;
use crate::spawn;
use crate::sys::{self, Ending, Fd};
use crate::text::{self, Options, Path, complain_errno};
use core::ffi::CStr;

const NOSUID: usize = 2;
const NODEV: usize = 4;
const NOEXEC: usize = 8;

pub fn file_systems() {
    let mounts: [(&CStr, &CStr, &CStr, usize, &CStr); 7] = [
        (c"proc", c"/proc", c"proc", NOSUID | NODEV | NOEXEC, c""),
        (c"sysfs", c"/sys", c"sysfs", NOSUID | NODEV | NOEXEC, c""),
        (c"devtmpfs", c"/dev", c"devtmpfs", NOSUID, c"mode=755"),
        (
            c"devpts",
            c"/dev/pts",
            c"devpts",
            NOSUID | NOEXEC,
            c"gid=5,mode=620,ptmxmode=666",
        ),
        (
            c"tmpfs",
            c"/dev/shm",
            c"tmpfs",
            NOSUID | NODEV,
            c"mode=1777",
        ),
        (c"tmpfs", c"/run", c"tmpfs", NOSUID | NODEV, c"mode=755"),
        (c"tmpfs", c"/tmp", c"tmpfs", NOSUID | NODEV, c"mode=1777"),
    ];
    for (source, target, kind, flags, data) in mounts {
        if let Err(errno) = sys::make_folder(target, 0o755)
            && errno != sys::EEXIST
        {
            complain_errno(b"create", target.to_bytes(), errno);
        }
        if let Err(errno) = sys::mount(source, target, kind, flags, data) {
            complain_errno(b"mount", target.to_bytes(), errno);
        }
    }
    for (target, path) in [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"fd/0", c"/dev/stdin"),
        (c"fd/1", c"/dev/stdout"),
        (c"fd/2", c"/dev/stderr"),
        (c"/proc/mounts", c"/etc/mtab"),
    ] {
        let _ = sys::symlink(target, path);
    }
}

/// The kernel's command line; empty if it cannot be read.
pub fn read_command_line() -> &'static [u8] {
    read_file(c"/proc/cmdline", 16 * 1024)
}

/// A file's first `max` bytes; empty if it cannot be read.
fn read_file(path: &CStr, max: usize) -> &'static [u8] {
    let Ok(file) = sys::open(path, sys::O_RDONLY | sys::O_CLOEXEC) else {
        return &[];
    };
    let buffer = memory::allocate(max);
    let mut len = 0;
    while let Ok(count) = sys::read(file, &mut buffer[len..]) {
        len += count;
        if count == 0 {
            break;
        }
    }
    sys::close(file);
    &buffer[..len]
}

/// Loads the modules that the initramfs lists, in its order.
pub fn modules() {
    let list = read_file(c"/etc/caisson/modules", 64 * 1024);
    for line in list
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let Some(path) = Path::new(&[line]) else {
            continue;
        };
        let loaded = sys::open(path.as_c_str(), sys::O_RDONLY | sys::O_CLOEXEC).and_then(|file| {
            let loaded = sys::load_module(file);
            sys::close(file);
            loaded
        });
        if let Err(errno) = loaded
            && errno != sys::EEXIST
        {
            complain_errno(b"load", line, errno);
        }
    }
}

pub fn network_and_name(options: &Options) {
    let name = options.host_name.unwrap_or(b"caisson");
    let name = &name[..name.len().min(64)];
    if let Err(errno) = sys::set_host_name(name) {
        complain_errno(b"set the host name", name, errno);
    }
    if let Err(errno) = raise_loopback() {
        complain_errno(b"raise", b"lo", errno);
    }
}

/// Has the network cards configured, if there are any, by whoever answers there.
pub fn cards() {
    if let Ok(card) = sys::open(c"/sys/class/net/eth0", sys::O_RDONLY | sys::O_CLOEXEC) {
        sys::close(card);
        spawn::run_to_end(&[c"sh", c"/etc/caisson/network"]);
    }
}

fn raise_loopback() -> sys::Result<()> {
    /// `struct ifreq`: a name, then here flags, then the rest of a union.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    const SIOCGIFFLAGS: usize = 0x8913;
    const SIOCSIFFLAGS: usize = 0x8914;
    const IFF_UP: u16 = 1;
    let mut request = Request {
        name: [0; 16],
        flags: 0,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    let socket = sys::control_socket()?;
    let outcome = sys::ioctl(socket, SIOCGIFFLAGS, &mut request).and_then(|_| {
        request.flags |= IFF_UP;
        sys::ioctl(socket, SIOCSIFFLAGS, &mut request)
    });
    sys::close(socket);
    outcome.map(drop)
}

/// The signals that process 1 answers: a child's end, and what `poweroff`, `reboot` and `halt`
/// send. They are blocked, so that they wait on the descriptor that this gives.
pub fn signals() -> sys::Result<Fd> {
    let set = sys::signal_set(&[
        sys::SIGCHLD,
        sys::SIGINT,
        sys::SIGTERM,
        sys::SIGUSR1,
        sys::SIGUSR2,
    ]);
    sys::set_blocked_signals(set);
    sys::signal_fd(set)
}

/// What a signal to process 1 asks for, as busybox's own init takes it.
pub fn ending_of(signal: u32) -> Option<Ending> {
    match signal {
        sys::SIGUSR1 => Some(Ending::Halt),
        sys::SIGUSR2 => Some(Ending::PowerOff),
        sys::SIGTERM | sys::SIGINT => Some(Ending::Restart),
        _ => None,
    }
}

/// Ends every process, lets go of disks, and ends the machine.
pub fn shut_down(ending: Ending) -> ! {
    let _ = sys::kill(-1, sys::SIGTERM);
    let _ = sys::kill(-1, sys::SIGKILL);
    while sys::wait().is_ok() {}
    sys::sync();
    let mounts = read_file(c"/proc/mounts", 64 * 1024);
    if mounts
        .split(|&byte| byte == b'\n')
        .any(|line| line.starts_with(b"/dev/"))
    {
        spawn::run_to_end(&[c"umount", c"-a", c"-r"]);
    }
    sys::end_machine(ending);
    text::complain(&[b"init: the kernel would not end the machine\n"]);
    loop {
        let _ = sys::poll(&mut []);
    }
}

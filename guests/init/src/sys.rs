//! System calls of Linux on x86-64.

use core::arch::asm;
use core::ffi::CStr;

/// The error number of a failed system call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

pub const ENOENT: Errno = Errno(2);
pub const EINTR: Errno = Errno(4);
pub const EIO: Errno = Errno(5);
pub const ENOEXEC: Errno = Errno(8);
pub const EAGAIN: Errno = Errno(11);
pub const EACCES: Errno = Errno(13);
pub const EEXIST: Errno = Errno(17);
pub const ENOTDIR: Errno = Errno(20);

pub type Result<T> = core::result::Result<T, Errno>;

/// An open file's number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fd(pub i32);

/// How the machine ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    PowerOff,
    Restart,
    Halt,
}

pub const O_RDONLY: usize = 0;
pub const O_RDWR: usize = 2;
pub const O_NOCTTY: usize = 0o400;
pub const O_NONBLOCK: usize = 0o4000;
pub const O_CLOEXEC: usize = 0o2_000_000;

pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;

pub const SIGINT: u32 = 2;
pub const SIGKILL: u32 = 9;
pub const SIGUSR1: u32 = 10;
pub const SIGUSR2: u32 = 12;
pub const SIGTERM: u32 = 15;
pub const SIGCHLD: u32 = 17;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct PollFd {
    pub fd: i32,
    pub events: i16,
    pub seen: i16,
}

/// The kernel's `struct termios` (`asm-generic/termbits.h`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Termios {
    pub input: u32,
    pub output: u32,
    pub control: u32,
    pub local: u32,
    pub line: u8,
    pub characters: [u8; 19],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
    pub pixels: [u16; 2],
}

/// # Safety
/// The arguments must be what the call numbered `number` takes, and pointers among them valid for
/// what it does with them.
unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize> {
    let result: isize;
    // SAFETY: the caller vouches for the call; the kernel keeps all registers but these.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result,
            in("rdi") arguments[0], in("rsi") arguments[1], in("rdx") arguments[2],
            in("r10") arguments[3], in("r8") arguments[4], in("r9") arguments[5],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    if (-4095..0).contains(&result) {
        Err(Errno(-result as i32))
    } else {
        Ok(result as usize)
    }
}

macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {{
        let given = [$($argument as usize),*];
        let mut arguments = [0usize; 6];
        arguments[..given.len()].copy_from_slice(&given);
        // SAFETY: each use passes integers and pointers to live memory of the size that the call
        // reads or writes.
        unsafe { call($number, arguments) }
    }};
}

pub fn read(fd: Fd, buffer: &mut [u8]) -> Result<usize> {
    call!(0, fd.0, buffer.as_mut_ptr(), buffer.len())
}

pub fn write(fd: Fd, bytes: &[u8]) -> Result<usize> {
    call!(1, fd.0, bytes.as_ptr(), bytes.len())
}

pub fn open(path: &CStr, flags: usize) -> Result<Fd> {
    call!(2, path.as_ptr(), flags, 0usize).map(|fd| Fd(fd as i32))
}

pub fn close(fd: Fd) {
    let _ = call!(3, fd.0);
}

pub fn poll(fds: &mut [PollFd]) -> Result<usize> {
    call!(7, fds.as_mut_ptr(), fds.len(), -1isize)
}

pub fn map_anonymous(len: usize) -> Result<usize> {
    const READ_WRITE: usize = 3;
    const PRIVATE_ANONYMOUS: usize = 0x22;
    call!(
        9,
        0usize,
        len,
        READ_WRITE,
        PRIVATE_ANONYMOUS,
        -1isize,
        0usize
    )
}

/// A bit mask of signals.
pub fn signal_set(signals: &[u32]) -> u64 {
    signals
        .iter()
        .fold(0, |set, signal| set | 1 << (signal - 1))
}

pub fn set_blocked_signals(set: u64) {
    const SIG_SETMASK: usize = 2;
    let _ = call!(14, SIG_SETMASK, &raw const set, 0usize, 8usize);
}

pub fn signal_fd(set: u64) -> Result<Fd> {
    let flags = O_CLOEXEC | O_NONBLOCK;
    call!(289, -1isize, &raw const set, 8usize, flags).map(|fd| Fd(fd as i32))
}

pub fn ioctl<T>(fd: Fd, request: usize, argument: &mut T) -> Result<usize> {
    call!(16, fd.0, request, &raw mut *argument)
}

pub fn ioctl_value(fd: Fd, request: usize, value: usize) -> Result<usize> {
    call!(16, fd.0, request, value)
}

/// A pipe: what is written to the second comes out of the first.
pub fn pipe() -> Result<(Fd, Fd)> {
    let mut fds = [0i32; 2];
    call!(293, fds.as_mut_ptr(), O_CLOEXEC)?;
    Ok((Fd(fds[0]), Fd(fds[1])))
}

pub fn set_non_blocking(fd: Fd) {
    const F_GETFL: usize = 3;
    const F_SETFL: usize = 4;
    if let Ok(flags) = call!(72, fd.0, F_GETFL, 0usize) {
        let _ = call!(72, fd.0, F_SETFL, flags | O_NONBLOCK);
    }
}

pub fn duplicate_to(from: Fd, to: Fd) -> Result<()> {
    call!(33, from.0, to.0).map(drop)
}

/// `Ok(None)` in the child.
pub fn fork() -> Result<Option<u32>> {
    Ok(match call!(57)? {
        0 => None,
        pid => Some(pid as u32),
    })
}

/// Replaces the program; returns only if that fails. `arguments` and `environment` are null-
/// terminated arrays of strings.
///
/// # Safety
/// Both arrays must end in a null pointer and point to NUL-terminated strings.
pub unsafe fn execute(
    path: &CStr,
    arguments: *const *const u8,
    environment: *const *const u8,
) -> Errno {
    match call!(59, path.as_ptr(), arguments, environment) {
        Err(errno) => errno,
        Ok(_) => EIO,
    }
}

pub fn exit(status: u8) -> ! {
    loop {
        let _ = call!(60, status);
    }
}

/// Reaps one child that has ended: its number and wait status. `Ok(None)` if none has.
pub fn reap() -> Result<Option<(u32, u32)>> {
    const WNOHANG: usize = 1;
    let mut status = 0u32;
    let pid = call!(61, -1isize, &raw mut status, WNOHANG, 0usize)?;
    Ok((pid != 0).then_some((pid as u32, status)))
}

/// Waits for one child to end.
pub fn wait() -> Result<u32> {
    let mut status = 0u32;
    call!(61, -1isize, &raw mut status, 0usize, 0usize).map(|pid| pid as u32)
}

/// Sends a signal to a process, or if negative to a process group.
pub fn kill(pid: i64, signal: u32) -> Result<()> {
    call!(62, pid, signal).map(drop)
}

pub fn change_folder(path: &CStr) -> Result<()> {
    call!(80, path.as_ptr()).map(drop)
}

pub fn make_folder(path: &CStr, mode: usize) -> Result<()> {
    call!(83, path.as_ptr(), mode).map(drop)
}

pub fn symlink(target: &CStr, path: &CStr) -> Result<()> {
    call!(88, target.as_ptr(), path.as_ptr()).map(drop)
}

/// Becomes another user, for good, without supplementary groups.
pub fn become_user(uid: u32, gid: u32) -> Result<()> {
    call!(116, 0usize, 0usize)?;
    call!(106, gid)?;
    call!(105, uid).map(drop)
}

pub fn new_session() -> Result<()> {
    call!(112).map(drop)
}

pub fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: usize, data: &CStr) -> Result<()> {
    call!(
        165,
        source.as_ptr(),
        target.as_ptr(),
        kind.as_ptr(),
        flags,
        data.as_ptr()
    )
    .map(drop)
}

pub fn sync() {
    let _ = call!(162);
}

pub fn end_machine(ending: Ending) {
    let command: usize = match ending {
        Ending::PowerOff => 0x4321_FEDC,
        Ending::Restart => 0x0123_4567,
        Ending::Halt => 0xCDEF_0123,
    };
    let _ = call!(169, 0xFEE1_DEADusize, 672_274_793usize, command, 0usize);
}

pub fn set_host_name(name: &[u8]) -> Result<()> {
    call!(170, name.as_ptr(), name.len()).map(drop)
}

pub fn load_module(file: Fd) -> Result<()> {
    call!(313, file.0, c"".as_ptr(), 0usize).map(drop)
}

/// A datagram socket to name network interfaces with.
pub fn control_socket() -> Result<Fd> {
    const AF_INET: usize = 2;
    const SOCK_DGRAM: usize = 2;
    call!(41, AF_INET, SOCK_DGRAM, 0usize).map(|fd| Fd(fd as i32))
}

/// Waits for a signal in `set` through its descriptor.
pub fn next_signal(signals: Fd) -> Option<u32> {
    // struct signalfd_siginfo is 128 bytes; the signal's number is the first four.
    let mut info = [0u8; 128];
    match read(signals, &mut info) {
        Ok(128) => Some(u32::from_le_bytes([info[0], info[1], info[2], info[3]])),
        _ => None,
    }
}

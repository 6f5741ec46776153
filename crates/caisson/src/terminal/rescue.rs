//! Signals: none of them may leave the terminal in raw mode.
//!
//! Signals that ask (`SIGTERM`, `SIGINT`, …) are blocked in every thread and taken by a thread of
//! their own, which may do anything. Signals that kill (`SIGABRT`, `SIGSEGV`, …) get a handler
//! that restores the terminal and nothing else, and then take their course. Panics restore it
//! through the panic hook.

use std::io;
use std::mem::MaybeUninit;
use std::panic;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use libc::{c_int, c_void, sigset_t};

use super::raw;

/// Signals that ask the process to end.
const ENDING: [c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Signals about the terminal and job control.
const CONTROL: [c_int; 3] = [libc::SIGTSTP, libc::SIGCONT, libc::SIGWINCH];
/// Signals of a fault in this process.
const FATAL: [c_int; 5] = [
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
];

/// What a signal told, for the run to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The process is asked to end, by the signal of this number.
    End(c_int),
    /// The terminal has a new size.
    Resize,
}

/// Blocks the signals that [`Blocked::watch`] will take, and makes faults and panics restore the
/// terminal. Call it before any thread is started: threads inherit what is blocked.
///
/// # Errors
/// The host refuses; it has no reason to.
pub(crate) fn block_signals() -> io::Result<Blocked> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        raw::restore();
        hook(info);
    }));
    for (index, signal) in FATAL.into_iter().enumerate() {
        install_fatal(index, signal)?;
    }
    let mut set = empty_set();
    for signal in ENDING.into_iter().chain(CONTROL) {
        // A signal that the parent had ignored (nohup, background jobs) stays ignored.
        if !ENDING.contains(&signal) || !is_ignored(signal)? {
            // SAFETY: `set` is an initialised signal set and `signal` a valid signal number.
            unsafe { libc::sigaddset(&mut set, signal) };
        }
    }
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    Ok(Blocked { set })
}

/// The signals are blocked and wait to be taken.
pub(crate) struct Blocked {
    set: sigset_t,
}

impl Blocked {
    /// Starts the thread that takes the signals and passes on those that the run has to do with.
    /// Stops and continues are dealt with here.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn watch(self, mut handle: impl FnMut(Notice) + Send + 'static) -> io::Result<()> {
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                loop {
                    match wait(&self.set) {
                        libc::SIGWINCH => handle(Notice::Resize),
                        libc::SIGTSTP => {
                            raw::restore();
                            stop_self();
                        }
                        libc::SIGCONT => raw::resume(),
                        signal if ENDING.contains(&signal) => handle(Notice::End(signal)),
                        _ => {}
                    }
                }
            })?;
        Ok(())
    }
}

fn wait(set: &sigset_t) -> c_int {
    let mut signal = 0;
    // SAFETY: both pointers are to live, initialised values.
    unsafe { libc::sigwait(set, &mut signal) };
    signal
}

fn stop_self() {
    // SAFETY: no memory is involved. SIGSTOP cannot be caught: this is a stop until SIGCONT.
    unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
}

/// Ends the process as `signal` would have, so that the parent sees why it ended.
pub(crate) fn end_by_signal(signal: c_int) -> ! {
    raw::restore();
    let mut set = empty_set();
    // SAFETY: `set` is initialised; default dispositions and unblocking touch no memory of ours.
    unsafe {
        libc::sigaddset(&mut set, signal);
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
    std::process::exit(128 + signal)
}

fn empty_set() -> sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set and cannot fail for a valid pointer.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

fn current_action(signal: c_int) -> io::Result<libc::sigaction> {
    let mut action = MaybeUninit::uninit();
    // SAFETY: with a null new action nothing changes, and on success `action` is filled in.
    if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded.
    Ok(unsafe { action.assume_init() })
}

fn is_ignored(signal: c_int) -> io::Result<bool> {
    Ok(current_action(signal)?.sa_sigaction == libc::SIG_IGN)
}

/// What the fatal signals did before, to be put back when one comes.
static BEFORE: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];
/// How often the handler ran: a fault inside of it must not loop.
static FAULTS: AtomicUsize = AtomicUsize::new(0);

fn install_fatal(index: usize, signal: c_int) -> io::Result<()> {
    let before = current_action(signal)?;
    BEFORE[index].get_or_init(|| before);
    let mut action = before;
    action.sa_sigaction = on_fatal as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: `action` is a complete sigaction whose handler has the three-argument form that the
    // flags promise and does only async-signal-safe things.
    if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Restores the terminal and puts the former action back; returning repeats the fault under it.
extern "C" fn on_fatal(signal: c_int, info: *const libc::siginfo_t, _context: *mut c_void) {
    raw::restore();
    let before = FATAL
        .iter()
        .position(|fatal| *fatal == signal)
        .and_then(|index| BEFORE[index].get());
    let first = FAULTS.fetch_add(1, Ordering::Relaxed) < FATAL.len();
    let Some(before) = before.filter(|_| first) else {
        // SAFETY: _exit is async-signal-safe and touches no memory.
        unsafe { libc::_exit(128 + signal) }
    };
    // SAFETY: `before` was filled in by sigaction itself; the calls are async-signal-safe, and
    // `info` is what the kernel passes to a handler with SA_SIGINFO. A signal that a process sent
    // (code 0 or less) does not come again by itself, and the former action may count on that.
    unsafe {
        if (*info).si_code <= 0 {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        } else {
            libc::sigaction(signal, before, ptr::null_mut());
        }
    }
}

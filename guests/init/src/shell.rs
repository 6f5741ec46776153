//! The interactive mode: a shell on the first serial port.

use crate::setup::{self, ending_of};
use crate::spawn;
use crate::sys::{self, Ending, Fd, PollFd, Termios, WindowSize};
use crate::text::{Options, Path, complain_errno};

pub const TCGETS: usize = 0x5401;
pub const TCSETS: usize = 0x5402;
pub const TIOCSCTTY: usize = 0x540E;
pub const TIOCSWINSZ: usize = 0x5414;

/// Runs the shell until it exits or somebody ends the machine.
pub fn run(options: &Options) -> Ending {
    let signals = match setup::signals() {
        Ok(signals) => signals,
        Err(errno) => {
            complain_errno(b"watch", b"signals", errno);
            return Ending::PowerOff;
        }
    };
    let shell = match sys::fork() {
        Ok(None) => become_shell(options),
        Ok(Some(pid)) => pid,
        Err(errno) => {
            complain_errno(b"start", b"the shell", errno);
            return Ending::PowerOff;
        }
    };
    loop {
        let mut fds = [PollFd {
            fd: signals.0,
            events: sys::POLLIN,
            seen: 0,
        }];
        let _ = sys::poll(&mut fds);
        while let Some(signal) = sys::next_signal(signals) {
            if let Some(ending) = ending_of(signal) {
                return ending;
            }
        }
        while let Ok(Some((pid, _))) = sys::reap() {
            if pid == shell {
                return Ending::PowerOff;
            }
        }
    }
}

fn become_shell(options: &Options) -> ! {
    sys::set_blocked_signals(0);
    let _ = sys::new_session();
    let terminal = match sys::open(c"/dev/ttyS0", sys::O_RDWR) {
        Ok(terminal) => terminal,
        Err(errno) => {
            complain_errno(b"open", b"/dev/ttyS0", errno);
            sys::exit(1)
        }
    };
    let _ = sys::ioctl_value(terminal, TIOCSCTTY, 0);
    make_sane(terminal);
    set_size(terminal, options.size.unwrap_or((80, 24)));
    for standard in 0..3 {
        let _ = sys::duplicate_to(terminal, Fd(standard));
    }
    if terminal.0 > 2 {
        sys::close(terminal);
    }
    let _ = sys::change_folder(c"/root");
    let kind = Path::new(&[b"TERM=", options.terminal.unwrap_or(b"vt100")]);
    let kind = kind.as_ref().map_or(c"TERM=vt100", Path::as_c_str);
    spawn::execute_busybox(&[c"-sh"], kind);
    sys::exit(127)
}

/// A terminal as a person expects it: lines, echo, signals from the keyboard, UTF-8.
fn make_sane(terminal: Fd) {
    const ICRNL: u32 = 0o400;
    const IXON: u32 = 0o2000;
    const IUTF8: u32 = 0o40_000;
    const OPOST_ONLCR: u32 = 0o5;
    const HUPCL: u32 = 0o2000;
    const CS8_CREAD_CLOCAL: u32 = 0o60 | 0o200 | 0o4000;
    // ISIG, ICANON, ECHO, ECHOE, ECHOK, ECHOCTL, ECHOKE and IEXTEN.
    const LINES: u32 = 0o1 | 0o2 | 0o10 | 0o20 | 0o40 | 0o1000 | 0o4000 | 0o100_000;
    let mut state = Termios::default();
    if sys::ioctl(terminal, TCGETS, &mut state).is_ok() {
        state.input = ICRNL | IXON | IUTF8;
        state.output = OPOST_ONLCR;
        state.control = (state.control | CS8_CREAD_CLOCAL) & !HUPCL;
        state.local = LINES;
        let _ = sys::ioctl(terminal, TCSETS, &mut state);
    }
}

/// Sets a terminal's size, in columns and rows.
pub fn set_size(terminal: Fd, (columns, rows): (u16, u16)) {
    let mut size = WindowSize {
        rows,
        columns,
        pixels: [0; 2],
    };
    let _ = sys::ioctl(terminal, TIOCSWINSZ, &mut size);
}

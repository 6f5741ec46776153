//! The command mode: runs one command for the host over the second serial port.

use crate::memory;
use crate::setup::{self, ending_of};
use crate::shell::{TCGETS, TCSETS, TIOCSCTTY, set_size};
use crate::spawn::Command;
use crate::sys::{self, Ending, Fd, PollFd, Termios};
use crate::text::{Options, Path, complain, complain_errno, decimal};
use crate::wire::{
    Decoder, Event, ExitStatus, MAX_FRAME, MAX_PAYLOAD, MAX_START, ToGuest, ToHost, VERSION,
    WINDOW, encode_frame,
};
use core::ffi::CStr;

/// Bytes of frames that may wait for the port.
const OUTGOING: usize = 8 * MAX_FRAME;
/// Credit is given back in pieces of at least this many bytes, or when nothing waits.
const CREDIT_PIECE: u32 = WINDOW / 4;

/// Runs the command, tells the host how it ended, and gives how the machine should end.
pub fn run(options: &Options) -> Ending {
    let opened = setup::signals().and_then(|signals| {
        let flags = sys::O_RDWR | sys::O_NOCTTY | sys::O_NONBLOCK | sys::O_CLOEXEC;
        Ok((signals, sys::open(c"/dev/ttyS1", flags)?))
    });
    let (signals, port) = match opened {
        Ok(opened) => opened,
        Err(errno) => {
            complain_errno(b"open", b"/dev/ttyS1", errno);
            return Ending::PowerOff;
        }
    };
    make_raw(port);
    let mut agent = Agent {
        port,
        signals,
        terminal: terminal_variable(options),
        size: options.size,
        outgoing: memory::allocate(OUTGOING),
        outgoing_len: 0,
        sequence: 0,
        record: memory::allocate(MAX_START),
        record_len: 0,
        pending: memory::allocate(WINDOW as usize),
        pending_len: 0,
        eof: false,
        credit: 0,
        child: None,
        status: None,
    };
    agent.send(ToHost::Hello {
        version: VERSION,
        window: WINDOW,
    });
    let ending = agent.serve();
    agent.drain();
    ending
}

/// `TERM=...` as a string that lasts.
fn terminal_variable(options: &Options) -> &'static CStr {
    let kind = options.terminal.unwrap_or(b"dumb");
    let place = memory::allocate(5 + kind.len() + 1);
    if let Some(text) = place.get_mut(..5 + kind.len()) {
        text[..5].copy_from_slice(b"TERM=");
        text[5..].copy_from_slice(kind);
    }
    CStr::from_bytes_until_nul(place).unwrap_or(c"TERM=dumb")
}

/// A port that passes every byte as it is, in both directions.
fn make_raw(port: Fd) {
    const CS8_CREAD_CLOCAL: u32 = 0o60 | 0o200 | 0o4000;
    const B115200: u32 = 0o10002;
    const VMIN: usize = 6;
    const VTIME: usize = 5;
    let mut state = Termios::default();
    if sys::ioctl(port, TCGETS, &mut state).is_ok() {
        state.input = 0;
        state.output = 0;
        state.local = 0;
        state.control = CS8_CREAD_CLOCAL | B115200;
        state.characters[VMIN] = 1;
        state.characters[VTIME] = 0;
        let _ = sys::ioctl(port, TCSETS, &mut state);
    }
}

/// The running command as seen from here.
struct Child {
    pid: u32,
    input: Option<Fd>,
    output: Option<Fd>,
    errors: Option<Fd>,
    /// Whether the three are one pseudo-terminal.
    terminal: bool,
}

struct Agent {
    port: Fd,
    signals: Fd,
    terminal: &'static CStr,
    size: Option<(u16, u16)>,
    outgoing: &'static mut [u8],
    outgoing_len: usize,
    sequence: u8,
    record: &'static mut [u8],
    record_len: usize,
    /// Standard input that the command has not taken yet.
    pending: &'static mut [u8],
    pending_len: usize,
    eof: bool,
    credit: u32,
    child: Option<Child>,
    status: Option<ExitStatus>,
}

impl Agent {
    fn serve(&mut self) -> Ending {
        let mut decoder = Decoder::new();
        loop {
            self.return_credit();
            self.flush();
            if self.is_over() {
                return Ending::PowerOff;
            }
            self.wait();
            while let Some(signal) = sys::next_signal(self.signals) {
                if let Some(ending) = ending_of(signal) {
                    return ending;
                }
            }
            self.reap();
            if let Err(()) = self.hear(&mut decoder) {
                complain(&[b"init: the host broke the command protocol\n"]);
                return Ending::PowerOff;
            }
            self.feed();
            self.collect();
        }
    }

    /// Sleeps until something can be done.
    fn wait(&mut self) {
        let room = self.has_room();
        let child = self.child.as_ref();
        let number = |fd: Option<Fd>| fd.map_or(-1, |fd| fd.0);
        let interest = |wanted: bool, events| if wanted { events } else { 0 };
        let sending = self.outgoing_len > 0;
        let mut fds = [
            PollFd {
                fd: self.port.0,
                events: sys::POLLIN | interest(sending, sys::POLLOUT),
                seen: 0,
            },
            PollFd {
                fd: self.signals.0,
                events: sys::POLLIN,
                seen: 0,
            },
            PollFd {
                fd: number(child.and_then(|child| child.output).filter(|_| room)),
                events: sys::POLLIN,
                seen: 0,
            },
            PollFd {
                fd: number(child.and_then(|child| child.errors).filter(|_| room)),
                events: sys::POLLIN,
                seen: 0,
            },
            PollFd {
                fd: number(
                    child
                        .and_then(|child| child.input)
                        .filter(|_| self.pending_len > 0),
                ),
                events: sys::POLLOUT,
                seen: 0,
            },
        ];
        let _ = sys::poll(&mut fds);
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = sys::reap() {
            if self.child.as_ref().is_some_and(|child| child.pid == pid) {
                self.status = Some(match status & 0x7F {
                    0 => ExitStatus::Code((status >> 8) as u8),
                    signal => ExitStatus::Signal(signal as u8),
                });
            }
        }
    }

    /// Whether the command has ended and all that it wrote is on its way.
    fn is_over(&mut self) -> bool {
        let Some(status) = self.status else {
            return false;
        };
        let silent = self
            .child
            .as_ref()
            .is_none_or(|child| child.output.is_none() && child.errors.is_none());
        if !silent || !self.has_room() {
            return false;
        }
        self.send(ToHost::Exit(status));
        true
    }

    /// Takes what the host sent.
    fn hear(&mut self, decoder: &mut Decoder) -> Result<(), ()> {
        let mut buffer = [0; 1024];
        let len = match sys::read(self.port, &mut buffer) {
            Ok(len) => len,
            Err(_) => return Ok(()),
        };
        let mut bytes = &buffer[..len];
        while let Some(event) = decoder.next(&mut bytes) {
            let Event::Frame {
                kind,
                payload,
                wire_len,
            } = event
            else {
                return Err(());
            };
            let message = ToGuest::parse(kind, payload).map_err(drop)?;
            self.credit += wire_len as u32;
            self.act(message)?;
        }
        Ok(())
    }

    fn act(&mut self, message: ToGuest<'_>) -> Result<(), ()> {
        match message {
            ToGuest::Start { last, piece } => {
                let end = self.record_len + piece.len();
                let place = self.record.get_mut(self.record_len..end).ok_or(())?;
                place.copy_from_slice(piece);
                self.record_len = end;
                if last {
                    self.start()?;
                }
            }
            ToGuest::Stdin(bytes) => {
                let end = self.pending_len + bytes.len();
                let place = self.pending.get_mut(self.pending_len..end).ok_or(())?;
                place.copy_from_slice(bytes);
                self.pending_len = end;
                // Given back as the command takes them.
                self.credit -= bytes.len() as u32;
            }
            ToGuest::StdinEof => self.eof = true,
            ToGuest::Signal(signal) => {
                if let (Some(child), None) = (&self.child, self.status) {
                    let _ = sys::kill(-i64::from(child.pid), signal.into());
                }
            }
            ToGuest::WindowSize { columns, rows } => {
                if let Some(Child {
                    output: Some(terminal),
                    terminal: true,
                    ..
                }) = self.child
                {
                    set_size(terminal, (columns, rows));
                }
            }
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), ()> {
        if self.child.is_some() || self.status.is_some() {
            return Err(());
        }
        let record = core::mem::take(&mut self.record);
        let record: &'static [u8] = &record[..self.record_len];
        let mut command = Command::parse(record).ok_or(())?;
        command.complete_environment(self.terminal);
        let started = if command.header.terminal {
            start_on_terminal(&mut command, self.size)
        } else {
            start_on_pipes(&mut command)
        };
        match started {
            Ok(child) => self.child = Some(child),
            Err(errno) => {
                let mut digits = [0; 10];
                let number = decimal(errno.0.unsigned_abs(), &mut digits);
                self.send(ToHost::Stderr(
                    b"caisson: the guest cannot start a process: error ",
                ));
                self.send(ToHost::Stderr(number));
                self.send(ToHost::Stderr(b"\n"));
                self.status = Some(ExitStatus::Code(126));
            }
        }
        Ok(())
    }

    /// Passes standard input on to the command.
    fn feed(&mut self) {
        let Some(child) = &mut self.child else {
            return;
        };
        while let (Some(input), true) = (child.input, self.pending_len > 0) {
            match sys::write(input, &self.pending[..self.pending_len]) {
                Ok(count) => {
                    self.pending.copy_within(count..self.pending_len, 0);
                    self.pending_len -= count;
                    self.credit += count as u32;
                }
                Err(sys::EAGAIN) => return,
                Err(sys::EINTR) => {}
                Err(_) => {
                    // The command closed its end: what it will not read, nobody will.
                    child.close_input();
                }
            }
        }
        if child.input.is_none() {
            self.credit += self.pending_len as u32;
            self.pending_len = 0;
        } else if self.eof && self.pending_len == 0 {
            if child.terminal {
                // End of input as the line discipline knows it.
                if let Some(terminal) = child.input {
                    let _ = sys::write(terminal, &[4]);
                }
                self.eof = false;
            } else {
                child.close_input();
            }
        }
    }

    /// Takes what the command wrote, as far as there is room for it.
    fn collect(&mut self) {
        let mut buffer = [0; MAX_PAYLOAD];
        for is_error in [false, true] {
            while self.has_room() {
                let Some(child) = &mut self.child else {
                    return;
                };
                let file = if is_error {
                    &mut child.errors
                } else {
                    &mut child.output
                };
                let Some(fd) = *file else {
                    break;
                };
                match sys::read(fd, &mut buffer) {
                    Ok(count) if count > 0 => {
                        let bytes = &buffer[..count];
                        self.send(if is_error {
                            ToHost::Stderr(bytes)
                        } else {
                            ToHost::Stdout(bytes)
                        });
                    }
                    Err(sys::EINTR) => {}
                    // A process that the command left behind may hold the other end open; once
                    // the command is gone, what is there now is all that counts.
                    Err(sys::EAGAIN) if self.status.is_none() => break,
                    _ => {
                        *file = None;
                        if !child.terminal {
                            sys::close(fd);
                        }
                    }
                }
            }
        }
    }

    fn return_credit(&mut self) {
        if self.credit >= CREDIT_PIECE || (self.credit > 0 && self.pending_len == 0) {
            let credit = core::mem::take(&mut self.credit);
            self.send(ToHost::Credit(credit));
        }
    }

    /// Whether two of the longest frames fit before the port is written again: one of output, and
    /// one of credit or status.
    fn has_room(&self) -> bool {
        self.outgoing.len() - self.outgoing_len >= 2 * MAX_FRAME
    }

    fn send(&mut self, message: ToHost<'_>) {
        let mut scratch = [0; 8];
        let (kind, payload) = message.pieces(&mut scratch);
        let place = &mut self.outgoing[self.outgoing_len..];
        match encode_frame(kind, self.sequence, payload, place) {
            Some(len) => {
                self.sequence = self.sequence.wrapping_add(1);
                self.outgoing_len += len;
            }
            None => complain(&[b"init: no room for a message to the host\n"]),
        }
    }

    /// Writes to the port what it takes now.
    fn flush(&mut self) {
        let mut done = 0;
        while done < self.outgoing_len {
            match sys::write(self.port, &self.outgoing[done..self.outgoing_len]) {
                Ok(count) => done += count,
                Err(sys::EINTR) => {}
                Err(_) => break,
            }
        }
        self.outgoing.copy_within(done..self.outgoing_len, 0);
        self.outgoing_len -= done;
    }

    /// Waits until everything has left the port.
    fn drain(&mut self) {
        const TCSBRK: usize = 0x5409;
        while self.outgoing_len > 0 {
            let mut fds = [PollFd {
                fd: self.port.0,
                events: sys::POLLOUT,
                seen: 0,
            }];
            let _ = sys::poll(&mut fds);
            self.flush();
        }
        let _ = sys::ioctl_value(self.port, TCSBRK, 1);
    }
}

impl Child {
    fn close_input(&mut self) {
        if let (Some(input), false) = (self.input.take(), self.terminal) {
            sys::close(input);
        }
    }
}

fn start_on_pipes(command: &mut Command) -> sys::Result<Child> {
    let (their_input, input) = sys::pipe()?;
    let (output, their_output) = sys::pipe()?;
    let (errors, their_errors) = sys::pipe()?;
    let Some(pid) = sys::fork()? else {
        sys::set_blocked_signals(0);
        let _ = sys::new_session();
        for (to, from) in [their_input, their_output, their_errors]
            .into_iter()
            .enumerate()
        {
            let _ = sys::duplicate_to(from, Fd(to as i32));
        }
        command.become_program()
    };
    for theirs in [their_input, their_output, their_errors] {
        sys::close(theirs);
    }
    for ours in [input, output, errors] {
        sys::set_non_blocking(ours);
    }
    Ok(Child {
        pid,
        input: Some(input),
        output: Some(output),
        errors: Some(errors),
        terminal: false,
    })
}

fn start_on_terminal(command: &mut Command, size: Option<(u16, u16)>) -> sys::Result<Child> {
    const TIOCGPTN: usize = 0x8004_5430;
    const TIOCSPTLCK: usize = 0x4004_5431;
    let flags = sys::O_RDWR | sys::O_NOCTTY | sys::O_NONBLOCK | sys::O_CLOEXEC;
    let master = sys::open(c"/dev/ptmx", flags)?;
    let mut unlock = 0i32;
    sys::ioctl(master, TIOCSPTLCK, &mut unlock)?;
    let mut number = 0u32;
    sys::ioctl(master, TIOCGPTN, &mut number)?;
    let mut digits = [0; 10];
    let path = Path::new(&[b"/dev/pts/", decimal(number, &mut digits)]).ok_or(sys::ENOENT)?;
    let theirs = sys::open(
        path.as_c_str(),
        sys::O_RDWR | sys::O_NOCTTY | sys::O_CLOEXEC,
    )?;
    let asked = (command.header.columns, command.header.rows);
    let size = if asked == (0, 0) { size } else { Some(asked) };
    set_size(master, size.unwrap_or((80, 24)));
    let Some(pid) = sys::fork()? else {
        sys::set_blocked_signals(0);
        let _ = sys::new_session();
        let _ = sys::ioctl_value(theirs, TIOCSCTTY, 0);
        for standard in 0..3 {
            let _ = sys::duplicate_to(theirs, Fd(standard));
        }
        command.become_program()
    };
    sys::close(theirs);
    Ok(Child {
        pid,
        input: Some(master),
        output: Some(master),
        errors: None,
        terminal: true,
    })
}

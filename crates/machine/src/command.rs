//! One command in the guest: the host's side of the agent protocol at a serial port.

use std::{
    io::{self, Write},
    sync::Arc,
};

use caisson_agent_protocol::{
    ProtocolError, Session, SessionEvent, StartError, StartRequest, wire::ExitStatus,
};
use parking_lot::{Condvar, Mutex};

use crate::serial::{HostEnd, SerialInput};

/// The signal that a program gets whose reader has gone, as Linux numbers it.
const SIGPIPE: u8 = 13;

/// How a command ended, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandEnding {
    /// It exited or was killed.
    Exit(ExitStatus),
    /// The guest broke the protocol.
    Protocol(ProtocolError),
    /// The machine ended first.
    MachineEnded,
}

/// The end of the serial port at which the guest's agent is. Made by [`command`].
pub struct CommandEnd {
    shared: Arc<Shared>,
    stdout: Output,
    stderr: Output,
}

/// The command as its caller sees it. Clones are the same command.
#[derive(Clone)]
pub struct CommandSession {
    shared: Arc<Shared>,
}

struct Output {
    writer: Box<dyn Write + Send>,
    broken: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    session: Session,
    input: Option<SerialInput>,
    ready: bool,
    ending: Option<CommandEnding>,
}

/// Prepares to run `request` in a guest: the [`CommandEnd`] goes to the machine's port, the [`CommandSession`] stays
/// with the caller. What the command writes goes to `stdout` and `stderr`, byte for byte; when one of them breaks,
/// the command gets SIGPIPE, as a local one would.
///
/// # Errors
/// The request cannot be sent to a guest.
pub fn command(
    request: &StartRequest,
    stdout: Box<dyn Write + Send>,
    stderr: Box<dyn Write + Send>,
) -> Result<(CommandEnd, CommandSession), StartError> {
    let state = State {
        session: Session::new(request)?,
        input: None,
        ready: false,
        ending: None,
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        changed: Condvar::new(),
    });
    let output = |writer| Output {
        writer,
        broken: false,
    };
    let end = CommandEnd {
        shared: shared.clone(),
        stdout: output(stdout),
        stderr: output(stderr),
    };
    Ok((end, CommandSession { shared }))
}

impl State {
    /// Sends what the session has to say. Bounded by the window that the guest granted.
    fn flush(&mut self) {
        if self.session.has_output()
            && let Some(input) = &self.input
        {
            input.push_now(&self.session.take_output());
        }
    }
}

impl Output {
    /// Writes `bytes`. Returns whether the reader went away just now.
    fn write(&mut self, bytes: &[u8]) -> bool {
        if self.broken {
            return false;
        }
        self.broken = self
            .writer
            .write_all(bytes)
            .and_then(|()| self.writer.flush())
            .is_err();
        self.broken
    }
}

impl HostEnd for CommandEnd {
    fn attach(&mut self, input: SerialInput) {
        self.shared.state.lock().input = Some(input);
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Written only after the lock is gone: a writer may block, and senders of input must not wait for it.
        let mut written: Vec<(bool, Vec<u8>)> = Vec::new();
        let mut state = self.shared.state.lock();
        let mut ready = false;
        let mut exit = None;
        let result = state.session.receive(bytes, |event| match event {
            SessionEvent::Ready => ready = true,
            SessionEvent::Stdout(bytes) => written.push((false, bytes.to_vec())),
            SessionEvent::Stderr(bytes) => written.push((true, bytes.to_vec())),
            SessionEvent::Exit(status) => exit = Some(CommandEnding::Exit(status)),
        });
        state.ready |= ready;
        state.flush();
        drop(state);
        self.shared.changed.notify_all();
        for (to_stderr, bytes) in written {
            let output = if to_stderr {
                &mut self.stderr
            } else {
                &mut self.stdout
            };
            if output.write(&bytes) {
                let mut state = self.shared.state.lock();
                state.session.signal(SIGPIPE);
                state.flush();
            }
        }
        // The ending is told last: whoever waits for it may rely on all output having been written.
        if let Some(ending) = exit.or(result.err().map(CommandEnding::Protocol)) {
            self.shared.end(ending);
        }
        Ok(())
    }

    fn close(&mut self) {
        self.shared.end(CommandEnding::MachineEnded);
    }
}

impl Drop for CommandEnd {
    fn drop(&mut self) {
        self.shared.end(CommandEnding::MachineEnded);
    }
}

impl Shared {
    fn end(&self, ending: CommandEnding) {
        self.state.lock().ending.get_or_insert(ending);
        self.changed.notify_all();
    }
}

impl CommandSession {
    /// Waits until the guest's agent is up. `false` when the command ended, or never began.
    pub fn wait_ready(&self) -> bool {
        let mut state = self.shared.state.lock();
        while !state.ready && state.ending.is_none() {
            self.shared.changed.wait(&mut state);
        }
        state.ready
    }

    /// Whether the guest's agent is up, or was.
    pub fn is_ready(&self) -> bool {
        self.shared.state.lock().ready
    }

    /// Sends standard input, waiting for the guest to take it. `false` when the command ended first.
    pub fn send_stdin(&self, mut bytes: &[u8]) -> bool {
        let mut state = self.shared.state.lock();
        while !bytes.is_empty() {
            if state.ending.is_some() {
                return false;
            }
            let taken = state.session.send_stdin(bytes);
            if taken == 0 {
                self.shared.changed.wait(&mut state);
            } else {
                bytes = bytes.get(taken..).unwrap_or_default();
                state.flush();
            }
        }
        true
    }

    /// Ends standard input behind what was sent.
    pub fn close_stdin(&self) {
        let mut state = self.shared.state.lock();
        state.session.close_stdin();
        state.flush();
    }

    /// Sends a signal (Linux numbers) to the command.
    pub fn signal(&self, signal: u8) {
        let mut state = self.shared.state.lock();
        state.session.signal(signal);
        state.flush();
    }

    /// Tells the command's terminal its size in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut state = self.shared.state.lock();
        state.session.resize(columns, rows);
        state.flush();
    }

    /// How it ended, if it has.
    pub fn ending(&self) -> Option<CommandEnding> {
        self.shared.state.lock().ending.clone()
    }

    /// Waits until it has ended and all its output has been written.
    pub fn wait(&self) -> CommandEnding {
        let mut state = self.shared.state.lock();
        loop {
            if let Some(ending) = &state.ending {
                return ending.clone();
            }
            self.shared.changed.wait(&mut state);
        }
    }
}

//! One command in a fresh guest: `caisson run -- COMMAND`.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow};
use caisson_agent_protocol::StartRequest;
use caisson_config::MachineConfig;
use caisson_hypervisor::Hypervisor;
use caisson_machine::{
    BootSpec, CommandEnding, CommandSession, HostEnd, MachineSpec, NetSpec, Outcome, command,
};

use super::tail::Tail;
use super::{Disks, Stopper, conclude, make};
use crate::exit::Exit;
use crate::terminal::{
    self, Blocked, Escape, HELP, Key, ModeTracker, Notice, RawMode, is_terminal, say,
};

/// The port that the guest's agent listens on: COM2.
const AGENT_PORT: usize = 1;
/// How much of the console is kept in case the guest dies, in bytes.
const TAIL_BYTES: usize = 64 << 10;
/// How much of it is shown then, in lines.
const TAIL_LINES: usize = 30;
/// The exit status when the user leaves before the command has ended, as if it had been killed.
const LEFT: u8 = 128 + 9;

/// Runs the description's command and passes its streams and status on.
pub(super) fn run(
    config: &MachineConfig,
    hypervisor: Arc<dyn Hypervisor>,
    (boot, disks, nets): (BootSpec, Disks, Vec<NetSpec>),
    signals: Blocked,
    stopper: &Arc<Stopper>,
) -> Result<Exit> {
    let at_terminal = is_terminal(io::stdin()) && is_terminal(io::stdout());
    let request = StartRequest {
        arguments: config
            .command
            .iter()
            .map(|word| word.clone().into_bytes())
            .collect(),
        terminal: at_terminal,
        size: terminal::size(io::stdout()).filter(|_| at_terminal),
        ..StartRequest::default()
    };
    let modes = Arc::new(Mutex::new(ModeTracker::default()));
    let stdout = Watched {
        modes: modes.clone(),
        out: io::stdout(),
    };
    let (end, session) = command(&request, Box::new(stdout), Box::new(io::stderr()))?;

    let tail = Arc::new(Mutex::new(Tail::new(TAIL_BYTES)));
    let console = TailEnd(tail.clone());
    let mut spec = MachineSpec::from_config(config, hypervisor, boot, || Some(Box::new(console)))?;
    spec.disks = disks.specs();
    spec.nets = nets;
    spec.serial[AGENT_PORT] = Some(Box::new(end));
    let machine = make(spec, None, stopper)?;

    let (on_signal, to_command) = (stopper.clone(), session.clone());
    let mut interrupts = 0;
    signals
        .watch(move |notice| match notice {
            // The first Ctrl-C is the command's, as it would be without a machine around it.
            Notice::End(libc::SIGINT) if interrupts == 0 && to_command.is_ready() => {
                interrupts += 1;
                to_command.signal(libc::SIGINT as u8);
            }
            Notice::End(signal) => on_signal.stop_by_signal(signal),
            Notice::Resize => {
                if let Some((columns, rows)) = terminal::size(io::stdout()) {
                    to_command.resize(columns, rows);
                }
            }
        })
        .context("cannot start the signal thread")?;

    let raw = if at_terminal {
        Some(RawMode::enter().context("cannot put the terminal into raw mode")?)
    } else {
        None
    };
    let (to_command, leave) = (session.clone(), stopper.clone());
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || pump(&to_command, at_terminal, &leave))
        .context("cannot start the input thread")?;

    machine.start()?;
    let ending = session.wait();
    if ending != CommandEnding::MachineEnded {
        machine.stop();
    }
    let outcome = machine.wait();
    drop(raw);
    if at_terminal {
        let undo = modes.lock().unwrap_or_else(PoisonError::into_inner).undo();
        let _ = io::stdout()
            .write_all(&undo)
            .and_then(|()| io::stdout().flush());
    }
    let in_order = disks.close();
    stopper.follow_signal();
    if !in_order {
        return Ok(Exit::Failed);
    }
    match ending {
        CommandEnding::Exit(status) => Ok(Exit::Guest(status.shell_code())),
        CommandEnding::Protocol(error) => {
            show(&tail);
            Err(anyhow!(error).context("the command was given up"))
        }
        CommandEnding::MachineEnded if outcome == Outcome::Stopped => Ok(Exit::Guest(LEFT)),
        CommandEnding::MachineEnded => {
            if outcome.is_crash() {
                show(&tail);
            }
            Ok(conclude(config, &outcome))
        }
    }
}

/// Sends standard input to the command until it ends.
fn pump(session: &CommandSession, at_terminal: bool, stopper: &Stopper) {
    let mut escape = Escape::default();
    let mut bytes = [0; 4096];
    let mut guest = Vec::new();
    let mut leave = false;
    while !leave {
        let count = match io::stdin().lock().read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => return session.close_stdin(),
            Ok(count) => count,
        };
        guest.clear();
        if at_terminal {
            escape.filter(&bytes[..count], &mut guest, |key| match key {
                Key::Leave => leave = true,
                Key::Help => say(HELP),
            });
        } else {
            guest.extend_from_slice(&bytes[..count]);
        }
        if !session.send_stdin(&guest) {
            return;
        }
    }
    stopper.stop();
}

/// Shows the end of the console, which nobody has seen.
fn show(tail: &Mutex<Tail>) {
    let lines = tail
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .lines(TAIL_LINES);
    if !lines.is_empty() {
        say("the guest's last words:");
        say(&lines
            .iter()
            .map(|line| format!("| {line}\n"))
            .collect::<String>());
    }
}

/// Keeps the end of what the guest's console says.
struct TailEnd(Arc<Mutex<Tail>>);

impl HostEnd for TailEnd {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(bytes);
        Ok(())
    }
}

/// Standard output, watched for modes that the command sets in the terminal.
struct Watched {
    modes: Arc<Mutex<ModeTracker>>,
    out: io::Stdout,
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.modes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .watch(bytes);
        self.out.lock().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

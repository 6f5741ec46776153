//! The machine's console on standard input and output.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use caisson_config::{CharBackend, MachineConfig};
use caisson_hypervisor::Hypervisor;
use caisson_machine::{BootSpec, HostEnd, MachineSpec, NetSpec, SerialInput};

use super::{Disks, Saved, Stopper, conclude, make};
use crate::backend;
use crate::exit::Exit;
use crate::terminal::{
    self, Blocked, Escape, HELP, Key, ModeTracker, Notice, RawMode, is_terminal, say,
};

/// End of transmission: what a terminal's user types to end input.
const CTRL_D: u8 = 0x04;

/// Runs the machine with its console where the description says.
pub(super) fn run(
    config: &MachineConfig,
    quiet: bool,
    hypervisor: Arc<dyn Hypervisor>,
    (boot, disks, nets, saved): (BootSpec, Disks, Vec<NetSpec>, Option<Saved>),
    signals: Blocked,
    stopper: &Arc<Stopper>,
) -> Result<Exit> {
    let screen = Arc::new(Screen::default());
    let end = ScreenEnd {
        screen: screen.clone(),
        stopper: stopper.clone(),
    };
    let chosen = hypervisor.name();
    let mut spec = MachineSpec::from_config(config, hypervisor, boot, || Some(Box::new(end)))?;
    spec.disks = disks.specs();
    spec.nets = nets;
    let machine = make(spec, saved.as_ref(), stopper)?;
    if saved.is_some() {
        // Its guest listens already.
        screen.state().heard = true;
    }
    // Standard input belongs to a serial port or a virtio console; the debug console has no input.
    let on_stdio = |ends: &[CharBackend]| ends.iter().position(|end| *end == CharBackend::Stdio);
    let console = on_stdio(&config.console);
    let input = match (on_stdio(&config.serial), console) {
        (Some(index), _) => machine.serial_input(index),
        (None, Some(index)) => machine.console_input(index),
        (None, None) => None,
    };
    let (on_signal, on_resize) = (stopper.clone(), Arc::downgrade(&machine));
    // A serial line cannot tell its size, a virtio console can.
    let tell_size = move || {
        if let (Some(index), Some(machine)) = (console, on_resize.upgrade())
            && let Some((columns, rows)) = terminal::size(io::stdout())
        {
            machine.resize_console(index, columns, rows);
        }
    };
    tell_size();
    signals
        .watch(move |notice| match notice {
            Notice::End(signal) => on_signal.stop_by_signal(signal),
            Notice::Resize => tell_size(),
        })
        .context("cannot start the signal thread")?;

    let at_terminal = is_terminal(io::stdin());
    let mut raw = None;
    if let Some(input) = input {
        if at_terminal {
            if !quiet {
                if let Some(note) = backend::passed_over(config.accel, chosen) {
                    say(&note);
                }
                say("Ctrl-A x leaves, Ctrl-A h helps");
            }
            raw = Some(RawMode::enter().context("cannot put the terminal into raw mode")?);
        }
        let (screen, stopper) = (screen.clone(), stopper.clone());
        let image = config.effective_image().is_some();
        thread::Builder::new()
            .name("stdin".into())
            .spawn(move || {
                if at_terminal {
                    pump_keys(&input, &stopper);
                } else {
                    pump_bytes(&input, &screen, image);
                }
            })
            .context("cannot start the input thread")?;
    }

    machine.start()?;
    let outcome = machine.wait();
    drop(raw);
    screen.tidy();
    let in_order = disks.close();
    stopper.follow_signal();
    if stopper.save_failed() || !in_order {
        return Ok(Exit::Failed);
    }
    Ok(conclude(config, &outcome))
}

/// Sends what is typed at the terminal to the guest, but for Caisson's own keys.
fn pump_keys(input: &SerialInput, stopper: &Stopper) {
    let mut escape = Escape::default();
    let mut typed = [0; 1024];
    let mut guest = Vec::new();
    let mut leave = false;
    while !leave {
        let count = match io::stdin().lock().read(&mut typed) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The terminal is gone, and with it the way to leave.
            Ok(0) | Err(_) => return stopper.stop(),
            Ok(count) => count,
        };
        guest.clear();
        escape.filter(&typed[..count], &mut guest, |key| match key {
            Key::Leave => leave = true,
            Key::Help => say(HELP),
        });
        if input.push(&guest).is_err() {
            return;
        }
    }
    stopper.stop();
}

/// Types standard input into the guest. It waits for the guest's first output: before, the serial
/// driver is not there yet and would drop what comes. An image's shell gets a Ctrl-D at the end.
fn pump_bytes(input: &SerialInput, screen: &Screen, image: bool) {
    screen.wait_for_output();
    let mut bytes = [0; 4096];
    loop {
        let count = match io::stdin().lock().read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        if input.push(&bytes[..count]).is_err() {
            return;
        }
    }
    if image {
        let _ = input.push(&[CTRL_D]);
    }
}

/// What is known of the user's screen.
#[derive(Default)]
struct Screen {
    state: Mutex<State>,
    output: Condvar,
}

#[derive(Default)]
struct State {
    modes: ModeTracker,
    /// The guest has said something.
    heard: bool,
}

impl Screen {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_output(&self) {
        let mut state = self.state();
        while !state.heard {
            state = self
                .output
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Undoes what the guest's programs have left switched on in the terminal.
    fn tidy(&self) {
        if is_terminal(io::stdout()) {
            let mut out = io::stdout().lock();
            let _ = out
                .write_all(&self.state().modes.undo())
                .and_then(|()| out.flush());
        }
    }
}

/// The host end of the port that leads to standard output.
struct ScreenEnd {
    screen: Arc<Screen>,
    stopper: Arc<Stopper>,
}

impl HostEnd for ScreenEnd {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.screen.state();
        state.modes.watch(bytes);
        if !state.heard {
            state.heard = true;
            self.screen.output.notify_all();
        }
        drop(state);
        let mut out = io::stdout().lock();
        let written = out.write_all(bytes).and_then(|()| out.flush());
        if written.is_err() {
            // Nobody sees the console any more, so nobody could end the machine.
            self.stopper.stop();
        }
        written
    }
}

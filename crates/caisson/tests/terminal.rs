//! The terminal is given back as it was, however a run ends.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};
use support::{Bench, asm, kernel};

/// A terminal, seen from the side of the window.
struct Terminal {
    window: File,
    before: Termios,
}

impl Terminal {
    fn new() -> (Self, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let window = openpt(flags).unwrap();
        grantpt(&window).unwrap();
        unlockpt(&window).unwrap();
        let program = ioctl_tiocgptpeer(&window, flags).unwrap();
        // Something to recognise: not what a new terminal has.
        let mut settings = tcgetattr(&program).unwrap();
        settings.local_modes &= !LocalModes::ECHOK;
        tcsetattr(&program, OptionalActions::Now, &settings).unwrap();
        let before = tcgetattr(&program).unwrap();
        let window = File::from(window);
        (Self { window, before }, program)
    }

    fn settings(&self) -> Termios {
        tcgetattr(&self.window).unwrap()
    }

    fn is_raw(&self) -> bool {
        let settings = self.settings();
        !settings
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
            && !settings.output_modes.contains(OutputModes::OPOST)
    }

    fn is_restored(&self) -> bool {
        let now = self.settings();
        now.local_modes == self.before.local_modes
            && now.input_modes == self.before.input_modes
            && now.output_modes == self.before.output_modes
            && now.control_modes == self.before.control_modes
    }

    /// Reads what is shown until `text` was.
    fn read_until(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let mut piece = [0; 1024];
        while !String::from_utf8_lossy(&seen).contains(text) {
            let count = self.window.read(&mut piece).unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&piece[..count]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.window.write_all(keys).unwrap();
    }
}

fn start(command: &mut Command, program: OwnedFd) -> Child {
    let copy = || program.try_clone().unwrap();
    // SAFETY: between fork and exec, signal() is allowed and touches no memory. Where the tests
    // run under nohup or behind a shell's `&`, these would stay ignored.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    support::spawn(command.stdin(copy()).stdout(copy()).stderr(copy()))
}

/// A guest that says that it is there and then echoes, on a terminal.
fn running(bench: &Bench, more: &[&str]) -> (Terminal, Child) {
    let code = [
        asm::print("ready>"),
        asm::echo_until_q(),
        asm::debug_exit(1),
    ]
    .concat();
    let image = bench.file("k", kernel(&code));
    let (mut terminal, program) = Terminal::new();
    let mut command = bench.command(["run", "--kernel", &image, "--debug-exit"]);
    let child = start(command.args(more), program);
    terminal.read_until("ready>");
    assert!(terminal.is_raw(), "keys go to the guest");
    (terminal, child)
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn ended(child: &mut Child, terminal: &mut Terminal) -> ExitStatus {
    // Somebody has to read what the process says at its end.
    let mut window = terminal.window.try_clone().unwrap();
    std::thread::spawn(move || while window.read(&mut [0; 256]).is_ok_and(|count| count > 0) {});
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it goes on and on");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn keys_of_ours_are_taken_and_others_go_through() {
    let bench = Bench::new();
    let (mut terminal, mut child) = running(&bench, &[]);
    terminal.type_keys(b"\x03\x1ahi");
    terminal.read_until("\x03\x1ahi");
    terminal.type_keys(b"\x01h");
    let help = terminal.read_until("both go to the guest");
    assert!(help.contains("caisson: Ctrl-A x"), "{help:?}");
    assert!(
        help.contains("\r\n"),
        "lines start at the left in raw mode: {help:?}"
    );
    terminal.type_keys(b"a\x01\x01b");
    terminal.read_until("a\x01b");
    terminal.type_keys(b"\x01x");
    assert_eq!(ended(&mut child, &mut terminal).code(), Some(0));
    assert!(terminal.is_restored());
}

#[test]
fn the_hint_is_shown_unless_quiet() {
    let bench = Bench::new();
    let image = bench.file(
        "k",
        kernel(&[asm::print("guest is up"), asm::debug_exit(1)].concat()),
    );
    for (more, hint) in [(&[][..], true), (&["--quiet"][..], false)] {
        let (mut terminal, program) = Terminal::new();
        let mut command = bench.command(["run", "--kernel", &image, "--debug-exit"]);
        let mut child = start(command.args(more), program);
        let seen = terminal.read_until("guest is up");
        assert_eq!(seen.contains("Ctrl-A x leaves"), hint, "{seen:?}");
        assert_eq!(ended(&mut child, &mut terminal).code(), Some(3));
        assert!(terminal.is_restored());
    }
}

#[test]
fn the_guests_own_end_restores() {
    let bench = Bench::new();
    let (mut terminal, mut child) = running(&bench, &[]);
    terminal.type_keys(b"q");
    assert_eq!(ended(&mut child, &mut terminal).code(), Some(3));
    assert!(terminal.is_restored());
}

#[test]
fn signals_restore_and_show_in_the_status() {
    let bench = Bench::new();
    for signal in [
        Signal::TERM,
        Signal::INT,
        Signal::HUP,
        Signal::QUIT,
        Signal::ABORT,
        Signal::SEGV,
    ] {
        let (mut terminal, mut child) = running(&bench, &[]);
        send(&child, signal);
        let status = ended(&mut child, &mut terminal);
        assert_eq!(status.signal(), Some(signal.as_raw()), "{signal:?}");
        assert!(terminal.is_restored(), "{signal:?}");
    }
}

#[test]
fn a_stop_from_outside_gives_the_terminal_back_for_as_long() {
    let bench = Bench::new();
    let (mut terminal, mut child) = running(&bench, &[]);
    send(&child, Signal::TSTP);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !terminal.is_restored() {
        assert!(Instant::now() < deadline, "stopped without restoring");
        std::thread::sleep(Duration::from_millis(5));
    }
    send(&child, Signal::CONT);
    send(&child, Signal::TERM);
    assert_eq!(
        ended(&mut child, &mut terminal).signal(),
        Some(Signal::TERM.as_raw())
    );
    assert!(terminal.is_restored());
}

#[test]
fn modes_that_the_guest_left_on_are_switched_off() {
    let bench = Bench::new();
    let code = [asm::print("\x1b[?1049h\x1b[?25l."), asm::debug_exit(1)].concat();
    let image = bench.file("k", kernel(&code));
    let (mut terminal, program) = Terminal::new();
    let mut child = start(
        &mut bench.command(["run", "--kernel", &image, "--debug-exit"]),
        program,
    );
    terminal.read_until("\x1b[?25h\x1b[?1049l");
    assert_eq!(ended(&mut child, &mut terminal).code(), Some(3));
}

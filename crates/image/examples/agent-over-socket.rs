//! Runs one command in a guest whose second serial port is a Unix socket, to try the command
//! protocol on any machine monitor:
//!
//! ```text
//! qemu-system-x86_64 -kernel K -initrd I -append "console=ttyS0 caisson.exec=1" -display none \
//!     -serial null -serial unix:/tmp/agent.sock,server=on,wait=on &
//! cargo run -p caisson-image --example agent-over-socket -- /tmp/agent.sock cat < file
//! ```
//!
//! `--terminal` before the socket gives the command a pseudo-terminal, `--user UID` another user.

use caisson_agent_protocol::{Session, SessionEvent, StartRequest};
use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

enum Input {
    Guest(Vec<u8>),
    GuestGone,
    Stdin(Vec<u8>),
}

fn pump(mut from: impl Read + Send + 'static, to: SyncSender<Input>, wrap: fn(Vec<u8>) -> Input) {
    std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        loop {
            let count = from.read(&mut buffer).unwrap_or(0);
            if to.send(wrap(buffer[..count].to_vec())).is_err() || count == 0 {
                return;
            }
        }
    });
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut request = StartRequest::default();
    let mut arguments = std::env::args_os().skip(1).peekable();
    while let Some(option) = arguments.next_if(|word| word.as_encoded_bytes().starts_with(b"--")) {
        match option.to_str() {
            Some("--terminal") => request.terminal = true,
            Some("--user") => {
                let user = arguments.next().ok_or("--user needs a number")?;
                request.uid = user.to_str().unwrap_or_default().parse()?;
                request.gid = request.uid;
            }
            _ => return Err("unknown option".into()),
        }
    }
    let socket = arguments
        .next()
        .ok_or("usage: SOCKET COMMAND ARGUMENTS...")?;
    request.arguments = arguments.map(OsStringExt::into_vec).collect();
    let mut session = Session::new(&request)?;
    let mut port = UnixStream::connect(socket)?;
    let (send, receive) = sync_channel(16);
    pump(port.try_clone()?, send.clone(), |bytes| {
        if bytes.is_empty() {
            Input::GuestGone
        } else {
            Input::Guest(bytes)
        }
    });
    let (stdin_send, stdin) = sync_channel(1);
    pump(std::io::stdin(), stdin_send, Input::Stdin);
    converse(&mut session, &mut port, &receive, &stdin, send)
}

fn converse(
    session: &mut Session,
    port: &mut UnixStream,
    receive: &Receiver<Input>,
    stdin: &Receiver<Input>,
    send: SyncSender<Input>,
) -> Result<ExitCode, Box<dyn Error>> {
    let mut waiting: Vec<u8> = Vec::new();
    let mut ended = None;
    drop(send);
    loop {
        while waiting.is_empty() && session.stdin_room() > 0 {
            match stdin.recv_timeout(std::time::Duration::from_millis(10)) {
                Ok(Input::Stdin(bytes)) if bytes.is_empty() => session.close_stdin(),
                Ok(Input::Stdin(bytes)) => waiting = bytes,
                _ => break,
            }
        }
        let taken = session.send_stdin(&waiting);
        waiting.drain(..taken);
        port.write_all(&session.take_output())?;
        match receive.recv_timeout(std::time::Duration::from_millis(10)) {
            Ok(Input::Guest(bytes)) => {
                let mut failed = None;
                session.receive(&bytes, |event| match event {
                    SessionEvent::Ready => {}
                    SessionEvent::Stdout(bytes) => {
                        failed = std::io::stdout().write_all(bytes).err();
                    }
                    SessionEvent::Stderr(bytes) => {
                        failed = std::io::stderr().write_all(bytes).err();
                    }
                    SessionEvent::Exit(status) => ended = Some(status),
                })?;
                if let Some(error) = failed {
                    return Err(error.into());
                }
            }
            Ok(Input::GuestGone) => {
                std::io::stdout().flush()?;
                return match ended {
                    Some(status) => Ok(ExitCode::from(status.shell_code())),
                    None => Err("the guest went away before the command ended".into()),
                };
            }
            _ => {}
        }
    }
}

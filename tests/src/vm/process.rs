//! A test's machine in a process of its own.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use caisson_machine::Outcome;

use super::wire::{Answer, Frame, Port, Request};

/// How long a process gets to answer, on a slow and busy host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Takes what the machine sends.
pub(super) trait Sink: Send + Sync + 'static {
    /// The guest wrote.
    fn bytes(&self, port: Port, bytes: &[u8]);
    /// The machine is over.
    fn ended(&self, outcome: Outcome);
    /// The process is gone, and the machine was not over. It may have gone elsewhere.
    fn hung_up(&self);
}

/// The process.
pub(super) struct Process {
    child: Child,
    stream: UnixStream,
    answers: Receiver<Answer>,
    reader: Option<JoinHandle<()>>,
}

/// The program, which cargo builds beside the tests.
fn program() -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    let path = tests
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("caisson-vm"))
        .find(|path| path.is_file());
    path.with_context(|| format!("there is no caisson-vm near {}", tests.display()))
}

impl Process {
    /// Starts a process without a machine.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn spawn(sink: impl Sink) -> Result<Self> {
        let (stream, theirs) = UnixStream::pair()?;
        let program = program()?;
        let child = Command::new(&program)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let (answer, answers) = mpsc::channel();
        let mut frames = stream.try_clone()?;
        let reader = thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                while let Ok(Some(frame)) = Frame::receive(&mut frames) {
                    match frame {
                        Frame::Bytes(port, bytes) => sink.bytes(port, &bytes),
                        Frame::Ended(outcome) => sink.ended(outcome),
                        Frame::Answer(given) => {
                            let _ = answer.send(given);
                        }
                        Frame::Request(_) => {}
                    }
                }
                sink.hung_up();
            })?;
        Ok(Self {
            child,
            stream,
            answers,
            reader: Some(reader),
        })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// The machine cannot do it, or the process is gone.
    pub(super) fn ask(&mut self, request: Request) -> Result<Answer> {
        let sent = Frame::Request(request.clone()).send(&mut self.stream);
        let answer = match sent {
            Ok(()) => self.answers.recv_timeout(PATIENCE),
            Err(_) => Err(mpsc::RecvTimeoutError::Disconnected),
        };
        match answer {
            Ok(Answer::Failed(why)) => Err(anyhow!(why)),
            Ok(answer) => Ok(answer),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("no answer to {request:?} within {PATIENCE:?}")
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("the machine's process died: {:?}", self.child.wait())
            }
        }
    }

    /// Types at a port.
    ///
    /// # Errors
    /// The process is gone.
    pub(super) fn type_bytes(&mut self, port: Port, bytes: &[u8]) -> Result<()> {
        Ok(Frame::Bytes(port, bytes.to_vec()).send(&mut self.stream)?)
    }

    /// Ends the process. Everything that it sent has then been seen.
    ///
    /// # Errors
    /// It does not end well.
    pub(super) fn finish(mut self) -> Result<()> {
        self.stream.shutdown(std::net::Shutdown::Write)?;
        let status = self.child.wait()?;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        ensure!(status.success(), "the machine's process ends with {status}");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After `finish` it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

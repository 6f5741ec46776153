//! The host's side of a conversation.

use crate::start::{StartError, StartRequest};
use crate::wire::{
    Decoder, Event, ExitStatus, HEADER, MAX_FRAME, MAX_PAYLOAD, TRAILER, ToGuest, ToHost, VERSION,
    encode_frame,
};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Credit that standard input leaves untouched, so that a signal, a new window size or the end of
/// input still get through to a command which reads nothing.
const RESERVE: usize = 512;
/// The largest piece of standard input or of the start record in one frame, in bytes.
const PIECE: usize = 1024;
/// The largest window that the host believes: more is a hostile or confused guest.
const MAX_WINDOW: u32 = 1 << 20;

/// What the guest reported.
#[derive(Debug, PartialEq, Eq)]
pub enum SessionEvent<'a> {
    /// The guest's init is up; the command is on its way.
    Ready,
    /// The command wrote to standard output (or to its terminal).
    Stdout(&'a [u8]),
    /// The command wrote to standard error.
    Stderr(&'a [u8]),
    /// The command ended; nothing comes after it.
    Exit(ExitStatus),
}

/// What makes a session useless.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// A frame was damaged or is missing.
    #[error(
        "output of the command was lost: something else in the guest wrote to its second serial port"
    )]
    Lost,
    /// A message that makes no sense.
    #[error("the guest's init sent a message of kind {0:#04x} that does not fit the protocol")]
    Message(u8),
    /// The init program is of another version.
    #[error(
        "the guest's init speaks version {0} of the command protocol and this caisson {VERSION}; `caisson image pull mini` rebuilds the guest"
    )]
    Version(u16),
    /// A window or a credit that cannot be.
    #[error("the guest's init granted {0} bytes of standard input, which it cannot hold")]
    Credit(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Over,
}

/// One command's run, from the guest's hello to its exit status.
///
/// Feed it what the port received with [`receive`](Self::receive), send to the port what
/// [`take_output`](Self::take_output) gives, and offer standard input with
/// [`send_stdin`](Self::send_stdin) as [`stdin_room`](Self::stdin_room) allows. It holds at most
/// one window of bytes to send besides the start record.
pub struct Session {
    decoder: Box<Decoder>,
    phase: Phase,
    record: Vec<u8>,
    recorded: usize,
    window: usize,
    credit: usize,
    sequence: u8,
    output: Vec<u8>,
    closing: bool,
    closed: bool,
    signals: Vec<u8>,
    resize: Option<(u16, u16)>,
}

impl Session {
    /// A session that will run `request` as soon as the guest is up.
    ///
    /// # Errors
    /// If the request cannot be expressed on the wire.
    pub fn new(request: &StartRequest) -> Result<Self, StartError> {
        Ok(Session {
            decoder: Box::new(Decoder::new()),
            phase: Phase::Waiting,
            record: request.to_record()?,
            recorded: 0,
            window: 0,
            credit: 0,
            sequence: 0,
            output: Vec::new(),
            closing: false,
            closed: false,
            signals: Vec::new(),
            resize: None,
        })
    }

    /// Takes bytes that the guest wrote to the port and reports what they say, in order.
    ///
    /// # Errors
    /// If the guest breaks the protocol. The session is then over; the machine should be stopped.
    pub fn receive(
        &mut self,
        mut bytes: &[u8],
        mut report: impl FnMut(SessionEvent<'_>),
    ) -> Result<(), ProtocolError> {
        while let Some(event) = self.decoder.next(&mut bytes) {
            let (kind, payload) = match event {
                _ if self.phase == Phase::Over => continue,
                Event::Lost => {
                    self.phase = Phase::Over;
                    return Err(ProtocolError::Lost);
                }
                Event::Frame { kind, payload, .. } => (kind, payload),
            };
            let outcome = match (self.phase, ToHost::parse(kind, payload)) {
                (Phase::Waiting, Ok(ToHost::Hello { version, .. })) if version != VERSION => {
                    Err(ProtocolError::Version(version))
                }
                (Phase::Waiting, Ok(ToHost::Hello { window, .. })) => {
                    if window > MAX_WINDOW || (window as usize) < RESERVE + 2 * PIECE {
                        Err(ProtocolError::Credit(window.into()))
                    } else {
                        self.window = window as usize;
                        self.credit = self.window;
                        self.phase = Phase::Running;
                        report(SessionEvent::Ready);
                        Ok(())
                    }
                }
                (Phase::Running, Ok(ToHost::Stdout(bytes))) => {
                    report(SessionEvent::Stdout(bytes));
                    Ok(())
                }
                (Phase::Running, Ok(ToHost::Stderr(bytes))) => {
                    report(SessionEvent::Stderr(bytes));
                    Ok(())
                }
                (Phase::Running, Ok(ToHost::Credit(bytes))) => {
                    let credit = self.credit as u64 + u64::from(bytes);
                    if credit > self.window as u64 {
                        Err(ProtocolError::Credit(credit))
                    } else {
                        self.credit = credit as usize;
                        Ok(())
                    }
                }
                (Phase::Running, Ok(ToHost::Exit(status))) => {
                    self.phase = Phase::Over;
                    report(SessionEvent::Exit(status));
                    Ok(())
                }
                _ => Err(ProtocolError::Message(kind)),
            };
            if outcome.is_err() {
                self.phase = Phase::Over;
                return outcome;
            }
        }
        self.schedule();
        Ok(())
    }

    /// How many bytes of standard input would be taken now.
    #[must_use]
    pub fn stdin_room(&self) -> usize {
        if self.phase != Phase::Running || self.recorded < self.record.len() || self.closing {
            return 0;
        }
        let spendable = self.credit.saturating_sub(RESERVE);
        let whole = spendable / (HEADER + PIECE + TRAILER) * PIECE;
        let rest = (spendable % (HEADER + PIECE + TRAILER)).saturating_sub(HEADER + TRAILER);
        whole + rest
    }

    /// Offers standard input; returns how many bytes of it were taken.
    pub fn send_stdin(&mut self, bytes: &[u8]) -> usize {
        let take = self.stdin_room().min(bytes.len());
        for piece in bytes[..take].chunks(PIECE) {
            self.send(ToGuest::Stdin(piece));
        }
        take
    }

    /// Closes the command's standard input after what was sent.
    pub fn close_stdin(&mut self) {
        self.closing = true;
        self.schedule();
    }

    /// Sends a signal to the command. It is kept until the guest is up; at most 16 wait.
    pub fn signal(&mut self, signal: u8) {
        if self.signals.len() < 16 {
            self.signals.push(signal);
        }
        self.schedule();
    }

    /// Tells the command's terminal its new size, in characters.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.resize = Some((columns, rows));
        self.schedule();
    }

    /// Whether there are bytes to send.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Takes the bytes that the port should send to the guest now.
    pub fn take_output(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.output)
    }

    fn schedule(&mut self) {
        if self.phase != Phase::Running {
            return;
        }
        while self.recorded < self.record.len() {
            let left = self.record.len() - self.recorded;
            let take = left.min(PIECE);
            if self.credit < RESERVE + HEADER + take + TRAILER {
                return;
            }
            let record = core::mem::take(&mut self.record);
            self.send(ToGuest::Start {
                last: take == left,
                piece: &record[self.recorded..self.recorded + take],
            });
            self.record = record;
            self.recorded += take;
        }
        const CONTROL: usize = HEADER + 8 + TRAILER;
        while self.credit >= CONTROL && !self.signals.is_empty() {
            let signal = self.signals.remove(0);
            self.send(ToGuest::Signal(signal));
        }
        if self.credit >= CONTROL
            && let Some((columns, rows)) = self.resize.take()
        {
            self.send(ToGuest::WindowSize { columns, rows });
        }
        if self.credit >= CONTROL && self.closing && !self.closed {
            self.closed = true;
            self.send(ToGuest::StdinEof);
        }
    }

    fn send(&mut self, message: ToGuest<'_>) {
        const { assert!(PIECE <= MAX_PAYLOAD) };
        let mut scratch = [0; 8];
        let (kind, payload) = message.pieces(&mut scratch);
        let mut frame = [0; MAX_FRAME];
        if let Some(len) = encode_frame(kind, self.sequence, payload, &mut frame) {
            self.sequence = self.sequence.wrapping_add(1);
            self.credit = self.credit.saturating_sub(len);
            self.output.extend_from_slice(&frame[..len]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::WINDOW;
    use alloc::vec;
    use proptest::prelude::*;

    /// The guest's end, as our init program behaves.
    struct Guest {
        decoder: Decoder,
        sequence: u8,
        record: Vec<u8>,
        stdin: Vec<u8>,
        eof: bool,
        signals: Vec<u8>,
        consumed: u32,
    }

    impl Guest {
        fn new() -> Self {
            Guest {
                decoder: Decoder::new(),
                sequence: 0,
                record: Vec::new(),
                stdin: Vec::new(),
                eof: false,
                signals: Vec::new(),
                consumed: 0,
            }
        }

        fn say(&mut self, message: ToHost<'_>) -> Vec<u8> {
            let mut scratch = [0; 8];
            let (kind, payload) = message.pieces(&mut scratch);
            let mut frame = vec![0; MAX_FRAME];
            let len = encode_frame(kind, self.sequence, payload, &mut frame).unwrap();
            self.sequence = self.sequence.wrapping_add(1);
            frame.truncate(len);
            frame
        }

        fn hear(&mut self, mut bytes: &[u8]) {
            while let Some(event) = self.decoder.next(&mut bytes) {
                let Event::Frame {
                    kind,
                    payload,
                    wire_len,
                } = event
                else {
                    panic!("the host lost a frame");
                };
                self.consumed += wire_len as u32;
                match ToGuest::parse(kind, payload).unwrap() {
                    ToGuest::Start { piece, .. } => self.record.extend(piece),
                    ToGuest::Stdin(bytes) => self.stdin.extend(bytes),
                    ToGuest::StdinEof => self.eof = true,
                    ToGuest::Signal(signal) => self.signals.push(signal),
                    ToGuest::WindowSize { .. } => {}
                }
            }
        }
    }

    fn request(argument_bytes: usize) -> StartRequest {
        StartRequest {
            arguments: vec![b"cat".to_vec(), vec![b'a'; argument_bytes]],
            ..StartRequest::default()
        }
    }

    fn hello(guest: &mut Guest) -> Vec<u8> {
        guest.say(ToHost::Hello {
            version: VERSION,
            window: WINDOW,
        })
    }

    #[test]
    fn nothing_is_sent_before_the_guest_is_up() {
        let mut session = Session::new(&request(1)).unwrap();
        session.signal(2);
        session.close_stdin();
        assert!(!session.has_output());
        assert_eq!(session.stdin_room(), 0);
    }

    #[test]
    fn a_long_start_record_and_input_stay_within_the_window() {
        let start = request(100_000);
        let input: Vec<u8> = (0..50_000u32).map(|n| (n * 7) as u8).collect();
        let mut session = Session::new(&start).unwrap();
        let mut guest = Guest::new();
        let mut to_host = hello(&mut guest);
        let mut sent = 0;
        while guest.stdin.len() < input.len() || !guest.eof {
            session.receive(&to_host, |_| {}).unwrap();
            sent += session.send_stdin(&input[sent..]);
            if sent == input.len() {
                session.close_stdin();
            }
            let wire = session.take_output();
            assert!(!wire.is_empty() && wire.len() <= WINDOW as usize);
            guest.hear(&wire);
            let back = core::mem::take(&mut guest.consumed);
            to_host = guest.say(ToHost::Credit(back));
        }
        assert_eq!(guest.record, start.to_record().unwrap());
        assert_eq!(guest.stdin, input);
    }

    #[test]
    fn a_signal_passes_input_that_nobody_reads() {
        let mut session = Session::new(&request(1)).unwrap();
        let mut guest = Guest::new();
        session.receive(&hello(&mut guest), |_| {}).unwrap();
        while session.send_stdin(&[0; 4096]) > 0 {}
        assert_eq!(session.stdin_room(), 0);
        session.signal(15);
        session.close_stdin();
        guest.hear(&session.take_output());
        assert_eq!(guest.signals, [15]);
        assert!(guest.eof);
    }

    #[test]
    fn output_and_status_arrive_and_nothing_after_them() {
        let mut session = Session::new(&request(1)).unwrap();
        let mut guest = Guest::new();
        let mut wire = hello(&mut guest);
        wire.extend(guest.say(ToHost::Stdout(b"out\n")));
        wire.extend(guest.say(ToHost::Stderr(b"err\n")));
        wire.extend(guest.say(ToHost::Exit(ExitStatus::Code(3))));
        wire.extend(b"[  1.0] reboot: Power down\n");
        wire.extend(guest.say(ToHost::Stdout(b"late")));
        let mut seen = Vec::new();
        session
            .receive(&wire, |event| seen.push(std::format!("{event:?}")))
            .unwrap();
        assert_eq!(
            seen,
            [
                "Ready",
                "Stdout([111, 117, 116, 10])",
                "Stderr([101, 114, 114, 10])",
                "Exit(Code(3))"
            ]
        );
    }

    #[test]
    fn a_guest_that_breaks_the_rules_ends_the_session() {
        let refuse = |messages: &[ToHost<'_>]| {
            let mut guest = Guest::new();
            let mut session = Session::new(&request(1)).unwrap();
            let wire: Vec<u8> = messages.iter().flat_map(|m| guest.say(*m)).collect();
            session.receive(&wire, |_| {}).unwrap_err()
        };
        let good = ToHost::Hello {
            version: VERSION,
            window: WINDOW,
        };
        assert_eq!(
            refuse(&[good, ToHost::Credit(u32::MAX)]),
            ProtocolError::Credit(u64::from(WINDOW) + u64::from(u32::MAX))
        );
        assert_eq!(refuse(&[good, good]), ProtocolError::Message(0x81));
        assert_eq!(
            refuse(&[ToHost::Stdout(b"x")]),
            ProtocolError::Message(0x82)
        );
        assert_eq!(
            refuse(&[ToHost::Hello {
                version: 9,
                window: WINDOW
            }]),
            ProtocolError::Version(9)
        );
        for window in [0, 16, u32::MAX] {
            assert_eq!(
                refuse(&[ToHost::Hello {
                    version: VERSION,
                    window
                }]),
                ProtocolError::Credit(window.into())
            );
        }
    }

    #[test]
    fn a_lost_frame_is_an_error() {
        let mut session = Session::new(&request(1)).unwrap();
        let mut guest = Guest::new();
        session.receive(&hello(&mut guest), |_| {}).unwrap();
        let _lost = guest.say(ToHost::Stdout(b"gone"));
        let next = guest.say(ToHost::Stdout(b"here"));
        assert_eq!(session.receive(&next, |_| {}), Err(ProtocolError::Lost));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_grow_what_is_held(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 0..20),
        ) {
            let mut session = Session::new(&request(1)).unwrap();
            let mut guest = Guest::new();
            session.receive(&hello(&mut guest), |_| {}).unwrap();
            session.take_output();
            for chunk in chunks {
                let _ = session.receive(&chunk, |_| {});
                prop_assert!(session.take_output().len() <= WINDOW as usize);
            }
        }
    }
}

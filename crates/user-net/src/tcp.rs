//! A TCP connection of the guest's (RFC 9293), and the host's stream that it is joined to.
//!
//! Nothing between us and the guest is congested, so what the guest's window and the room for frames allow is sent at
//! once. Frames can be lost inside the guest all the same: three duplicate acknowledgements, or a timer, have everything
//! sent again from the first byte that is not acknowledged. Data from the guest is taken in order only.

use alloc::{collections::VecDeque, vec::Vec};

use crate::{
    FlowId, Host, HostError,
    flows::NEVER,
    limits,
    output::{Outgoing, Output},
    wire::{ACK, Ends, FIN, RST, SYN, Segment},
};

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1000 * MILLISECOND;
/// The first wait for an acknowledgement. Each further one is twice as long.
const RETRANSMIT: u64 = 200 * MILLISECOND;
/// How often that is done before the guest is given up.
const TRIES: u8 = 8;
/// The same for a connection that is not set up yet, with a longer first wait.
const SYN_RETRANSMIT: u64 = SECOND;
const SYN_TRIES: u8 = 5;
/// How long a host may take to answer.
const CONNECT: u64 = 130 * SECOND;
/// How long the end of a connection is remembered.
const TIME_WAIT: u64 = 2 * SECOND;
/// How long a connection lives on which nothing happens.
const IDLE: u64 = 2 * 3600 * SECOND;
/// What the idle time is rounded to, so that it does not change all the time.
const IDLE_STEP: u64 = 600 * SECOND;
/// How far our windows are shifted (RFC 7323 §2).
const SCALE: u8 = 7;
/// How many bytes are read from the host at once.
const PIECE: usize = 64 << 10;
/// What a connection gets when memory runs short.
const LEAST: usize = 16 << 10;
/// The segments of a guest that does not say what it takes (RFC 9293 §3.7.1).
const DEFAULT_MSS: u16 = 536;

/// What a flow works with.
pub(crate) struct Cx<'a> {
    pub(crate) id: FlowId,
    pub(crate) now: u64,
    pub(crate) host: &'a mut dyn Host,
    pub(crate) out: &'a mut Output,
    /// Bytes that all connections together may still hold.
    pub(crate) pool: &'a mut usize,
    pub(crate) scratch: &'a mut Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest wants it, the host has not answered.
    Connecting,
    /// The guest was asked.
    SynSent,
    /// The guest was answered.
    SynReceived,
    Open,
    /// Both sides have ended; only remembered.
    Closed,
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Keep,
    Forget,
}

pub(crate) struct Tcp {
    ends: Ends,
    phase: Phase,
    rcv_nxt: u32,
    /// What the guest sent and the host has not taken.
    to_host: VecDeque<u8>,
    guest_fin: bool,
    /// The host was told of that.
    shut: bool,
    ack_due: bool,
    /// The window that the guest was told last.
    advertised: usize,
    /// Whether windows are scaled, and the guest's shift.
    scaled: bool,
    guest_scale: u8,
    snd_una: u32,
    snd_nxt: u32,
    /// The end of what was ever sent.
    snd_max: u32,
    window: u32,
    /// The segment that the window is from.
    wl1: u32,
    wl2: u32,
    mss: u16,
    /// What the host sent and the guest has not acknowledged, from `snd_una` on.
    from_host: VecDeque<u8>,
    readable: bool,
    host_fin: bool,
    fin_acked: bool,
    duplicates: u8,
    /// Lost data was sent again; not once more until this is acknowledged.
    recover: Option<u32>,
    tries: u8,
    timer: u64,
    active: u64,
    /// There was no room for frames.
    pub(crate) stalled: bool,
}

/// Whether sequence number `a` is before `b`.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Tcp {
    fn new(ends: Ends, phase: Phase, cx: &Cx<'_>) -> Self {
        let iss =
            ((cx.now >> 8) as u32).wrapping_add((cx.id.to_bits() as u32).wrapping_mul(0x9e37_79b1));
        Self {
            ends,
            phase,
            rcv_nxt: 0,
            to_host: VecDeque::new(),
            guest_fin: false,
            shut: false,
            ack_due: false,
            advertised: 0,
            scaled: false,
            guest_scale: 0,
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            window: 0,
            wl1: 0,
            wl2: 0,
            mss: DEFAULT_MSS,
            from_host: VecDeque::new(),
            readable: false,
            host_fin: false,
            fin_acked: false,
            duplicates: 0,
            recover: None,
            tries: 0,
            timer: NEVER,
            active: cx.now,
            stalled: false,
        }
    }

    /// The guest asks for a connection with `syn`, and the host has been asked to make it.
    pub(crate) fn from_guest(ends: Ends, syn: &Segment<'_>, cx: &mut Cx<'_>) -> Self {
        let mut flow = Self::new(ends, Phase::Connecting, cx);
        flow.learn(syn, cx);
        flow.timer = cx.now.saturating_add(CONNECT);
        flow
    }

    /// The host has a connection for the guest.
    pub(crate) fn from_host(ends: Ends, cx: &mut Cx<'_>) -> Self {
        let mut flow = Self::new(ends, Phase::SynSent, cx);
        flow.scaled = true;
        flow.send_syn(cx);
        flow
    }

    /// What the guest says of itself in its SYN.
    fn learn(&mut self, syn: &Segment<'_>, cx: &Cx<'_>) {
        self.rcv_nxt = syn.seq.wrapping_add(1);
        self.scaled = syn.scale.is_some();
        self.guest_scale = syn.scale.unwrap_or(0);
        let largest = cx.out.mtu - 40;
        self.mss = syn.mss.unwrap_or(DEFAULT_MSS).clamp(64, largest);
        self.window = syn.window.into();
        (self.wl1, self.wl2) = (syn.seq, syn.ack);
    }

    /// Whether it has not been set up yet.
    pub(crate) fn is_half_open(&self) -> bool {
        !matches!(self.phase, Phase::Open | Phase::Closed)
    }

    /// Whether it only is remembered.
    pub(crate) fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// What a reset carries that the guest believes: its sequence number, and the acknowledgement.
    pub(crate) fn reset_numbers(&self) -> Option<(u32, u32)> {
        match self.phase {
            Phase::Connecting => Some((0, self.rcv_nxt)),
            // It has heard our SYN, or looks at the acknowledgement only.
            Phase::SynReceived => Some((self.snd_max, self.rcv_nxt)),
            Phase::Open => Some((self.snd_una, self.rcv_nxt)),
            Phase::SynSent | Phase::Closed => None,
        }
    }

    pub(crate) fn deadline(&self) -> u64 {
        let idle = self.active.saturating_add(IDLE) / IDLE_STEP * IDLE_STEP;
        self.timer.min(idle)
    }

    /// How much more of the guest's may wait for the host.
    fn room(&self, cx: &Cx<'_>) -> usize {
        let share = (*cx.pool / 16).clamp(LEAST, limits::TO_HOST);
        share.saturating_sub(self.to_host.len()).min(*cx.pool)
    }

    fn send(&mut self, cx: &mut Cx<'_>, seq: u32, flags: u8, range: core::ops::Range<usize>) {
        let syn = flags & SYN != 0;
        let room = self.room(cx);
        let shift = if self.scaled && !syn { SCALE } else { 0 };
        let window = u16::try_from(room >> shift).unwrap_or(u16::MAX);
        self.advertised = usize::from(window) << shift;
        let (first, second) = self.from_host.as_slices();
        let split = first.len();
        let head = first
            .get(range.start.min(split)..range.end.min(split))
            .unwrap_or_default();
        let tail = second
            .get(range.start.saturating_sub(split)..range.end.saturating_sub(split))
            .unwrap_or_default();
        let mss = cx.out.mtu - 40;
        cx.out.tcp(&Outgoing {
            ends: self.ends,
            seq,
            ack: if flags & ACK != 0 { self.rcv_nxt } else { 0 },
            flags,
            window,
            options: syn.then_some((mss, self.scaled.then_some(SCALE))),
            payload: [head, tail],
            mss: self.mss,
        });
        if flags & ACK != 0 {
            self.ack_due = false;
        }
    }

    fn send_syn(&mut self, cx: &mut Cx<'_>) {
        let flags = match self.phase {
            Phase::SynSent => SYN,
            _ => SYN | ACK,
        };
        self.send(cx, self.snd_una, flags, 0..0);
        self.snd_nxt = self.snd_una.wrapping_add(1);
        self.snd_max = self.snd_nxt;
        self.timer = cx.now.saturating_add(SYN_RETRANSMIT << self.tries.min(6));
    }

    fn send_ack(&mut self, cx: &mut Cx<'_>) {
        self.send(cx, self.snd_nxt, ACK, 0..0);
    }

    /// Sends the acknowledgement that a batch of segments calls for.
    pub(crate) fn flush(&mut self, cx: &mut Cx<'_>) {
        if self.ack_due {
            self.send_ack(cx);
        }
    }

    /// Whether an acknowledgement is to be sent.
    pub(crate) fn is_ack_due(&self) -> bool {
        self.ack_due
    }

    /// Gives back what it holds.
    pub(crate) fn release(&mut self, pool: &mut usize) {
        *pool += self.to_host.len() + self.from_host.len();
        self.to_host = VecDeque::new();
        self.from_host = VecDeque::new();
    }

    /// Ends both sides at once.
    pub(crate) fn abort(&mut self, cx: &mut Cx<'_>) -> Next {
        match self.phase {
            Phase::Connecting => cx.out.reset(self.ends, 0, Some(self.rcv_nxt)),
            Phase::SynSent | Phase::Closed => {}
            Phase::SynReceived | Phase::Open => {
                cx.out.reset(self.ends, self.snd_nxt, Some(self.rcv_nxt));
            }
        }
        self.forget(cx)
    }

    /// Ends the host's side at once; the guest knows.
    fn forget(&mut self, cx: &mut Cx<'_>) -> Next {
        if self.phase != Phase::Closed {
            cx.host.close(cx.id, true);
        }
        self.release(cx.pool);
        Next::Forget
    }

    /// A segment of the guest's. An acknowledgement may be due afterwards.
    pub(crate) fn on_segment(&mut self, cx: &mut Cx<'_>, segment: &Segment<'_>) -> Next {
        self.active = cx.now;
        match self.phase {
            Phase::Connecting => match segment.has(RST) {
                true => return self.forget(cx),
                false => return Next::Keep,
            },
            Phase::SynSent => return self.on_answer(cx, segment),
            Phase::Closed => {
                if segment.has(RST) {
                    return Next::Forget;
                }
                self.ack_due |= segment.len() > 0;
                return Next::Keep;
            }
            Phase::SynReceived | Phase::Open => {}
        }
        let offset = segment.seq.wrapping_sub(self.rcv_nxt) as i32;
        if segment.has(RST) {
            if offset == 0 {
                return self.forget(cx);
            }
            // RFC 5961 §3: who really sent it repeats it with the right number.
            self.ack_due |= (0..limits::TO_HOST as i32).contains(&offset);
            return Next::Keep;
        }
        if segment.has(SYN) {
            match self.phase == Phase::SynReceived && offset == -1 {
                true => self.send_syn(cx),
                false => self.ack_due = true,
            }
            return Next::Keep;
        }
        if !segment.has(ACK) {
            return Next::Keep;
        }
        let len = segment.len();
        let end = segment.seq.wrapping_add(len);
        if before(end, self.rcv_nxt) || offset > limits::TO_HOST as i32 || len == 0 && offset < 0 {
            // Old, or a question whether we are still there.
            self.ack_due = true;
            return Next::Keep;
        }
        if !self.on_ack(segment) {
            self.ack_due = true;
            return Next::Keep;
        }
        self.acknowledged(cx, segment);
        if self.phase != Phase::Open {
            return Next::Keep;
        }
        match self.on_data(cx, segment, offset) {
            Ok(()) => self.progress(cx),
            Err(_) => self.abort(cx),
        }
    }

    /// The guest answers a SYN of ours (RFC 9293 §3.10.7.3).
    fn on_answer(&mut self, cx: &mut Cx<'_>, segment: &Segment<'_>) -> Next {
        if !segment.has(ACK) || segment.ack != self.snd_max {
            if segment.has(ACK) {
                cx.out.refuse(self.ends, segment);
            }
            return Next::Keep;
        }
        if segment.has(RST) {
            return self.forget(cx);
        }
        if segment.has(SYN) {
            self.learn(segment, cx);
            self.snd_una = segment.ack;
            self.phase = Phase::Open;
            (self.timer, self.tries) = (NEVER, 0);
            self.ack_due = true;
            self.readable = true;
            return self.progress(cx);
        }
        Next::Keep
    }

    /// Whether a segment acknowledges what may be acknowledged.
    fn on_ack(&self, segment: &Segment<'_>) -> bool {
        let acked = segment.ack.wrapping_sub(self.snd_una);
        let sent = self.snd_max.wrapping_sub(self.snd_una);
        match self.phase {
            Phase::SynReceived => acked == 1,
            _ => acked <= sent || before(segment.ack, self.snd_una),
        }
    }

    fn acknowledged(&mut self, cx: &mut Cx<'_>, segment: &Segment<'_>) {
        if before(segment.ack, self.snd_una) {
            return;
        }
        let mut acked = segment.ack.wrapping_sub(self.snd_una) as usize;
        let window = u32::from(segment.window) << self.guest_scale;
        if self.phase == Phase::SynReceived {
            self.phase = Phase::Open;
            self.snd_una = segment.ack;
            (self.timer, self.tries) = (NEVER, 0);
            self.readable = true;
            acked = 0;
        }
        if acked > 0 {
            let data = acked.min(self.from_host.len());
            self.from_host.drain(..data);
            *cx.pool += data;
            if self.from_host.is_empty() {
                // The memory of a long burst is not kept by an idle connection.
                self.from_host = VecDeque::new();
            }
            self.fin_acked |= acked > data;
            self.snd_una = segment.ack;
            if before(self.snd_nxt, self.snd_una) {
                self.snd_nxt = self.snd_una;
            }
            if self
                .recover
                .is_some_and(|recover| !before(self.snd_una, recover))
            {
                self.recover = None;
            }
            (self.duplicates, self.tries, self.timer) = (0, 0, NEVER);
        } else if segment.len() == 0 && self.snd_nxt != self.snd_una && window == self.window {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == 3 && self.recover.is_none() {
                self.recover = Some(self.snd_max);
                self.snd_nxt = self.snd_una;
            }
        }
        if before(self.wl1, segment.seq)
            || self.wl1 == segment.seq && !before(segment.ack, self.wl2)
        {
            self.window = window;
            (self.wl1, self.wl2) = (segment.seq, segment.ack);
        }
        if self.window == 0 {
            // It is there, it only does not read.
            self.tries = self.tries.min(TRIES / 2);
        }
    }

    fn on_data(
        &mut self,
        cx: &mut Cx<'_>,
        segment: &Segment<'_>,
        offset: i32,
    ) -> Result<(), HostError> {
        if segment.len() == 0 {
            return Ok(());
        }
        if offset > 0 || self.guest_fin {
            // Each out of its order is answered, so that the guest counts them.
            self.send_ack(cx);
            return Ok(());
        }
        self.ack_due = true;
        let known = offset.unsigned_abs() as usize;
        let data = segment
            .payload
            .get(known.min(segment.payload.len())..)
            .unwrap_or_default();
        let taken = self.accept(cx, data)?;
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken as u32);
        if taken == data.len() && segment.has(FIN) {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.guest_fin = true;
        }
        Ok(())
    }

    /// Takes data of the guest's: what the host takes at once, and what there is room for.
    fn accept(&mut self, cx: &mut Cx<'_>, data: &[u8]) -> Result<usize, HostError> {
        let mut sent = 0;
        if self.to_host.is_empty() && !data.is_empty() {
            sent = cx.host.tcp_send(cx.id, data)?.min(data.len());
        }
        let rest = data.get(sent..).unwrap_or_default();
        let kept = rest.len().min(self.room(cx));
        self.to_host.extend(rest.iter().take(kept));
        *cx.pool -= kept;
        Ok(sent + kept)
    }

    /// The host's side can go on.
    pub(crate) fn on_ready(&mut self, cx: &mut Cx<'_>, readable: bool) -> Next {
        self.active = cx.now;
        match self.phase {
            Phase::Connecting => match cx.host.tcp_connected(cx.id) {
                Ok(false) => Next::Keep,
                Ok(true) => {
                    self.phase = Phase::SynReceived;
                    self.tries = 0;
                    self.send_syn(cx);
                    Next::Keep
                }
                Err(_) => self.abort(cx),
            },
            Phase::Open => {
                self.readable |= readable;
                self.progress(cx)
            }
            // It is looked at when it is open.
            Phase::SynSent | Phase::SynReceived | Phase::Closed => Next::Keep,
        }
    }

    /// Moves what can be moved, both ways.
    pub(crate) fn progress(&mut self, cx: &mut Cx<'_>) -> Next {
        if self.phase != Phase::Open {
            return Next::Keep;
        }
        if self.push(cx).and_then(|()| self.pull(cx)).is_err() {
            return self.abort(cx);
        }
        self.transmit(cx);
        if self.shut && self.fin_acked {
            cx.host.close(cx.id, false);
            self.release(cx.pool);
            self.phase = Phase::Closed;
            self.timer = cx.now.saturating_add(TIME_WAIT);
        }
        Next::Keep
    }

    /// To the host.
    fn push(&mut self, cx: &mut Cx<'_>) -> Result<(), HostError> {
        while !self.to_host.is_empty() {
            let (first, _) = self.to_host.as_slices();
            let sent = cx.host.tcp_send(cx.id, first)?.min(first.len());
            if sent == 0 {
                break;
            }
            self.to_host.drain(..sent);
            *cx.pool += sent;
        }
        if self.to_host.is_empty() && self.to_host.capacity() > LEAST {
            self.to_host = VecDeque::new();
        }
        // The guest waits for a window that has been too small for it.
        let room = self.room(cx);
        if !self.guest_fin
            && self.advertised < limits::TO_HOST / 4
            && room >= 2 * self.advertised.max(LEAST / 4)
        {
            self.ack_due = true;
        }
        if self.guest_fin && self.to_host.is_empty() && !self.shut {
            cx.host.tcp_shutdown(cx.id);
            self.shut = true;
        }
        Ok(())
    }

    /// From the host.
    fn pull(&mut self, cx: &mut Cx<'_>) -> Result<(), HostError> {
        while self.readable && !self.host_fin {
            let share = (*cx.pool / 16).clamp(LEAST, limits::TO_GUEST);
            let limit = (self.window as usize)
                .clamp(PIECE, share.max(PIECE))
                .min(share);
            let room = limit
                .saturating_sub(self.from_host.len())
                .min(PIECE)
                .min(*cx.pool);
            if room == 0 {
                break;
            }
            cx.scratch.resize(PIECE, 0);
            let buffer = cx.scratch.get_mut(..room).unwrap_or_default();
            match cx.host.tcp_receive(cx.id, buffer)? {
                None => self.readable = false,
                Some(0) => self.host_fin = true,
                Some(count) => {
                    let count = count.min(room);
                    self.from_host.extend(cx.scratch.iter().take(count));
                    *cx.pool -= count;
                }
            }
        }
        Ok(())
    }

    /// To the guest.
    fn transmit(&mut self, cx: &mut Cx<'_>) {
        self.stalled = false;
        loop {
            let sent = self.snd_nxt.wrapping_sub(self.snd_una) as usize;
            let Some(left) = self.from_host.len().checked_sub(sent) else {
                break;
            };
            let window = (self.window as usize).saturating_sub(sent);
            let count = left.min(window).min(cx.out.largest(self.mss));
            let fin = self.host_fin && !self.fin_acked && count == left;
            if count == 0 && !fin || count < left && count < usize::from(self.mss) && sent > 0 {
                break;
            }
            if !cx.out.has_room() {
                self.stalled = true;
                break;
            }
            let flags = if fin { ACK | FIN } else { ACK };
            self.send(cx, self.snd_nxt, flags, sent..sent + count);
            self.snd_nxt = self.snd_nxt.wrapping_add(count as u32 + u32::from(fin));
            if before(self.snd_max, self.snd_nxt) {
                self.snd_max = self.snd_nxt;
            }
            if fin {
                break;
            }
        }
        let waits = self.snd_nxt != self.snd_una || !self.from_host.is_empty();
        match (waits, self.timer) {
            (false, _) => self.timer = NEVER,
            (true, NEVER) => self.arm(cx.now),
            (true, _) => {}
        }
    }

    fn arm(&mut self, now: u64) {
        self.timer = now.saturating_add(RETRANSMIT << self.tries.min(8));
    }

    /// Its time has come.
    pub(crate) fn on_timer(&mut self, cx: &mut Cx<'_>, guest_is_slow: bool) -> Next {
        if self.timer > cx.now {
            let idle = self.active.saturating_add(IDLE) / IDLE_STEP * IDLE_STEP <= cx.now;
            return if idle { self.abort(cx) } else { Next::Keep };
        }
        match self.phase {
            Phase::Closed => return Next::Forget,
            Phase::Connecting => return self.forget(cx),
            // What was sent has not even been looked at: the machine is paused, say.
            _ if guest_is_slow => self.arm(cx.now),
            Phase::SynSent | Phase::SynReceived => {
                self.tries += 1;
                if self.tries > SYN_TRIES {
                    return self.forget(cx);
                }
                self.send_syn(cx);
            }
            Phase::Open => {
                self.tries = self.tries.saturating_add(1);
                if self.tries > TRIES {
                    return self.abort(cx);
                }
                self.snd_nxt = self.snd_una;
                (self.duplicates, self.recover) = (0, None);
                self.arm(cx.now);
                if self.window == 0 && !self.from_host.is_empty() {
                    // One byte asks whether the window is still closed (RFC 9293 §3.8.6.1).
                    self.send(cx, self.snd_nxt, ACK, 0..1);
                    self.snd_nxt = self.snd_nxt.wrapping_add(1);
                    if before(self.snd_max, self.snd_nxt) {
                        self.snd_max = self.snd_nxt;
                    }
                }
                return self.progress(cx);
            }
        }
        Next::Keep
    }
}

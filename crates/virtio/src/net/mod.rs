//! The network device (§5.1): an Ethernet card in front of a [`PacketBackend`].
//!
//! Frames are copied once each way, between guest memory and the backend's. What the driver leaves to the device
//! (checksums, segmentation) is passed on to the backend, and what the driver accepts the backend makes use of, so that
//! bulk data travels in frames of up to 64 KiB. Received frames are spread over as many buffers as they need
//! (`VIRTIO_NET_F_MRG_RXBUF`).
//!
//! A frame that the driver has described wrongly is dropped and counted. After the machine is restored the driver is
//! asked to announce itself (§5.1.6.5.4).
//!
//! Left out: more than one queue pair, receive-side scaling, hash reports, and notification coalescing.

mod config;
mod control;
mod filter;
mod header;
mod state;

use alloc::{sync::Arc, vec::Vec};
use core::task::{Context, Poll};

use caisson_device::{Inspector, SaveState, StateError, StateRecord};
use caisson_packet::{Checksum, Frame, MAX_FRAME, MacAddress, PacketBackend, PacketInfo, complete};

use self::{
    config::{ANNOUNCED, ECN_FREE_OFFLOADS},
    header::{HEADER_LEN, Header},
    state::NetState,
};
use crate::{DeviceKind, Fault, Queues, VirtioDevice, queue::Chain};

/// Entries of the receive and the transmit queue.
pub const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
pub const CONTROL_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;
/// How many frames are moved per call and direction.
const BUDGET: usize = 64;
/// The shortest frame: an Ethernet header.
const MIN_FRAME: u64 = 14;

/// What a network card is to its driver, besides what its backend says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address, until the driver sets another.
    pub mac: MacAddress,
}

/// The device.
pub struct Net {
    backend: Arc<dyn PacketBackend>,
    config: NetConfig,
    info: PacketInfo,
    state: NetState,
    /// A frame that the driver has had too few buffers for.
    pending: Option<Frame>,
    /// The driver is to be told of a change of configuration.
    changed: bool,
    /// It has not been polled since it was restored.
    restored: bool,
    chain: Chain,
    spare: Vec<Chain>,
}

impl Net {
    /// A card in front of `backend`.
    pub fn new(backend: Arc<dyn PacketBackend>, config: NetConfig) -> Self {
        let info = backend.info();
        Self {
            backend,
            config,
            info,
            state: NetState::new(config.mac),
            pending: None,
            changed: false,
            restored: false,
            chain: Chain::default(),
            spare: Vec::new(),
        }
    }

    /// Has the backend make the frames that the driver accepts now.
    fn tell_offloads(&self) {
        self.backend
            .set_receive_offloads(config::offloads(self.state.guest_offloads));
    }

    /// Moves frames from the driver to the backend. Returns whether there are more.
    fn transmit(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues<'_>,
        sent: &mut bool,
    ) -> Result<bool, Fault> {
        for _ in 0..BUDGET {
            if self.backend.poll_send(cx).is_pending() {
                return Ok(false);
            }
            if !queues.pop(TRANSMIT, &mut self.chain)? {
                return Ok(false);
            }
            match self.read_frame(queues)? {
                Some(frame) => {
                    self.state.sent.count(frame.bytes.len());
                    self.backend.send(frame);
                    *sent = true;
                }
                None => self.state.sent.dropped = self.state.sent.dropped.saturating_add(1),
            }
            queues.complete(TRANSMIT, &self.chain, 0)?;
        }
        Ok(true)
    }

    /// The frame in the buffer that was taken; `None` if it is none.
    fn read_frame(&self, queues: &Queues<'_>) -> Result<Option<Frame>, Fault> {
        let memory = |error| Fault::Memory {
            queue: TRANSMIT,
            error,
        };
        let Some(len) = self.chain.readable_len().checked_sub(HEADER_LEN as u64) else {
            return Err(Fault::Request {
                queue: TRANSMIT,
                what: "a frame without its header",
            });
        };
        if !(MIN_FRAME..=MAX_FRAME as u64).contains(&len) {
            return Ok(None);
        }
        let mut header = [0; HEADER_LEN];
        self.chain
            .read(queues.memory(), 0, &mut header)
            .map_err(memory)?;
        let header = Header::from_bytes(header);
        let Some((checksum, segmentation)) = header.offloads(len as usize, self.state.features)
        else {
            return Ok(None);
        };
        let mut bytes = alloc::vec![0; len as usize];
        self.chain
            .read(queues.memory(), HEADER_LEN as u64, &mut bytes)
            .map_err(memory)?;
        Ok(Some(Frame {
            bytes,
            checksum,
            segmentation,
        }))
    }

    /// Moves frames from the backend to the driver. Returns whether there are more.
    fn receive(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<bool, Fault> {
        for _ in 0..BUDGET {
            // Frames wait in the backend, which then reads no more from the network.
            if self.state.held.is_empty() && !self.hold_buffer(queues)? {
                return Ok(false);
            }
            if self.pending.is_none() {
                let Poll::Ready(frame) = self.backend.poll_receive(cx) else {
                    return Ok(false);
                };
                self.pending = self.accept(frame);
            }
            if let Some(frame) = self.pending.take()
                && let Some(frame) = self.write_frame(frame, queues)?
            {
                self.pending = Some(frame);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes one more buffer of the driver's for what is received.
    fn hold_buffer(&mut self, queues: &mut Queues<'_>) -> Result<bool, Fault> {
        let mut chain = self.spare.pop().unwrap_or_default();
        if !queues.pop(RECEIVE, &mut chain)? {
            self.spare.push(chain);
            return Ok(false);
        }
        if chain.writable_len() < HEADER_LEN as u64 {
            return Err(Fault::Request {
                queue: RECEIVE,
                what: "a buffer with no room for the header",
            });
        }
        self.state.held.push(chain);
        Ok(true)
    }

    /// The frame as the driver takes it, `None` if it does not.
    fn accept(&mut self, mut frame: Frame) -> Option<Frame> {
        let state = &mut self.state;
        if !state.filter.passes(&frame.bytes, state.mac, state.features) {
            state.received.filtered = state.received.filtered.saturating_add(1);
            return None;
        }
        let offloads = state.guest_offloads;
        let fits = match frame.segmentation {
            Some(segmentation) => offloads & config::accepted_by(segmentation, &frame.bytes) != 0,
            None => true,
        };
        if let Checksum::Partial { start, offset } = frame.checksum
            && offloads & config::GUEST_CSUM == 0
        {
            frame.checksum = Checksum::Present;
            if !complete(&mut frame.bytes, start, offset) {
                state.received.dropped = state.received.dropped.saturating_add(1);
                return None;
            }
        }
        if !fits || frame.bytes.len() > MAX_FRAME {
            state.received.dropped = state.received.dropped.saturating_add(1);
            return None;
        }
        Some(frame)
    }

    /// Writes `frame` to the driver's buffers. Gives it back if there are too few.
    fn write_frame(
        &mut self,
        frame: Frame,
        queues: &mut Queues<'_>,
    ) -> Result<Option<Frame>, Fault> {
        let memory = |error| Fault::Memory {
            queue: RECEIVE,
            error,
        };
        let total = (HEADER_LEN + frame.bytes.len()) as u64;
        let mergeable = self.state.features & config::MRG_RXBUF != 0;
        loop {
            let room: u64 = self.state.held.iter().map(Chain::writable_len).sum();
            if room >= total {
                break;
            }
            let most = if mergeable { QUEUE_SIZE } else { 1 };
            if self.state.held.len() >= usize::from(most) {
                // All buffers that there can be are too small.
                self.state.received.dropped = self.state.received.dropped.saturating_add(1);
                return Ok(None);
            }
            if !self.hold_buffer(queues)? {
                return Ok(Some(frame));
            }
        }
        let mut used = 0;
        let mut room = 0;
        for chain in &self.state.held {
            used += 1;
            room += chain.writable_len();
            if room >= total {
                break;
            }
        }
        let header = Header::of(&frame, used as u16, self.state.guest_offloads).to_bytes();
        let mut rest = frame.bytes.as_slice();
        for (index, chain) in self.state.held.drain(..used).enumerate() {
            let mut at = 0;
            if index == 0 {
                chain.write(queues.memory(), 0, &header).map_err(memory)?;
                at = HEADER_LEN as u64;
            }
            let written = chain.write(queues.memory(), at, rest).map_err(memory)?;
            rest = rest.get(written..).unwrap_or_default();
            queues.complete(RECEIVE, &chain, (at + written as u64) as u32)?;
            self.spare.push(chain);
        }
        self.state.received.count(frame.bytes.len());
        Ok(None)
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        // Class: an Ethernet controller.
        DeviceKind {
            id: 1,
            class: 0x02_00_00,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE, QUEUE_SIZE, CONTROL_SIZE]
    }

    fn features(&self) -> u64 {
        config::offered(&self.info)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let image = self.config_image();
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn take_config_change(&mut self) -> bool {
        core::mem::take(&mut self.changed)
    }

    fn activate(&mut self, features: u64) {
        self.state.features = features;
        self.state.guest_offloads = features & ECN_FREE_OFFLOADS;
        self.tell_offloads();
    }

    fn poll(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<(), Fault> {
        if core::mem::take(&mut self.restored) && self.state.features & ANNOUNCED == ANNOUNCED {
            self.state.announce = true;
            self.changed = true;
        }
        self.control(queues)?;
        let mut sent = false;
        let more_out = self.transmit(cx, queues, &mut sent);
        // Also before a fault: what was sent before it is.
        if sent {
            self.backend.kick();
        }
        let more_in = self.receive(cx, queues)?;
        if more_out? || more_in {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16) {
        if queue == RECEIVE {
            self.state.held.clear();
        }
    }

    fn reset(&mut self) {
        let (sent, received) = (self.state.sent, self.state.received);
        self.state = NetState {
            sent,
            received,
            ..NetState::new(self.config.mac)
        };
        self.pending = None;
        self.restored = false;
        self.backend.reset();
        self.tell_offloads();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        let mut state = self.state.clone();
        // A frame that waits for buffers is lost, as on a wire.
        state.backend = self.backend.save();
        state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.state = NetState::from_record(record)?.checked()?;
        self.pending = None;
        let saved = core::mem::take(&mut self.state.backend);
        self.backend.restore(&saved);
        self.tell_offloads();
        self.restored = true;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        let state = &self.state;
        inspector
            .text("mac", alloc::format!("{}", state.mac))
            .u64("mtu", self.info.mtu)
            .hex("guest offloads", state.guest_offloads)
            .bool("promiscuous", state.filter.promiscuous)
            .u64("frames sent", state.sent.frames)
            .u64("bytes sent", state.sent.bytes)
            .u64("frames sent wrongly", state.sent.dropped)
            .u64("frames received", state.received.frames)
            .u64("bytes received", state.received.bytes)
            .u64("frames dropped", state.received.dropped)
            .u64("frames not for the guest", state.received.filtered)
            .u64("buffers held", state.held.len() as u64);
    }
}

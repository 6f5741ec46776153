//! Recording fakes of everything that a device is given, for tests and fuzz targets of device crates.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    vec::Vec,
};

use crate::{
    Access, ByteSink, Claim, ClaimSink, Clock, Device, DoorbellSink, Line, LineSink, Lines, Msi,
    MsiSink, Outcome, PowerRequest, PowerSink, Space, Timer, TimerKey, TimerService, WallClock,
    WallTime, le_value, put_le,
};

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Interrupt inputs that remember their level and count their rising edges.
#[derive(Debug, Default)]
pub struct RecordedLines {
    lines: Mutex<BTreeMap<u32, (u64, u64)>>,
}

impl RecordedLines {
    /// Lines that are all low.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A fresh recorder and a line `number` of it.
    pub fn with_line(number: u32) -> (Arc<Self>, Line) {
        let lines = Self::new();
        let line = Lines::new(lines.clone())
            .line(number)
            .expect("the first source of a line");
        (lines, line)
    }

    /// Whether any source drives line `number`.
    pub fn level(&self, number: u32) -> bool {
        locked(&self.lines)
            .get(&number)
            .is_some_and(|(sources, _)| *sources != 0)
    }

    /// How often line `number` went from low to high.
    pub fn edges(&self, number: u32) -> u64 {
        locked(&self.lines)
            .get(&number)
            .map_or(0, |(_, edges)| *edges)
    }
}

impl LineSink for RecordedLines {
    fn set(&self, line: u32, source: u8, level: bool) {
        let mut lines = locked(&self.lines);
        let (sources, edges) = lines.entry(line).or_default();
        let before = *sources;
        let bit = 1u64 << (source & 63);
        *sources = if level { before | bit } else { before & !bit };
        *edges += u64::from(before == 0 && *sources != 0);
    }
}

/// Remembers the MSIs sent.
#[derive(Debug, Default)]
pub struct RecordedMsis {
    sent: Mutex<Vec<Msi>>,
}

impl RecordedMsis {
    /// Nothing sent yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The MSIs sent since the last call.
    pub fn take(&self) -> Vec<Msi> {
        core::mem::take(&mut *locked(&self.sent))
    }
}

impl MsiSink for RecordedMsis {
    fn send(&self, msi: Msi) {
        locked(&self.sent).push(msi);
    }
}

/// Remembers which ranges a device has placed.
#[derive(Debug, Default)]
pub struct RecordedClaims {
    regions: Mutex<BTreeMap<u32, Claim>>,
    changes: AtomicU64,
}

impl RecordedClaims {
    /// Nothing placed yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Where region `region` is.
    pub fn get(&self, region: u32) -> Option<Claim> {
        locked(&self.regions).get(&region).copied()
    }

    /// The access to `address` in `space` that the ranges placed give, if any.
    pub fn access(&self, space: Space, address: u64) -> Option<Access> {
        let regions = locked(&self.regions);
        let (region, claim) = regions
            .iter()
            .find(|(_, claim)| claim.range.space == space && claim.range.contains(address))?;
        Some(Access {
            space,
            address,
            region: *region,
            offset: address - claim.range.base,
        })
    }

    /// How often a range was placed or taken away.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }
}

impl ClaimSink for RecordedClaims {
    fn set(&self, region: u32, claim: Option<Claim>) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        let mut regions = locked(&self.regions);
        match claim {
            Some(claim) => regions.insert(region, claim),
            None => regions.remove(&region),
        };
    }
}

/// Remembers the doorbells that are set.
#[derive(Debug, Default)]
pub struct RecordedDoorbells {
    set: Mutex<Vec<(Space, u64)>>,
}

impl RecordedDoorbells {
    /// No doorbell yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The doorbells.
    pub fn get(&self) -> Vec<(Space, u64)> {
        locked(&self.set).clone()
    }
}

impl DoorbellSink for RecordedDoorbells {
    fn set(&self, doorbells: &[(Space, u64)]) {
        *locked(&self.set) = doorbells.to_vec();
    }
}

/// A machine clock that moves when told to, its alarms, and a wall clock.
#[derive(Debug, Default)]
pub struct ManualTime {
    now: AtomicU64,
    wall: AtomicI64,
    armed: Mutex<BTreeMap<TimerKey, u64>>,
}

impl ManualTime {
    /// Machine time 0, wall time 1970-01-01.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A timer of this clock with the given id, of device 0.
    pub fn timer(self: &Arc<Self>, id: u32) -> Timer {
        Timer::new(self.clone(), TimerKey { device: 0, id })
    }

    /// Sets the machine time without delivering expiries.
    pub fn set_now(&self, now: u64) {
        self.now.store(now, Ordering::SeqCst);
    }

    /// Sets the wall time, in nanoseconds since 1970.
    pub fn set_wall(&self, nanos: i64) {
        self.wall.store(nanos, Ordering::SeqCst);
    }

    /// When the timer `id` is armed for.
    pub fn armed(&self, id: u32) -> Option<u64> {
        locked(&self.armed)
            .get(&TimerKey { device: 0, id })
            .copied()
    }

    /// Moves machine time and wall time forward by `nanos`, stopping at each expiry on the way to call `device`. At
    /// most `limit` expiries are delivered; returns how many were.
    pub fn advance(&self, device: &mut dyn Device, nanos: u64, limit: usize) -> usize {
        let end = Clock::now(self).saturating_add(nanos);
        let mut delivered = 0;
        while delivered < limit {
            let due = {
                let mut armed = locked(&self.armed);
                let first = armed
                    .iter()
                    .map(|(key, at)| (*at, *key))
                    .min()
                    .filter(|(at, _)| *at <= end);
                if let Some((_, key)) = first {
                    armed.remove(&key);
                }
                first
            };
            let Some((at, key)) = due else { break };
            self.move_to(at);
            device.timer(key.id);
            delivered += 1;
        }
        self.move_to(end);
        delivered
    }

    fn move_to(&self, at: u64) {
        let passed = at.saturating_sub(Clock::now(self));
        self.now.fetch_add(passed, Ordering::SeqCst);
        self.wall.fetch_add(passed as i64, Ordering::SeqCst);
    }
}

impl Clock for ManualTime {
    fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }
}

impl WallClock for ManualTime {
    fn now(&self) -> WallTime {
        let nanos = self.wall.load(Ordering::SeqCst);
        WallTime {
            seconds: nanos.div_euclid(1_000_000_000),
            nanos: nanos.rem_euclid(1_000_000_000) as u32,
        }
    }
}

impl TimerService for ManualTime {
    fn arm(&self, key: TimerKey, at: u64) {
        locked(&self.armed).insert(key, at);
    }

    fn cancel(&self, key: TimerKey) {
        locked(&self.armed).remove(&key);
    }
}

/// Remembers power requests.
#[derive(Debug, Default)]
pub struct RecordedPower {
    requests: Mutex<Vec<PowerRequest>>,
}

impl RecordedPower {
    /// Nothing requested yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The requests since the last call.
    pub fn take(&self) -> Vec<PowerRequest> {
        core::mem::take(&mut *locked(&self.requests))
    }
}

impl PowerSink for RecordedPower {
    fn request(&self, request: PowerRequest) {
        locked(&self.requests).push(request);
    }
}

/// Collects output, or refuses it while told to be full.
#[derive(Debug, Default)]
pub struct RecordedBytes {
    bytes: Mutex<Vec<u8>>,
    full: AtomicBool,
}

impl RecordedBytes {
    /// Empty, with room.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The bytes taken since the last call.
    pub fn take(&self) -> Vec<u8> {
        core::mem::take(&mut *locked(&self.bytes))
    }

    /// Whether further bytes are refused.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }
}

impl ByteSink for RecordedBytes {
    fn write(&self, bytes: &[u8]) -> usize {
        if self.full.load(Ordering::SeqCst) {
            return 0;
        }
        locked(&self.bytes).extend_from_slice(bytes);
        bytes.len()
    }
}

/// Drives `device` with whatever `input` says: reads and writes of every width at every offset of its claims, time that
/// passes (with at most 64 expiries a step), polls and resets. What a guest and its host could do, in any order.
pub fn exercise(device: &mut dyn Device, time: &ManualTime, input: &[u8]) {
    let claims = device.claims();
    let mut input = input.iter().copied();
    while let Some(operation) = input.next() {
        let mut number = |bytes: usize| -> u64 {
            (0..bytes).fold(0, |value, _| {
                value << 8 | u64::from(input.next().unwrap_or(0))
            })
        };
        match operation & 0x0F {
            0x0E => {
                let shift = number(1) % 40;
                time.advance(device, number(2) << shift, 64);
            }
            0x0F if operation == 0x0F => device.reset(crate::ResetKind::System),
            0x0F => device.poll(&mut core::task::Context::from_waker(
                core::task::Waker::noop(),
            )),
            low => {
                let len = usize::from(operation >> 5) + 1;
                let region = usize::from(low) % claims.len().max(1);
                let Some(claim) = claims.get(region) else {
                    continue;
                };
                let room = claim.range.len.saturating_sub(len as u64 - 1);
                if room == 0 {
                    continue;
                }
                let offset = number(if room > 256 { 2 } else { 1 }) % room;
                let at = Access {
                    space: claim.range.space,
                    address: claim.range.base + offset,
                    region: region as u32,
                    offset,
                };
                let mut data = [0xFF; 8];
                let _ = if operation & 0x10 == 0 {
                    device.read(at, &mut data[..len])
                } else {
                    put_le(&mut data, number(len));
                    device.write(at, &data[..len])
                };
            }
        }
    }
}

/// Checks that `device`'s state goes through bytes into `fresh`, a new device of the same kind on the same clock, and
/// comes out unchanged.
///
/// # Panics
/// When it does not.
pub fn check_state(device: &dyn Device, fresh: &mut dyn Device) {
    let record = device.save().expect("a running device can be saved");
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    let decoded = crate::StateRecord::decode(&mut &bytes[..]).expect("what was encoded decodes");
    fresh
        .restore(&decoded)
        .expect("what was saved can be restored");
    assert_eq!(
        fresh.save().as_ref(),
        Ok(&record),
        "the state of {}",
        device.name()
    );
}

/// The access to `address` in `space` that `device`'s claims give, if any.
pub fn access(device: &dyn Device, space: Space, address: u64) -> Option<Access> {
    let claims = device.claims();
    let (region, claim) = claims
        .iter()
        .enumerate()
        .find(|(_, claim)| claim.range.space == space && claim.range.contains(address))?;
    Some(Access {
        space,
        address,
        region: region as u32,
        offset: address - claim.range.base,
    })
}

/// Reads `len` bytes at port `port` of `device` as a vCPU would; all-ones where the device claims nothing.
pub fn port_read(device: &mut dyn Device, port: u16, len: usize) -> u64 {
    read(device, Space::Pio, port.into(), len)
}

/// Writes the low `len` bytes of `value` to port `port` of `device`.
pub fn port_write(device: &mut dyn Device, port: u16, len: usize, value: u64) {
    write(device, Space::Pio, port.into(), len, value);
}

/// Reads `len` bytes at `address` of `device`.
pub fn read(device: &mut dyn Device, space: Space, address: u64, len: usize) -> u64 {
    let mut data = [0xFF; 8];
    let data = &mut data[..len.min(8)];
    if let Some(at) = access(device, space, address) {
        assert_eq!(device.read(at, data), Outcome::Done, "read of {address:#x}");
    }
    le_value(data)
}

/// Writes the low `len` bytes of `value` at `address` of `device`.
pub fn write(device: &mut dyn Device, space: Space, address: u64, len: usize, value: u64) {
    let mut data = [0; 8];
    let data = &mut data[..len.min(8)];
    put_le(data, value);
    if let Some(at) = access(device, space, address) {
        assert_eq!(
            device.write(at, data),
            Outcome::Done,
            "write of {address:#x}"
        );
    }
}

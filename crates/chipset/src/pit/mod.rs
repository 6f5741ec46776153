//! The interval timer: Intel 8254 at ports 0x40 to 0x43 (Intel 8254 data sheet), with the system control port B at
//! 0x61, which drives the gate of counter 2 and shows its output.
//!
//! Counter 0 drives an interrupt line, counter 1 nothing, counter 2 the speaker, which is not heard.
//!
//! Differences from the chip: a new count takes effect at once in all modes (the chip lets a running period of modes 2
//! and 3 end first), and counter 0 interrupts at most every [`MIN_PERIOD_NANOS`].

mod counter;

use alloc::{sync::Arc, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Clock, Device, Inspector, Line, NANOS_PER_SECOND, Outcome,
    ResetKind, SaveState, StateError, StateRecord, Timer,
};
use serde::{Deserialize, Serialize};

use counter::{Counter, Mode};

/// The frequency of the counters' clock.
pub const PIT_HZ: u64 = 1_193_182;

/// The shortest time between two interrupts of counter 0. A guest that asks for more gets fewer, which bounds what it
/// can cost the host.
pub const MIN_PERIOD_NANOS: u64 = 20_000;

/// How long the refresh-request bit of port B stays as it is.
const REFRESH_NANOS: u64 = 15_085;

const COUNTERS: u32 = 0;

/// What the timer needs of the machine.
pub struct PitHandles {
    /// The line of counter 0.
    pub line: Line,
    /// Machine time.
    pub clock: Arc<dyn Clock>,
    /// The alarm for counter 0's next interrupt.
    pub timer: Timer,
}

/// The interval timer and port B.
pub struct Pit {
    handles: PitHandles,
    state: PitState,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PitState {
    counters: [Counter; 3],
    /// Bits 1 to 3 of port B: speaker, parity check, channel check.
    port_b: u8,
    /// The level of counter 0's line.
    line: bool,
    /// The machine time of counter 0's last interrupt.
    last_interrupt: Option<u64>,
    /// Counter 0 has interrupts coming, the next of them at this tick.
    next_rise: Option<u64>,
}

impl SaveState for PitState {
    const ID: &'static str = "pit8254";
    const VERSION: u16 = 1;
}

impl PitState {
    fn new() -> Self {
        Self {
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            port_b: 0,
            line: false,
            last_interrupt: None,
            next_rise: None,
        }
    }
}

fn ticks(nanos: u64) -> u64 {
    (u128::from(nanos) * u128::from(PIT_HZ) / u128::from(NANOS_PER_SECOND)) as u64
}

/// The first nanosecond at which [`ticks`] gives `ticks`.
fn nanos(ticks: u64) -> u64 {
    let nanos = (u128::from(ticks) * u128::from(NANOS_PER_SECOND)).div_ceil(u128::from(PIT_HZ));
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

impl Pit {
    /// A timer with nothing programmed.
    pub fn new(handles: PitHandles) -> Self {
        Self {
            handles,
            state: PitState::new(),
        }
    }

    fn now(&self) -> u64 {
        ticks(self.handles.clock.now())
    }

    fn drive(&mut self, level: bool) {
        self.state.line = level;
        self.handles.line.set(level);
    }

    /// Counter 0 was written to: forgets what was to come and plans anew.
    fn restart_counter_0(&mut self, now: u64) {
        let counter = &self.state.counters[0];
        if counter.mode() == Mode::Terminal && !counter.output(now) {
            self.drive(false);
        }
        self.state.next_rise = self.state.counters[0].next_rise(now);
        self.arm();
    }

    fn arm(&mut self) {
        let earliest = self
            .state
            .last_interrupt
            .map_or(0, |last| last.saturating_add(MIN_PERIOD_NANOS));
        let at = self.state.next_rise.map(|tick| nanos(tick).max(earliest));
        self.handles.timer.set(at);
    }

    fn write_control(&mut self, word: u8, now: u64) {
        match usize::from(word >> 6) {
            3 => {
                for (index, counter) in self.state.counters.iter_mut().enumerate() {
                    if word & 2 << index != 0 {
                        if word & 0x20 == 0 {
                            counter.latch_count(now);
                        }
                        if word & 0x10 == 0 {
                            counter.latch_status(now);
                        }
                    }
                }
            }
            index => {
                self.state.counters[index].control(word, now);
                if index == 0 && word & 0x30 != 0 {
                    self.restart_counter_0(now);
                }
            }
        }
    }

    fn write_port_b(&mut self, value: u8, now: u64) {
        self.state.port_b = value & 0x0E;
        self.state.counters[2].set_gate(value & 1 != 0, now);
    }

    fn read_port_b(&self) -> u8 {
        let nanos = self.handles.clock.now();
        let speaker = &self.state.counters[2];
        self.state.port_b
            | u8::from(speaker.gate())
            | (u8::from((nanos / REFRESH_NANOS) & 1 != 0) << 4)
            | u8::from(speaker.output(ticks(nanos))) << 5
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        "pit"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![
            Claim::new(AddressRange::pio(0x40, 4), "counters"),
            Claim::new(AddressRange::pio(0x61, 1), "port B"),
        ]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        let now = self.now();
        at.read_each(data, |offset| match (at.region, offset) {
            (COUNTERS, offset @ 0..3) => self.state.counters[offset as usize].read(now),
            (COUNTERS, _) => 0xFF,
            _ => self.read_port_b(),
        });
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        let now = self.now();
        at.write_each(data, |offset, value| match (at.region, offset) {
            (COUNTERS, offset @ 0..3) => {
                let changed = self.state.counters[offset as usize].write(value, now);
                if offset == 0 && changed {
                    self.restart_counter_0(now);
                }
            }
            (COUNTERS, _) => self.write_control(value, now),
            _ => self.write_port_b(value, now),
        });
        Outcome::Done
    }

    fn timer(&mut self, _: u32) {
        let nanos = self.handles.clock.now();
        let now = ticks(nanos);
        if self.state.next_rise.is_none_or(|rise| now < rise) {
            return;
        }
        self.state.last_interrupt = Some(nanos);
        self.state.next_rise = self.state.counters[0].next_rise(now);
        self.drive(false);
        self.drive(true);
        self.arm();
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = PitState::new();
        self.handles.timer.cancel();
        self.handles.line.set(false);
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = PitState::from_record(record)?;
        if !state.counters.iter().all(Counter::is_valid) || state.port_b & !0x0E != 0 {
            return Err(PitState::invalid(
                "a counter holds a value that it cannot have",
            ));
        }
        self.state = state;
        self.drive(self.state.line);
        self.arm();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        let now = self.now();
        for (index, counter) in self.state.counters.iter().enumerate() {
            inspector.child(alloc::format!("counter {index}"), |inspector| {
                inspector
                    .text("mode", alloc::format!("{:?}", counter.mode()))
                    .u64("initial count", counter.initial())
                    .bool("gate", counter.gate())
                    .bool("output", counter.output(now));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::testing::{ManualTime, RecordedLines, port_read, port_write};

    fn pit() -> (Pit, Arc<ManualTime>, Arc<RecordedLines>) {
        let time = ManualTime::new();
        let (lines, line) = RecordedLines::with_line(0);
        let mut pit = Pit::new(PitHandles {
            line,
            clock: time.clone(),
            timer: time.timer(0),
        });
        pit.reset(ResetKind::PowerOn);
        (pit, time, lines)
    }

    fn program(pit: &mut Pit, word: u64, port: u16, count: u64) {
        port_write(pit, 0x43, 1, word);
        port_write(pit, port, 1, count & 0xFF);
        port_write(pit, port, 1, count >> 8);
    }

    #[test]
    fn time_conversion_is_exact_at_edges() {
        for tick in [0, 1, 11_932, 1_193_182, 1_193_182_000_001] {
            assert_eq!(ticks(nanos(tick)), tick);
            assert!(tick == 0 || ticks(nanos(tick) - 1) == tick - 1);
        }
    }

    #[test]
    fn a_hundred_hertz_tick_ticks() {
        let (mut pit, time, lines) = pit();
        program(&mut pit, 0x34, 0x40, 11_932);
        assert_eq!(
            time.advance(&mut pit, NANOS_PER_SECOND + 1_000_000, 1000),
            100
        );
        assert_eq!(lines.edges(0), 100);
    }

    #[test]
    fn late_expiries_merge() {
        let (mut pit, time, lines) = pit();
        program(&mut pit, 0x34, 0x40, 1193);
        time.set_now(NANOS_PER_SECOND);
        pit.timer(0);
        assert_eq!(lines.edges(0), 1);
        let next = time.armed(0).unwrap();
        assert!(
            next > NANOS_PER_SECOND && next <= NANOS_PER_SECOND + 1_000_000,
            "{next}"
        );
    }

    #[test]
    fn a_one_shot_interrupts_once_and_lowers_when_rearmed() {
        let (mut pit, time, lines) = pit();
        program(&mut pit, 0x30, 0x40, 1193);
        assert_eq!(time.advance(&mut pit, 10_000_000, 10), 1);
        assert!(lines.level(0));
        program(&mut pit, 0x30, 0x40, 1193);
        assert!(!lines.level(0));
        assert_eq!(time.advance(&mut pit, 10_000_000, 10), 1);
        assert_eq!(lines.edges(0), 2);
    }

    #[test]
    fn a_tiny_count_does_not_flood_the_host() {
        let (mut pit, time, _) = pit();
        program(&mut pit, 0x34, 0x40, 1);
        let expiries = time.advance(&mut pit, 1_000_000, 1000);
        assert!(expiries <= 51, "{expiries}");
        assert!(expiries >= 45, "{expiries}");
    }

    #[test]
    fn the_speaker_counter_can_be_polled_through_port_b() {
        // As Linux calibrates the TSC: gate up, speaker off, counter 2 in mode 0, poll bit 5.
        let (mut pit, time, lines) = pit();
        port_write(&mut pit, 0x61, 1, 0x01);
        program(&mut pit, 0xB0, 0x42, 11_932);
        assert_eq!(port_read(&mut pit, 0x61, 1) & 0x2F, 0x01);
        time.advance(&mut pit, 9_999_000, 10);
        assert_eq!(port_read(&mut pit, 0x61, 1) & 0x20, 0);
        time.advance(&mut pit, 2_000, 10);
        assert_eq!(port_read(&mut pit, 0x61, 1) & 0x20, 0x20);
        assert_eq!(lines.edges(0), 0);
    }

    #[test]
    fn the_refresh_bit_toggles() {
        let (mut pit, time, _) = pit();
        let mut toggles = 0;
        let mut last = port_read(&mut pit, 0x61, 1) & 0x10;
        for _ in 0..1000 {
            time.advance(&mut pit, 1000, 10);
            let bit = port_read(&mut pit, 0x61, 1) & 0x10;
            toggles += u32::from(bit != last);
            last = bit;
        }
        assert_eq!(toggles, 66);
    }

    #[test]
    fn read_back_latches_several_counters() {
        let (mut pit, time, _) = pit();
        program(&mut pit, 0x34, 0x40, 0xFFFF);
        program(&mut pit, 0x74, 0x41, 0xFFFF);
        port_write(&mut pit, 0x43, 1, 0xC6);
        time.advance(&mut pit, 1_000_000, 0);
        assert_eq!(port_read(&mut pit, 0x40, 1), 0xB4);
        assert_eq!(port_read(&mut pit, 0x41, 1), 0xB4);
        assert_eq!(
            [port_read(&mut pit, 0x40, 1), port_read(&mut pit, 0x40, 1)],
            [0xFF, 0xFF]
        );
        assert_eq!(
            port_read(&mut pit, 0x43, 1),
            0xFF,
            "the control port cannot be read"
        );
    }

    #[test]
    fn a_restored_timer_goes_on_ticking() {
        let (mut pit, time, _) = pit();
        program(&mut pit, 0x34, 0x40, 11_932);
        time.advance(&mut pit, 25_000_000, 100);
        let record = pit.save().unwrap();
        let (mut other, other_time, lines) = self::pit();
        other_time.set_now(25_000_000);
        other.restore(&record).unwrap();
        assert_eq!(other_time.armed(0), time.armed(0));
        assert_eq!(other_time.advance(&mut other, 10_000_000, 100), 1);
        assert!(lines.level(0));
    }
}

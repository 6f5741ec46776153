//! One counter of an 8254: nothing ticks, its value and output follow from the clock ticks that have passed.

use serde::{Deserialize, Serialize};

/// How a counter is read and written (bits 5 and 4 of its control word).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Bytes {
    Low,
    High,
    Both,
}

/// What a counter does (bits 3 to 1 of its control word).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Mode {
    /// 0: OUT rises when the count runs out.
    Terminal,
    /// 1: the gate starts a low pulse of OUT.
    OneShot,
    /// 2: OUT falls for one tick per period.
    Rate,
    /// 3: OUT is high for half of each period.
    Square,
    /// 4: OUT falls for one tick when the count runs out.
    SoftwareStrobe,
    /// 5: the same, started by the gate.
    HardwareStrobe,
}

impl Mode {
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Terminal,
            1 => Self::OneShot,
            2 | 6 => Self::Rate,
            3 | 7 => Self::Square,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::Terminal => 0,
            Self::OneShot => 1,
            Self::Rate => 2,
            Self::Square => 3,
            Self::SoftwareStrobe => 4,
            Self::HardwareStrobe => 5,
        }
    }

    /// Whether the rise of the gate (re)starts the counter, instead of the gate's level letting it count.
    fn is_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }
}

/// The state of a counter. Times are in ticks of the PIT's clock since machine time 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    mode: Mode,
    bytes: Bytes,
    bcd: bool,
    gate: bool,
    /// What the counter was last loaded with: 1 to 65,536 (10,000 in BCD); 0 when nothing was loaded since the control
    /// word.
    initial: u32,
    /// Ticks counted before `since`.
    counted: u64,
    /// When counting last began; `None` while it stands still.
    since: Option<u64>,
    /// The low byte of a count whose high byte has yet to be written.
    low_byte: Option<u8>,
    /// The next read gives the high byte.
    read_high: bool,
    /// A count held for reading, as the guest will see it.
    latched: Option<u16>,
    /// A status byte held for reading.
    latched_status: Option<u8>,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: Mode::Terminal,
            bytes: Bytes::Both,
            bcd: false,
            gate,
            initial: 0,
            counted: 0,
            since: None,
            low_byte: None,
            read_high: false,
            latched: None,
            latched_status: None,
        }
    }

    /// Whether a saved counter can exist.
    pub(super) fn is_valid(&self) -> bool {
        self.initial <= 0x1_0000 && (self.since.is_none() || self.initial != 0)
    }

    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    fn elapsed(&self, now: u64) -> u64 {
        let running = self.since.map_or(0, |since| now.saturating_sub(since));
        self.counted.saturating_add(running)
    }

    /// A control word for this counter.
    pub(super) fn control(&mut self, word: u8, now: u64) {
        let bytes = match word >> 4 & 3 {
            0 => {
                self.latch_count(now);
                return;
            }
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        *self = Self {
            mode: Mode::from_bits(word >> 1),
            bytes,
            bcd: word & 1 != 0,
            ..Self::new(self.gate)
        };
    }

    pub(super) fn latch_count(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
        }
    }

    pub(super) fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let bytes = match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::Both => 3,
            };
            let null_count = self.initial == 0 || self.low_byte.is_some();
            self.latched_status = Some(
                u8::from(self.output(now)) << 7
                    | u8::from(null_count) << 6
                    | bytes << 4
                    | self.mode.bits() << 1
                    | u8::from(self.bcd),
            );
        }
    }

    /// Writes a byte of the initial count; returns whether the count was loaded or stopped.
    pub(super) fn write(&mut self, value: u8, now: u64) -> bool {
        let count = match (self.bytes, self.low_byte.take()) {
            (Bytes::Low, _) => u16::from(value),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Bytes::Both, None) => {
                self.low_byte = Some(value);
                // The first byte stops a counter in mode 0.
                if self.mode == Mode::Terminal {
                    self.counted = 0;
                    self.since = None;
                    self.initial = 0;
                    return true;
                }
                return false;
            }
        };
        self.initial = match (self.bcd, count) {
            (false, 0) => 0x1_0000,
            (false, count) => count.into(),
            (true, count) => match from_bcd(count) {
                0 => 10_000,
                count => count,
            },
        };
        if !self.mode.is_triggered() {
            self.counted = 0;
            self.since = self.gate.then_some(now);
        }
        true
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched.unwrap_or_else(|| self.count(now));
        let [low, high] = count.to_le_bytes();
        let (value, complete) = match self.bytes {
            Bytes::Low => (low, true),
            Bytes::High => (high, true),
            Bytes::Both => {
                self.read_high = !self.read_high;
                if self.read_high {
                    (low, false)
                } else {
                    (high, true)
                }
            }
        };
        if complete {
            self.latched = None;
        }
        value
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        if self.initial == 0 {
            return;
        }
        match self.mode {
            Mode::OneShot | Mode::HardwareStrobe | Mode::Rate | Mode::Square if rises => {
                self.counted = 0;
                self.since = Some(now);
            }
            Mode::Terminal | Mode::SoftwareStrobe if rises => self.since = Some(now),
            Mode::Terminal | Mode::SoftwareStrobe | Mode::Rate | Mode::Square if falls => {
                self.counted = self.elapsed(now);
                self.since = None;
            }
            _ => {}
        }
    }

    /// The counting element as a guest reads it.
    fn count(&self, now: u64) -> u16 {
        if self.initial == 0 {
            return 0;
        }
        let initial = u64::from(self.initial);
        let elapsed = self.elapsed(now);
        let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = match self.mode {
            Mode::Rate => initial - elapsed % initial,
            // Counts down by two, twice per period; an odd count spends its extra tick in the high half.
            Mode::Square => {
                let tick = elapsed % initial;
                let high = initial.div_ceil(2);
                let even = initial & !1;
                let in_half = if tick < high { tick } else { tick - high };
                even.saturating_sub(2 * in_half)
            }
            // These go on counting, from all ones, when they have run out.
            _ => (initial + wrap - elapsed % wrap) % wrap,
        };
        if self.bcd {
            to_bcd((count % 10_000) as u16)
        } else {
            count as u16
        }
    }

    /// The level of OUT.
    pub(super) fn output(&self, now: u64) -> bool {
        if self.initial == 0 {
            return self.mode != Mode::Terminal;
        }
        let initial = u64::from(self.initial);
        let elapsed = self.elapsed(now);
        let started = self.since.is_some() || self.counted != 0;
        match self.mode {
            Mode::Terminal => elapsed >= initial,
            Mode::OneShot => !started || elapsed >= initial,
            Mode::Rate => !self.gate || elapsed % initial != initial - 1 || initial == 1,
            Mode::Square => !self.gate || elapsed % initial < initial.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => !started || elapsed != initial,
        }
    }

    /// The tick after `now` at which OUT next rises; `None` when it does not without further writes.
    pub(super) fn next_rise(&self, now: u64) -> Option<u64> {
        let since = self.since?;
        let initial = u64::from(self.initial);
        let begin = since.saturating_sub(self.counted);
        let first = match self.mode {
            Mode::Terminal | Mode::OneShot => initial.checked_sub(self.counted)?,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => {
                (initial + 1).checked_sub(self.counted)?
            }
            Mode::Rate | Mode::Square => {
                let periods = now.saturating_sub(begin) / initial + 1;
                return begin.checked_add(periods.checked_mul(initial)?);
            }
        };
        since.checked_add(first).filter(|at| *at > now)
    }
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |sum, digit| {
        sum * 10 + u32::from(value >> (4 * digit) & 0xF).min(9)
    })
}

fn to_bcd(value: u16) -> u16 {
    ((value / 1000) << 12) | ((value / 100 % 10) << 8) | ((value / 10 % 10) << 4) | (value % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(word: u8, count: u16) -> Counter {
        let mut counter = Counter::new(true);
        counter.control(word, 0);
        counter.write(count as u8, 0);
        counter.write((count >> 8) as u8, 0);
        counter
    }

    fn count(counter: &mut Counter, now: u64) -> u16 {
        let low = counter.read(now);
        u16::from_le_bytes([low, counter.read(now)])
    }

    #[test]
    fn mode_0_rises_once() {
        let mut counter = counter(0x30, 100);
        assert!(!counter.output(99));
        assert!(counter.output(100));
        assert_eq!(counter.next_rise(0), Some(100));
        assert_eq!(counter.next_rise(100), None);
        assert_eq!(count(&mut counter, 40), 60);
        assert_eq!(count(&mut counter, 101), 0xFFFF, "it counts on");
    }

    #[test]
    fn the_gate_pauses_mode_0() {
        let mut counter = counter(0x30, 100);
        counter.set_gate(false, 40);
        assert_eq!(counter.next_rise(50), None);
        assert_eq!(count(&mut counter, 1000), 60);
        counter.set_gate(true, 1000);
        assert_eq!(counter.next_rise(1000), Some(1060));
        assert!(!counter.output(1059));
        assert!(counter.output(1060));
    }

    #[test]
    fn the_gate_triggers_mode_1() {
        let mut counter = counter(0x32, 10);
        assert!(counter.output(5));
        counter.set_gate(false, 5);
        counter.set_gate(true, 6);
        assert!(!counter.output(15));
        assert!(counter.output(16));
        counter.set_gate(false, 20);
        counter.set_gate(true, 30);
        assert!(!counter.output(31), "triggered again");
    }

    #[test]
    fn mode_2_is_low_for_a_tick_per_period() {
        let mut counter = counter(0x34, 10);
        let low: std::vec::Vec<u64> = (0..25).filter(|now| !counter.output(*now)).collect();
        assert_eq!(low, [9, 19]);
        assert_eq!(counter.next_rise(0), Some(10));
        assert_eq!(counter.next_rise(10), Some(20));
        assert_eq!(counter.next_rise(1_000_003), Some(1_000_010));
        assert_eq!(count(&mut counter, 0), 10);
        assert_eq!(count(&mut counter, 9), 1);
        assert_eq!(count(&mut counter, 10), 10);
    }

    #[test]
    fn mode_3_is_high_for_half_of_each_period() {
        let mut counter = counter(0x36, 10);
        let high: std::vec::Vec<u64> = (0..12).filter(|now| counter.output(*now)).collect();
        assert_eq!(high, [0, 1, 2, 3, 4, 10, 11]);
        assert_eq!(count(&mut counter, 2), 6);
        assert_eq!(count(&mut counter, 7), 6, "counts down by two, twice");
        let odd = self::counter(0x36, 5);
        let high: std::vec::Vec<u64> = (0..6).filter(|now| odd.output(*now)).collect();
        assert_eq!(high, [0, 1, 2, 5]);
    }

    #[test]
    fn mode_4_strobes_once() {
        let counter = counter(0x38, 10);
        assert!(counter.output(9) && !counter.output(10) && counter.output(11));
        assert_eq!(counter.next_rise(0), Some(11));
    }

    #[test]
    fn mode_5_strobes_after_the_gate() {
        let mut counter = counter(0x3A, 10);
        assert!(counter.output(10));
        counter.set_gate(false, 20);
        counter.set_gate(true, 30);
        assert!(counter.output(39) && !counter.output(40) && counter.output(41));
    }

    #[test]
    fn zero_counts_the_longest() {
        assert_eq!(counter(0x34, 0).next_rise(0), Some(0x1_0000));
        assert_eq!(counter(0x35, 0).next_rise(0), Some(10_000));
    }

    #[test]
    fn bcd_counts_in_tens() {
        let mut counter = counter(0x31, 0x1234);
        assert_eq!(counter.next_rise(0), Some(1234));
        assert_eq!(count(&mut counter, 5), 0x1229);
        assert_eq!(count(&mut counter, 1235), 0x9999);
    }

    #[test]
    fn a_latched_count_stays_until_it_is_read() {
        let mut counter = counter(0x34, 1000);
        counter.control(0x00, 100);
        counter.control(0x00, 200);
        assert_eq!(counter.read(300), 0x84);
        assert_eq!(counter.read(400), 0x03, "900 both times");
        assert_eq!(count(&mut counter, 500), 500);
    }

    #[test]
    fn single_byte_access() {
        let mut low = Counter::new(true);
        low.control(0x14, 0);
        low.write(0x20, 0);
        assert_eq!(
            (low.initial(), low.read(0), low.read(1)),
            (0x20, 0x20, 0x1F)
        );
        let mut high = Counter::new(true);
        high.control(0x24, 0);
        high.write(0x20, 0);
        assert_eq!((high.initial(), high.read(0)), (0x2000, 0x20));
    }

    #[test]
    fn status_tells_mode_output_and_null_count() {
        let mut counter = Counter::new(true);
        counter.control(0x36, 0);
        counter.latch_status(0);
        assert_eq!(counter.read(0), 0xF6, "nothing loaded, OUT high");
        counter.write(10, 0);
        counter.write(0, 0);
        counter.latch_status(7);
        counter.latch_count(7);
        assert_eq!(counter.read(7), 0x36, "loaded, OUT low");
        assert_eq!(
            (counter.read(9), counter.read(9)),
            (6, 0),
            "then the latched count"
        );
    }

    #[test]
    fn counters_that_cannot_be_are_told() {
        let good = counter(0x34, 1000);
        assert!(good.is_valid());
        assert!(
            !Counter {
                initial: 0x1_0001,
                ..good.clone()
            }
            .is_valid()
        );
        assert!(
            !Counter { initial: 0, ..good }.is_valid(),
            "it would divide by zero"
        );
    }

    #[test]
    fn the_first_byte_stops_mode_0() {
        let mut counter = counter(0x30, 10);
        counter.write(20, 5);
        assert_eq!(counter.next_rise(5), None);
        assert!(!counter.output(100));
        counter.write(0, 100);
        assert_eq!(counter.next_rise(100), Some(120));
    }
}

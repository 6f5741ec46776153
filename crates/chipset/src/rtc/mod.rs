//! The real-time clock and its memory: Motorola MC146818 (data sheet "MC146818 Real-Time Clock Plus RAM") at ports
//! 0x70 and 0x71, with 128 bytes as in the PC/AT and the century in byte 0x32.
//!
//! Time follows the host's wall clock at a distance that the guest may change by setting the clock. Periodic
//! interrupts follow machine time.
//!
//! Left out: the square-wave output, daylight saving (register B bits 3 and 0 are kept without effect), a day of week
//! other than the date's, and the NMI mask in bit 7 of port 0x70.

mod calendar;
mod registers;

use alloc::{sync::Arc, vec, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Clock, Device, Inspector, Line, NANOS_PER_SECOND, Outcome,
    ResetKind, SaveState, StateError, StateRecord, Timer, WallClock,
};
use serde::{Deserialize, Serialize};

use calendar::DateTime;
use registers::{A, B, C, D, Encoding};

/// The interrupt line of the clock in a PC.
pub const RTC_LINE: u32 = 8;
/// The byte that holds the century; ACPI's FADT names it.
pub const CENTURY: u8 = 0x32;
/// How many bytes there are.
pub const CMOS_LEN: usize = 128;

const SET: u8 = 1 << 7;
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const SQUARE_WAVE: u8 = 1 << 3;
const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE;
const IRQF: u8 = 1 << 7;
const UIP: u8 = 1 << 7;
const VALID_RAM: u8 = 1 << 7;
/// Register A: the divider that makes a 32,768 Hz crystal tick seconds.
const DIVIDER_RUNS: u8 = 0x20;
/// Update-in-progress is up for this long before each second: 244 µs of warning and 1,984 µs of update.
const UPDATE_NANOS: u64 = 2_228_000;
/// The clock takes its first step this long after the divider was released or the clock was set.
const CRYSTAL_HZ: u64 = 32_768;

const PERIODIC_TIMER: u32 = 0;
const UPDATE_TIMER: u32 = 1;

/// What the clock needs of the machine.
pub struct RtcHandles {
    /// The interrupt line, number [`RTC_LINE`] in a PC.
    pub line: Line,
    /// Machine time.
    pub clock: Arc<dyn Clock>,
    /// The time of day.
    pub wall: Arc<dyn WallClock>,
    /// The alarm for periodic interrupts.
    pub periodic: Timer,
    /// The alarm for update and alarm interrupts.
    pub update: Timer,
}

impl RtcHandles {
    /// The ids that the two timers are to have, periodic first.
    pub const TIMER_IDS: [u32; 2] = [PERIODIC_TIMER, UPDATE_TIMER];
}

/// What firmware would have written into the memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct RtcConfig {
    /// Bytes of RAM below 4 GiB.
    pub low_memory: u64,
    /// Bytes of RAM from 4 GiB on.
    pub high_memory: u64,
}

impl RtcConfig {
    /// Writes the sizes where firmware and boot loaders look for them.
    fn fill(&self, cmos: &mut [u8]) {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let mut put16 = |index: usize, value: u64| {
            let value = value.min(0xFFFF) as u16;
            cmos[index..index + 2].copy_from_slice(&value.to_le_bytes());
        };
        let extended = self.low_memory.saturating_sub(MIB) / KIB;
        put16(0x15, (self.low_memory / KIB).min(640));
        put16(0x17, extended);
        put16(0x30, extended);
        put16(0x34, self.low_memory.saturating_sub(16 * MIB) / (64 * KIB));
        let high = (self.high_memory / (64 * KIB)).min(0xFF_FFFF);
        cmos[0x5B..0x5E].copy_from_slice(&high.to_le_bytes()[..3]);
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RtcState {
    /// All bytes; those of the time are only up to date while the clock stands still.
    cmos: Vec<u8>,
    index: u8,
    /// What to add to the wall clock, in nanoseconds.
    offset: i128,
    /// The last second of the clock that flags were computed for.
    last_second: i64,
    /// The machine time of the last periodic event.
    last_periodic: u64,
}

impl SaveState for RtcState {
    const ID: &'static str = "rtc146818";
    const VERSION: u16 = 1;
}

/// The real-time clock.
pub struct Rtc {
    handles: RtcHandles,
    config: RtcConfig,
    state: RtcState,
}

impl Rtc {
    /// A clock that shows the host's time of day, UTC.
    pub fn new(handles: RtcHandles, config: RtcConfig) -> Self {
        let state = RtcState {
            cmos: vec![0; CMOS_LEN],
            index: 0,
            offset: 0,
            last_second: 0,
            last_periodic: 0,
        };
        Self {
            handles,
            config,
            state,
        }
    }

    fn encoding(&self) -> Encoding {
        Encoding(self.state.cmos[B])
    }

    /// Whether time goes on: the divider runs and the guest is not setting the clock.
    fn runs(&self) -> bool {
        self.state.cmos[A] & 0x70 == DIVIDER_RUNS && self.state.cmos[B] & SET == 0
    }

    /// The clock's time in nanoseconds since 1970.
    fn nanos(&self) -> i128 {
        let wall = self.handles.wall.now();
        (i128::from(wall.seconds) * i128::from(NANOS_PER_SECOND) + i128::from(wall.nanos))
            .saturating_add(self.state.offset)
    }

    /// The clock's second, and the nanoseconds passed in it.
    fn time(&self) -> (i64, u64) {
        let nanos = self.nanos();
        let second = nanos.div_euclid(i128::from(NANOS_PER_SECOND));
        let within = nanos.rem_euclid(i128::from(NANOS_PER_SECOND)) as u64;
        (
            second.clamp(i64::MIN.into(), i64::MAX.into()) as i64,
            within,
        )
    }

    /// Copies the running time into the registers.
    fn store_time(&mut self) {
        let (second, _) = self.time();
        let encoding = self.encoding();
        registers::store(
            &mut self.state.cmos,
            encoding,
            DateTime::from_seconds(second),
            CENTURY.into(),
        );
    }

    /// Makes the clock run on from what the registers hold, `within` nanoseconds into that second.
    fn load_time(&mut self, within: u64) {
        let second =
            registers::load(&self.state.cmos, self.encoding(), CENTURY.into()).to_seconds();
        let wanted = i128::from(second) * i128::from(NANOS_PER_SECOND) + i128::from(within);
        let shown = self.nanos();
        self.state.offset = self
            .state
            .offset
            .saturating_add(wanted.saturating_sub(shown));
        self.state.last_second = second;
    }

    fn period(&self) -> Option<u64> {
        let rate = match self.state.cmos[A] & 0xF {
            0 => return None,
            rate @ (1 | 2) => rate + 7,
            rate => rate,
        };
        Some((1 << (rate - 1)) * NANOS_PER_SECOND / CRYSTAL_HZ)
    }

    /// Sets the flags of what has happened since the last call.
    fn advance(&mut self) {
        if let Some(period) = self.period() {
            let now = self.handles.clock.now();
            let periods = now.saturating_sub(self.state.last_periodic) / period;
            if periods > 0 {
                self.state.last_periodic += periods * period;
                self.state.cmos[C] |= PERIODIC;
            }
        }
        if self.runs() {
            let (second, _) = self.time();
            if second > self.state.last_second {
                self.state.cmos[C] |= UPDATE;
                let alarm = registers::next_alarm(
                    &self.state.cmos,
                    self.encoding(),
                    self.state.last_second,
                );
                if alarm.is_some_and(|alarm| alarm <= second) {
                    self.state.cmos[C] |= ALARM;
                }
            }
            self.state.last_second = second;
        }
    }

    /// Drives the line and arms the timers as registers A to C want.
    fn update_line(&mut self) {
        let pending = self.state.cmos[B] & self.state.cmos[C] & INTERRUPTS != 0;
        self.state.cmos[C] = self.state.cmos[C] & INTERRUPTS | if pending { IRQF } else { 0 };
        self.handles.line.set(pending);
        // Flags that are up already need no alarm: reading register C arms it again.
        let wanted = self.state.cmos[B] & !self.state.cmos[C];
        let periodic = self
            .period()
            .filter(|_| wanted & PERIODIC != 0)
            .map(|period| self.state.last_periodic.saturating_add(period));
        self.handles.periodic.set(periodic);
        let update =
            (self.runs() && wanted & (UPDATE | ALARM) != 0).then(|| self.next_update(wanted));
        self.handles.update.set(update.flatten());
    }

    /// The machine time of the next second that interrupts.
    fn next_update(&self, wanted: u8) -> Option<u64> {
        let (second, within) = self.time();
        let next = if wanted & UPDATE != 0 {
            second.checked_add(1)?
        } else {
            registers::next_alarm(&self.state.cmos, self.encoding(), second)?
        };
        // The wall clock may be changed on the host: look again at least every minute.
        let seconds = next.saturating_sub(second).clamp(1, 60) as u64;
        let left = seconds * NANOS_PER_SECOND - within;
        Some(self.handles.clock.now().saturating_add(left))
    }

    fn read_data(&mut self) -> u8 {
        let index = usize::from(self.state.index);
        let is_time = registers::TIME.contains(&index) || index == usize::from(CENTURY);
        if is_time && self.runs() {
            self.store_time();
        }
        match index {
            A => {
                let (_, within) = self.time();
                let updating = self.runs() && within >= NANOS_PER_SECOND - UPDATE_NANOS;
                self.state.cmos[A] | if updating { UIP } else { 0 }
            }
            C => {
                self.advance();
                self.update_line();
                let flags = core::mem::take(&mut self.state.cmos[C]);
                self.update_line();
                flags
            }
            D => VALID_RAM,
            index => self.state.cmos[index],
        }
    }

    fn write_data(&mut self, value: u8) {
        let index = usize::from(self.state.index);
        let is_time = registers::TIME.contains(&index) || index == usize::from(CENTURY);
        match index {
            A | B => {
                self.advance();
                let ran = self.runs();
                if ran {
                    self.store_time();
                }
                let (_, within) = self.time();
                let divider_before = self.state.cmos[A] & 0x70;
                let period_before = self.period();
                if index == A {
                    self.state.cmos[A] = value & !UIP;
                } else {
                    self.state.cmos[B] = value;
                }
                if self.period() != period_before {
                    self.state.last_periodic = self.handles.clock.now();
                }
                if self.runs() && !ran {
                    // After a reset of the divider the first update comes half a second later.
                    let restarted = divider_before != DIVIDER_RUNS;
                    self.load_time(if restarted {
                        NANOS_PER_SECOND / 2
                    } else {
                        within
                    });
                }
                self.update_line();
            }
            C | D => {}
            index if is_time && self.runs() => {
                let (_, within) = self.time();
                self.store_time();
                self.state.cmos[index] = value;
                self.load_time(within);
                self.update_line();
            }
            registers::SECONDS_ALARM | registers::MINUTES_ALARM | registers::HOURS_ALARM => {
                self.advance();
                self.state.cmos[index] = value;
                self.update_line();
            }
            index => self.state.cmos[index] = value,
        }
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![Claim::new(AddressRange::pio(0x70, 2), "index and data")]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        at.read_each(
            data,
            |offset| if offset == 0 { 0xFF } else { self.read_data() },
        );
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        at.write_each(data, |offset, value| {
            if offset == 0 {
                self.state.index = value & 0x7F;
            } else {
                self.write_data(value);
            }
        });
        Outcome::Done
    }

    fn timer(&mut self, _: u32) {
        self.advance();
        self.update_line();
    }

    fn reset(&mut self, kind: ResetKind) {
        if kind == ResetKind::PowerOn {
            self.state.cmos = vec![0; CMOS_LEN];
            self.config.fill(&mut self.state.cmos);
            self.state.cmos[A] = DIVIDER_RUNS | 6;
            self.state.cmos[B] = registers::HOURS_24;
            self.state.offset = 0;
            self.state.last_second = self.time().0;
            self.state.last_periodic = self.handles.clock.now();
        }
        self.state.index = 0;
        self.state.cmos[B] &= !(INTERRUPTS | SQUARE_WAVE);
        self.state.cmos[C] = 0;
        self.update_line();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = RtcState::from_record(record)?;
        if state.cmos.len() != CMOS_LEN || usize::from(state.index) >= CMOS_LEN {
            return Err(RtcState::invalid("the clock's memory has 128 bytes"));
        }
        self.state = state;
        self.update_line();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        let time = DateTime::from_seconds(self.time().0);
        inspector
            .text(
                "time",
                alloc::format!(
                    "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
                    time.year,
                    time.month,
                    time.day,
                    time.hour,
                    time.minute,
                    time.second
                ),
            )
            .bool("runs", self.runs())
            .hex("register A", self.state.cmos[A])
            .hex("register B", self.state.cmos[B])
            .hex("register C", self.state.cmos[C]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::testing::{ManualTime, RecordedLines, port_read, port_write};

    /// 2026-11-22 16:49:45 UTC, a Sunday.
    const START: i64 = 1_795_366_185;

    fn rtc() -> (Rtc, Arc<ManualTime>, Arc<RecordedLines>) {
        let time = ManualTime::new();
        time.set_wall(START * 1_000_000_000);
        let (lines, line) = RecordedLines::with_line(RTC_LINE);
        let handles = RtcHandles {
            line,
            clock: time.clone(),
            wall: time.clone(),
            periodic: time.timer(PERIODIC_TIMER),
            update: time.timer(UPDATE_TIMER),
        };
        let config = RtcConfig {
            low_memory: 3 << 30,
            high_memory: 5 << 30,
        };
        let mut rtc = Rtc::new(handles, config);
        rtc.reset(ResetKind::PowerOn);
        (rtc, time, lines)
    }

    fn read(rtc: &mut Rtc, index: u64) -> u8 {
        port_write(rtc, 0x70, 1, index);
        port_read(rtc, 0x71, 1) as u8
    }

    fn write(rtc: &mut Rtc, index: u64, value: u8) {
        port_write(rtc, 0x70, 1, index);
        port_write(rtc, 0x71, 1, value.into());
    }

    fn shown(rtc: &mut Rtc) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| read(rtc, index))
    }

    #[test]
    fn shows_the_time_of_day() {
        let (mut rtc, time, _) = rtc();
        assert_eq!(
            shown(&mut rtc),
            [0x20, 0x26, 0x11, 0x22, 0x01, 0x16, 0x49, 0x45]
        );
        time.advance(&mut rtc, 15 * NANOS_PER_SECOND, 100);
        assert_eq!(
            shown(&mut rtc),
            [0x20, 0x26, 0x11, 0x22, 0x01, 0x16, 0x50, 0x00]
        );
        write(&mut rtc, 0x0B, 0x04);
        assert_eq!(
            shown(&mut rtc),
            [20, 26, 11, 22, 1, 0x84, 50, 0],
            "binary, 12 hours"
        );
        assert_eq!(read(&mut rtc, 0x0D), 0x80);
    }

    #[test]
    fn memory_sizes_are_where_firmware_puts_them() {
        let (mut rtc, ..) = rtc();
        let bytes = [
            0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D,
        ]
        .map(|index| read(&mut rtc, index));
        assert_eq!(
            bytes,
            [
                0x80, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0xBF, 0x00, 0x40, 0x01
            ]
        );
    }

    #[test]
    fn update_in_progress_precedes_each_second() {
        let (mut rtc, time, _) = rtc();
        time.advance(&mut rtc, NANOS_PER_SECOND - UPDATE_NANOS - 1, 100);
        assert_eq!(read(&mut rtc, 0x0A), 0x26);
        time.advance(&mut rtc, 1, 100);
        assert_eq!(read(&mut rtc, 0x0A), 0xA6);
        assert_eq!(read(&mut rtc, 0), 0x45);
        time.advance(&mut rtc, UPDATE_NANOS, 100);
        assert_eq!(read(&mut rtc, 0x0A), 0x26);
        assert_eq!(read(&mut rtc, 0), 0x46);
    }

    #[test]
    fn setting_the_clock_moves_it() {
        let (mut rtc, time, _) = rtc();
        write(&mut rtc, 0x0B, 0x82);
        for (index, value) in [
            (0x32, 0x19),
            (9, 0x99),
            (8, 0x12),
            (7, 0x31),
            (4, 0x23),
            (2, 0x59),
            (0, 0x59),
        ] {
            write(&mut rtc, index, value);
        }
        time.advance(&mut rtc, 5 * NANOS_PER_SECOND, 100);
        assert_eq!(read(&mut rtc, 0), 0x59, "it stands still while it is set");
        write(&mut rtc, 0x0B, 0x02);
        assert_eq!(
            shown(&mut rtc),
            [0x19, 0x99, 0x12, 0x31, 0x06, 0x23, 0x59, 0x59]
        );
        time.advance(&mut rtc, NANOS_PER_SECOND, 100);
        assert_eq!(
            shown(&mut rtc),
            [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]
        );
    }

    #[test]
    fn releasing_the_divider_starts_half_a_second_before_an_update() {
        let (mut rtc, time, _) = rtc();
        time.advance(&mut rtc, 100_000_000, 100);
        write(&mut rtc, 0x0A, 0x76);
        write(&mut rtc, 0x00, 0x10);
        time.advance(&mut rtc, 3_300_000_000, 100);
        write(&mut rtc, 0x0A, 0x26);
        time.advance(&mut rtc, 499_000_000, 100);
        assert_eq!(read(&mut rtc, 0), 0x10);
        time.advance(&mut rtc, 2_000_000, 100);
        assert_eq!(read(&mut rtc, 0), 0x11);
    }

    #[test]
    fn periodic_interrupts_wait_for_register_c() {
        let (mut rtc, time, lines) = rtc();
        write(&mut rtc, 0x0B, 0x42);
        assert_eq!(
            time.advance(&mut rtc, NANOS_PER_SECOND, 100),
            1,
            "1024 Hz, but nobody reads"
        );
        assert!(lines.level(RTC_LINE));
        assert_eq!(
            read(&mut rtc, 0x0C),
            0xD0,
            "with the update flag, which did not interrupt"
        );
        assert!(!lines.level(RTC_LINE));
        time.advance(&mut rtc, 976_563, 100);
        assert!(lines.level(RTC_LINE));
        assert_eq!(read(&mut rtc, 0x0C), 0xC0);
        assert_eq!(read(&mut rtc, 0x0C), 0);
        write(&mut rtc, 0x0A, 0x20);
        assert_eq!(
            time.advance(&mut rtc, NANOS_PER_SECOND, 100),
            0,
            "rate 0 is off"
        );
    }

    #[test]
    fn update_interrupts_come_once_per_second() {
        let (mut rtc, time, lines) = rtc();
        write(&mut rtc, 0x0B, 0x12);
        for _ in 0..3 {
            time.advance(&mut rtc, NANOS_PER_SECOND, 100);
            assert!(lines.level(RTC_LINE));
            assert_eq!(read(&mut rtc, 0x0C) & 0xB0, 0x90);
        }
        assert_eq!(lines.edges(RTC_LINE), 3);
    }

    #[test]
    fn the_alarm_rings_at_its_time() {
        let (mut rtc, time, lines) = rtc();
        write(&mut rtc, 5, 0x16);
        write(&mut rtc, 3, 0x52);
        write(&mut rtc, 1, 0x00);
        write(&mut rtc, 0x0B, 0x22);
        time.advance(&mut rtc, 134 * NANOS_PER_SECOND, 100);
        assert!(!lines.level(RTC_LINE));
        time.advance(&mut rtc, NANOS_PER_SECOND, 100);
        assert!(lines.level(RTC_LINE));
        assert_eq!(read(&mut rtc, 0x0C) & 0xA0, 0xA0);
    }

    #[test]
    fn a_system_reset_keeps_memory_and_time() {
        let (mut rtc, time, lines) = rtc();
        write(&mut rtc, 0x40, 0xA5);
        write(&mut rtc, 0x04, 0x03);
        write(&mut rtc, 0x0B, 0x52);
        time.advance(&mut rtc, NANOS_PER_SECOND, 100);
        rtc.reset(ResetKind::System);
        assert!(!lines.level(RTC_LINE));
        assert_eq!((read(&mut rtc, 0x40), read(&mut rtc, 0x04)), (0xA5, 0x03));
        assert_eq!((read(&mut rtc, 0x0B), read(&mut rtc, 0x0C)), (0x02, 0));
        assert_eq!((time.armed(0), time.armed(1)), (None, None));
    }

    #[test]
    fn a_restored_clock_keeps_its_distance_from_the_wall() {
        let (mut rtc, _, _) = rtc();
        write(&mut rtc, 0x04, 0x03);
        write(&mut rtc, 0x0B, 0x12);
        let record = rtc.save().unwrap();
        let (mut other, time, _) = self::rtc();
        time.set_wall((START + 3600) * 1_000_000_000);
        other.restore(&record).unwrap();
        assert_eq!(read(&mut other, 0x04), 0x04, "an hour later");
        assert_eq!(time.armed(UPDATE_TIMER), Some(NANOS_PER_SECOND));
    }

    #[test]
    fn short_memory_is_refused() {
        let (mut rtc, ..) = rtc();
        let state = RtcState {
            cmos: vec![0; 127],
            ..rtc.state.clone()
        };
        assert!(rtc.restore(&state.to_record().unwrap()).is_err());
    }
}

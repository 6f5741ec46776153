//! ACPI fixed hardware (ACPI specification 6.5, "ACPI Hardware Specification", "Fixed Hardware Features"): PM1a event
//! and control blocks, power-management timer, one general-purpose event block, and the SCI.
//!
//! The machine is in ACPI mode from the start: there is no SMI command port, and SCI_EN always reads as set. A power
//! button is pressed with [`AcpiPm::press_power_button`], general-purpose events are raised with
//! [`AcpiPm::raise_event`]. Of the sleeping states only S5 (off) exists; writing another type to SLP_EN does nothing.

use alloc::{sync::Arc, vec, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Clock, Device, Inspector, Line, NANOS_PER_SECOND, Outcome,
    PowerRequest, PowerSink, ResetKind, SaveState, StateError, StateRecord, Timer, put_le,
};
use serde::{Deserialize, Serialize};

/// The interrupt line of the SCI in a PC, level-triggered.
pub const SCI_LINE: u32 = 9;
/// The frequency of the power-management timer.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// How many general-purpose events there are.
pub const EVENTS: u32 = 16;
/// The value of SLP_TYP that DSDT's `\_S5` has to give.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Where the blocks are: what the FADT has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiPmConfig {
    /// PM1a event block, 4 ports: status, enable.
    pub event: u16,
    /// PM1a control block, 2 ports.
    pub control: u16,
    /// Power-management timer, 4 ports.
    pub timer: u16,
    /// General-purpose event block 0, 4 ports: two of status, two of enable.
    pub gpe0: u16,
    /// Whether the timer has 32 bits (FADT flag TMR_VAL_EXT) instead of 24.
    pub wide_timer: bool,
}

impl Default for AcpiPmConfig {
    fn default() -> Self {
        Self {
            event: 0x600,
            control: 0x604,
            timer: 0x608,
            gpe0: 0x620,
            wide_timer: true,
        }
    }
}

/// Status and enable bits of the PM1 event block.
mod pm1 {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const RTC: u16 = 1 << 10;
    pub(super) const WAKE: u16 = 1 << 15;
    pub(super) const EVENTS: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;
/// Bus-master reload and sleep type are kept; the others read as zero or are fixed.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << SLEEP_TYPE_SHIFT;

const EVENT: u32 = 0;
const CONTROL: u32 = 1;
const TIMER: u32 = 2;

/// What the power-management block needs of the machine.
pub struct AcpiPmHandles {
    /// The SCI.
    pub sci: Line,
    /// Machine time.
    pub clock: Arc<dyn Clock>,
    /// The alarm for the timer's carry.
    pub timer: Timer,
    /// Takes the request to power off.
    pub power: Arc<dyn PowerSink>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// How often the timer's highest bit had changed when that was last looked at.
    carries: u64,
}

impl SaveState for AcpiPmState {
    const ID: &'static str = "acpi-pm";
    const VERSION: u16 = 1;
}

/// The power-management block.
pub struct AcpiPm {
    config: AcpiPmConfig,
    handles: AcpiPmHandles,
    state: AcpiPmState,
}

fn ticks(nanos: u64) -> u64 {
    (u128::from(nanos) * u128::from(PM_TIMER_HZ) / u128::from(NANOS_PER_SECOND)) as u64
}

fn nanos(ticks: u64) -> u64 {
    let nanos =
        (u128::from(ticks) * u128::from(NANOS_PER_SECOND)).div_ceil(u128::from(PM_TIMER_HZ));
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

impl AcpiPm {
    /// A block with nothing enabled.
    pub fn new(config: AcpiPmConfig, handles: AcpiPmHandles) -> Self {
        let state = AcpiPmState {
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            carries: 0,
        };
        Self {
            config,
            handles,
            state,
        }
    }

    /// Somebody pressed the power button: asks the guest to shut down.
    pub fn press_power_button(&mut self) {
        self.state.status |= pm1::POWER_BUTTON;
        self.update();
    }

    /// Raises general-purpose event `event`, below [`EVENTS`]; others are ignored.
    pub fn raise_event(&mut self, event: u32) {
        if event < EVENTS {
            self.state.gpe_status |= 1 << event;
            self.update();
        }
    }

    fn timer_bits(&self) -> u32 {
        if self.config.wide_timer { 32 } else { 24 }
    }

    fn timer_value(&self) -> u32 {
        let ticks = ticks(self.handles.clock.now());
        (ticks & ((1 << self.timer_bits()) - 1)) as u32
    }

    /// Notes a change of the timer's highest bit, which is what its status bit tells.
    fn advance(&mut self) {
        let carries = ticks(self.handles.clock.now()) >> (self.timer_bits() - 1);
        if carries != self.state.carries {
            self.state.carries = carries;
            self.state.status |= pm1::TIMER;
        }
    }

    fn update(&mut self) {
        let fixed = self.state.status & self.state.enable & pm1::EVENTS;
        let general = self.state.gpe_status & self.state.gpe_enable;
        self.handles.sci.set(fixed | general != 0);
        let wanted = self.state.enable & !self.state.status & pm1::TIMER != 0;
        let next = (self.state.carries + 1) << (self.timer_bits() - 1);
        self.handles.timer.set(wanted.then(|| nanos(next)));
    }

    /// The bytes of a block as they read, lowest port first.
    fn block(&mut self, region: u32) -> [u8; 4] {
        let two = |low: u16, high: u16| {
            let [a, b] = low.to_le_bytes();
            let [c, d] = high.to_le_bytes();
            [a, b, c, d]
        };
        match region {
            EVENT => {
                self.advance();
                two(self.state.status, self.state.enable)
            }
            CONTROL => two(self.state.control | SCI_ENABLE, 0),
            TIMER => self.timer_value().to_le_bytes(),
            _ => two(self.state.gpe_status, self.state.gpe_enable),
        }
    }

    fn write_byte(&mut self, region: u32, offset: u64, value: u8) {
        // Each register is 16 bits wide and can be written by halves.
        let shift = 8 * (offset & 1);
        let value = u16::from(value) << shift;
        let written = 0xFFu16 << shift;
        let replace = |register: u16, kept: u16| register & !written | value & kept;
        match (region, offset >> 1) {
            (EVENT, 0) => self.state.status &= !(value & (pm1::EVENTS | pm1::WAKE)),
            (EVENT, _) => self.state.enable = replace(self.state.enable, pm1::EVENTS),
            (CONTROL, 0) => {
                self.state.control = replace(self.state.control, CONTROL_KEPT);
                let sleep_type = self.state.control >> SLEEP_TYPE_SHIFT & 7;
                if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                    self.handles.power.request(PowerRequest::PowerOff);
                }
            }
            (CONTROL | TIMER, _) => {}
            (_, 0) => self.state.gpe_status &= !value,
            _ => self.state.gpe_enable = replace(self.state.gpe_enable, u16::MAX),
        }
    }
}

impl Device for AcpiPm {
    fn name(&self) -> &str {
        "acpi-pm"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![
            Claim::new(AddressRange::pio(self.config.event, 4), "PM1a event"),
            Claim::new(AddressRange::pio(self.config.control, 2), "PM1a control"),
            Claim::new(AddressRange::pio(self.config.timer, 4), "PM timer"),
            Claim::new(AddressRange::pio(self.config.gpe0, 4), "GPE0"),
        ]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        let block = u64::from(u32::from_le_bytes(self.block(at.region)));
        put_le(data, block >> (8 * (at.offset & 3)));
        if at.region == EVENT {
            self.update();
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        self.advance();
        at.write_each(data, |offset, value| {
            self.write_byte(at.region, offset, value)
        });
        self.update();
        Outcome::Done
    }

    fn timer(&mut self, _: u32) {
        self.advance();
        self.update();
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = AcpiPmState {
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            carries: ticks(self.handles.clock.now()) >> (self.timer_bits() - 1),
        };
        self.update();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = AcpiPmState::from_record(record)?;
        let valid = state.status & !(pm1::EVENTS | pm1::WAKE) == 0
            && state.enable & !pm1::EVENTS == 0
            && state.control & !CONTROL_KEPT == 0
            && state.carries <= ticks(u64::MAX) >> (self.timer_bits() - 1);
        if !valid {
            return Err(AcpiPmState::invalid(
                "a register has bits set that do not exist",
            ));
        }
        self.state = state;
        self.update();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("PM1 status", self.state.status)
            .hex("PM1 enable", self.state.enable)
            .hex("PM1 control", self.state.control | SCI_ENABLE)
            .hex("GPE0 status", self.state.gpe_status)
            .hex("GPE0 enable", self.state.gpe_enable)
            .hex("timer", self.timer_value());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::testing::{
        ManualTime, RecordedLines, RecordedPower, port_read, port_write,
    };

    struct Bench {
        pm: AcpiPm,
        time: Arc<ManualTime>,
        lines: Arc<RecordedLines>,
        power: Arc<RecordedPower>,
    }

    fn bench(wide_timer: bool) -> Bench {
        let (time, power) = (ManualTime::new(), RecordedPower::new());
        let (lines, sci) = RecordedLines::with_line(SCI_LINE);
        let handles = AcpiPmHandles {
            sci,
            clock: time.clone(),
            timer: time.timer(0),
            power: power.clone(),
        };
        let mut pm = AcpiPm::new(
            AcpiPmConfig {
                wide_timer,
                ..AcpiPmConfig::default()
            },
            handles,
        );
        pm.reset(ResetKind::PowerOn);
        Bench {
            pm,
            time,
            lines,
            power,
        }
    }

    #[test]
    fn s5_powers_off_and_other_states_do_not() {
        let mut bench = bench(true);
        assert_eq!(port_read(&mut bench.pm, 0x604, 2), 1, "ACPI mode");
        for sleep_type in [0, 1, 3, 4, 7] {
            port_write(&mut bench.pm, 0x604, 2, sleep_type << 10 | 1 << 13);
        }
        port_write(&mut bench.pm, 0x604, 2, 5 << 10);
        assert_eq!(bench.power.take(), []);
        assert_eq!(port_read(&mut bench.pm, 0x604, 2), 5 << 10 | 1);
        port_write(&mut bench.pm, 0x604, 2, 5 << 10 | 1 << 13 | 1);
        assert_eq!(bench.power.take(), [PowerRequest::PowerOff]);
        port_write(&mut bench.pm, 0x605, 1, (5 << 10 | 1 << 13) >> 8);
        assert_eq!(bench.power.take(), [PowerRequest::PowerOff], "by bytes too");
    }

    #[test]
    fn the_power_button_raises_the_sci_where_enabled() {
        let mut bench = bench(true);
        bench.pm.press_power_button();
        assert!(!bench.lines.level(SCI_LINE));
        port_write(&mut bench.pm, 0x602, 2, 0x100);
        assert!(bench.lines.level(SCI_LINE));
        assert_eq!(port_read(&mut bench.pm, 0x600, 4), 0x0100_0100);
        port_write(&mut bench.pm, 0x600, 2, 0x0001);
        assert!(bench.lines.level(SCI_LINE), "another bit");
        port_write(&mut bench.pm, 0x601, 1, 0x01);
        assert!(!bench.lines.level(SCI_LINE));
        assert_eq!(port_read(&mut bench.pm, 0x600, 2), 0);
    }

    #[test]
    fn general_purpose_events() {
        let mut bench = bench(true);
        port_write(&mut bench.pm, 0x622, 2, 0x8002);
        bench.pm.raise_event(0);
        assert!(!bench.lines.level(SCI_LINE));
        bench.pm.raise_event(15);
        bench.pm.raise_event(16);
        bench.pm.raise_event(u32::MAX);
        assert!(bench.lines.level(SCI_LINE));
        assert_eq!(port_read(&mut bench.pm, 0x620, 4), 0x8002_8001);
        port_write(&mut bench.pm, 0x620, 2, 0xFFFF);
        assert!(!bench.lines.level(SCI_LINE));
    }

    #[test]
    fn the_timer_runs_at_its_frequency() {
        for (wide, mask) in [(true, u32::MAX.into()), (false, 0xFF_FFFFu64)] {
            let mut bench = bench(wide);
            for seconds in [1, 10, 3000] {
                bench.time.set_now(seconds * NANOS_PER_SECOND);
                let expected = (seconds * PM_TIMER_HZ) & mask;
                assert_eq!(port_read(&mut bench.pm, 0x608, 4), expected);
                assert_eq!(port_read(&mut bench.pm, 0x60A, 1), expected >> 16 & 0xFF);
            }
        }
    }

    #[test]
    fn the_timer_interrupts_at_each_change_of_its_top_bit() {
        let mut bench = bench(false);
        port_write(&mut bench.pm, 0x602, 2, 1);
        bench.time.advance(&mut bench.pm, 2_343_000_000, 10);
        assert!(!bench.lines.level(SCI_LINE));
        bench.time.advance(&mut bench.pm, 1_000_000, 10);
        assert!(bench.lines.level(SCI_LINE));
        assert_eq!(bench.time.armed(0), None, "until it is acknowledged");
        port_write(&mut bench.pm, 0x600, 2, 1);
        assert!(!bench.lines.level(SCI_LINE));
        assert_eq!(bench.time.advance(&mut bench.pm, 2_344_000_000, 10), 1);
        assert!(bench.lines.level(SCI_LINE));
    }

    #[test]
    fn state_survives_save_and_restore() {
        let mut bench = bench(true);
        port_write(&mut bench.pm, 0x602, 2, 0x121);
        bench.pm.press_power_button();
        let record = bench.pm.save().unwrap();
        let mut other = self::bench(true);
        other.pm.restore(&record).unwrap();
        assert!(other.lines.level(SCI_LINE));
        assert_eq!(other.time.armed(0), bench.time.armed(0));
        bench.pm.reset(ResetKind::System);
        assert!(!bench.lines.level(SCI_LINE));
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut bench = bench(true);
        let mut state = bench.pm.state.clone();
        state.carries = u64::MAX;
        assert!(bench.pm.restore(&state.to_record().unwrap()).is_err());
    }
}

//! The APIC timer (SDM "APIC Timer"): one-shot, periodic and TSC-deadline.
//!
//! Nothing ticks: a running countdown is the time at which it ends, and the current count is computed when it is read.

use serde::{Deserialize, Serialize};

use crate::{
    lapic::{Effects, Lapic},
    lvt::Lvt,
    regs,
};

/// The frequency of the APIC bus, which the divided timer counts: 1 GHz, so that one tick is one nanosecond of machine
/// time. Guests learn it by calibration, or from CPUID leaf 0x15 and hypervisor leaves that tell it.
pub const BUS_HZ: u64 = 1_000_000_000;

/// The time at which an access happens, on both clocks that the timer can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    /// Machine time in nanoseconds: stands still while the machine is paused.
    pub nanos: u64,
    /// The vCPU's time-stamp counter, as RDTSC would give it.
    pub tsc: u64,
}

/// When the timer wants [`Lapic::advance_timer`] to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// At this machine time, in nanoseconds.
    Nanos(u64),
    /// When the vCPU's time-stamp counter has this value.
    Tsc(u64),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
/// The timer's state.
pub struct TimerState {
    /// The initial-count register.
    pub initial: u32,
    /// The divide-configuration register.
    pub divide: u32,
    /// The machine time at which the running countdown reaches zero; `None` when it does not run.
    pub expires: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 when not armed.
    pub tsc_deadline: u64,
}

impl TimerState {
    /// The power of two that the bus clock is divided by.
    fn shift(&self) -> u32 {
        (((self.divide & 8) >> 1 | self.divide & 3) + 1) & 7
    }

    fn nanos(&self, count: u32) -> u64 {
        u64::from(count) << self.shift()
    }

    fn count(&self, now: u64) -> u32 {
        let Some(expires) = self.expires else {
            return 0;
        };
        let left = expires.saturating_sub(now);
        let count = left.div_ceil(1 << self.shift());
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The code that is not defined: the timer stands still.
    Reserved,
}

impl Lapic {
    fn timer_mode(&self) -> TimerMode {
        match (self.state.lvt(Lvt::Timer).bits >> 17) & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::Reserved,
        }
    }

    /// Brings the timer to `now` and requests its interrupt if it has expired; periods that were missed altogether
    /// give one interrupt. To be called at or after [`Lapic::next_timer_deadline`]; harmless at any time. Returns
    /// whether the timer expired.
    pub fn advance_timer(&mut self, now: Time) -> bool {
        let mode = self.timer_mode();
        let timer = &mut self.state.timer;
        let expired = match mode {
            TimerMode::TscDeadline => {
                let expired = timer.tsc_deadline != 0 && now.tsc >= timer.tsc_deadline;
                if expired {
                    timer.tsc_deadline = 0;
                }
                expired
            }
            TimerMode::OneShot => {
                let expired = timer.expires.is_some_and(|expires| now.nanos >= expires);
                if expired {
                    timer.expires = None;
                }
                expired
            }
            TimerMode::Periodic => match timer.expires {
                Some(expires) if now.nanos >= expires => {
                    let period = timer.nanos(timer.initial).max(1);
                    let periods = (now.nanos - expires) / period + 1;
                    timer.expires = periods
                        .checked_mul(period)
                        .and_then(|passed| expires.checked_add(passed));
                    true
                }
                _ => false,
            },
            TimerMode::Reserved => false,
        };
        if expired {
            let _ = self.fire(Lvt::Timer);
        }
        expired
    }

    /// When the timer's next interrupt is due; `None` when none is, or its entry is masked.
    pub fn next_timer_deadline(&self) -> Option<Deadline> {
        if self.state.lvt(Lvt::Timer).masked() {
            return None;
        }
        let timer = &self.state.timer;
        match self.timer_mode() {
            TimerMode::TscDeadline if timer.tsc_deadline != 0 => {
                Some(Deadline::Tsc(timer.tsc_deadline))
            }
            TimerMode::OneShot | TimerMode::Periodic => timer.expires.map(Deadline::Nanos),
            _ => None,
        }
    }

    /// The value of IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&mut self, now: Time) -> u64 {
        self.advance_timer(now);
        self.state.timer.tsc_deadline
    }

    /// Writes IA32_TSC_DEADLINE: arms the timer, or disarms it with 0. Ignored in the other timer modes.
    pub fn set_tsc_deadline(&mut self, value: u64, now: Time) -> Effects {
        if self.timer_mode() != TimerMode::TscDeadline {
            return Effects::default();
        }
        self.state.timer.tsc_deadline = value;
        self.advance_timer(now);
        Effects {
            timer_changed: true,
            ..Effects::default()
        }
    }

    pub(crate) fn write_timer_lvt(&mut self, value: u32, now: Time) -> Effects {
        self.advance_timer(now);
        let before = self.timer_mode();
        self.write_lvt(Lvt::Timer, value);
        let after = self.timer_mode();
        let timer = &mut self.state.timer;
        if before != after && [before, after].contains(&TimerMode::TscDeadline) {
            *timer = TimerState {
                divide: timer.divide,
                ..TimerState::default()
            };
        }
        // A countdown that already ran out under the old mode stays so; one that runs goes on.
        self.advance_timer(now);
        Effects {
            timer_changed: true,
            ..Effects::default()
        }
    }

    pub(crate) fn write_timer_initial(&mut self, value: u32, now: Time) -> Effects {
        if self.timer_mode() == TimerMode::TscDeadline {
            return Effects::default();
        }
        self.advance_timer(now);
        let timer = &mut self.state.timer;
        timer.initial = value;
        timer.expires = if value == 0 {
            None
        } else {
            Some(now.nanos.saturating_add(timer.nanos(value)))
        };
        Effects {
            timer_changed: true,
            ..Effects::default()
        }
    }

    pub(crate) fn write_timer_divide(&mut self, value: u32, now: Time) -> Effects {
        self.advance_timer(now);
        let timer = &mut self.state.timer;
        let count = timer.count(now.nanos);
        timer.divide = value & regs::DIVIDE_WRITABLE;
        if timer.expires.is_some() {
            timer.expires = Some(now.nanos.saturating_add(timer.nanos(count)));
        }
        Effects {
            timer_changed: true,
            ..Effects::default()
        }
    }

    pub(crate) fn timer_current(&mut self, now: Time) -> u32 {
        self.advance_timer(now);
        self.state.timer.count(now.nanos)
    }

    /// Starts a countdown that has `count` ticks left: for states that come as register values.
    pub(crate) fn resume_timer(&mut self, count: u32, now: Time) {
        let timer = &mut self.state.timer;
        timer.expires = (count != 0).then(|| {
            now.nanos
                .saturating_add(timer.nanos(count.min(timer.initial)))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Pending};
    use proptest::prelude::*;

    fn at(nanos: u64) -> Time {
        Time {
            nanos,
            tsc: nanos * 3,
        }
    }

    fn write(lapic: &mut Lapic, offset: u64, value: u32, now: u64) -> Effects {
        lapic.write_mmio(offset, &value.to_le_bytes(), at(now))
    }

    fn current(lapic: &mut Lapic, now: u64) -> u32 {
        let mut data = [0; 4];
        lapic.read_mmio(0x390, &mut data, at(now));
        u32::from_le_bytes(data)
    }

    fn enabled(lvt: u32, divide: u32) -> Lapic {
        let mut lapic = Lapic::new(Config::new(0, true));
        let _ = write(&mut lapic, 0xF0, 0x1FF, 0);
        let _ = write(&mut lapic, 0x320, lvt, 0);
        let _ = write(&mut lapic, 0x3E0, divide, 0);
        lapic
    }

    #[test]
    fn one_shot_counts_down_once() {
        let mut lapic = enabled(0x40, 0b1011);
        assert!(write(&mut lapic, 0x380, 1000, 500).timer_changed);
        assert_eq!(lapic.next_timer_deadline(), Some(Deadline::Nanos(1500)));
        assert_eq!(current(&mut lapic, 500), 1000);
        assert_eq!(current(&mut lapic, 1499), 1);
        assert!(!lapic.advance_timer(at(1499)));
        assert!(lapic.advance_timer(at(1500)));
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x40)));
        assert_eq!(current(&mut lapic, 1500), 0);
        assert_eq!(lapic.next_timer_deadline(), None);
        assert!(!lapic.advance_timer(at(9999)));
    }

    #[test]
    fn each_divisor_divides() {
        for (divide, divisor) in [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ] {
            let mut lapic = enabled(0x40, divide);
            let _ = write(&mut lapic, 0x380, 10, 0);
            assert_eq!(
                lapic.next_timer_deadline(),
                Some(Deadline::Nanos(10 * divisor))
            );
            assert_eq!(current(&mut lapic, 9 * divisor), 1);
        }
    }

    #[test]
    fn periodic_goes_on_and_merges_missed_periods() {
        let mut lapic = enabled(0x2_0040, 0b1011);
        let _ = write(&mut lapic, 0x380, 100, 0);
        assert!(lapic.advance_timer(at(100)));
        assert_eq!(lapic.next_timer_deadline(), Some(Deadline::Nanos(200)));
        lapic.accept(0x40);
        assert!(lapic.advance_timer(at(555)));
        assert_eq!(lapic.next_timer_deadline(), Some(Deadline::Nanos(600)));
        assert_eq!(current(&mut lapic, 555), 45);
        let _ = write(&mut lapic, 0x380, 0, 560);
        assert_eq!(lapic.next_timer_deadline(), None);
    }

    #[test]
    fn a_masked_timer_counts_silently() {
        let mut lapic = enabled(0x1_0040, 0b1011);
        let _ = write(&mut lapic, 0x380, 100, 0);
        assert_eq!(lapic.next_timer_deadline(), None);
        assert_eq!(current(&mut lapic, 40), 60);
        let _ = write(&mut lapic, 0x320, 0x40, 200);
        assert_eq!(lapic.pending(), None, "it ran out while masked");
        let _ = write(&mut lapic, 0x320, 0x1_0040, 200);
        let _ = write(&mut lapic, 0x380, 100, 200);
        let _ = write(&mut lapic, 0x320, 0x40, 250);
        assert_eq!(lapic.next_timer_deadline(), Some(Deadline::Nanos(300)));
    }

    #[test]
    fn tsc_deadline_fires_once_and_clears_its_msr() {
        let mut lapic = enabled(0x4_0040, 0);
        assert!(lapic.set_tsc_deadline(3000, at(10)).timer_changed);
        assert_eq!(lapic.next_timer_deadline(), Some(Deadline::Tsc(3000)));
        assert_eq!(lapic.tsc_deadline(at(999)), 3000);
        assert!(lapic.advance_timer(at(1000)));
        assert_eq!(lapic.tsc_deadline(at(1000)), 0);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x40)));
        lapic.accept(0x40);
        let _ = lapic.set_tsc_deadline(1, at(2000));
        assert_eq!(
            lapic.state.irr.highest(),
            Some(0x40),
            "a deadline in the past fires at once"
        );
        let _ = lapic.set_tsc_deadline(90_000, at(2000));
        let _ = lapic.set_tsc_deadline(0, at(2000));
        assert_eq!(lapic.next_timer_deadline(), None);
    }

    #[test]
    fn modes_do_not_mix() {
        let mut lapic = enabled(0x4_0040, 0b1011);
        assert_eq!(write(&mut lapic, 0x380, 100, 0), Effects::default());
        assert_eq!(current(&mut lapic, 0), 0);
        let _ = lapic.set_tsc_deadline(3000, at(0));
        let _ = write(&mut lapic, 0x320, 0x40, 0);
        assert_eq!(lapic.set_tsc_deadline(3000, at(0)), Effects::default());
        assert_eq!(lapic.tsc_deadline(at(0)), 0);
        let _ = write(&mut lapic, 0x380, 100, 0);
        let _ = write(&mut lapic, 0x320, 0x2_0040, 10);
        assert_eq!(
            lapic.next_timer_deadline(),
            Some(Deadline::Nanos(100)),
            "one-shot to periodic goes on"
        );
        let _ = write(&mut lapic, 0x320, 0x4_0040, 10);
        let _ = write(&mut lapic, 0x320, 0x40, 10);
        assert_eq!(
            lapic.next_timer_deadline(),
            None,
            "by way of TSC-deadline it stops"
        );
    }

    #[test]
    fn a_new_divisor_keeps_the_count() {
        let mut lapic = enabled(0x40, 0b1011);
        let _ = write(&mut lapic, 0x380, 100, 0);
        let _ = write(&mut lapic, 0x3E0, 0, 40);
        assert_eq!(current(&mut lapic, 40), 60);
        assert_eq!(lapic.next_timer_deadline(), Some(Deadline::Nanos(160)));
    }

    proptest! {
        #[test]
        fn the_count_never_grows_within_a_period(
            initial in 1u32.., divide in 0u32..16, steps in prop::collection::vec(0u64..1 << 33, 1..20), periodic: bool,
        ) {
            let mut lapic = enabled(if periodic { 0x2_0040 } else { 0x40 }, divide);
            let _ = write(&mut lapic, 0x380, initial, 0);
            let (mut now, mut last) = (0, initial);
            for step in steps {
                now += step;
                let expired = lapic.advance_timer(at(now));
                let count = current(&mut lapic, now);
                prop_assert!(count <= initial);
                prop_assert!(expired || count <= last);
                prop_assert!(!periodic || count > 0);
                last = count;
            }
        }
    }
}

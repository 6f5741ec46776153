//! How the clock's registers encode time: BCD or binary, 12 or 24 hours.

use super::calendar::DateTime;

pub(super) const SECONDS: usize = 0x00;
pub(super) const SECONDS_ALARM: usize = 0x01;
pub(super) const MINUTES: usize = 0x02;
pub(super) const MINUTES_ALARM: usize = 0x03;
pub(super) const HOURS: usize = 0x04;
pub(super) const HOURS_ALARM: usize = 0x05;
pub(super) const DAY_OF_WEEK: usize = 0x06;
pub(super) const DAY_OF_MONTH: usize = 0x07;
pub(super) const MONTH: usize = 0x08;
pub(super) const YEAR: usize = 0x09;
pub(super) const A: usize = 0x0A;
pub(super) const B: usize = 0x0B;
pub(super) const C: usize = 0x0C;
pub(super) const D: usize = 0x0D;

/// Register B: hours run to 23.
pub(super) const HOURS_24: u8 = 1 << 1;
/// Register B: values are binary, not BCD.
pub(super) const BINARY: u8 = 1 << 2;

/// The registers that hold the current time.
pub(super) const TIME: [usize; 7] = [
    SECONDS,
    MINUTES,
    HOURS,
    DAY_OF_WEEK,
    DAY_OF_MONTH,
    MONTH,
    YEAR,
];

/// The encoding that register B chooses.
#[derive(Clone, Copy)]
pub(super) struct Encoding(pub(super) u8);

impl Encoding {
    pub(super) fn encode(self, value: u8) -> u8 {
        if self.0 & BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        }
    }

    /// The value of a register; `None` when it holds none.
    pub(super) fn decode(self, register: u8) -> Option<u8> {
        if self.0 & BINARY != 0 {
            Some(register)
        } else {
            let (tens, ones) = (register >> 4, register & 0xF);
            (tens <= 9 && ones <= 9).then_some(tens * 10 + ones)
        }
    }

    pub(super) fn encode_hour(self, hour: u8) -> u8 {
        if self.0 & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        let hour = match hour % 12 {
            0 => 12,
            hour => hour,
        };
        self.encode(hour) | afternoon
    }

    pub(super) fn decode_hour(self, register: u8) -> Option<u8> {
        if self.0 & HOURS_24 != 0 {
            return self.decode(register).filter(|hour| *hour < 24);
        }
        let hour = self
            .decode(register & 0x7F)
            .filter(|hour| (1..=12).contains(hour))?;
        Some(hour % 12 + if register & 0x80 != 0 { 12 } else { 0 })
    }
}

/// Writes `time` into the time registers and the century byte.
pub(super) fn store(cmos: &mut [u8], encoding: Encoding, time: DateTime, century: usize) {
    let mut put = |register: usize, value: u8| {
        if let Some(slot) = cmos.get_mut(register) {
            *slot = value;
        }
    };
    put(SECONDS, encoding.encode(time.second));
    put(MINUTES, encoding.encode(time.minute));
    put(HOURS, encoding.encode_hour(time.hour));
    put(DAY_OF_WEEK, encoding.encode(time.day_of_week()));
    put(DAY_OF_MONTH, encoding.encode(time.day));
    put(MONTH, encoding.encode(time.month));
    put(YEAR, encoding.encode((time.year % 100) as u8));
    put(century, encoding.encode((time.year / 100) as u8));
}

/// Reads the time registers and the century byte. What they cannot mean is taken as the nearest value that they can.
pub(super) fn load(cmos: &[u8], encoding: Encoding, century: usize) -> DateTime {
    let get = |register: usize, least: u8, most: u8| {
        let register = cmos.get(register).copied().unwrap_or(0);
        encoding
            .decode(register)
            .unwrap_or(least)
            .clamp(least, most)
    };
    DateTime {
        year: u16::from(get(century, 0, 99)) * 100 + u16::from(get(YEAR, 0, 99)),
        month: get(MONTH, 1, 12),
        day: get(DAY_OF_MONTH, 1, 31),
        hour: encoding
            .decode_hour(cmos.get(HOURS).copied().unwrap_or(0))
            .unwrap_or(0),
        minute: get(MINUTES, 0, 59),
        second: get(SECONDS, 0, 59),
    }
}

/// The first second after `after` at which the alarm registers match; `None` when they never do. A register of 0xC0 or
/// more matches every value.
pub(super) fn next_alarm(cmos: &[u8], encoding: Encoding, after: i64) -> Option<i64> {
    let field = |register: usize, limit: u8, decode: &dyn Fn(u8) -> Option<u8>| {
        let value = cmos.get(register).copied().unwrap_or(0xFF);
        if value >= 0xC0 {
            Some(None)
        } else {
            decode(value).filter(|value| *value < limit).map(Some)
        }
    };
    let hour = field(HOURS_ALARM, 24, &|value| encoding.decode_hour(value))?;
    let minute = field(MINUTES_ALARM, 60, &|value| encoding.decode(value))?;
    let second = field(SECONDS_ALARM, 60, &|value| encoding.decode(value))?;
    let matches =
        |alarm: Option<u8>, value: i64| alarm.is_none_or(|alarm| i64::from(alarm) == value);

    // Coarse steps first: at most 25 hours, then 60 minutes, then 60 seconds are looked at.
    let mut at = after.checked_add(1)?;
    for _ in 0..=24 {
        if matches(hour, at.div_euclid(3600).rem_euclid(24)) {
            let end_of_hour = (at.div_euclid(3600) + 1) * 3600;
            while at < end_of_hour {
                if matches(minute, at.div_euclid(60).rem_euclid(60)) {
                    let end_of_minute = (at.div_euclid(60) + 1) * 60;
                    match (at..end_of_minute).find(|at| matches(second, at.rem_euclid(60))) {
                        Some(found) => return Some(found),
                        None => at = end_of_minute,
                    }
                } else {
                    at = (at.div_euclid(60) + 1) * 60;
                }
            }
        } else {
            at = (at.div_euclid(3600) + 1) * 3600;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const CENTURY: usize = 0x32;

    #[test]
    fn each_encoding_round_trips() {
        for encoding in [0, HOURS_24, BINARY, HOURS_24 | BINARY].map(Encoding) {
            for hour in 0..24 {
                let time = DateTime {
                    year: 2026,
                    month: 11,
                    day: 22,
                    hour,
                    minute: 59,
                    second: 8,
                };
                let mut cmos = [0; 128];
                store(&mut cmos, encoding, time, CENTURY);
                assert_eq!(load(&cmos, encoding, CENTURY), time);
            }
        }
    }

    #[test]
    fn twelve_hours() {
        let encoding = Encoding(0);
        for (hour, register) in [
            (0, 0x12),
            (1, 0x01),
            (11, 0x11),
            (12, 0x92),
            (13, 0x81),
            (23, 0x91),
        ] {
            assert_eq!(encoding.encode_hour(hour), register);
            assert_eq!(encoding.decode_hour(register), Some(hour));
        }
        assert_eq!(encoding.decode_hour(0x13), None);
        assert_eq!(encoding.decode_hour(0x00), None);
    }

    #[test]
    fn nonsense_is_taken_as_something_near() {
        let cmos = [0xFF; 128];
        let time = load(&cmos, Encoding(BINARY | HOURS_24), CENTURY);
        assert_eq!(
            (time.year, time.month, time.day, time.hour),
            (9999, 12, 31, 0)
        );
        let time = load(&cmos, Encoding(HOURS_24), CENTURY);
        assert_eq!((time.year, time.month, time.day, time.minute), (0, 1, 1, 0));
    }

    fn alarm(hour: u8, minute: u8, second: u8, after: i64) -> Option<i64> {
        let mut cmos = [0; 16];
        cmos[HOURS_ALARM] = hour;
        cmos[MINUTES_ALARM] = minute;
        cmos[SECONDS_ALARM] = second;
        next_alarm(&cmos, Encoding(BINARY | HOURS_24), after)
    }

    #[test]
    fn alarms() {
        assert_eq!(alarm(0xFF, 0xFF, 0xFF, 41), Some(42));
        assert_eq!(alarm(0xFF, 0xFF, 30, 30), Some(90));
        assert_eq!(alarm(0xC0, 5, 0, 0), Some(300));
        assert_eq!(alarm(0xC0, 5, 0, 300), Some(3900));
        assert_eq!(alarm(1, 0, 0, 3600), Some(3600 + 86_400));
        assert_eq!(alarm(1, 59, 59, 3600), Some(7199));
        assert_eq!(alarm(23, 0xFF, 0, 0), Some(23 * 3600));
        assert_eq!(alarm(0, 0, 0, -1), Some(0));
        assert_eq!(alarm(0, 0, 0, -5000), Some(0), "before 1970");
        assert_eq!(alarm(24, 0, 0, 0), None);
        assert_eq!(alarm(0, 60, 0, 0), None);
        assert_eq!(alarm(0xFF, 0xFF, 0xFF, i64::MAX), None);
    }
}

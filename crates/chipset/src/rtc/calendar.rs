//! Dates of the proleptic Gregorian calendar, as seconds since 1970-01-01.

/// A date and a time of day, without time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    /// 0 to 9999.
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 0 to 59.
    pub(super) minute: u8,
    /// 0 to 59.
    pub(super) second: u8,
}

pub(super) const SECONDS_PER_DAY: i64 = 86_400;
const FIRST: i64 = -62_167_219_200;
const LAST: i64 = 253_402_300_799;

/// Days from 1970-01-01 to the first of March of `year` (year 0 begins the count of 400-year cycles).
fn days_before_march(year: i64) -> i64 {
    365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) - 719_468
}

impl DateTime {
    /// The date `seconds` after 1970-01-01 00:00:00; the first or last instant of the years 0 to 9999 outside them.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST, LAST);
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        let time = seconds.rem_euclid(SECONDS_PER_DAY);
        // Years that begin in March put the leap day last, so that months have a regular pattern.
        let mut year = (days + 719_468).div_euclid(366) - 1;
        while days_before_march(year + 1) <= days {
            year += 1;
            let behind = (days - days_before_march(year)) / 366;
            year += behind.max(0);
        }
        let day_of_year = days - days_before_march(year);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let (month, year) = if month_from_march < 10 {
            (month_from_march + 3, year)
        } else {
            (month_from_march - 9, year + 1)
        };
        Self {
            year: year as u16,
            month: month as u8,
            day: day as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00:00. Fields past their range carry over into the next.
    pub(super) fn to_seconds(self) -> i64 {
        let month_from_march = (i64::from(self.month) + 9) % 12;
        let year = i64::from(self.year) - i64::from(self.month <= 2);
        let days =
            days_before_march(year) + (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        days * SECONDS_PER_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// 1 for Sunday to 7 for Saturday.
    pub(super) fn day_of_week(self) -> u8 {
        let days = self.to_seconds().div_euclid(SECONDS_PER_DAY);
        ((days + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn date(year: u16, month: u8, day: u8) -> DateTime {
        DateTime {
            year,
            month,
            day,
            hour: 0,
            minute: 0,
            second: 0,
        }
    }

    #[test]
    fn known_days() {
        for (date, seconds, day_of_week) in [
            (date(1970, 1, 1), 0, 5),
            (date(2000, 2, 29), 951_782_400, 3),
            (date(2000, 3, 1), 951_868_800, 4),
            (date(2026, 11, 22), 1_795_305_600, 1),
            (date(1900, 1, 1), -2_208_988_800, 2),
            (date(0, 1, 1), FIRST, 7),
        ] {
            assert_eq!(date.to_seconds(), seconds, "{date:?}");
            assert_eq!(DateTime::from_seconds(seconds), date);
            assert_eq!(date.day_of_week(), day_of_week, "{date:?}");
        }
        let last = DateTime {
            hour: 23,
            minute: 59,
            second: 59,
            ..date(9999, 12, 31)
        };
        assert_eq!(DateTime::from_seconds(i64::MAX), last);
        assert_eq!(DateTime::from_seconds(i64::MIN), date(0, 1, 1));
    }

    proptest! {
        #[test]
        fn dates_round_trip(seconds in FIRST..=LAST) {
            let date = DateTime::from_seconds(seconds);
            prop_assert_eq!(date.to_seconds(), seconds);
            prop_assert!((1..=12).contains(&date.month) && (1..=31).contains(&date.day));
        }

        #[test]
        fn days_follow_each_other(day in FIRST / SECONDS_PER_DAY..LAST / SECONDS_PER_DAY) {
            let (today, next) = (day * SECONDS_PER_DAY, (day + 1) * SECONDS_PER_DAY);
            let (today, next) = (DateTime::from_seconds(today), DateTime::from_seconds(next));
            prop_assert!(next.day == today.day + 1 || next.day == 1);
            prop_assert_eq!(next.day_of_week(), today.day_of_week() % 7 + 1);
        }
    }
}

//! What several runs come to.

use std::{fmt, time::Duration};

/// Times of several runs.
#[derive(Debug, Default)]
pub(super) struct Sample(Vec<Duration>);

impl Sample {
    pub(super) fn push(&mut self, time: Duration) {
        self.0.push(time);
        self.0.sort_unstable();
    }

    /// The middle time; of an even number of runs, the mean of the middle two.
    pub(super) fn median(&self) -> Option<Duration> {
        let middle = self.0.len() / 2;
        let upper = *self.0.get(middle)?;
        if self.0.len() % 2 == 1 {
            return Some(upper);
        }
        let lower = *self.0.get(middle.checked_sub(1)?)?;
        Some((lower + upper) / 2)
    }
}

impl fmt::Display for Sample {
    /// Median, least and greatest, in milliseconds; with `{:.2}`, to two decimal places.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(median), Some(least), Some(greatest)) =
            (self.median(), self.0.first(), self.0.last())
        else {
            return f.write_str("no runs");
        };
        let places = f.precision().unwrap_or(0);
        let [median, least, greatest] =
            [median, *least, *greatest].map(|time| time.as_secs_f64() * 1000.0);
        write!(
            f,
            "{median:>9.places$} {least:>9.places$} {greatest:>9.places$}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let of = |millis: &[u64]| {
            let mut sample = Sample::default();
            millis
                .iter()
                .for_each(|millis| sample.push(Duration::from_millis(*millis)));
            sample.median().map(|median| median.as_millis())
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[5]), Some(5));
        assert_eq!(of(&[9, 1, 5]), Some(5));
        assert_eq!(of(&[1, 9, 5, 7]), Some(6));
    }

    #[test]
    fn short_times_keep_their_fractions() {
        let mut sample = Sample::default();
        sample.push(Duration::from_micros(1250));
        assert_eq!(format!("{sample:.2}"), "     1.25      1.25      1.25");
        assert_eq!(
            format!("{sample}").trim_start().split(' ').next(),
            Some("1")
        );
    }
}

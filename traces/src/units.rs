//! Time as a type, so that it cannot be mixed up with a count or a rate.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

/// A point in time since the start of a run, or a duration, in whole nanoseconds.
///
/// Sums of integers do not depend on their order. A simulation therefore gives bit-identical results on any machine and
/// any number of threads.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The start of a run.
    pub const ZERO: Self = Self(0);
    /// Later than any event.
    pub const MAX: Self = Self(u64::MAX);

    /// Rounds to the nearest nanosecond; negative and NaN become zero.
    pub fn from_secs_f64(seconds: f64) -> Self {
        Self((seconds * 1e9).round() as u64)
    }

    /// Rounds to the nearest nanosecond; negative and NaN become zero.
    pub fn from_micros_f64(micros: f64) -> Self {
        Self((micros * 1e3).round() as u64)
    }

    /// The time in seconds. Up to 2^53 nanoseconds (104 days) it is the number that is nearest to the decimal, so that
    /// it is written without further digits: `1e-9` is not exact, `1e9` is.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// The time in milliseconds, as exact as [`Self::as_secs_f64`].
    pub fn as_millis_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// The time in microseconds, as exact as [`Self::as_secs_f64`].
    pub fn as_micros_f64(self) -> f64 {
        self.0 as f64 / 1e3
    }

    /// The duration since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl From<std::time::Duration> for Nanos {
    fn from(duration: std::time::Duration) -> Self {
        Self(duration.as_nanos() as u64)
    }
}

impl From<Nanos> for std::time::Duration {
    fn from(nanos: Nanos) -> Self {
        Self::from_nanos(nanos.0)
    }
}

impl Add for Nanos {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for Nanos {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sub for Nanos {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Sum for Nanos {
    fn sum<I: Iterator<Item = Self>>(spans: I) -> Self {
        spans.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Debug for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ns", self.0)
    }
}

/// The current wall-clock time in microseconds since 1970 (UTC); 0 if the system's clock is earlier.
pub fn unix_micros() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_with_the_digits_of_their_nanoseconds() {
        for (nanos, seconds, millis, micros) in [
            (0, "0", "0", "0"),
            (1, "0.000000001", "0.000001", "0.001"),
            (210_000_000, "0.21", "210", "210000"),
            (61_500_000_003, "61.500000003", "61500.000003", "61500000.003"),
            (1_929_001_000, "1.929001", "1929.001", "1929001"),
        ] {
            let found = Nanos(nanos);
            assert_eq!(found.as_secs_f64().to_string(), seconds);
            assert_eq!(found.as_millis_f64().to_string(), millis);
            assert_eq!(found.as_micros_f64().to_string(), micros);
            assert_eq!(Nanos::from_secs_f64(found.as_secs_f64()), found);
        }
    }
}

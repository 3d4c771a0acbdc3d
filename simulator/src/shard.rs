//! A share of a sweep's points, which one machine of several simulates.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Every `count`-th point of a sweep, from point `number - 1` on; written `NUMBER/COUNT`, such as `3/8`.
///
/// Neighbouring points are in different shards, so that shards take similar times.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    number: usize,
    count: usize,
}

impl Shard {
    /// The only shard of an undivided sweep.
    pub const WHOLE: Self = Self { number: 1, count: 1 };

    /// Which shard it is, from 1 to [`Shard::count`].
    pub fn number(self) -> usize {
        self.number
    }

    /// The number of shards of the sweep.
    pub fn count(self) -> usize {
        self.count
    }

    /// All shards of a sweep that is divided like this one.
    pub fn all(self) -> impl Iterator<Item = Self> {
        (1..=self.count).map(move |number| Self { number, ..self })
    }

    /// The points of the shard, in a sweep of `points`.
    pub fn points(self, points: usize) -> impl Iterator<Item = usize> {
        (self.number - 1..points).step_by(self.count)
    }

    /// Whether a point is in the shard.
    pub fn contains(self, point: usize) -> bool {
        point % self.count == self.number - 1
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    /// Parses `NUMBER/COUNT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |text: &str| text.parse::<usize>().ok();
        let parts = text.split_once('/').and_then(|(number, count)| Some((parse(number)?, parse(count)?)));
        match parts {
            Some((number, count)) if (1..=count).contains(&number) => Ok(Self { number, count }),
            _ => Err(format!("found `{text}`, expected shard K of N as K/N, with K from 1 to N, such as 3/8")),
        }
    }
}

impl TryFrom<String> for Shard {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_in_one_shard() {
        for count in 1..6 {
            let shards: Vec<Shard> = Shard { number: 1, count }.all().collect();
            for point in 0..20 {
                let holders: Vec<Shard> = shards.iter().copied().filter(|shard| shard.contains(point)).collect();
                assert_eq!(holders.len(), 1, "point {point} of {count} shards");
                let listed = shards.iter().filter(|shard| shard.points(20).any(|listed| listed == point));
                assert!(listed.eq(&holders));
            }
        }
    }

    #[test]
    fn a_shard_reads_as_it_is_written_and_others_are_refused() {
        let shard: Shard = "3/8".parse().unwrap();
        assert_eq!((shard.number(), shard.count(), shard.to_string()), (3, 8, "3/8".to_owned()));
        for text in ["", "3", "0/8", "9/8", "3/0", "-1/8", "3/8/2", "a/b"] {
            let error = text.parse::<Shard>().unwrap_err();
            assert!(error.starts_with(&format!("found `{text}`, expected shard K of N")), "{error}");
        }
    }
}

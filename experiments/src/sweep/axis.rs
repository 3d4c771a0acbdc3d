//! The values of one setting that a grid runs through.

use std::fmt;
use std::marker::PhantomData;

use bytesize::ByteSize;
use scheduler::KvFill;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Values that are sound and all different, at least one: errors name the key and the line.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Axis<T>(Vec<T>);

/// What a grid may run through.
pub trait Value: Copy + fmt::Display + PartialEq {
    /// What a sound value is.
    const EXPECTED: &str;
    /// Whether this is one.
    fn is_sound(self) -> bool;
}

/// The most values of a setting: each is compared with every other.
const MOST_VALUES: usize = 10_000;

impl<T: Value> Axis<T> {
    /// The values, as listed.
    pub fn values(&self) -> &[T] {
        &self.0
    }
}

impl<'de, T: Value + Deserialize<'de>> Deserialize<'de> for Axis<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Values(PhantomData))
    }
}

/// Checks values as they are read, so that errors say where they stand.
struct Values<T>(PhantomData<T>);

impl<'de, T: Value + Deserialize<'de>> Visitor<'de> for Values<T> {
    type Value = Axis<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of values, each {}", T::EXPECTED)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Axis<T>, A::Error> {
        let mut values: Vec<T> = Vec::new();
        while let Some(value) = list.next_element::<T>()? {
            if !value.is_sound() {
                return Err(A::Error::custom(format!("found {value}, expected {}", T::EXPECTED)));
            }
            if values.len() == MOST_VALUES {
                return Err(A::Error::custom(format!("found more than {MOST_VALUES} values")));
            }
            if values.contains(&value) {
                return Err(A::Error::custom(format!("found {value} twice, expected each value once")));
            }
            values.push(value);
        }
        match values.is_empty() {
            true => Err(A::Error::custom("found an empty list, expected at least one value")),
            false => Ok(Axis(values)),
        }
    }
}

/// A count.
impl Value for u32 {
    const EXPECTED: &str = "a whole number of at least 1";
    fn is_sound(self) -> bool {
        self > 0
    }
}

/// A seed.
impl Value for u64 {
    const EXPECTED: &str = "a whole number";
    fn is_sound(self) -> bool {
        true
    }
}

/// A threshold.
impl Value for f32 {
    const EXPECTED: &str = "a finite number";
    fn is_sound(self) -> bool {
        self.is_finite()
    }
}

/// A rate.
impl Value for f64 {
    const EXPECTED: &str = "a number above 0";
    fn is_sound(self) -> bool {
        self.is_finite() && self > 0.0
    }
}

impl Value for KvFill {
    const EXPECTED: &str = "reuse, first, skip, backfill, last, or cycle:SLOTS";
    fn is_sound(self) -> bool {
        true
    }
}

/// A number of passes, which may be 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Passes(pub u32);

impl fmt::Display for Passes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Value for Passes {
    const EXPECTED: &str = "a whole number";
    fn is_sound(self) -> bool {
        true
    }
}

/// An amount of memory: bytes, with or without a unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(ByteSize::deserialize(deserializer)?.as_u64()))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Value for Bytes {
    const EXPECTED: &str = "bytes, more than 0";
    fn is_sound(self) -> bool {
        self.0 > 0
    }
}

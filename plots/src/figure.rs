//! Properties of every figure: name, folder, caption, and checks of its values.

use std::fmt;
use std::path::PathBuf;

use crate::Error;

/// Origin of a figure's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Measured in a run on the device.
    Measured,
    /// Simulated from the device's latency profile.
    Simulated,
    /// Both, side by side.
    MeasuredAndSimulated,
    /// Synthetic data, to check the drawing.
    Synthetic,
}

/// A figure's name, folder and caption, without its data.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Folder of `NAME.svg` and `NAME.png`; created if missing.
    pub folder: PathBuf,
    /// File name without extension.
    pub name: String,
    /// What the figure shows, in a sentence.
    pub title: String,
    /// Model, request trace and other conditions; may be empty.
    pub setting: String,
    /// The device that the numbers belong to.
    pub device: String,
    /// Whether the numbers are measured or simulated.
    pub origin: Origin,
}

impl Figure {
    /// The line below the title: origin, device and setting.
    pub(crate) fn subtitle(&self) -> String {
        let source = match self.origin {
            Origin::Measured => format!("Measured on {}", self.device),
            Origin::Simulated => format!("Simulated for {}", self.device),
            Origin::MeasuredAndSimulated => format!("Measured on and simulated for {}", self.device),
            Origin::Synthetic => "Synthetic data, not a result".into(),
        };
        if self.setting.is_empty() { source } else { format!("{source} · {}", self.setting) }
    }

    pub(crate) fn require<T>(&self, what: &str, items: &[T]) -> Result<(), Error> {
        if items.is_empty() {
            return Err(Error::Empty { figure: self.name.clone(), what: what.into() });
        }
        Ok(())
    }

    pub(crate) fn require_length<T>(&self, what: &str, items: &[T], expected: usize) -> Result<(), Error> {
        if items.len() != expected {
            return Err(Error::Length { figure: self.name.clone(), what: what.into(), found: items.len(), expected });
        }
        Ok(())
    }

    /// Checks that there are values and that each is valid for `kind`.
    pub(crate) fn check(&self, what: &str, kind: Kind, values: impl IntoIterator<Item = f64>) -> Result<(), Error> {
        let mut count = 0;
        for (index, value) in values.into_iter().enumerate() {
            if !kind.holds(value) {
                return Err(Error::Value {
                    figure: self.name.clone(),
                    what: what.into(),
                    index,
                    value,
                    expected: kind.expected(),
                });
            }
            count += 1;
        }
        self.require(what, &vec![(); count])
    }
}

/// Tolerance for rounding in sums of shares, far below what a figure shows.
const ROUNDING: f64 = 1e-9;

/// Valid range of a quantity's values.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Finite,
    NonNegative,
    Positive,
    Share,
}

impl Kind {
    fn holds(self, value: f64) -> bool {
        value.is_finite()
            && match self {
                Self::Finite => true,
                Self::NonNegative => value >= 0.0,
                Self::Positive => value > 0.0,
                Self::Share => (-ROUNDING..=1.0 + ROUNDING).contains(&value),
            }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Finite => "a finite number",
            Self::NonNegative => "a finite number of at least 0",
            Self::Positive => "a finite number above 0",
            Self::Share => "a share between 0 and 1",
        }
    }
}

/// A batching policy with an exit policy, as labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Batching policy, such as `depth-wise`.
    pub batching: String,
    /// Exit policy, such as `confidence 0.9`.
    pub exit: String,
}

impl Policy {
    /// A policy from its two labels.
    pub fn new(batching: impl Into<String>, exit: impl Into<String>) -> Self {
        Self { batching: batching.into(), exit: exit.into() }
    }

    pub(crate) fn label(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.batching, self.exit)
    }
}

/// A line of a figure: one policy, and `(x, y)` points in any order.
#[derive(Clone, Debug)]
pub struct PolicyLine {
    /// Policy of the line.
    pub policy: Policy,
    /// The points, in the figure's units.
    pub points: Vec<(f64, f64)>,
}

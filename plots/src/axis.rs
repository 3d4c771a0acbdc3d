//! Axes: range, ticks and the format of numbers.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use crate::canvas::{Canvas, DrawResult, text_width};
use crate::style;

pub(crate) const TICK_SIZE: u32 = 29;

const TICK_TARGET: f64 = 7.0;
const MOST_VALUE_TICKS: usize = 12;
/// A span of more than this factor is drawn on a log axis by [`Axis::auto`].
const LOG_FACTOR: f64 = 20.0;

/// How values are spread over an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Equal steps are equal distances.
    Linear,
    /// Equal factors are equal distances; values must be above 0.
    Log,
}

/// An axis: its label with unit, its range and its labelled ticks.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) label: String,
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
    /// Whether lines across the panel mark the ticks.
    pub(crate) has_grid: bool,
}

impl Axis {
    /// Linear, from the smallest to the largest value with some room around them.
    pub(crate) fn linear(label: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = padded(extent(values));
        Self::with_linear_ticks(label, low, high)
    }

    /// Linear and from 0 up to a little above the largest of values that are not negative.
    pub(crate) fn from_zero(label: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (_, high) = extent(values);
        let high = if high > 0.0 { high * 1.06 } else { 1.0 };
        Self::with_linear_ticks(label, 0.0, high)
    }

    /// Linear over an exact range.
    pub(crate) fn with_linear_ticks(label: &str, low: f64, high: f64) -> Self {
        Self { label: label.into(), scale: Scale::Linear, low, high, ticks: linear_ticks(low, high), has_grid: true }
    }

    /// Logarithmic around values above 0, with ticks at 1, 2 and 5 times powers of ten.
    pub(crate) fn log(label: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = padded_factor(extent(values));
        Self { label: label.into(), scale: Scale::Log, low, high, ticks: log_ticks(low, high), has_grid: true }
    }

    /// Logarithmic with the values themselves as ticks, or the powers of two when they are many: for batch sizes.
    pub(crate) fn log_at_values(label: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let axis = Self::log(label, values.iter().copied());
        if values.len() > MOST_VALUE_TICKS {
            let (low, high) = (axis.low.log2().ceil() as i32, axis.high.log2().floor() as i32);
            if low >= high {
                return axis;
            }
            values = (low..=high).map(|power| 2f64.powi(power)).collect();
        }
        Self { ticks: values.into_iter().map(|v| (v, plain(v))).collect(), ..axis }
    }

    /// Linear or, for positive values that span a large factor, logarithmic.
    pub(crate) fn auto(label: &str, values: impl IntoIterator<Item = f64> + Clone) -> Self {
        let (low, high) = extent(values.clone());
        if low > 0.0 && high / low > LOG_FACTOR { Self::log(label, values) } else { Self::linear(label, values) }
    }

    /// Linear or, for a few whole numbers, a tick at each.
    pub(crate) fn linear_or_steps(label: &str, values: impl IntoIterator<Item = f64> + Clone) -> Self {
        let (low, high) = extent(values.clone());
        let are_few = low >= 0.0 && high - low < MOST_VALUE_TICKS as f64;
        match are_few && values.clone().into_iter().all(|value| value.fract() == 0.0) {
            true => Self { has_grid: true, ..Self::steps(label, low as usize, high as usize) },
            false => Self::linear(label, values),
        }
    }

    /// Whole numbers from `first` to `last`, with half a step of room on either side.
    pub(crate) fn steps(label: &str, first: usize, last: usize) -> Self {
        let stride = (last - first).div_ceil(16).max(1);
        let ticks = (first..=last).step_by(stride);
        Self {
            label: label.into(),
            scale: Scale::Linear,
            low: first as f64 - 0.5,
            high: last as f64 + 0.5,
            ticks: ticks.map(|i| (i as f64, i.to_string())).collect(),
            has_grid: false,
        }
    }

    /// Names from the top down, a step each.
    pub(crate) fn names<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let ticks: Vec<_> = names.into_iter().enumerate().map(|(at, name)| (Self::name_at(at), name.into())).collect();
        let (low, high) = (0.5 - ticks.len() as f64, 0.5);
        Self { label: String::new(), scale: Scale::Linear, low, high, ticks, has_grid: false }
    }

    /// Names from left to right, at 0, 1, 2 and so on.
    pub(crate) fn columns<'a>(label: &str, names: impl IntoIterator<Item = &'a str>) -> Self {
        let ticks: Vec<_> = names.into_iter().enumerate().map(|(at, name)| (at as f64, name.into())).collect();
        let (low, high) = (-0.5, ticks.len() as f64 - 0.5);
        Self { label: label.into(), scale: Scale::Linear, low, high, ticks, has_grid: false }
    }

    /// Position of a name on an axis of [`Self::names`].
    pub(crate) fn name_at(place: usize) -> f64 {
        -(place as f64)
    }

    /// The axis without ticks and label, for a panel that shares it with one below.
    pub(crate) fn unlabelled(&self) -> Self {
        let ticks = self.ticks.iter().map(|(v, _)| (*v, String::new()));
        Self { label: String::new(), ticks: ticks.collect(), ..self.clone() }
    }

    /// The axis without ticks, for categories that the figure labels itself.
    pub(crate) fn without_ticks(self) -> Self {
        Self { ticks: Vec::new(), ..self }
    }

    /// The axis with fewer ticks, so that their labels fit in `room` units.
    pub(crate) fn thinned(mut self, canvas: &Canvas, room: i32) -> DrawResult<Self> {
        let widest = self.tick_width(canvas)? + TICK_SIZE as i32;
        while self.ticks.len() as i32 * widest > room && self.ticks.len() > 2 {
            self.halve_ticks();
        }
        Ok(self)
    }

    /// Keeps the rounder half of the ticks: even multiples of the step, or powers of ten on a log axis.
    fn halve_ticks(&mut self) {
        let is_power = |value: f64| (value.log10() - value.log10().round()).abs() < 1e-9;
        let powers = self.ticks.iter().filter(|(value, _)| is_power(*value)).count();
        if self.scale == Scale::Log && (2..self.ticks.len()).contains(&powers) {
            self.ticks.retain(|(value, _)| is_power(*value));
        } else {
            let first = usize::from(self.scale == Scale::Linear && !self.is_even(0));
            let mut index = 0;
            self.ticks.retain(|_| {
                index += 1;
                (index - 1) % 2 == first
            });
        }
    }

    /// Whether a tick of a linear axis is an even multiple of the step: the rounder half of the ticks.
    fn is_even(&self, tick: usize) -> bool {
        let step = self.ticks[1].0 - self.ticks[0].0;
        (self.ticks[tick].0 / step).round() as i64 % 2 == 0
    }

    /// The axis with another label.
    pub(crate) fn labelled(&self, label: &str) -> Self {
        Self { label: label.into(), ..self.clone() }
    }

    /// The axis cut at `high`, for shares that cannot exceed 100 %.
    pub(crate) fn at_most(self, high: f64) -> Self {
        let high = self.high.min(high);
        Self::with_linear_ticks(&self.label, self.low, high)
    }

    /// Relative position of a value: 0 at the low end, 1 at the high end.
    fn position(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        }
    }

    /// Width of the widest tick label, in units.
    pub(crate) fn tick_width(&self, canvas: &Canvas) -> DrawResult<i32> {
        let style = style::text(TICK_SIZE, style::INK);
        let mut widest = 0;
        for (_, label) in &self.ticks {
            widest = widest.max(text_width(canvas, label, &style)?);
        }
        Ok(widest)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (self.position(*value) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|(value, _)| *value).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        let tick = self.ticks.iter().find(|(v, _)| v == value);
        tick.map_or(String::new(), |(_, label)| label.clone())
    }
}

/// Smallest and largest value; callers have checked that there is a value.
pub(crate) fn extent(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    let widen = |(low, high): (f64, f64), v: f64| (low.min(v), high.max(v));
    values.into_iter().fold(start, widen)
}

fn padded((low, high): (f64, f64)) -> (f64, f64) {
    let span = high - low;
    let room = if span > f64::EPSILON * high.abs().max(low.abs()) {
        span * 0.05
    } else if high != 0.0 {
        high.abs() * 0.1
    } else {
        1.0
    };
    (low - room, high + room)
}

fn padded_factor((low, high): (f64, f64)) -> (f64, f64) {
    let room = if high > low * 1.0001 { (high / low).powf(0.04) } else { 1.5 };
    (low / room, high * room)
}

fn linear_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let step = tick_step(high - low);
    let decimals = (-(step * 1.0001).log10().floor()).clamp(0.0, 12.0) as usize;
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).map(|v| (v, number(v, decimals))).collect()
}

/// 1, 2 or 5 times a power of ten that gives about `TICK_TARGET` ticks.
fn tick_step(span: f64) -> f64 {
    let rough = span / TICK_TARGET;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * power >= rough);
    factor.unwrap_or(10.0) * power
}

fn log_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let decades = (high / low).log10();
    let factors: &[f64] = match decades {
        d if d > 3.5 => &[1.0],
        d if d > 0.7 => &[1.0, 2.0, 5.0],
        _ => return linear_ticks(low, high),
    };
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    powers
        .flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)))
        .filter(|v| (low..=high).contains(v))
        .map(|v| (v, plain(v)))
        .collect()
}

/// A number with thousands separators and a fixed number of decimals.
pub(crate) fn number(value: f64, decimals: usize) -> String {
    let digits = format!("{:.decimals$}", value.abs());
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let mut text = String::new();
    if value < 0.0 && digits.bytes().any(|b| (b'1'..=b'9').contains(&b)) {
        text.push('-');
    }
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if !fraction.is_empty() {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

/// A number with the decimals it needs, up to six significant digits.
fn plain(value: f64) -> String {
    let decimals = (0..6).find(|&d| {
        let scaled = value * 10f64.powi(d);
        (scaled - scaled.round()).abs() < 1e-6 * scaled.abs()
    });
    number(value, decimals.unwrap_or(6) as usize)
}

/// A number short enough for a label on a bar: about three significant digits.
pub(crate) fn three_digits(value: f64) -> String {
    if value.abs() >= 1e4 {
        let (scaled, suffix) = if value.abs() >= 1e6 { (value / 1e6, "M") } else { (value / 1e3, "k") };
        return three_digits(scaled) + suffix;
    }
    let decimals = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    number(value, decimals)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn numbers_have_thousands_separators() {
        assert_eq!(number(1_234_567.891, 1), "1,234,567.9");
        assert_eq!(number(-123_456.0, 0), "-123,456");
        assert_eq!(number(999.0, 0), "999");
        assert_eq!(number(-0.001, 2), "0.00");
    }

    #[test]
    fn bar_labels_stay_short() {
        let cases = [(0.0, "0"), (0.1234, "0.123"), (1.869, "1.87"), (45.04, "45.0"), (1872.4, "1,872")];
        for (value, label) in cases.into_iter().chain([(12_345.0, "12.3k"), (2.5e6, "2.50M")]) {
            assert_eq!(three_digits(value), label);
        }
    }

    #[test]
    fn linear_ticks_are_round_and_share_their_decimals() {
        assert_eq!(labels(&Axis::with_linear_ticks("", -0.1, 1.02)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&Axis::with_linear_ticks("", 0.0, 2100.0)), ["0", "500", "1,000", "1,500", "2,000"]);
    }

    #[test]
    fn log_ticks_are_powers_of_ten_over_many_decades() {
        assert_eq!(labels(&Axis::log("", [0.5, 9000.0])), ["1", "10", "100", "1,000", "10,000"]);
        assert_eq!(labels(&Axis::log("", [3.0, 60.0])), ["5", "10", "20", "50"]);
    }

    #[test]
    fn many_batch_sizes_are_ticked_at_powers_of_two() {
        let few = Axis::log_at_values("", [24.0, 1.0, 8.0]);
        assert_eq!(labels(&few), ["1", "8", "24"]);
        let many = Axis::log_at_values("", (1..=40).map(f64::from));
        assert_eq!(labels(&many), ["1", "2", "4", "8", "16", "32"]);
    }

    #[test]
    fn a_few_whole_numbers_are_ticked_each() {
        assert_eq!(labels(&Axis::linear_or_steps("", [1.0, 3.0, 4.0])), ["1", "2", "3", "4"]);
        assert_eq!(labels(&Axis::linear_or_steps("", [1.0, 3.5])).len(), 6);
        assert_eq!(labels(&Axis::linear_or_steps("", [0.0, 64.0])), ["0", "20", "40", "60"]);
    }

    #[test]
    fn halving_ticks_keeps_the_round_ones() {
        let mut linear = Axis::with_linear_ticks("", 400.0, 2600.0);
        linear.halve_ticks();
        assert_eq!(labels(&linear), ["1,000", "2,000"]);
        let mut log = Axis::log("", [1.0, 100.0]);
        log.halve_ticks();
        assert_eq!(labels(&log), ["1", "10", "100"]);
    }

    #[test]
    fn an_axis_has_room_around_any_values() {
        for values in [vec![0.0], vec![-3.0, -3.0], vec![5.0; 3], vec![1e-9, 1e9]] {
            let axis = Axis::linear("", values.iter().copied());
            for value in values {
                assert!((0.01..=0.99).contains(&axis.position(value)), "{value} at {}", axis.position(value));
            }
        }
    }
}

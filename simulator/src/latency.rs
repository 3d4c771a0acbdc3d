//! How long a pass takes, interpolated over the measured points of a latency profile.
//!
//! Between measured points time is linear: in the rows, and for attention in rows and history. Below the
//! smallest measured point it is that point's. Above the largest one the last slope goes on, and each such
//! use is counted in [`Extrapolations`]: a simulation that left the measured grid says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use scheduler::{Pass, Segment};
use traces::{Component, LatencyProfile, Nanos, Point};

use crate::attention::{AttentionModel, AttentionShape, is_chunk};
use crate::memory::ModelMemory;

/// Rows up to which one-dimensional components are tabulated.
const MAX_TABULATED: u32 = 1 << 14;

/// A profile that cannot be interpolated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LatencyError {
    /// Without the block there is no pass.
    #[error("the latency profile of `{0}` has no point of component `block`: a pass cannot be timed without it")]
    NoBlock(String),
    /// A time that no clock shows.
    #[error("{component} at rows {rows}, kv_tokens {kv_tokens}: found {time_us} us, expected {expected}")]
    BadTime {
        /// Whose.
        component: Component,
        /// Where.
        rows: u32,
        /// Where.
        kv_tokens: u32,
        /// What was found, of the time or its spread.
        time_us: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// Overhead that no clock shows.
    #[error("overhead_us of the latency profile is {0}, expected a number of at least 0")]
    BadOverhead(f64),
    /// Two times for the same point.
    #[error("{component} at rows {rows}, kv_tokens {kv_tokens}, depths {depths} is there twice")]
    Twice {
        /// Whose.
        component: Component,
        /// Where.
        rows: u32,
        /// Where.
        kv_tokens: u32,
        /// Where.
        depths: u32,
    },
    /// Loops beyond what a pass can count.
    #[error("the latency profile is of a model with {0} loops, expected 1 to 64")]
    Loops(u32),
}

/// What the time of a pass depends on, chunks of prompts and backfill apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassShape {
    /// All rows.
    pub rows: u32,
    /// Decode rows, and rows of backfill that are alone.
    pub decode_rows: u32,
    /// Sum of the histories of the decode rows, in tokens.
    pub decode_history: u64,
    /// Distinct depths among the rows.
    pub depths: u32,
    /// Rows at depth 0.
    pub embed_rows: u32,
    /// Rows that need the exit head.
    pub head_rows: u32,
    /// What ran before it.
    pub before: PassBefore,
}

/// What the time of a pass depends on in the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassBefore {
    /// Rows that it had.
    pub rows: u32,
    /// Whether it ran the exit head.
    pub head: bool,
}

impl PassShape {
    /// The shape of a pass, as if nothing ran before it; `history` says how many tokens a segment
    /// attends to before its first.
    ///
    /// Without branches: it runs for every row.
    #[inline]
    pub(crate) fn of(pass: &Pass<'_>, history: impl Fn(&Segment) -> u32) -> Self {
        let mut shape = Self::default();
        let mut depths = 0u64;
        for segment in pass.segments {
            let (tokens, alone) = (segment.tokens, !is_chunk(segment));
            shape.rows += tokens;
            shape.decode_rows += u32::from(alone);
            shape.decode_history += if alone { u64::from(history(segment)) } else { 0 };
            shape.embed_rows += if segment.depth == 0 { tokens } else { 0 };
            shape.head_rows += u32::from(pass.runs_head(segment));
            depths |= 1 << segment.depth;
        }
        shape.depths = depths.count_ones();
        shape
    }

    /// Whether the exit head ran in the pass before or in this one: what it takes for rows that turn out to leave.
    #[inline]
    pub(crate) fn has_head_at_hand(&self) -> bool {
        self.before.head || self.head_rows > 0
    }
}

/// Latency by pass shape for one profile.
#[derive(Clone, Debug)]
pub struct LatencyModel {
    num_loops: u8,
    fingerprint: String,
    device: String,
    computed: Vec<Component>,
    memory: ModelMemory,
    overhead_ns: f64,
    mixed_attention: Option<AttentionModel>,
    times: Parts,
    spreads: Parts,
}

impl LatencyModel {
    /// Prepares a profile for look-up. A component without points, other than the block, takes no time.
    ///
    /// # Errors
    /// If the block has no points, a time is negative or not a number, or a point is there twice.
    pub fn new(profile: &LatencyProfile) -> Result<Self, LatencyError> {
        let meta = &profile.meta;
        if !(1..=64).contains(&meta.num_loops) {
            return Err(LatencyError::Loops(meta.num_loops));
        }
        if !(meta.overhead_us.is_finite() && meta.overhead_us >= 0.0) {
            return Err(LatencyError::BadOverhead(meta.overhead_us));
        }
        if profile.points_of(Component::Block).next().is_none() {
            return Err(LatencyError::NoBlock(meta.model.clone()));
        }
        Ok(Self {
            num_loops: meta.num_loops as u8,
            fingerprint: meta.fingerprint.clone(),
            device: meta.device.clone(),
            computed: profile.computed_components().collect(),
            memory: ModelMemory::from(meta),
            overhead_ns: meta.overhead_us * 1e3,
            mixed_attention: profile.mixed_attention.as_ref().map(AttentionModel::new),
            times: Parts::new(profile, |point| point.time_us)?,
            spreads: Parts::new(profile, |point| point.spread_us)?,
        })
    }

    /// Components with times that the profile's maker computed rather than measured.
    pub fn computed(&self) -> &[Component] {
        &self.computed
    }

    /// Loops of the model that was measured.
    pub fn num_loops(&self) -> u8 {
        self.num_loops
    }

    /// Device that was measured.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Fingerprint of the model that was measured.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What the model takes of the device's memory.
    pub fn memory(&self) -> &ModelMemory {
        &self.memory
    }

    /// The parts of [`Self::parts_ns`].
    pub(crate) const PARTS: [Component; 8] = [
        Component::Block,
        Component::Elementwise,
        Component::Lora,
        Component::AfterMore,
        Component::DecodeAttention,
        Component::DepthMix,
        Component::Embed,
        Component::Head,
    ];

    /// Median times of the parts of a pass without the attention of its prompt chunks, in nanoseconds.
    pub(crate) fn parts_ns(&self, shape: &PassShape, beyond: &mut Extrapolations) -> [f64; 8] {
        self.times.of_pass(shape, beyond)
    }

    /// What a pass costs beside its parts, in nanoseconds.
    pub(crate) fn overhead_ns(&self) -> f64 {
        self.overhead_ns
    }

    /// Median time that attention of one prompt chunk adds to a pass, in nanoseconds, by its tokens and the history
    /// before it.
    pub fn prefill_attention_ns(&self, tokens: u32, history: u32, beyond: &mut Extrapolations) -> f64 {
        self.times.prefill_attention.at(tokens, f64::from(history), Component::PrefillAttention, beyond)
    }

    /// Median time that attention of all prompt chunks adds to a pass, in nanoseconds, given as tokens and the history
    /// before them. The chunk with the most keys counts by itself, the others as what comes beside it.
    pub fn prefills_ns(&self, chunks: impl Iterator<Item = (u32, u32)>, beyond: &mut Extrapolations) -> f64 {
        let keys = |(tokens, history): (u32, u32)| tokens + history;
        let (mut longest, mut others) = (None, 0.0);
        for chunk in chunks {
            let other = match longest {
                Some(before) if keys(chunk) <= keys(before) => chunk,
                before => {
                    longest = Some(chunk);
                    let Some(before) = before else { continue };
                    before
                }
            };
            others += self.prefill_again_ns(other.0, other.1, beyond);
        }
        others + longest.map_or(0.0, |(tokens, history)| self.prefill_attention_ns(tokens, history, beyond))
    }

    fn prefill_again_ns(&self, tokens: u32, history: u32, beyond: &mut Extrapolations) -> f64 {
        match &self.times.prefill_again {
            Some(surface) => surface.at(tokens, f64::from(history), Component::PrefillAgain, beyond),
            None => self.prefill_attention_ns(tokens, history, beyond),
        }
    }

    /// Whether attention was measured for whole passes: [`Self::mixed_attention_ns`] then takes the place of the parts.
    pub fn has_mixed_attention(&self) -> bool {
        self.mixed_attention.is_some()
    }

    /// Time of attention in a pass where it was measured for whole passes, in nanoseconds; 0 elsewhere.
    pub fn mixed_attention_ns(&self, shape: &AttentionShape, beyond: &mut Extrapolations) -> f64 {
        self.mixed_attention.as_ref().map_or(0.0, |attention| attention.attention_ns(shape, beyond))
    }

    /// Median time of the exit head, in nanoseconds; `again` says whether it ran just before.
    pub fn head_ns(&self, rows: u32, again: bool, beyond: &mut Extrapolations) -> f64 {
        self.times.head(rows, again, beyond)
    }

    /// Median time of copying keys and values to so many depths that rows skip, counted over all rows, in nanoseconds.
    pub fn kv_fill_ns(&self, depths: u32, beyond: &mut Extrapolations) -> f64 {
        self.times.kv_fill.at(depths, Component::KvFill, beyond)
    }

    /// Half the distance between the quartiles of the time of a pass, squared, in square nanoseconds: as of a sum of
    /// independent parts, given as its shape and its prompt chunks, by tokens and history.
    pub fn squared_pass_spread(&self, shape: &PassShape, chunks: impl Iterator<Item = (u32, u32)>) -> f64 {
        let (prefill, mut counted) = (&self.spreads.prefill_attention, Extrapolations::default());
        let parts = self.spreads.of_pass(shape, &mut counted);
        let chunks = chunks.map(|(tokens, history)| {
            prefill.at(tokens, f64::from(history), Component::PrefillAttention, &mut Extrapolations::default())
        });
        parts.into_iter().chain(chunks).map(|spread| spread * spread).sum()
    }

    /// The same of the exit head for some rows, which ran just before or not, and of copying keys and values to some depths.
    pub fn squared_emit_spread(&self, head_rows: u32, again: bool, filled_depths: u32) -> f64 {
        let mut counted = Extrapolations::default();
        let head = self.spreads.head(head_rows, again, &mut counted);
        head.powi(2) + self.spreads.kv_fill.at(filled_depths, Component::KvFill, &mut counted).powi(2)
    }
}

/// One measured quantity of each part of a pass: its median time, or its spread.
#[derive(Clone, Debug)]
struct Parts {
    block: Table,
    elementwise: Table,
    lora: Table,
    after_more: AfterMore,
    decode_attention: Surface,
    prefill_attention: Surface,
    /// None where it was not measured.
    prefill_again: Option<Surface>,
    /// By distinct depths less 1.
    depth_mix: Vec<Table>,
    embed: Table,
    head: Table,
    /// None where it was not measured.
    head_again: Option<Table>,
    kv_fill: Table,
}

impl Parts {
    fn new(profile: &LatencyProfile, value_us: fn(&Point) -> f64) -> Result<Self, LatencyError> {
        let by_rows = |component| -> Result<Table, LatencyError> {
            let curves = curves(profile, component, value_us, |_| 0, |point| point.rows)?;
            Ok(Table::new(curves.into_values().next().unwrap_or_default()))
        };
        let curves_by_rows =
            |component| curves(profile, component, value_us, |point| point.rows, |point| point.kv_tokens);
        let if_measured = |component| profile.points_of(component).next().map(|point| point.component);
        Ok(Self {
            block: by_rows(Component::Block)?,
            elementwise: by_rows(Component::Elementwise)?,
            lora: by_rows(Component::Lora)?,
            after_more: AfterMore::new(curves_by_rows(Component::AfterMore)?),
            decode_attention: Surface::new(curves_by_rows(Component::DecodeAttention)?),
            prefill_attention: Surface::new(curves_by_rows(Component::PrefillAttention)?),
            prefill_again: if_measured(Component::PrefillAgain)
                .map(|component| curves_by_rows(component).map(Surface::new))
                .transpose()?,
            depth_mix: depth_mix(profile, value_us)?,
            embed: by_rows(Component::Embed)?,
            head: by_rows(Component::Head)?,
            head_again: if_measured(Component::HeadAgain).map(by_rows).transpose()?,
            kv_fill: by_rows(Component::KvFill)?,
        })
    }

    #[inline]
    fn head(&self, rows: u32, again: bool, beyond: &mut Extrapolations) -> f64 {
        match &self.head_again {
            Some(table) if again => table.at(rows, Component::HeadAgain, beyond),
            _ => self.head.at(rows, Component::Head, beyond),
        }
    }

    /// The parts of a pass but for the attention of its prompt chunks: those of [`LatencyModel::PARTS`].
    fn of_pass(&self, shape: &PassShape, beyond: &mut Extrapolations) -> [f64; 8] {
        let PassShape { rows, decode_rows, decode_history, depths, embed_rows, head_rows, before } = *shape;
        let mix = &self.depth_mix[depths.clamp(1, self.depth_mix.len() as u32) as usize - 1];
        let history = if decode_rows == 0 { 0.0 } else { decode_history as f64 / f64::from(decode_rows) };
        [
            self.block.at(rows, Component::Block, beyond),
            self.elementwise.at(rows, Component::Elementwise, beyond),
            self.lora.at(rows, Component::Lora, beyond),
            self.after_more.at(rows, before.rows),
            self.decode_attention.at(decode_rows, history, Component::DecodeAttention, beyond),
            mix.at(rows, Component::DepthMix, beyond),
            self.embed.at(embed_rows, Component::Embed, beyond),
            self.head(head_rows, before.head, beyond),
        ]
    }
}

/// The tables of `depth_mix` by distinct depths, from 1 (which adds nothing) to all loops; counts between two
/// measured ones are interpolated, those above the largest cost what it costs and count as extrapolated.
fn depth_mix(profile: &LatencyProfile, value_us: fn(&Point) -> f64) -> Result<Vec<Table>, LatencyError> {
    let mut measured = curves(profile, Component::DepthMix, value_us, |point| point.depths, |point| point.rows)?;
    if measured.is_empty() {
        return Ok(vec![Table::new(Curve::default()); profile.meta.num_loops as usize]);
    }
    measured.entry(1).or_default();
    let table = |depths: u32| {
        let (&low, below) = measured.range(..=depths).next_back().expect("1 is measured");
        let Some((&high, above)) = measured.range(depths..).next() else { return Table::unmeasured(below.clone()) };
        let share = if high == low { 0.0 } else { f64::from(depths - low) / f64::from(high - low) };
        let knots: BTreeSet<u32> = below.xs().chain(above.xs()).collect();
        let mixed = |rows: u32| {
            let (below, above) = (below.at(f64::from(rows)), above.at(f64::from(rows)));
            below + share * (above - below)
        };
        Table::new(Curve::new(knots.into_iter().map(|rows| (rows, mixed(rows)))))
    };
    Ok((1..=profile.meta.num_loops).map(table).collect())
}

/// The points of a component as curves over `x`, one for each value of `key`.
fn curves(
    profile: &LatencyProfile,
    component: Component,
    value_us: fn(&Point) -> f64,
    key: impl Fn(&Point) -> u32,
    x: impl Fn(&Point) -> u32,
) -> Result<BTreeMap<u32, Curve>, LatencyError> {
    let mut curves: BTreeMap<u32, BTreeMap<u32, f64>> = BTreeMap::new();
    for point in profile.points_of(component) {
        let (&Point { rows, kv_tokens, depths, .. }, time_us) = (point, value_us(point));
        let spread = point.spread_us;
        let checks = [
            (component.can_take(point.time_us), point.time_us, component.times()),
            (spread.is_finite() && spread >= 0.0, spread, "a spread of at least 0"),
        ];
        if let Some(&(_, time_us, expected)) = checks.iter().find(|check| !check.0) {
            return Err(LatencyError::BadTime { component, rows, kv_tokens, time_us, expected });
        }
        if curves.entry(key(point)).or_default().insert(x(point), time_us * 1e3).is_some() {
            return Err(LatencyError::Twice { component, rows, kv_tokens, depths });
        }
    }
    Ok(curves.into_iter().map(|(key, points)| (key, Curve::new(points))).collect())
}

/// Piecewise-linear time in nanoseconds over one variable; zero without points.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    /// Rising in where they lie.
    knots: Vec<Knot>,
}

/// A measured point of a curve.
#[derive(Clone, Copy, Debug)]
struct Knot {
    x: f64,
    y: f64,
    /// From the point before it; 0 at the first.
    slope: f64,
}

impl Curve {
    /// The curve through points that rise in the first.
    pub(crate) fn new(points: impl IntoIterator<Item = (u32, f64)>) -> Self {
        let mut knots: Vec<Knot> = Vec::new();
        for (x, y) in points {
            let x = f64::from(x);
            let slope = knots.last().map_or(0.0, |before| (y - before.y) / (x - before.x));
            knots.push(Knot { x, y, slope });
        }
        Self { knots }
    }

    fn xs(&self) -> impl Iterator<Item = u32> {
        self.knots.iter().map(|knot| knot.x as u32)
    }

    /// The largest measured place; infinite without points, since nothing lies beyond.
    pub(crate) fn end(&self) -> f64 {
        self.knots.last().map_or(f64::INFINITY, |knot| knot.x)
    }

    pub(crate) fn at(&self, x: f64) -> f64 {
        match self.knots[..] {
            [] => 0.0,
            [first, ..] if x <= first.x => first.y,
            [only] => only.y,
            _ => {
                let above = self.knots.partition_point(|knot| knot.x < x).min(self.knots.len() - 1);
                let (low, high) = (self.knots[above - 1], self.knots[above]);
                // Beyond the last the line does not fall, as in `line`.
                if x <= high.x { low.y + high.slope * (x - low.x) } else { high.y + high.slope.max(0.0) * (x - high.x) }
            }
        }
    }
}

/// The line through two points; beyond the second it does not fall, however noisy the two.
pub(crate) fn line((x0, y0): (f64, f64), (x1, y1): (f64, f64), x: f64) -> f64 {
    let slope = (y1 - y0) / (x1 - x0);
    if x <= x1 { y0 + slope * (x - x0) } else { y1 + slope.max(0.0) * (x - x1) }
}

/// A curve over rows, tabulated; no rows take no time.
#[derive(Clone, Debug)]
struct Table {
    times: Vec<f64>,
    curve: Curve,
    end: u32,
}

impl Table {
    fn new(curve: Curve) -> Self {
        let end = curve.end().min(f64::from(u32::MAX)) as u32;
        let tabulated = if curve.knots.is_empty() { 0 } else { end.min(MAX_TABULATED) };
        let times = (0..=tabulated).map(|rows| if rows == 0 { 0.0 } else { curve.at(rows.into()) }).collect();
        Self { times, curve, end }
    }

    /// A curve that stands in for one that was not measured: every use is an extrapolation.
    fn unmeasured(curve: Curve) -> Self {
        Self { times: vec![0.0], curve, end: 0 }
    }

    fn at(&self, rows: u32, component: Component, beyond: &mut Extrapolations) -> f64 {
        match self.times.get(rows as usize) {
            Some(&time) => time,
            None => {
                if rows > self.end {
                    beyond.count(component, rows, 0);
                }
                self.curve.at(rows.into())
            }
        }
    }
}

/// Bilinear time in nanoseconds over rows and history; each measured number of rows has its own range of histories.
#[derive(Clone, Debug)]
struct Surface {
    /// Measured numbers of rows, rising, and the curve over history of each.
    curves: Vec<(u32, Curve)>,
    /// By rows, the first curve of as many or more: passes ask for it too often to search.
    above: Vec<u32>,
}

impl Surface {
    fn new(curves: BTreeMap<u32, Curve>) -> Self {
        let curves: Vec<(u32, Curve)> = curves.into_iter().collect();
        let end = curves.last().map_or(0, |last| last.0.min(MAX_TABULATED));
        let above = (0..=end).map(|rows| curves.partition_point(|curve| curve.0 < rows) as u32).collect();
        Self { curves, above }
    }

    fn at(&self, rows: u32, history: f64, component: Component, beyond: &mut Extrapolations) -> f64 {
        let (Some(last), true) = (self.curves.last(), rows > 0) else { return 0.0 };
        let above = match self.above.get(rows as usize) {
            Some(&above) => above as usize,
            None => self.curves.partition_point(|curve| curve.0 < rows).min(self.curves.len() - 1),
        };
        let (high, upper) = &self.curves[above];
        if above == 0 || *high == rows {
            if history > upper.end() || rows > *high {
                beyond.count(component, rows, history as u32);
            }
            return upper.at(history);
        }
        let (low, lower) = &self.curves[above - 1];
        if rows > last.0 || history > upper.end().min(lower.end()) {
            beyond.count(component, rows, history as u32);
        }
        line((f64::from(*low), lower.at(history)), (f64::from(*high), upper.at(history)), f64::from(rows))
    }
}

/// What passes take beyond by their rows and those of the pass before: nothing where that had no more, and beyond the
/// measured rows of either what the largest measured cost.
#[derive(Clone, Debug)]
struct AfterMore {
    surface: Surface,
    most_rows: u32,
    most_before: f64,
}

impl AfterMore {
    /// By rows, curves over the rows of the pass before.
    fn new(mut curves: BTreeMap<u32, Curve>) -> Self {
        for (&rows, curve) in &mut curves {
            let more = curve.knots.iter().map(|knot| (knot.x as u32, knot.y)).filter(|&(before, _)| before > rows);
            *curve = Curve::new(std::iter::once((rows, 0.0)).chain(more.collect::<Vec<_>>()));
        }
        let most_rows = curves.keys().next_back().copied().unwrap_or(0);
        let most_before = curves.values().map(Curve::end).fold(0.0, f64::max);
        Self { surface: Surface::new(curves), most_rows, most_before }
    }

    #[inline]
    fn at(&self, rows: u32, before: u32) -> f64 {
        match before > rows && self.most_rows > 0 {
            true => {
                let (rows, before) = (rows.min(self.most_rows), f64::from(before).min(self.most_before));
                self.surface.at(rows, before, Component::AfterMore, &mut Extrapolations::default())
            }
            false => 0.0,
        }
    }
}

/// How often a run asked for times beyond the measured grid, and how far, by component.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extrapolations {
    by_component: [Extrapolation; Component::ALL.len()],
}

/// Uses of one component beyond its measured grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extrapolation {
    /// How many.
    pub count: u64,
    /// The most rows asked for.
    pub rows: u32,
    /// The longest history asked for, in tokens.
    pub kv_tokens: u32,
}

impl Extrapolations {
    #[cold]
    pub(crate) fn count(&mut self, component: Component, rows: u32, kv_tokens: u32) {
        let entry = &mut self.by_component[component as usize];
        entry.count += 1;
        entry.rows = entry.rows.max(rows);
        entry.kv_tokens = entry.kv_tokens.max(kv_tokens);
    }

    /// Adds those of another run.
    pub fn merge(&mut self, other: &Self) {
        for (entry, other) in self.by_component.iter_mut().zip(&other.by_component) {
            entry.count += other.count;
            entry.rows = entry.rows.max(other.rows);
            entry.kv_tokens = entry.kv_tokens.max(other.kv_tokens);
        }
    }

    /// The components that were extrapolated.
    pub fn iter(&self) -> impl Iterator<Item = (Component, Extrapolation)> {
        Component::ALL.into_iter().zip(self.by_component).filter(|(_, entry)| entry.count > 0)
    }

    /// Whether every time asked for lay within what was measured.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }
}

/// One line for each component that was extrapolated; nothing if none was.
impl fmt::Display for Extrapolations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (component, Extrapolation { count, rows, kv_tokens })) in self.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(
                f,
                "{separator}{component}: extrapolated beyond the profile {count} times, up to {rows} rows and {kv_tokens} tokens of history"
            )?;
        }
        Ok(())
    }
}

/// Rounds a sum of parts.
pub(crate) fn nanos(ns: f64) -> Nanos {
    Nanos((ns + 0.5) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use traces::ProfileMeta;

    fn profile(points: &[(Component, u32, u32, u32, f64)]) -> LatencyProfile {
        let point = |&(component, rows, kv_tokens, depths, time_us)| Point {
            component,
            rows,
            kv_tokens,
            depths,
            time_us,
            spread_us: 0.0,
            repeats: 1,
        };
        LatencyProfile {
            meta: ProfileMeta {
                schema_version: LatencyProfile::SCHEMA_VERSION,
                model: "test".into(),
                fingerprint: LatencyProfile::ANY_MODEL.into(),
                num_loops: 4,
                device: "none".into(),
                software: "none".into(),
                source: "made up".into(),
                overhead_us: 0.25,
                weight_bytes: 0,
                kv_bytes_per_token: 0,
                memory: None,
            },
            points: points.iter().map(point).collect(),
            mixed_attention: None,
        }
    }

    fn model(points: &[(Component, u32, u32, u32, f64)]) -> LatencyModel {
        LatencyModel::new(&profile(points)).unwrap()
    }

    use Component::{
        AfterMore, Block, DecodeAttention, DepthMix, Embed, Head, HeadAgain, PrefillAgain, PrefillAttention,
    };

    /// A pass without the attention of its prompt chunks.
    fn pass_ns(model: &LatencyModel, shape: &PassShape, beyond: &mut Extrapolations) -> f64 {
        model.overhead_ns() + model.parts_ns(shape, beyond).iter().sum::<f64>()
    }

    #[test]
    fn a_pass_is_the_sum_of_its_parts() {
        let model = model(&[
            (Block, 1, 0, 1, 10.0),
            (Block, 5, 0, 1, 30.0),
            (DecodeAttention, 1, 100, 1, 2.0),
            (DecodeAttention, 1, 300, 1, 4.0),
            (DecodeAttention, 3, 100, 1, 6.0),
            (DecodeAttention, 3, 300, 1, 12.0),
            (PrefillAttention, 2, 0, 1, 7.0),
            (DepthMix, 1, 0, 3, 1.0),
            (DepthMix, 5, 0, 3, 5.0),
            (Embed, 1, 0, 1, 0.5),
            (Head, 2, 0, 1, 3.0),
        ]);
        let mut beyond = Extrapolations::default();
        let shape = PassShape {
            rows: 4,
            decode_rows: 2,
            decode_history: 400,
            depths: 2,
            embed_rows: 1,
            head_rows: 2,
            before: PassBefore { rows: 9, head: true },
        };
        // overhead + block + decode attention at 2 rows of 200 + depth mix halfway from 1 depth to 3 + embed + head
        let expected = 0.25 + 25.0 + 6.0 + 2.0 + 0.5 + 3.0;
        assert!((pass_ns(&model, &shape, &mut beyond) - 1e3 * expected).abs() < 1e-6);
        assert_eq!(model.prefill_attention_ns(2, 0, &mut beyond), 7e3);
        let mut less = profile(&[
            (PrefillAttention, 2, 0, 1, -7.0),
            (Block, 1, 0, 1, 9.0),
            (Embed, 1, 0, 1, 0.0),
            (Head, 1, 0, 1, 0.0),
        ]);
        assert_eq!(LatencyModel::new(&less).unwrap().prefill_attention_ns(2, 0, &mut beyond), -7e3);
        less.points[0].spread_us = -1.0;
        assert!(matches!(LatencyModel::new(&less), Err(LatencyError::BadTime { time_us: -1.0, .. })));
        assert!(beyond.is_empty(), "{beyond}");
        let empty = PassShape { depths: 1, ..PassShape::default() };
        assert_eq!(pass_ns(&model, &empty, &mut beyond), 250.0);
    }

    #[test]
    fn beside_the_chunk_with_the_most_keys_others_take_their_own_time() {
        let prefill = [(Block, 9, 0, 1, 10.0), (PrefillAttention, 1, 0, 1, 1.0), (PrefillAttention, 9, 0, 1, 9.0)];
        let again = [(PrefillAgain, 1, 0, 1, 0.25), (PrefillAgain, 9, 0, 1, 2.25)];
        let (alone, both) = (model(&prefill), model(&[prefill.as_slice(), &again].concat()));
        let beyond = &mut Extrapolations::default();
        for chunks in [[(3, 0), (8, 0), (1, 0)], [(8, 0), (1, 0), (3, 0)]] {
            assert_eq!(alone.prefills_ns(chunks.into_iter(), beyond), 12e3, "{chunks:?}");
            assert_eq!(both.prefills_ns(chunks.into_iter(), beyond), 9e3, "{chunks:?}");
        }
        assert_eq!(both.prefills_ns([(5, 0)].into_iter(), beyond), 5e3);
        assert_eq!(both.prefills_ns(std::iter::empty(), beyond), 0.0);
        assert!(beyond.is_empty(), "{beyond}");
        both.prefills_ns([(9, 0), (8, 1)].into_iter(), beyond);
        assert!(beyond.iter().any(|(component, _)| component == PrefillAgain), "{beyond}");
    }

    #[test]
    fn a_head_that_ran_just_before_takes_its_own_time() {
        let model = model(&[(Block, 2, 0, 1, 10.0), (Head, 2, 0, 1, 3.0), (HeadAgain, 2, 0, 1, 2.0)]);
        let mut beyond = Extrapolations::default();
        let shape = PassShape { rows: 2, head_rows: 2, ..PassShape::default() };
        assert_eq!(pass_ns(&model, &shape, &mut beyond), 13_250.0);
        assert_eq!(
            pass_ns(&model, &PassShape { before: PassBefore { rows: 0, head: true }, ..shape }, &mut beyond),
            12_250.0
        );
        assert_eq!([false, true].map(|again| model.head_ns(2, again, &mut beyond)), [3e3, 2e3]);
        assert!(beyond.is_empty());
        model.head_ns(3, true, &mut beyond);
        assert_eq!(beyond.iter().map(|(component, _)| component).collect::<Vec<_>>(), [HeadAgain]);
    }

    #[test]
    fn a_pass_after_one_of_more_rows_takes_longer() {
        let more = [(1, 2, 4.0), (1, 8, 10.0), (4, 8, 6.0)];
        let more = more.map(|(rows, before, time)| (AfterMore, rows, before, 1, time));
        let model = model(&[&[(Block, 1, 0, 1, 100.0), (Block, 8, 0, 1, 100.0)], &more[..]].concat());
        let takes = |rows, before| {
            let mut beyond = Extrapolations::default();
            let shape = PassShape { rows, before: PassBefore { rows: before, head: false }, ..PassShape::default() };
            let ns = pass_ns(&model, &shape, &mut beyond) - 100_250.0;
            assert!(beyond.is_empty());
            ns.round()
        };
        assert_eq!([(1, 0), (1, 1), (4, 2), (8, 8)].map(|(rows, before)| takes(rows, before)), [0.0; 4]);
        assert_eq!([takes(1, 2), takes(1, 5), takes(1, 8), takes(1, 99)], [4e3, 7e3, 10e3, 10e3]);
        // Between 1 row and 4: a third of the way.
        assert_eq!([takes(2, 8), takes(4, 6), takes(6, 8)], [8667.0, 3e3, 6e3]);
    }

    #[test]
    fn below_the_grid_time_is_that_of_its_edge() {
        let model = model(&[(Block, 4, 0, 1, 10.0), (Block, 8, 0, 1, 30.0), (DecodeAttention, 4, 64, 1, 5.0)]);
        let mut beyond = Extrapolations::default();
        assert_eq!(model.times.block.at(1, Block, &mut beyond), 10e3);
        assert_eq!(model.times.decode_attention.at(1, 3.0, DecodeAttention, &mut beyond), 5e3);
        assert!(beyond.is_empty());
    }

    #[test]
    fn above_the_grid_the_last_slope_goes_on_and_is_reported() {
        let model = model(&[
            (Block, 1, 0, 1, 10.0),
            (Block, 2, 0, 1, 12.0),
            (Head, 1, 0, 1, 9.0),
            (Head, 2, 0, 1, 8.0),
            (DecodeAttention, 1, 10, 1, 1.0),
            (DecodeAttention, 1, 20, 1, 2.0),
            (DecodeAttention, 2, 10, 1, 2.0),
            (DecodeAttention, 2, 20, 1, 4.0),
        ]);
        let mut beyond = Extrapolations::default();
        assert_eq!(model.times.block.at(7, Block, &mut beyond), 22e3);
        assert_eq!(model.times.block.at(5, Block, &mut beyond), 18e3);
        assert_eq!(model.head_ns(10, false, &mut beyond), 8e3, "a falling last slope does not go on");
        assert_eq!(model.times.decode_attention.at(2, 40.0, DecodeAttention, &mut beyond), 8e3);
        assert_eq!(model.times.decode_attention.at(4, 20.0, DecodeAttention, &mut beyond), 8e3);
        let found: Vec<_> = beyond.iter().collect();
        assert_eq!(
            found,
            [
                (Block, Extrapolation { count: 2, rows: 7, kv_tokens: 0 }),
                (DecodeAttention, Extrapolation { count: 2, rows: 4, kv_tokens: 40 }),
                (Head, Extrapolation { count: 1, rows: 10, kv_tokens: 0 }),
            ]
        );
        assert_eq!(beyond.to_string().lines().count(), 3);
    }

    #[test]
    fn more_depths_than_were_measured_cost_the_most_measured_and_are_reported() {
        let model = model(&[(Block, 1, 0, 1, 1.0), (DepthMix, 1, 0, 2, 3.0), (DepthMix, 8, 0, 2, 3.0)]);
        let mix = |depths| {
            let mut beyond = Extrapolations::default();
            let shape = PassShape { rows: 1, depths, ..PassShape::default() };
            (pass_ns(&model, &shape, &mut beyond) - 1250.0, beyond.is_empty())
        };
        assert_eq!([mix(1), mix(2), mix(3), mix(4)], [(0.0, true), (3e3, true), (3e3, false), (3e3, false)]);
    }

    #[test]
    fn each_number_of_rows_has_its_own_range_of_histories() {
        let model = model(&[
            (Block, 1, 0, 1, 1.0),
            (DecodeAttention, 1, 0, 1, 0.0),
            (DecodeAttention, 1, 100, 1, 10.0),
            (DecodeAttention, 3, 0, 1, 0.0),
            (DecodeAttention, 3, 50, 1, 15.0),
        ]);
        let mut beyond = Extrapolations::default();
        assert_eq!(model.times.decode_attention.at(1, 100.0, DecodeAttention, &mut beyond), 10e3);
        assert!(beyond.is_empty());
        assert_eq!(model.times.decode_attention.at(2, 100.0, DecodeAttention, &mut beyond), 20e3);
        assert!(!beyond.is_empty());
    }

    #[test]
    fn profiles_that_cannot_be_interpolated_are_refused() {
        let error = |points: &[_]| LatencyModel::new(&profile(points)).unwrap_err().to_string();
        assert!(error(&[(Head, 1, 0, 1, 1.0)]).contains("`block`"));
        assert!(error(&[(Block, 3, 0, 1, f64::NAN)]).contains("rows 3"));
        assert!(error(&[(Block, 3, 0, 1, -1.0)]).contains("-1"));
        assert!(error(&[(Block, 3, 0, 1, 1.0), (Block, 3, 0, 1, 2.0)]).contains("twice"));
        let mut bad = profile(&[(Block, 1, 0, 1, 1.0)]);
        bad.meta.num_loops = 0;
        assert_eq!(LatencyModel::new(&bad).unwrap_err(), LatencyError::Loops(0));
    }

    proptest! {
        #[test]
        fn time_passes_through_its_points_and_lies_between_them(
            times in prop::collection::btree_map(1u32..30_000, 0.0f64..1e5, 1..12),
            rows in 1u32..40_000,
        ) {
            let points: Vec<_> = times.iter().map(|(&rows, &time)| (Block, rows, 0, 1, time)).collect();
            let model = model(&points);
            let mut beyond = Extrapolations::default();
            for (&rows, &time) in &times {
                prop_assert!((model.times.block.at(rows, Block, &mut beyond) - time * 1e3).abs() < 1e-6);
            }
            prop_assert!(beyond.is_empty());
            let found = model.times.block.at(rows, Block, &mut beyond);
            let below = times.range(..=rows).next_back().map(|(_, time)| time * 1e3);
            let above = times.range(rows..).next().map(|(_, time)| time * 1e3);
            let (Some(low), Some(high)) = (below.or(above), above.or(below)) else { unreachable!() };
            prop_assert!(found >= low.min(high) - 1e-6);
            prop_assert!(above.is_none() || found <= low.max(high) + 1e-6);
            prop_assert_eq!(beyond.is_empty(), above.is_some());
        }
    }
}

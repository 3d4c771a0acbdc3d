//! Time of the components of a pass, from its work.

use std::collections::{BTreeMap, BTreeSet};

use traces::{ChunkWork, Component, LatencyProfile, PassWork, Point};

use crate::curve::{Curve, Surface, Table};
use crate::extrapolation::Extrapolations;
use crate::model::LatencyError;

/// One measured quantity of every component of a pass: its time, or its spread.
#[derive(Clone, Debug)]
pub(crate) struct Components {
    block: Table,
    elementwise: Table,
    all_reduce: Table,
    lora: Table,
    after_more: AfterMore,
    decode_attention: Surface,
    prefill_attention: Surface,
    /// `None` where it was not measured.
    prefill_again: Option<Surface>,
    /// By distinct depths less 1.
    depth_mix: Vec<Table>,
    embed: Table,
    head: Table,
    /// `None` where it was not measured.
    head_again: Option<Table>,
    exit_signal: Table,
    exit_decision: Table,
    kv_fill: Table,
    exit_attention: Surface,
}

impl Components {
    pub(crate) fn new(profile: &LatencyProfile, value_us: fn(&Point) -> f64) -> Result<Self, LatencyError> {
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
            all_reduce: by_rows(Component::AllReduce)?,
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
            exit_signal: by_rows(Component::ExitSignal)?,
            exit_decision: by_rows(Component::ExitDecision)?,
            kv_fill: by_rows(Component::KvFill)?,
            exit_attention: Surface::new(curves_by_rows(Component::ExitAttention)?),
        })
    }

    #[inline]
    fn head(&self, rows: u32, again: bool, beyond: &mut Extrapolations) -> f64 {
        match &self.head_again {
            Some(table) if again => table.at(rows, Component::HeadAgain, beyond),
            _ => self.head.at(rows, Component::Head, beyond),
        }
    }

    #[inline]
    fn exit_attention(&self, rows: u32, history: f64, beyond: &mut Extrapolations) -> f64 {
        self.exit_attention.at(rows, history, Component::ExitAttention, beyond)
    }

    /// Time of the components until the exits are decided, in nanoseconds, without the attention of chunks. The head runs for
    /// `head_rows` rows.
    pub(crate) fn run(&self, work: &PassWork, head_rows: u32, beyond: &mut Extrapolations) -> [(Component, f64); 11] {
        let &PassWork { rows, decode_rows, depths, embed_rows, signal_rows, before, .. } = work;
        let mix = &self.depth_mix[depths.clamp(1, self.depth_mix.len() as u32) as usize - 1];
        let history = work.mean_decode_history();
        [
            (Component::Block, self.block.at(rows, Component::Block, beyond)),
            (Component::Elementwise, self.elementwise.at(rows, Component::Elementwise, beyond)),
            (Component::AllReduce, self.all_reduce.at(rows, Component::AllReduce, beyond)),
            (Component::Lora, self.lora.at(rows, Component::Lora, beyond)),
            (Component::AfterMore, self.after_more.at(rows, before.rows)),
            (
                Component::DecodeAttention,
                self.decode_attention.at(decode_rows, history, Component::DecodeAttention, beyond),
            ),
            (Component::DepthMix, mix.at(rows, Component::DepthMix, beyond)),
            (Component::Embed, self.embed.at(embed_rows, Component::Embed, beyond)),
            (Component::Head, self.head(head_rows, before.head, beyond)),
            (Component::ExitSignal, self.exit_signal.at(signal_rows, Component::ExitSignal, beyond)),
            (Component::ExitAttention, self.exit_attention(head_rows, history, beyond)),
        ]
    }

    /// Time of the components that run once the exits of a pass are decided, in nanoseconds. The head runs for `head_rows`
    /// rows, for `decided_rows` of them anew.
    pub(crate) fn exit(
        &self,
        work: &PassWork,
        [head_rows, decided_rows]: [u32; 2],
        beyond: &mut Extrapolations,
    ) -> [(Component, f64); 4] {
        [
            (Component::Head, self.head(head_rows, work.head_is_warm(), beyond)),
            (Component::ExitDecision, self.exit_decision.at(decided_rows, Component::ExitDecision, beyond)),
            (Component::KvFill, self.kv_fill.at(work.filled_depths, Component::KvFill, beyond)),
            (Component::ExitAttention, self.exit_attention(head_rows, work.mean_decode_history(), beyond)),
        ]
    }

    /// Time that attention of one chunk adds to a pass, in nanoseconds.
    pub(crate) fn chunk(&self, chunk: ChunkWork, beyond: &mut Extrapolations) -> f64 {
        self.prefill_attention.at(chunk.tokens, chunk.history.into(), Component::PrefillAttention, beyond)
    }

    /// Time that attention of all chunks adds to a pass, in nanoseconds. The chunk with the most keys counts as a first
    /// chunk, every other one as a further chunk.
    pub(crate) fn chunks(&self, chunks: &[ChunkWork], beyond: &mut Extrapolations) -> f64 {
        let keys = |chunk: ChunkWork| chunk.tokens + chunk.history;
        let (mut longest, mut others) = (None, 0.0);
        for &chunk in chunks {
            let other = match longest {
                Some(before) if keys(chunk) <= keys(before) => chunk,
                before => {
                    longest = Some(chunk);
                    let Some(before) = before else { continue };
                    before
                }
            };
            others += self.further_chunk(other, beyond);
        }
        others + longest.map_or(0.0, |chunk| self.chunk(chunk, beyond))
    }

    fn further_chunk(&self, chunk: ChunkWork, beyond: &mut Extrapolations) -> f64 {
        match &self.prefill_again {
            Some(surface) => surface.at(chunk.tokens, chunk.history.into(), Component::PrefillAgain, beyond),
            None => self.chunk(chunk, beyond),
        }
    }
}

/// Tables of `depth_mix` by number of distinct depths, from 1 (which adds nothing) to the number of loops. Numbers
/// between two measured ones are interpolated. Numbers above the largest measured one take its time and count as
/// extrapolated.
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

/// Extra time of a pass that follows a larger one; zero otherwise. Beyond the measured rows of either pass, the time is
/// that of the largest measured number.
#[derive(Clone, Debug)]
struct AfterMore {
    surface: Surface,
    most_rows: u32,
    most_before: f64,
}

impl AfterMore {
    /// By rows: curves over the rows of the previous pass.
    fn new(mut curves: BTreeMap<u32, Curve>) -> Self {
        for (&rows, curve) in &mut curves {
            let more = curve.points().filter(|&(before, _)| before > rows);
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

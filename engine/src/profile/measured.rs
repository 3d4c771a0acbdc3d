//! Measurements of a profiler's rounds, and the profile that follows from them.

use std::collections::BTreeMap;

use latency::{LatencyError, LatencyModel, TimedPass};
use scheduler::KvFill;
use traces::{Component, LatencyProfile, LoggedPass, PassRun, Point, ProfileMeta};

use super::grid::{SHORT, Shape};
use super::probe::{Probe, at_one_pace};
use super::statistics::{Summary, make_rising};
use super::{Profiler, WAYS};

/// Share of the block's time that a component can save at most.
const MOST_SAVED: f64 = 0.5;

/// A shape, and whether its runs at the first depth count, where rows are embedded.
pub(super) type Counted = (Shape, bool);

/// Measurements of one round.
#[derive(Clone, Debug, Default)]
pub(super) struct Round {
    pub visits: Vec<Visit>,
    pub probes: Vec<Probe>,
    pub shapes: PassRun,
}

/// Times of every shape at one visit, in microseconds.
pub(super) type Visit = BTreeMap<Counted, Vec<f64>>;

/// Measurements of some rounds of a [`Profiler`].
pub struct Measured<'a> {
    pub(super) profiler: &'a Profiler,
    pub(super) visits: Vec<&'a Visit>,
    pub(super) probes: Vec<&'a Probe>,
    /// Logged passes of the shapes.
    pub(super) passes: Vec<&'a LoggedPass>,
}

impl<'a> Measured<'a> {
    pub(super) fn counted(&self) -> impl Iterator<Item = Counted> {
        self.visits[0].keys().copied()
    }

    /// Times of some runs.
    pub(super) fn of(&self, counted: Counted) -> Summary {
        Summary::of(&self.visits.iter().flat_map(|visit| &visit[&counted]).copied().collect::<Vec<_>>())
    }

    /// Difference of the times of two kinds of runs, visit by visit.
    fn difference(&self, of: Counted, less: Counted) -> Summary {
        let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len() as f64;
        let differences = self.visits.iter().map(|visit| mean(&visit[&of]) - mean(&visit[&less]));
        Summary::of(&differences.collect::<Vec<_>>())
    }

    /// Slowdown by other work on the machine: the mean of all runs over that of each shape's middle half, over all
    /// shapes. It is 1 on an idle machine.
    pub fn slowdown(&self) -> f64 {
        let all: f64 = self.visits.iter().flat_map(|visit| visit.values().flatten()).sum();
        let middles =
            self.counted().map(|counted| self.of(counted)).map(|found| found.middle * f64::from(found.repeats));
        all / middles.sum::<f64>()
    }

    /// Probes during the rounds, which tell how fast the machine was under steady load.
    pub fn probes(&self) -> impl Iterator<Item = &'a Probe> {
        self.probes.iter().copied()
    }

    /// Passes under steady load at one speed of the machine. In each cycle of probes the load is served in every way, so a cycle
    /// says how fast the machine was.
    ///
    /// # Errors
    /// If the components cannot be interpolated.
    pub fn steady_passes(&self) -> Result<Vec<TimedPass<'a>>, LatencyError> {
        self.steady_passes_over(&self.profile("", ""))
    }

    /// As [`steady_passes`](Self::steady_passes), with the components at hand.
    pub(super) fn steady_passes_over(&self, components: &LatencyProfile) -> Result<Vec<TimedPass<'a>>, LatencyError> {
        let model = LatencyModel::new(components)?;
        Ok(at_one_pace(self.probes.chunks(WAYS), |work| model.pass_ns(work)))
    }

    /// How much longer passes of a prompt chunk beside decode rows took than the sum of components, as a share of the sum: median
    /// of the passes at one depth, and of those at several. `None` where there were none.
    pub fn beside_chunks(&self, components: &LatencyModel) -> [Option<f64>; 2] {
        [false, true].map(|at_several| {
            let beside = |pass: &&&LoggedPass| !pass.work.chunks.is_empty() && pass.work.decode_rows > 0;
            let passes = self.passes.iter().filter(beside).filter(|pass| (pass.work.depths > 1) == at_several);
            let excess = |pass: &&LoggedPass| pass.elapsed.0 as f64 / components.pass_ns(&pass.work) - 1.0;
            let mut excesses: Vec<f64> = passes.map(excess).collect();
            excesses.sort_by(f64::total_cmp);
            excesses.get(excesses.len() / 2).copied()
        })
    }

    /// Overhead of a pass under steady load in microseconds: the time of the scheduler and the serving loop.
    fn overhead(&self) -> f64 {
        let passes: usize = self.probes().map(|probe| probe.passes.len()).sum();
        self.probes().map(|probe| probe.elapsed.since(probe.in_executor()).as_micros_f64()).sum::<f64>() / passes as f64
    }

    /// The measured components before scaling to steady load: means of the middle halves. Components that are
    /// differences are at least zero, except those that [may save time](Component::can_take).
    pub(super) fn profile(&self, model: &str, source: &str) -> LatencyProfile {
        let served = &self.profiler.engine.model;
        let disagreement = self.profiler.disagreement();
        let halves = disagreement.map_or(String::new(), |share| format!("; halves differ by {:.1}%", 100.0 * share));
        LatencyProfile {
            meta: ProfileMeta {
                schema_version: LatencyProfile::SCHEMA_VERSION,
                model: model.to_owned(),
                fingerprint: served.fingerprint().to_owned(),
                num_loops: served.config().num_loops as u32,
                device: served.device_name(),
                software: format!("depthwise {}, {}", env!("CARGO_PKG_VERSION"), served.storage()),
                source: format!("{source}; {}; means of the middle half of times{halves}", served.device_state()),
                overhead_us: self.overhead(),
                weight_bytes: served.weight_bytes(),
                kv_bytes_per_token: served.kv_bytes_per_token(KvFill::Reuse),
                memory: None,
                kv_fill: Some(served.config().kv_fill)
                    .filter(|fill| *fill != KvFill::default())
                    .map(|fill| fill.to_string()),
                decode_q_len: None,
                heads_ahead_from: served.heads_ahead_from().map(|rows| rows as u32),
            },
            points: self.points(),
            mixed_attention: None,
        }
    }

    /// Time of the component of each shape. Time does not fall with history: where noise makes it fall, both points
    /// take the mean. Otherwise components, which are at least zero, would be too large on average.
    fn components(&self) -> BTreeMap<Shape, Summary> {
        let component = |shape: Shape| match shape.baseline() {
            Some(baseline) => self.difference((shape, false), (baseline, false)),
            None => self.of((shape, false)),
        };
        let shapes = self.counted().filter(|&(_, embeds)| !embeds).map(|(shape, _)| shape);
        let mut components: BTreeMap<Shape, Summary> = shapes.map(|shape| (shape, component(shape))).collect();
        let grid = &self.profiler.grid;
        let histories = || grid.histories.iter().copied();
        let decodes = grid.decodes.iter().map(|&rows| histories().map(move |history| Shape::Decode { rows, history }));
        let chunks = grid.chunks.iter().map(|&tokens| {
            std::iter::once(0).chain(histories()).map(move |history| Shape::Prefill { tokens, history })
        });
        let series = decodes.map(Iterator::collect).chain(chunks.map(Iterator::collect));
        for series in series.collect::<Vec<Vec<Shape>>>() {
            let series: Vec<Shape> = series.into_iter().filter(|shape| shape.baseline().is_some()).collect();
            let mut times: Vec<f64> = series.iter().map(|shape| components[shape].middle).collect();
            make_rising(&mut times);
            for (shape, time) in series.iter().zip(times) {
                components.get_mut(shape).expect("a shape of the grid is measured").middle = time;
            }
        }
        components
    }

    fn points(&self) -> Vec<Point> {
        let num_loops = self.profiler.num_loops() as u32;
        let heads_are_trips = self.profiler.engine.model.heads_ahead_from().is_some();
        let mut points: Vec<Point> = Vec::new();
        let embed = |rows| {
            let shape = Shape::Decode { rows, history: SHORT };
            self.difference((shape, true), (shape, false))
        };
        let components = self.components();
        // What noise takes for a saving is limited, so that every pass takes some time.
        let most_saved = |rows: u32| {
            let block = components.get(&Shape::Decode { rows, history: SHORT });
            block.map_or(0.0, |block| MOST_SAVED * block.middle)
        };
        let mut add = |component: Component, rows, kv_tokens, depths, part: Summary| {
            let Summary { middle, spread, repeats } = part;
            let middle = middle.max(-most_saved(rows));
            let (time_us, spread_us) = (if component.can_take(middle) { middle } else { 0.0 }, spread);
            points.push(Point { component, rows, kv_tokens, depths, time_us, spread_us, repeats });
        };
        for (&shape, &part) in &components {
            match shape {
                Shape::Decode { rows, history: SHORT } => {
                    add(Component::Block, rows, 0, 1, part);
                    add(Component::Embed, rows, 0, 1, embed(rows));
                    if self.profiler.grid.decodes.contains(&rows) {
                        add(Component::DecodeAttention, rows, SHORT, 1, Summary { middle: 0.0, spread: 0.0, ..part });
                    }
                }
                Shape::Decode { rows, history } => add(Component::DecodeAttention, rows, history, 1, part),
                Shape::AfterMore { rows, before, .. } => add(Component::AfterMore, rows, before, 1, part),
                Shape::Head { rows, again, .. } if !heads_are_trips => {
                    add(if again { Component::HeadAgain } else { Component::Head }, rows, 0, 1, part);
                    if !again {
                        // Found in passes under steady load.
                        add(Component::ExitDecision, rows, 0, 1, Summary { middle: 0.0, spread: 0.0, ..part });
                    }
                }
                Shape::Head { rows, history, again: false, within: false } => {
                    let within = components[&Shape::Head { rows, history, again: false, within: true }].middle;
                    add(Component::ExitDecision, rows, 0, 1, Summary { middle: part.middle - within, ..part });
                }
                Shape::Head { again: true, within: false, .. } => {}
                Shape::Head { rows, again, within: true, .. } => {
                    add(if again { Component::HeadAgain } else { Component::Head }, rows, 0, 1, part);
                }
                Shape::Signal { rows, .. } => add(Component::ExitSignal, rows, 0, 1, part),
                Shape::Mix { rows, depths, .. } => {
                    // Each row was at the first depth once per turn.
                    let embeds = embed(rows).middle.max(0.0) / f64::from(num_loops);
                    add(Component::DepthMix, rows, 0, depths, Summary { middle: part.middle - embeds, ..part });
                }
                Shape::Prefill { tokens, history } => add(Component::PrefillAttention, tokens, history, 1, part),
                Shape::Prefills { tokens, history } => {
                    let first = components[&Shape::Prefill { tokens, history }].middle;
                    add(Component::PrefillAgain, tokens, history, 1, Summary { middle: part.middle - first, ..part });
                }
                Shape::Exit { skips: false, .. } | Shape::Beside { .. } => {}
                Shape::Exit { rows, skips: true } => add(Component::KvFill, rows * (num_loops - 1), 0, 1, part),
            }
        }
        points.sort_by_key(|point| (point.component, point.depths, point.rows, point.kv_tokens));
        points
    }
}

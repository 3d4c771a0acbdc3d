//! Time of attention from a profile that measured it for whole passes, prompt chunks and decode rows together.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use traces::{ChunkWork, Component, MixedAttention, MixedPoint, PassWork, PrefillAxis, SkewCell};

use crate::curve::{Curve, line};
use crate::extrapolation::Extrapolations;

/// Attention of a pass, interpolated between measured passes.
///
/// Time is linear between measured points in each of four variables: prompt tokens, their context, decode rows and the
/// decode rows' history. A grid need not be full: between two numbers of prompt tokens, only the nearest ones that were
/// measured with a context as short count. A measured pass has decode rows of one history. Two rules cover other
/// passes:
///
/// - Where passes were measured with one prompt chunk each, several chunks take the sum of their single times, with one
///   kernel start. Decode rows add what they add to one chunk with the total of the tokens and the mean history.
/// - Uneven decode histories move the time from that at the mean history towards that at the longest, by a measured
///   share. The share was measured on batches with two lengths, as a function of the share of rows with the longer
///   history. Any other batch is treated as the batch of two lengths with the same mean, longest history and variance.
#[derive(Clone, Debug)]
pub(crate) struct AttentionModel {
    prefill_axis: PrefillAxis,
    /// Passes of decode rows only.
    decodes: ByRows,
    /// Passes with prompts, by prompt tokens.
    prompts: Vec<(f64, ByRows)>,
    /// The smallest measured values of all passes with prompts.
    least: Least,
    skew: Skew,
}

/// By decode rows, then by the context of the prompt tokens: a curve over the decode rows' history.
#[derive(Clone, Debug, Default)]
struct ByRows {
    slices: Vec<(f64, Vec<(f64, Curve)>)>,
    least: Least,
}

/// Lower bounds of a grid.
#[derive(Clone, Copy, Debug, Default)]
struct Least {
    /// Context of the prompt tokens.
    context: f64,
    /// History of decode rows.
    history: f64,
}

impl Least {
    fn of<'a>(points: impl Iterator<Item = &'a MixedPoint>) -> Self {
        let none = Self { context: f64::INFINITY, history: f64::INFINITY };
        points.fold(none, |least, point| Self {
            context: least.context.min(point.prefill_context),
            history: if point.decode_rows == 0 {
                least.history
            } else {
                least.history.min(point.decode_history.into())
            },
        })
    }
}

impl AttentionModel {
    /// Prepares measured passes for interpolation.
    pub fn new(mixed: &MixedAttention) -> Self {
        let mut prompts: BTreeMap<u32, Vec<&MixedPoint>> = BTreeMap::new();
        for point in &mixed.points {
            prompts.entry(point.prefill_tokens).or_default().push(point);
        }
        let decodes = prompts.remove(&0).unwrap_or_default();
        Self {
            least: Least::of(prompts.values().flatten().copied()),
            prefill_axis: mixed.prefill_axis,
            decodes: ByRows::new(&decodes),
            prompts: prompts.into_iter().map(|(tokens, points)| (tokens.into(), ByRows::new(&points))).collect(),
            skew: Skew::new(&mixed.skew),
        }
    }

    /// Time of attention in a pass, in nanoseconds.
    pub fn attention_ns(&self, work: &PassWork, beyond: &mut Extrapolations) -> f64 {
        let rows = work.decode_rows;
        let tokens: u32 = work.chunks.iter().map(|chunk| chunk.tokens).sum();
        let mean = work.mean_decode_history();
        let over_tokens = |of_chunk: &dyn Fn(u32, u32) -> f64| {
            let sum: f64 = work
                .chunks
                .iter()
                .map(|&ChunkWork { tokens, history }| f64::from(tokens) * of_chunk(tokens, history))
                .sum();
            if tokens == 0 { 0.0 } else { sum / f64::from(tokens) }
        };
        let context = over_tokens(&|tokens, history| self.context(tokens, history));
        let mut at = |tokens, context, rows, history| self.at(tokens, context, rows, history, beyond);

        let even = if rows + tokens == 0 { 0.0 } else { at(tokens, context, rows, mean) };
        let mut time = even;
        if work.chunks.len() > 1 && self.prefill_axis == PrefillAxis::History {
            let apart: f64 =
                work.chunks.iter().map(|&ChunkWork { tokens, history }| at(tokens, history.into(), 0, 0.0)).sum();
            let start = at(1, 0.0, 0, 0.0);
            let starts = start * (work.chunks.len() - 1) as f64;
            time += apart - starts - at(tokens, context, 0, 0.0);
        }
        let longest = f64::from(work.longest_decode_history);
        let variance = if rows == 0 { 0.0 } else { work.squared_decode_history / f64::from(rows) - mean * mean };
        if variance > 0.0 && longest > mean && !self.skew.is_empty() {
            let further = (at(tokens, context, rows, longest) - even).max(0.0);
            let history = over_tokens(&|_, history| f64::from(history));
            let long_share = variance / (variance + (longest - mean).powi(2));
            let batch = [tokens.into(), further / even, rows.into(), long_share, longest, history];
            time += self.skew.alpha(&batch) * further;
        }
        time.max(0.0)
    }

    /// Context of the tokens of a chunk, on the profile's prefill axis.
    fn context(&self, tokens: u32, history: u32) -> f64 {
        match self.prefill_axis {
            PrefillAxis::History => history.into(),
            PrefillAxis::Keys => f64::from(history) + f64::from(tokens) / 2.0,
        }
    }

    /// Time of a pass with prompt tokens of one context and decode rows of one history.
    fn at(&self, tokens: u32, context: f64, rows: u32, history: f64, beyond: &mut Extrapolations) -> f64 {
        if tokens == 0 {
            return self.decodes.at(context, rows, history, Component::DecodeAttention, beyond);
        }
        let part = Component::PrefillAttention;
        if self.prompts.last().is_some_and(|last| f64::from(tokens) > last.0) {
            beyond.count(part, tokens, context as u32);
        }
        let (context_or_least, history_or_least) = (context.max(self.least.context), history.max(self.least.history));
        let measured = |by_rows: &ByRows| {
            by_rows.least.context <= context_or_least && (rows == 0 || by_rows.least.history <= history_or_least)
        };
        between(&self.prompts, tokens.into(), measured, |by_rows| by_rows.at(context, rows, history, part, beyond))
    }
}

impl ByRows {
    fn new(points: &[&MixedPoint]) -> Self {
        /// By context: times by history.
        type Slices = Vec<(f64, BTreeMap<u32, f64>)>;
        let mut by_rows: BTreeMap<u32, Slices> = BTreeMap::new();
        for point in points {
            let slices = by_rows.entry(point.decode_rows).or_default();
            let place = slices.partition_point(|slice| slice.0 < point.prefill_context);
            if slices.get(place).is_none_or(|slice| slice.0 != point.prefill_context) {
                slices.insert(place, (point.prefill_context, BTreeMap::new()));
            }
            slices[place].1.insert(point.decode_history, point.time_us * 1e3);
        }
        let curves = |slices: Slices| slices.into_iter().map(|(context, curve)| (context, Curve::new(curve))).collect();
        Self {
            least: Least::of(points.iter().copied()),
            slices: by_rows.into_iter().map(|(rows, slices)| (rows.into(), curves(slices))).collect(),
        }
    }

    fn at(&self, context: f64, rows: u32, history: f64, part: Component, beyond: &mut Extrapolations) -> f64 {
        if self.slices.last().is_some_and(|last| f64::from(rows) > last.0) {
            beyond.count(part, rows, history as u32);
        }
        between(
            &self.slices,
            rows.into(),
            |_| true,
            |by_context| {
                let ends = by_context.last().map_or((0.0, f64::INFINITY), |(context, curve)| (*context, curve.end()));
                if context > ends.0 || (rows > 0 && history > ends.1) {
                    beyond.count(part, rows, context.max(history) as u32);
                }
                between(by_context, context, |_| true, |curve| curve.at(history))
            },
        )
    }
}

/// Interpolates `value` between the nearest neighbours of `x` for which `measured` is true, or between the nearest
/// neighbours if there are none. Below the first point the value is constant; above the last one the last slope
/// continues.
fn between<T>(points: &[(f64, T)], x: f64, measured: impl Fn(&T) -> bool, mut value: impl FnMut(&T) -> f64) -> f64 {
    let place = points.partition_point(|point| point.0 < x);
    let above = || points[place..].iter().find(|point| measured(&point.1));
    let mut lower = points[..place].iter().rev().filter(|point| measured(&point.1));
    match (lower.next(), above(), points) {
        (_, Some((high, above)), _) if *high == x => value(above),
        (Some((low, below)), Some((high, above)), _) => line((*low, value(below)), (*high, value(above)), x),
        (Some((high, last)), None, _) => match lower.next() {
            Some((low, below)) => line((*low, value(below)), (*high, value(last)), x),
            None => value(last),
        },
        (None, Some((_, first)), _) => value(first),
        (None, None, []) => 0.0,
        (None, None, _) => value(&points[place.min(points.len() - 1)].1),
    }
}

/// Measured shares, sorted by the bounds of their cells.
#[derive(Clone, Debug, Default)]
struct Skew(Vec<(Batch, f64)>);

/// Features of a batch, or the upper bounds of a cell: prompt tokens, lever, decode rows, share of long rows, longest
/// history, history before the prompts.
type Batch = [f64; 6];

impl Skew {
    fn new(cells: &[SkewCell]) -> Self {
        let bounds = |cell: &SkewCell| {
            let SkewCell { prefill_tokens, lever, decode_rows, long_share, longest_history, prefill_history, .. } =
                *cell;
            [
                prefill_tokens.into(),
                lever,
                decode_rows.into(),
                long_share,
                longest_history.into(),
                prefill_history.into(),
            ]
        };
        let mut cells: Vec<_> = cells.iter().map(|cell| (bounds(cell), cell.alpha)).collect();
        cells.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal));
        Self(cells)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Share of the cell that contains the batch: for each bound in turn, the smallest one that is not exceeded, or the
    /// largest.
    fn alpha(&self, batch: &Batch) -> f64 {
        let mut cells = &self.0[..];
        for (axis, &value) in batch.iter().enumerate() {
            let reaching = cells.partition_point(|cell| cell.0[axis] < value);
            let Some(bound) = cells.get(reaching).or(cells.last()).map(|cell| cell.0[axis]) else { return 0.0 };
            let first = cells.partition_point(|cell| cell.0[axis] < bound);
            let end = cells.partition_point(|cell| cell.0[axis] <= bound);
            cells = &cells[first..end];
        }
        cells.first().map_or(0.0, |cell| cell.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that takes 10 us to start, 1 us per 100 pairs of chunk token and history or predecessor, and 1 us per
    /// 1,000 tokens of decode history.
    fn kernel(chunk: u32, before: u32, rows: u32, history: u32) -> f64 {
        let pairs = f64::from(chunk) * (f64::from(before) + f64::from(chunk) / 2.0);
        10.0 + pairs / 100.0 + f64::from(rows) * f64::from(history) / 1e3
    }

    fn model(skew: Vec<SkewCell>) -> AttentionModel {
        let mut points = Vec::new();
        for prefill_tokens in [0, 100, 200, 400] {
            for prefill_history in if prefill_tokens == 0 { vec![0] } else { vec![0, 1000] } {
                for decode_rows in [0, 1, 16].into_iter().filter(|rows| prefill_tokens + rows > 0) {
                    for decode_history in if decode_rows == 0 { vec![0] } else { vec![16, 4096] } {
                        let time_us = kernel(prefill_tokens, prefill_history, decode_rows, decode_history);
                        let prefill_context = f64::from(prefill_history);
                        points.push(MixedPoint {
                            prefill_tokens,
                            prefill_context,
                            decode_rows,
                            decode_history,
                            time_us,
                        });
                    }
                }
            }
        }
        AttentionModel::new(&MixedAttention { prefill_axis: PrefillAxis::History, points, skew })
    }

    /// A cell without bounds, which matches every batch.
    fn cell(alpha: f64) -> SkewCell {
        SkewCell {
            prefill_tokens: u32::MAX,
            lever: f64::INFINITY,
            decode_rows: u32::MAX,
            long_share: 1.0,
            longest_history: u32::MAX,
            prefill_history: u32::MAX,
            alpha,
        }
    }

    fn work(chunks: &[(u32, u32)], histories: &[u32]) -> PassWork {
        PassWork {
            chunks: chunks.iter().map(|&(tokens, history)| ChunkWork { tokens, history }).collect(),
            decode_rows: histories.len() as u32,
            decode_history: histories.iter().map(|&history| u64::from(history)).sum(),
            squared_decode_history: histories.iter().map(|&history| f64::from(history).powi(2)).sum(),
            longest_decode_history: histories.iter().copied().max().unwrap_or(0),
            ..PassWork::default()
        }
    }

    fn time_us(model: &AttentionModel, chunks: &[(u32, u32)], histories: &[u32]) -> f64 {
        let mut beyond = Extrapolations::default();
        let time = model.attention_ns(&work(chunks, histories), &mut beyond) / 1e3;
        assert!(beyond.is_empty(), "{beyond}");
        time
    }

    #[test]
    fn a_pass_between_measured_ones_is_interpolated() {
        let model = model(Vec::new());
        assert!((time_us(&model, &[], &[1000, 3000]) - 14.0).abs() < 1e-9);
        assert!((time_us(&model, &[(200, 500)], &[2000; 8]) - kernel(200, 500, 8, 2000)).abs() < 1e-9);
        assert_eq!(time_us(&model, &[], &[]), 0.0);
    }

    #[test]
    fn chunks_of_different_prompts_do_not_attend_to_each_other() {
        let model = model(Vec::new());
        // Each of the four chunks has 100 * 50 pairs; one chunk of 400 would have 400 * 200. A kernel start takes as
        // long as the smallest measured chunk, 60 us.
        let four = time_us(&model, &[(100, 0); 4], &[]);
        assert!((four - 60.0).abs() < 1e-9, "{four}");
        let with_decodes = time_us(&model, &[(100, 0); 4], &[1000; 4]);
        assert!((with_decodes - four - 4.0).abs() < 1e-9, "{with_decodes}");
    }

    #[test]
    fn uneven_histories_cost_what_two_lengths_of_the_same_mean_longest_and_variance_do() {
        let model = model(vec![SkewCell { long_share: 0.3, ..cell(0.9) }, cell(0.5)]);
        let even = kernel(0, 0, 4, 2000);
        let moved = |histories| (time_us(&model, &[], histories) - even) / (time_us(&model, &[], &[3000; 4]) - even);
        assert!((moved(&[1000, 1000, 3000, 3000]) - 0.5).abs() < 1e-9, "half of the rows have the longer history");
        assert!((moved(&[1600, 1600, 1600, 3200]) - 0.9 * 1.2).abs() < 1e-9, "a quarter");
        assert!((moved(&[1000, 2000, 2000, 3000]) - 0.5).abs() < 1e-9, "as if it were a third");
        assert!((moved(&[1500, 1750, 1750, 3000]) - 0.9).abs() < 1e-9, "as if it were a fourth and a bit");
        assert_eq!(moved(&[2000; 4]), 0.0);
    }

    #[test]
    fn a_batch_takes_the_cell_whose_bounds_reach_as_far_or_the_last() {
        let bounded =
            |prefill_tokens, lever, decode_rows, alpha| SkewCell { prefill_tokens, lever, decode_rows, ..cell(alpha) };
        let skew = Skew::new(&[
            bounded(0, f64::INFINITY, 8, 0.1),
            bounded(0, f64::INFINITY, 64, 0.2),
            bounded(512, 0.5, 8, 0.3),
            bounded(512, f64::INFINITY, 16, 0.4),
        ]);
        let alpha = |tokens: u32, lever, rows: u32| skew.alpha(&[tokens.into(), lever, rows.into(), 0.5, 100.0, 0.0]);
        assert_eq!([alpha(0, 2.0, 2), alpha(0, 2.0, 9), alpha(0, 2.0, 100)], [0.1, 0.2, 0.2]);
        assert_eq!([alpha(1, 0.5, 12), alpha(512, 0.6, 12), alpha(4096, 0.6, 12)], [0.3, 0.4, 0.4]);
    }

    #[test]
    fn prompt_tokens_that_were_measured_with_longer_histories_only_are_passed_over() {
        let point = |prefill_tokens, before, time_us| MixedPoint {
            prefill_tokens,
            prefill_context: before,
            decode_rows: 0,
            decode_history: 0,
            time_us,
        };
        let points = vec![
            point(0, 0.0, 0.0),
            point(100, 0.0, 10.0),
            point(100, 1000.0, 110.0),
            point(200, 500.0, 120.0),
            point(200, 1000.0, 220.0),
            point(300, 0.0, 30.0),
            point(300, 1000.0, 330.0),
        ];
        let model = AttentionModel::new(&MixedAttention { points, ..MixedAttention::default() });
        assert_eq!(time_us(&model, &[(150, 0)], &[]), 15.0, "not towards 200 tokens, that had 500 before them");
        assert_eq!(time_us(&model, &[(150, 500)], &[]), 90.0);
        assert_eq!(time_us(&model, &[(200, 0)], &[]), 20.0);
    }

    #[test]
    fn passes_of_several_chunks_are_looked_up_by_keys_where_they_were_measured() {
        let mut points = Vec::new();
        for prefill_tokens in [0_u32, 100, 400] {
            for keys in if prefill_tokens == 0 { vec![0.0] } else { vec![50.0, 2000.0] } {
                let time_us = 10.0 + f64::from(prefill_tokens) * keys / 100.0;
                let point =
                    MixedPoint { prefill_tokens, prefill_context: keys, decode_rows: 0, decode_history: 0, time_us };
                points.push(point);
            }
        }
        let model = AttentionModel::new(&MixedAttention { prefill_axis: PrefillAxis::Keys, points, skew: Vec::new() });
        assert!((time_us(&model, &[(200, 500)], &[]) - kernel(200, 500, 0, 0)).abs() < 1e-9);
        assert!((time_us(&model, &[(100, 0); 4], &[]) - (10.0 + 4.0 * 50.0)).abs() < 1e-9);
        // 300 tokens with 150 keys each and 100 with 1050.
        assert!((time_us(&model, &[(300, 0), (100, 1000)], &[]) - (10.0 + 450.0 + 1050.0)).abs() < 1e-9);
    }

    #[test]
    fn passes_beyond_the_measured_ones_are_reported() {
        let mut beyond = Extrapolations::default();
        model(Vec::new()).attention_ns(&work(&[(500, 0)], &[]), &mut beyond);
        model(Vec::new()).attention_ns(&work(&[], &[5000]), &mut beyond);
        let parts: Vec<Component> = beyond.iter().map(|(component, _)| component).collect();
        assert_eq!(parts, [Component::DecodeAttention, Component::PrefillAttention]);
    }
}

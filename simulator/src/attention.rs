//! Time of attention where it was measured for whole passes, prompt chunks and decode rows together.

use std::collections::BTreeMap;

use scheduler::{Pass, RowKind, Segment};
use traces::{Component, MixedAttention, MixedPoint, SkewCell};

use crate::latency::{Curve, Extrapolations, line};

/// What the time of attention in a pass depends on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionShape {
    /// Tokens and history of each prompt chunk, and of each chunk of backfill.
    pub chunks: Vec<(u32, u32)>,
    /// Decode rows, and rows of backfill that are alone.
    pub decode_rows: u32,
    /// Sum of their histories, in tokens.
    pub history: u64,
    /// Sum of the squares of their histories.
    pub squared_history: f64,
    /// The shortest of their histories.
    pub shortest: u32,
    /// The longest of their histories.
    pub longest: u32,
}

impl AttentionShape {
    /// Takes the shape of a pass, in place of the one before; `history` says how many tokens a segment attends to
    /// before its first.
    pub fn measure(&mut self, pass: &Pass<'_>, history: impl Fn(&Segment) -> u32) {
        self.chunks.clear();
        *self = Self { chunks: std::mem::take(&mut self.chunks), shortest: u32::MAX, ..Self::default() };
        for segment in pass.segments {
            let history = history(segment);
            if is_chunk(segment) {
                self.chunks.push((segment.tokens, history));
                continue;
            }
            self.decode_rows += 1;
            self.history += u64::from(history);
            self.squared_history += f64::from(history) * f64::from(history);
            self.shortest = self.shortest.min(history);
            self.longest = self.longest.max(history);
        }
    }
}

/// Whether attention runs over the rows of a segment together, as over a prompt chunk, rather than as a decode row.
pub fn is_chunk(segment: &Segment) -> bool {
    segment.kind == RowKind::Prompt || segment.tokens > 1
}

/// Attention of a pass, interpolated over measured passes.
///
/// Time is linear between measured points in each of chunk, history before it, decode rows and their history.
/// Of a measured pass, the prompt part is one chunk, and the decode rows have one history. So:
///
/// - Several chunks cost what each costs alone, but one start of the kernel; the decode rows add to that what they
///   add to one chunk of the same total and mean history.
/// - Uneven histories move the time from that at their mean towards that at the longest, by the measured share.
///   That share was measured on batches of two lengths, which are as uneven as a mean, a shortest and a longest
///   history allow (their variance is `(longest - mean) * (mean - shortest)`, and that of others is less). Other
///   batches move by that share times their variance over the largest possible.
#[derive(Clone, Debug)]
pub struct AttentionModel {
    /// Decode rows alone.
    decodes: ByRows,
    /// By tokens of the chunk.
    chunks: Vec<(u32, ByRows)>,
    skew: Skew,
}

/// By decode rows, then by history before the chunk, a curve over the decode rows' history.
#[derive(Clone, Debug, Default)]
struct ByRows(Vec<(u32, Vec<(u32, Curve)>)>);

impl AttentionModel {
    /// Prepares measured passes for look-up.
    pub fn new(mixed: &MixedAttention) -> Self {
        let mut chunks: BTreeMap<u32, Vec<&MixedPoint>> = BTreeMap::new();
        for point in &mixed.points {
            chunks.entry(point.prefill_tokens).or_default().push(point);
        }
        let decodes = chunks.remove(&0).unwrap_or_default();
        Self {
            decodes: ByRows::new(&decodes),
            chunks: chunks.into_iter().map(|(tokens, points)| (tokens, ByRows::new(&points))).collect(),
            skew: Skew::new(&mixed.skew),
        }
    }

    /// Time of attention in a pass, in nanoseconds.
    pub fn attention_ns(&self, shape: &AttentionShape, beyond: &mut Extrapolations) -> f64 {
        let rows = shape.decode_rows;
        let tokens: u32 = shape.chunks.iter().map(|chunk| chunk.0).sum();
        let before: f64 = shape.chunks.iter().map(|&(tokens, history)| f64::from(tokens) * f64::from(history)).sum();
        let before = if tokens == 0 { 0.0 } else { before / f64::from(tokens) };
        let mean = if rows == 0 { 0.0 } else { shape.history as f64 / f64::from(rows) };
        let mut at = |tokens, before, rows, history| self.at(tokens, before, rows, history, beyond);

        let even = if rows + tokens == 0 { 0.0 } else { at(tokens, before, rows, mean) };
        let mut time = even;
        if shape.chunks.len() > 1 {
            let apart: f64 = shape.chunks.iter().map(|&(tokens, history)| at(tokens, history.into(), 0, 0.0)).sum();
            let start = at(1, 0.0, 0, 0.0);
            let starts = start * (shape.chunks.len() - 1) as f64;
            time += apart - starts - at(tokens, before, 0, 0.0);
        }
        let (shortest, longest) = (f64::from(shape.shortest), f64::from(shape.longest));
        if rows > 1 && mean > shortest && longest > mean {
            let share = (mean - shortest) / (longest - shortest);
            let alpha = self.skew.alpha(tokens, rows, share, shape.longest, before);
            if alpha != 0.0 {
                let variance = (shape.squared_history / f64::from(rows) - mean * mean).max(0.0);
                let unevenness = variance / ((longest - mean) * (mean - shortest));
                time += alpha * unevenness * (at(tokens, before, rows, longest) - even).max(0.0);
            }
        }
        time.max(0.0)
    }

    /// A pass of one chunk and decode rows of one history.
    fn at(&self, tokens: u32, before: f64, rows: u32, history: f64, beyond: &mut Extrapolations) -> f64 {
        if tokens == 0 {
            return self.decodes.at(before, rows, history, Component::DecodeAttention, beyond);
        }
        let part = Component::PrefillAttention;
        if self.chunks.last().is_some_and(|last| tokens > last.0) {
            beyond.count(part, tokens, before as u32);
        }
        between(&self.chunks, tokens.into(), |by_rows| by_rows.at(before, rows, history, part, beyond))
    }
}

impl ByRows {
    fn new(points: &[&MixedPoint]) -> Self {
        let mut by_rows: BTreeMap<u32, BTreeMap<u32, BTreeMap<u32, f64>>> = BTreeMap::new();
        for point in points {
            let by_history = by_rows.entry(point.decode_rows).or_default().entry(point.prefill_history).or_default();
            by_history.insert(point.decode_history, point.time_us * 1e3);
        }
        let curves = |by_history: BTreeMap<u32, BTreeMap<u32, f64>>| {
            by_history.into_iter().map(|(before, curve)| (before, Curve::new(curve))).collect()
        };
        Self(by_rows.into_iter().map(|(rows, by_history)| (rows, curves(by_history))).collect())
    }

    fn at(&self, before: f64, rows: u32, history: f64, part: Component, beyond: &mut Extrapolations) -> f64 {
        if self.0.last().is_some_and(|last| rows > last.0) {
            beyond.count(part, rows, history as u32);
        }
        between(&self.0, rows.into(), |by_history| {
            let ends = by_history.last().map_or((0, f64::INFINITY), |(before, curve)| (*before, curve.end()));
            if before > ends.0.into() || (rows > 0 && history > ends.1) {
                beyond.count(part, rows, before.max(history) as u32);
            }
            between(by_history, before, |curve| curve.at(history))
        })
    }
}

/// Interpolates what `value` gives for the neighbours of `x`; below the first it is that of the first, above the last
/// the last slope goes on.
fn between<T>(points: &[(u32, T)], x: f64, mut value: impl FnMut(&T) -> f64) -> f64 {
    match points {
        [] => 0.0,
        [(_, only)] => value(only),
        [(first, point), ..] if x <= f64::from(*first) => value(point),
        _ => {
            let above = points.partition_point(|point| f64::from(point.0) < x).min(points.len() - 1);
            let ((low, below), (high, above)) = (&points[above - 1], &points[above]);
            if x == f64::from(*high) {
                return value(above);
            }
            line((f64::from(*low), value(below)), (f64::from(*high), value(above)), x)
        }
    }
}

/// The measured shares, by the upper bounds of their cells.
#[derive(Clone, Debug, Default)]
struct Skew {
    /// Bounds of each axis, rising: chunk tokens, decode rows, share of long rows in thousandths, longest history,
    /// history before the chunk.
    bounds: [Vec<u32>; 5],
    alphas: BTreeMap<[u32; 5], f64>,
    /// By chunk tokens and decode rows, the mean of their cells, for batches that no cell holds.
    means: BTreeMap<[u32; 2], f64>,
}

impl Skew {
    fn new(cells: &[SkewCell]) -> Self {
        let mut skew = Self::default();
        let mut sums: BTreeMap<[u32; 2], (f64, f64)> = BTreeMap::new();
        for cell in cells {
            let share = thousandths(cell.long_share);
            let key = [cell.prefill_tokens, cell.decode_rows, share, cell.longest_history, cell.prefill_history];
            for (bounds, bound) in skew.bounds.iter_mut().zip(key) {
                if let Err(place) = bounds.binary_search(&bound) {
                    bounds.insert(place, bound);
                }
            }
            skew.alphas.insert(key, cell.alpha);
            let sum = sums.entry([key[0], key[1]]).or_default();
            *sum = (sum.0 + cell.alpha, sum.1 + 1.0);
        }
        skew.means = sums.into_iter().map(|(key, (sum, count))| (key, sum / count)).collect();
        skew
    }

    fn alpha(&self, tokens: u32, rows: u32, share: f64, longest: u32, before: f64) -> f64 {
        if self.alphas.is_empty() {
            return 0.0;
        }
        let values = [tokens, rows, thousandths(share), longest, before.ceil() as u32];
        let key: [u32; 5] = std::array::from_fn(|axis| {
            let bounds = &self.bounds[axis];
            bounds[bounds.partition_point(|&bound| bound < values[axis]).min(bounds.len() - 1)]
        });
        let mean = || self.means.get(&[key[0], key[1]]).copied();
        self.alphas.get(&key).copied().or_else(mean).unwrap_or(0.0)
    }
}

fn thousandths(share: f64) -> u32 {
    (share * 1e3).round() as u32
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
                        points.push(MixedPoint {
                            prefill_tokens,
                            prefill_history,
                            decode_rows,
                            decode_history,
                            time_us,
                        });
                    }
                }
            }
        }
        AttentionModel::new(&MixedAttention { points, skew })
    }

    fn shape(chunks: &[(u32, u32)], histories: &[u32]) -> AttentionShape {
        AttentionShape {
            chunks: chunks.to_vec(),
            decode_rows: histories.len() as u32,
            history: histories.iter().map(|&history| u64::from(history)).sum(),
            squared_history: histories.iter().map(|&history| f64::from(history).powi(2)).sum(),
            shortest: histories.iter().copied().min().unwrap_or(u32::MAX),
            longest: histories.iter().copied().max().unwrap_or(0),
        }
    }

    fn time_us(model: &AttentionModel, chunks: &[(u32, u32)], histories: &[u32]) -> f64 {
        let mut beyond = Extrapolations::default();
        let time = model.attention_ns(&shape(chunks, histories), &mut beyond) / 1e3;
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
        // Each of the four has 100 * 50 pairs; one chunk of 400 would have 400 * 200. A start costs what the smallest
        // measured chunk does: here 60 us.
        let four = time_us(&model, &[(100, 0); 4], &[]);
        assert!((four - 60.0).abs() < 1e-9, "{four}");
        let with_decodes = time_us(&model, &[(100, 0); 4], &[1000; 4]);
        assert!((with_decodes - four - 4.0).abs() < 1e-9, "{with_decodes}");
    }

    #[test]
    fn uneven_histories_cost_as_measured_where_there_are_two_and_less_where_there_are_more() {
        let cell = |decode_rows, alpha| SkewCell {
            prefill_tokens: 0,
            decode_rows,
            long_share: 1.0,
            longest_history: 4096,
            prefill_history: 0,
            alpha,
        };
        let model = model(vec![cell(2, 0.9), cell(4, 0.5)]);
        let even = time_us(&model, &[], &[2000; 4]);
        let two_lengths = time_us(&model, &[], &[1000, 1000, 3000, 3000]);
        assert!((two_lengths - (even + 0.5 * 4.0)).abs() < 1e-9, "halfway to four rows of 3000: {two_lengths}");
        let spread = time_us(&model, &[], &[1000, 1500, 2500, 3000]);
        assert!(even < spread && spread < two_lengths, "{even} {spread} {two_lengths}");
    }

    #[test]
    fn passes_beyond_the_measured_ones_are_reported() {
        let mut beyond = Extrapolations::default();
        model(Vec::new()).attention_ns(&shape(&[(500, 0)], &[]), &mut beyond);
        model(Vec::new()).attention_ns(&shape(&[], &[5000]), &mut beyond);
        let parts: Vec<Component> = beyond.iter().map(|(component, _)| component).collect();
        assert_eq!(parts, [Component::DecodeAttention, Component::PrefillAttention]);
    }
}

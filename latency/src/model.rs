//! The latency model of a profile: time of a pass from its work.

use std::fmt::Debug;
use std::sync::Arc;

use traces::{ChunkWork, Component, LatencyProfile, Nanos, PassWork, ProfileMeta};

use crate::account::PassAccount;
use crate::attention::AttentionModel;
use crate::components::Components;
use crate::extrapolation::Extrapolations;

/// A profile that cannot be interpolated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LatencyError {
    /// A profile without points of the block.
    #[error("the latency profile of `{0}` has no point of component `block`: a pass cannot be timed without it")]
    NoBlock(String),
    /// A time that is out of range.
    #[error("{component} at rows {rows}, kv_tokens {kv_tokens}: found {time_us} us, expected {expected}")]
    BadTime {
        /// Component of the point.
        component: Component,
        /// Rows of the point.
        rows: u32,
        /// History of the point.
        kv_tokens: u32,
        /// The time or spread that was found.
        time_us: f64,
        /// The range that was expected.
        expected: &'static str,
    },
    /// An overhead that is out of range.
    #[error("overhead_us of the latency profile is {0}, expected a number of at least 0")]
    BadOverhead(f64),
    /// Two measurements of one point.
    #[error("{component} at rows {rows}, kv_tokens {kv_tokens}, depths {depths} is given twice")]
    Twice {
        /// Component of the point.
        component: Component,
        /// Rows of the point.
        rows: u32,
        /// History of the point.
        kv_tokens: u32,
        /// Distinct depths of the point.
        depths: u32,
    },
    /// More loops than a pass can count.
    #[error("the latency profile is of a model with {0} loops, expected 1 to 64")]
    Loops(u32),
}

/// Times of passes that are written outside of this crate, in place of those of a profile.
///
/// ```
/// use traces::PassWork;
///
/// /// Two microseconds for each row, and a copy takes half of one.
/// #[derive(Debug)]
/// struct Linear;
///
/// impl latency::CustomLatency for Linear {
///     fn pass_ns(&self, work: &PassWork) -> f64 {
///         2e3 * f64::from(work.rows) + 0.5e3 * f64::from(work.filled_depths)
///     }
/// }
/// ```
pub trait CustomLatency: Debug + Send + Sync {
    /// Time of a pass in nanoseconds, at least 0, the overhead of the serving loop and its exits included. What rows that
    /// exit add is the time beyond that of the same pass without them (`exit_head_rows` and `filled_depths` of 0), for
    /// which it is asked too.
    ///
    /// The time may depend on the work only: then a simulation gives the same result each time, on any number of threads.
    fn pass_ns(&self, work: &PassWork) -> f64;
}

/// Time of a pass from its work, for one profile.
#[derive(Clone, Debug)]
pub struct LatencyModel {
    meta: ProfileMeta,
    num_loops: u8,
    computed: Vec<Component>,
    overhead_ns: f64,
    /// Tokens of a chunk up to which its attention is that of decode rows.
    decode_q_len: u32,
    /// Rows whose signal does not need the head from which the head runs for all of them within the pass.
    heads_ahead_from: u32,
    mixed_attention: Option<AttentionModel>,
    times: Components,
    spreads: Components,
    /// Gives the times instead.
    custom: Option<Arc<dyn CustomLatency>>,
}

impl LatencyModel {
    /// Prepares a profile for interpolation. A component without points, other than the block, takes no time.
    ///
    /// # Errors
    /// If the block has no points, a time is negative or not a number, or a point is given twice.
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
            computed: profile.computed_components().collect(),
            overhead_ns: meta.overhead_us * 1e3,
            decode_q_len: meta.decode_q_len.unwrap_or(1),
            heads_ahead_from: meta.heads_ahead_from.unwrap_or(u32::MAX),
            mixed_attention: profile.mixed_attention.as_ref().map(AttentionModel::new),
            times: Components::new(profile, |point| point.time_us)?,
            spreads: Components::new(profile, |point| point.spread_us)?,
            custom: None,
            meta: meta.clone(),
        })
    }

    /// The same model and device with other times of passes, without spread. In accounts, the time of a pass until its exits
    /// are decided counts as that of the block, and the time of its exits as that of the head.
    pub fn with_times(self, custom: Arc<dyn CustomLatency>) -> Self {
        Self { custom: Some(custom), computed: Vec::new(), ..self }
    }

    /// Metadata of the profile: model, device, memory.
    pub fn meta(&self) -> &ProfileMeta {
        &self.meta
    }

    /// Components with times that were computed rather than measured.
    pub fn computed(&self) -> &[Component] {
        &self.computed
    }

    /// Number of loops of the measured model.
    pub fn num_loops(&self) -> u8 {
        self.num_loops
    }

    /// Time of a pass until its exits are decided, in nanoseconds, including the overhead of the serving loop.
    ///
    /// The time of a pass is derived from its work only here and in [`exit_ns`](Self::exit_ns).
    pub fn run_ns(&self, work: &PassWork, account: &mut PassAccount) -> f64 {
        let PassAccount { time, extrapolations } = account;
        if let Some(custom) = &self.custom {
            let ns = custom.pass_ns(&before_exits(work));
            time.add(Component::Block, ns);
            return ns;
        }
        let unchunked = self.without_short_chunks(work);
        let work = unchunked.as_ref().unwrap_or(work);
        let components = self.times.run(work, self.head_rows(work), extrapolations);
        let mut ns = self.overhead_ns + components.iter().map(|(_, ns)| ns).sum::<f64>();
        time.add_overhead(self.overhead_ns);
        components.into_iter().for_each(|(component, ns)| time.add(component, ns));
        if !work.chunks.is_empty() {
            let attention = self.times.chunks(&work.chunks, extrapolations);
            time.add(Component::PrefillAttention, attention);
            ns += attention;
        }
        if let Some(mixed) = &self.mixed_attention {
            let attention = mixed.attention_ns(work, extrapolations);
            let decodes = work.chunks.is_empty();
            time.add(if decodes { Component::DecodeAttention } else { Component::PrefillAttention }, attention);
            ns += attention;
        }
        ns
    }

    /// Whether the head runs within a pass for every row whose signal does not need it.
    #[inline]
    fn heads_are_ahead(&self, work: &PassWork) -> bool {
        work.signal_rows >= self.heads_ahead_from
    }

    /// Rows for which the head runs within a pass.
    #[inline]
    fn head_rows(&self, work: &PassWork) -> u32 {
        work.head_rows + if self.heads_are_ahead(work) { work.signal_rows } else { 0 }
    }

    /// Rows for which the head runs after a pass, and those of them for which it starts anew.
    #[inline]
    fn exit_head_rows(&self, work: &PassWork) -> [u32; 2] {
        if self.heads_are_ahead(work) { [0; 2] } else { [work.exit_head_rows, work.decided_rows] }
    }

    /// The work with decode rows in place of chunks that are short enough; `None` where that is the same.
    fn without_short_chunks(&self, work: &PassWork) -> Option<PassWork> {
        let is_short = |chunk: &ChunkWork| chunk.tokens <= self.decode_q_len;
        if self.decode_q_len < 2 || !work.chunks.iter().any(is_short) {
            return None;
        }
        let mut work = work.clone();
        for ChunkWork { tokens, history } in work.chunks.extract_if(.., |chunk| is_short(chunk)) {
            work.decode_rows += tokens;
            for history in history..history + tokens {
                work.decode_history += u64::from(history);
                work.squared_decode_history += f64::from(history) * f64::from(history);
                work.longest_decode_history = work.longest_decode_history.max(history);
            }
        }
        Some(work)
    }

    /// Time of the exits of a pass once they are decided, in nanoseconds: the exit head for rows that had not run it,
    /// the decision, and copies of keys and values to skipped depths.
    pub fn exit_ns(&self, work: &PassWork, account: &mut PassAccount) -> f64 {
        if let Some(custom) = &self.custom {
            let has_exits = work.exit_head_rows > 0 || work.filled_depths > 0;
            let ns = if has_exits { custom.pass_ns(work) - custom.pass_ns(&before_exits(work)) } else { 0.0 };
            account.time.add(Component::Head, ns);
            return ns;
        }
        let components = self.times.exit(work, self.exit_head_rows(work), &mut account.extrapolations);
        components.into_iter().for_each(|(component, ns)| account.time.add(component, ns));
        components.iter().map(|(_, ns)| ns).sum()
    }

    /// Time of a pass on the executor, in nanoseconds, without the overhead of the serving loop that the profile has.
    pub fn pass_ns(&self, work: &PassWork) -> f64 {
        let account = &mut PassAccount::default();
        let overhead_ns = if self.custom.is_some() { 0.0 } else { self.overhead_ns };
        self.run_ns(work, account) - overhead_ns + self.exit_ns(work, account)
    }

    /// Squared spread of [`run_ns`](Self::run_ns), in square nanoseconds. The spread is half the distance between the
    /// quartiles; the squares of independent components add up.
    pub fn squared_run_spread(&self, work: &PassWork) -> f64 {
        if self.custom.is_some() {
            return 0.0;
        }
        let unchunked = self.without_short_chunks(work);
        let work = unchunked.as_ref().unwrap_or(work);
        let counted = &mut Extrapolations::default();
        let components = self.spreads.run(work, self.head_rows(work), counted).map(|(_, spread)| spread);
        let chunks = work.chunks.iter().map(|&chunk| self.spreads.chunk(chunk, counted));
        components.into_iter().chain(chunks).map(|spread| spread * spread).sum()
    }

    /// Squared spread of [`exit_ns`](Self::exit_ns), in square nanoseconds; see
    /// [`squared_run_spread`](Self::squared_run_spread).
    pub fn squared_exit_spread(&self, work: &PassWork) -> f64 {
        if self.custom.is_some() {
            return 0.0;
        }
        let components = self.spreads.exit(work, self.exit_head_rows(work), &mut Extrapolations::default());
        components.into_iter().map(|(_, spread)| spread * spread).sum()
    }
}

/// The same pass, as it is before its exits are decided.
fn before_exits(work: &PassWork) -> PassWork {
    PassWork { exit_head_rows: 0, decided_rows: 0, filled_depths: 0, ..work.clone() }
}

/// Rounds to whole nanoseconds.
pub fn nanos(ns: f64) -> Nanos {
    Nanos((ns + 0.5) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use traces::{PassBefore, Point};

    use crate::extrapolation::Extrapolation;

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
                kv_fill: None,
                decode_q_len: None,
                heads_ahead_from: None,
            },
            points: points.iter().map(point).collect(),
            mixed_attention: None,
        }
    }

    fn model(points: &[(Component, u32, u32, u32, f64)]) -> LatencyModel {
        LatencyModel::new(&profile(points)).unwrap()
    }

    use Component::{
        AfterMore, Block, DecodeAttention, DepthMix, Embed, ExitAttention, ExitDecision, ExitSignal, Head, HeadAgain,
        KvFill, PrefillAgain, PrefillAttention,
    };

    /// Time of a pass until its exits are decided, without the overhead of 250 ns, and its extrapolations.
    fn run(model: &LatencyModel, work: &PassWork) -> (f64, Extrapolations) {
        let mut account = PassAccount::default();
        (model.run_ns(work, &mut account) - 250.0, account.extrapolations)
    }

    /// Time of rows without attention, and whether all of it was measured.
    fn rows(model: &LatencyModel, rows: u32) -> (f64, bool) {
        let (ns, beyond) = run(model, &PassWork { rows, ..PassWork::default() });
        (ns, beyond.is_empty())
    }

    /// Time that decode rows of one history add to the block, and its extrapolations.
    fn decode(model: &LatencyModel, rows: u32, history: u32) -> (f64, Extrapolations) {
        let decode_history = u64::from(rows) * u64::from(history);
        run(model, &PassWork { decode_rows: rows, decode_history, ..PassWork::default() })
    }

    /// Time that chunks of these tokens and histories add, and its extrapolations.
    fn chunks(model: &LatencyModel, chunks: &[(u32, u32)]) -> (f64, Extrapolations) {
        let chunks = chunks.iter().map(|&(tokens, history)| ChunkWork { tokens, history }).collect();
        run(model, &PassWork { chunks, ..PassWork::default() })
    }

    /// Time of the exit head for exiting rows, and its extrapolations; `warm` if the previous pass ran the head.
    fn exit_head(model: &LatencyModel, exit_head_rows: u32, warm: bool) -> (f64, Extrapolations) {
        let mut account = PassAccount::default();
        let before = PassBefore { rows: 0, head: warm };
        let work = PassWork { exit_head_rows, before, ..PassWork::default() };
        (model.exit_ns(&work, &mut account), account.extrapolations)
    }

    #[test]
    fn a_pass_is_the_sum_of_its_components() {
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
            (ExitSignal, 2, 0, 1, 0.375),
            (ExitDecision, 2, 0, 1, 0.75),
            (KvFill, 4, 0, 1, 1.0),
        ]);
        let work = PassWork {
            rows: 4,
            decode_rows: 2,
            decode_history: 400,
            chunks: vec![ChunkWork { tokens: 2, history: 0 }],
            depths: 2,
            embed_rows: 1,
            head_rows: 2,
            exit_head_rows: 2,
            signal_rows: 2,
            decided_rows: 2,
            filled_depths: 4,
            before: PassBefore { rows: 9, head: true },
            ..PassWork::default()
        };
        // Overhead, block, decode attention at 2 rows of 200, depth mix halfway from 1 depth to 3, embedding, head, signal,
        // chunk.
        let until_decided = 0.25 + 25.0 + 6.0 + 2.0 + 0.5 + 3.0 + 0.375 + 7.0;
        let mut account = PassAccount::default();
        assert!((model.run_ns(&work, &mut account) - 1e3 * until_decided).abs() < 1e-6);
        // Head, decision, copies; without the decision where exits were known.
        assert_eq!(model.exit_ns(&work, &mut account), 4.75e3);
        let known = PassWork { decided_rows: 0, ..work.clone() };
        assert_eq!(model.exit_ns(&known, &mut PassAccount::default()), 4e3);
        assert!((model.pass_ns(&work) - 1e3 * (until_decided - 0.25 + 4.75)).abs() < 1e-6);
        assert!(account.extrapolations.is_empty(), "{}", account.extrapolations);
        let by_component: f64 = Component::ALL.map(|component| account.time.of(component)).iter().sum();
        assert!((by_component + account.time.overhead_s() - 1e-6 * (until_decided + 4.75)).abs() < 1e-12);
        assert_eq!(account.time.of(Head), 6e-6);
        assert_eq!(run(&model, &PassWork { depths: 1, ..PassWork::default() }).0, 0.0);
    }

    #[test]
    fn custom_times_replace_those_of_the_profile() {
        #[derive(Debug)]
        struct Linear;

        impl CustomLatency for Linear {
            fn pass_ns(&self, work: &PassWork) -> f64 {
                2e3 * f64::from(work.rows)
                    + 1e3 * f64::from(work.exit_head_rows)
                    + 500.0 * f64::from(work.filled_depths)
            }
        }

        let model = model(&[(Block, 1, 0, 1, 10.0)]).with_times(Arc::new(Linear));
        let work = PassWork { rows: 4, exit_head_rows: 2, filled_depths: 1, ..PassWork::default() };
        let mut account = PassAccount::default();
        assert_eq!(model.run_ns(&work, &mut account), 8e3);
        assert_eq!(model.exit_ns(&work, &mut account), 2.5e3);
        assert_eq!(model.pass_ns(&work), 10.5e3);
        let [block, head] = [Block, Head].map(|component| 1e9 * account.time.of(component));
        assert_eq!((block.round(), head.round()), (8e3, 2.5e3));
        assert_eq!(account.time.overhead_s(), 0.0);
        assert_eq!(model.squared_run_spread(&work) + model.squared_exit_spread(&work), 0.0);
        assert_eq!(model.meta().num_loops, 4);
    }

    #[test]
    fn layers_around_the_loops_attend_once_for_each_token_that_exits() {
        let surface = [(1, 100, 1.0), (1, 300, 3.0), (3, 100, 3.0), (3, 300, 9.0)];
        let points = surface.map(|(rows, history, time)| (ExitAttention, rows, history, 1, time));
        let model = model(&[&[(Block, 1, 0, 1, 10.0), (Block, 8, 0, 1, 10.0)], &points[..]].concat());
        // Eight rows of 200 tokens before; two run the head for its signal, one more exits without it.
        let rows = PassWork { rows: 8, decode_rows: 8, decode_history: 1600, ..PassWork::default() };
        let mut account = PassAccount::default();
        assert_eq!(model.run_ns(&rows, &mut account) - 250.0, 10e3, "no row reads the head");
        let work = PassWork { head_rows: 2, exit_head_rows: 1, ..rows };
        assert_eq!(model.run_ns(&work, &mut account) - 250.0, 10e3 + 4e3);
        assert_eq!(model.exit_ns(&work, &mut account), 2e3);
        assert_eq!(account.time.of(ExitAttention), 6e-6);
        assert!(account.extrapolations.is_empty(), "{}", account.extrapolations);
    }

    #[test]
    fn a_chunk_may_take_less_than_the_decode_rows_that_it_is_compared_with() {
        let mut less = profile(&[
            (PrefillAttention, 2, 0, 1, -7.0),
            (Block, 1, 0, 1, 9.0),
            (Embed, 1, 0, 1, 0.0),
            (Head, 1, 0, 1, 0.0),
        ]);
        assert_eq!(chunks(&LatencyModel::new(&less).unwrap(), &[(2, 0)]).0, -7e3);
        less.points[0].spread_us = -1.0;
        assert!(matches!(LatencyModel::new(&less), Err(LatencyError::BadTime { time_us: -1.0, .. })));
    }

    #[test]
    fn the_attention_of_short_chunks_is_that_of_decode_rows_where_the_profile_says_so() {
        let chunk = |rows, time_us| (PrefillAttention, rows, 0, 1, time_us);
        let points = [
            (Block, 1, 0, 1, 0.0),
            chunk(1, 10.0),
            (DecodeAttention, 1, 0, 1, 0.0),
            (DecodeAttention, 1, 100, 1, 100.0),
            (DecodeAttention, 9, 0, 1, 0.0),
            (DecodeAttention, 9, 100, 1, 900.0),
        ];
        let measured = profile(&points);
        let of_kernels = LatencyModel::new(&LatencyProfile {
            meta: ProfileMeta { decode_q_len: Some(3), ..measured.meta.clone() },
            ..measured.clone()
        })
        .unwrap();
        let measured = LatencyModel::new(&measured).unwrap();
        let work = PassWork {
            rows: 7,
            chunks: [(2, 10), (4, 10)].map(|(tokens, history)| ChunkWork { tokens, history }).to_vec(),
            ..PassWork::default()
        };
        assert_eq!(run(&measured, &work).0, 20e3, "a time for each chunk");
        // Two decode rows attend to 10 and 11 tokens; the chunk of four stays one.
        assert_eq!(run(&of_kernels, &work).0.round(), 10e3 + 21e3);
    }

    #[test]
    fn beside_the_chunk_with_the_most_keys_others_take_their_own_time() {
        let prefill = [(Block, 9, 0, 1, 10.0), (PrefillAttention, 1, 0, 1, 1.0), (PrefillAttention, 9, 0, 1, 9.0)];
        let again = [(PrefillAgain, 1, 0, 1, 0.25), (PrefillAgain, 9, 0, 1, 2.25)];
        let (single, both) = (model(&prefill), model(&[prefill.as_slice(), &again].concat()));
        for order in [[(3, 0), (8, 0), (1, 0)], [(8, 0), (1, 0), (3, 0)]] {
            assert_eq!(chunks(&single, &order), (12e3, Extrapolations::default()), "{order:?}");
            assert_eq!(chunks(&both, &order), (9e3, Extrapolations::default()), "{order:?}");
        }
        assert_eq!(chunks(&both, &[(5, 0)]).0, 5e3);
        assert_eq!(chunks(&both, &[]).0, 0.0);
        let (_, beyond) = chunks(&both, &[(9, 0), (8, 1)]);
        assert!(beyond.iter().any(|(component, _)| component == PrefillAgain), "{beyond}");
    }

    #[test]
    fn a_head_that_ran_just_before_takes_its_own_time() {
        let model = model(&[(Block, 2, 0, 1, 10.0), (Head, 2, 0, 1, 3.0), (HeadAgain, 2, 0, 1, 2.0)]);
        let cold = PassWork { rows: 2, head_rows: 2, ..PassWork::default() };
        let warm = PassWork { before: PassBefore { rows: 0, head: true }, ..cold.clone() };
        assert_eq!(run(&model, &cold), (13e3, Extrapolations::default()));
        assert_eq!(run(&model, &warm), (12e3, Extrapolations::default()));
        assert_eq!([false, true].map(|warm| exit_head(&model, 2, warm).0), [3e3, 2e3]);
        let (_, beyond) = exit_head(&model, 3, true);
        assert_eq!(beyond.iter().map(|(component, _)| component).collect::<Vec<_>>(), [HeadAgain]);
    }

    #[test]
    fn heads_of_many_rows_run_ahead_where_the_profile_says_so() {
        let points =
            [(Block, 1, 0, 1, 0.0), (Head, 1, 0, 1, 10.0), (Head, 9, 0, 1, 18.0), (ExitDecision, 1, 0, 1, 80.0)];
        let of_cpu = profile(&points);
        let meta = ProfileMeta { heads_ahead_from: Some(4), ..of_cpu.meta.clone() };
        let of_gpu = LatencyModel::new(&LatencyProfile { meta, ..of_cpu.clone() }).unwrap();
        let of_cpu = LatencyModel::new(&of_cpu).unwrap();
        let work = |signal_rows| PassWork { signal_rows, exit_head_rows: 2, decided_rows: 2, ..PassWork::default() };
        let takes = |model: &LatencyModel, rows| {
            let (work, account) = (work(rows), &mut PassAccount::default());
            [model.run_ns(&work, account) - 250.0, model.exit_ns(&work, account)]
        };
        assert_eq!([&of_cpu, &of_gpu].map(|model| takes(model, 3)), [[0.0, 91e3]; 2]);
        assert_eq!(takes(&of_cpu, 5), [0.0, 91e3]);
        assert_eq!(takes(&of_gpu, 5), [14e3, 0.0], "all five read the head, whether or not they exit");
    }

    #[test]
    fn a_pass_after_one_of_more_rows_takes_longer() {
        let more = [(1, 2, 4.0), (1, 8, 10.0), (4, 8, 6.0)];
        let more = more.map(|(rows, before, time)| (AfterMore, rows, before, 1, time));
        let model = model(&[&[(Block, 1, 0, 1, 100.0), (Block, 8, 0, 1, 100.0)], &more[..]].concat());
        let takes = |rows, before| {
            let work = PassWork { rows, before: PassBefore { rows: before, head: false }, ..PassWork::default() };
            let (ns, beyond) = run(&model, &work);
            assert!(beyond.is_empty());
            (ns - 100e3).round()
        };
        assert_eq!([(1, 0), (1, 1), (4, 2), (8, 8)].map(|(rows, before)| takes(rows, before)), [0.0; 4]);
        assert_eq!([takes(1, 2), takes(1, 5), takes(1, 8), takes(1, 99)], [4e3, 7e3, 10e3, 10e3]);
        // Between 1 row and 4: a third of the way.
        assert_eq!([takes(2, 8), takes(4, 6), takes(6, 8)], [8667.0, 3e3, 6e3]);
    }

    #[test]
    fn below_the_grid_time_is_that_of_its_edge() {
        let model = model(&[(Block, 4, 0, 1, 10.0), (Block, 8, 0, 1, 30.0), (DecodeAttention, 4, 64, 1, 5.0)]);
        assert_eq!(rows(&model, 1), (10e3, true));
        assert_eq!(decode(&model, 1, 3), (5e3, Extrapolations::default()));
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
        let mut seen = |(ns, of_pass): (f64, Extrapolations)| {
            beyond.merge(&of_pass);
            ns
        };
        assert_eq!(seen(run(&model, &PassWork { rows: 7, ..PassWork::default() })), 22e3);
        assert_eq!(seen(run(&model, &PassWork { rows: 5, ..PassWork::default() })), 18e3);
        assert_eq!(seen(exit_head(&model, 10, false)), 8e3, "a falling last slope does not go on");
        assert_eq!(seen(decode(&model, 2, 40)), 8e3);
        assert_eq!(seen(decode(&model, 4, 20)), 8e3);
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
            let (ns, beyond) = run(&model, &PassWork { rows: 1, depths, ..PassWork::default() });
            (ns - 1e3, beyond.is_empty())
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
        assert_eq!(decode(&model, 1, 100), (10e3, Extrapolations::default()));
        let (ns, beyond) = decode(&model, 2, 100);
        assert_eq!(ns, 20e3);
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
            for (&at, &time) in &times {
                let (ns, is_measured) = super::tests::rows(&model, at);
                prop_assert!((ns - time * 1e3).abs() < 1e-6 && is_measured);
            }
            let (found, is_measured) = super::tests::rows(&model, rows);
            let below = times.range(..=rows).next_back().map(|(_, time)| time * 1e3);
            let above = times.range(rows..).next().map(|(_, time)| time * 1e3);
            let (Some(low), Some(high)) = (below.or(above), above.or(below)) else { unreachable!() };
            prop_assert!(found >= low.min(high) - 1e-6);
            prop_assert!(above.is_none() || found <= low.max(high) + 1e-6);
            prop_assert_eq!(is_measured, above.is_some());
        }
    }
}

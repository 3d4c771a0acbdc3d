//! Exit model: exit signals of a request's tokens, drawn from an exit trace by whole generations.
//!
//! Easy and hard tokens come in runs. A request therefore takes the tokens of a recorded generation in order, from the
//! first one; a longer request continues with another generation.

use std::sync::Arc;

use scheduler::{Pass, SignalRead};
use traces::{ExitSignal, ExitTrace, ExitTraceMeta, Request, Signals};

/// Which generations of the trace a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// Drawn by a hash of this seed and the request's id, independent of order and preemption.
    Seeded(u64),
    /// Request `i` takes generation `i`: the trace was recorded from these requests.
    Recorded,
}

/// An exit trace that does not suit the requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExitError {
    /// A trace without generations.
    #[error("the exit trace of `{0}` has no generations")]
    Empty(String),
    /// A generation without tokens, which would never end a draw.
    #[error("generation {0} of the exit trace has no tokens")]
    EmptyGeneration(usize),
    /// More loops than a pass can count.
    #[error("the exit trace is of a model with {0} loops, expected 1 to 64")]
    Loops(u32),
    /// A request without a recorded generation.
    #[error("request {request} has no generation in the exit trace, which was recorded from {generations} requests")]
    NotRecorded {
        /// Id of the request.
        request: u32,
        /// Number of recorded generations.
        generations: usize,
    },
    /// A request longer than its recorded generation.
    #[error("request {request} asks for {asked} tokens, but {recorded} were recorded of it in the exit trace")]
    TooShort {
        /// Id of the request.
        request: u32,
        /// Tokens that the request asks for.
        asked: u32,
        /// Tokens of the recorded generation.
        recorded: u32,
    },
}

/// Exit signals and agreement by token and depth, and the rule that assigns tokens to requests. Clones share the
/// signals.
#[derive(Clone, Debug)]
pub struct ExitModel {
    num_loops: u8,
    fingerprint: String,
    draw: Draw,
    has_gates: bool,
    /// Whether tokens exit where they agree with the last depth, whichever signal is read.
    is_scripted: bool,
    /// Generation `g` consists of tokens `starts[g]..starts[g + 1]`.
    starts: Arc<[u32]>,
    /// A bit for each token and depth: whether the prediction equals that of the last depth.
    agreement: Arc<[u64]>,
    /// The values of each signal by token and depth, in the order of [`ExitSignal::ALL`].
    signals: [Arc<[f32]>; ExitSignal::ALL.len()],
}

impl ExitModel {
    /// Prepares a trace for drawing.
    ///
    /// # Errors
    /// If the trace or one of its generations is empty.
    pub fn new(trace: &ExitTrace, draw: Draw) -> Result<Self, ExitError> {
        if !(1..=64).contains(&trace.meta.num_loops) {
            return Err(ExitError::Loops(trace.meta.num_loops));
        }
        if trace.num_generations() == 0 {
            return Err(ExitError::Empty(trace.meta.model.clone()));
        }
        if let Some(empty) = (0..trace.num_generations()).find(|&index| trace.generation(index).is_empty()) {
            return Err(ExitError::EmptyGeneration(empty));
        }
        let rows = || (0..trace.num_tokens()).flat_map(|token| (0..trace.num_loops()).map(move |depth| (token, depth)));
        Ok(Self {
            num_loops: trace.meta.num_loops as u8,
            fingerprint: trace.meta.fingerprint.clone(),
            draw,
            has_gates: trace.has_gates,
            is_scripted: false,
            starts: trace.starts.as_slice().into(),
            agreement: bits(rows().map(|(token, depth)| trace.agrees(token, depth))).into(),
            signals: ExitSignal::ALL.map(|signal| trace.signals.iter().map(|signals| signals.get(signal)).collect()),
        })
    }

    /// The model with another draw of its generations.
    pub fn with_draw(&self, draw: Draw) -> Self {
        Self { draw, ..self.clone() }
    }

    /// A model whose tokens exit at known depths: `depths` by generation, then by token. Under every policy that reads
    /// a signal, a token exits at its depth. From that depth on, its prediction equals that of the last depth.
    ///
    /// # Errors
    /// If there are no generations, one is empty, or `num_loops` is 0 or more than a pass can count.
    pub fn from_depths(depths: &[Vec<u8>], num_loops: u32, fingerprint: &str, draw: Draw) -> Result<Self, ExitError> {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "exit depths".to_owned(),
            fingerprint: fingerprint.to_owned(),
            num_loops: num_loops.clamp(1, 65),
            source: "no trace".to_owned(),
        });
        let rows =
            |&exit: &u8| (0..num_loops).map(move |depth| (Signals::default(), u32::from(depth >= u32::from(exit))));
        for generation in depths {
            trace.push_generation(&generation.iter().flat_map(rows).collect::<Vec<_>>());
        }
        Ok(Self { is_scripted: true, ..Self::new(&trace, draw)? })
    }

    /// A model whose tokens all run every depth. No exit policy has a signal to read.
    ///
    /// # Errors
    /// If `num_loops` is 0 or more than a pass can count.
    pub fn full_depth(num_loops: u32, fingerprint: &str) -> Result<Self, ExitError> {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "full depth".to_owned(),
            fingerprint: fingerprint.to_owned(),
            num_loops: num_loops.clamp(1, 65),
            source: "no trace".to_owned(),
        });
        let rows: Vec<_> = (0..trace.num_loops()).map(|depth| (Signals::default(), depth as u32)).collect();
        trace.push_generation(&rows);
        Self::new(&trace, Draw::Seeded(0))
    }

    /// Number of loops of the recorded model.
    pub fn num_loops(&self) -> u8 {
        self.num_loops
    }

    /// Fingerprint of the recorded model.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether the trace contains the signal that an exit policy reads.
    pub fn answers(&self, read: SignalRead) -> bool {
        read != SignalRead::Signal(ExitSignal::Gate) || self.has_gates || self.is_scripted
    }

    /// Position of a request's token number `generated`.
    ///
    /// # Errors
    /// If the trace should be recorded from these requests and is not.
    pub fn cursor(&self, request: &Request, generated: u32) -> Result<Cursor, ExitError> {
        if self.draw == Draw::Recorded {
            self.check_recorded(request)?;
        }
        let mut cursor = self.drawn(request.id, 0);
        let mut left = generated;
        while left >= self.tokens_left(&cursor) {
            left -= self.tokens_left(&cursor);
            cursor = self.drawn(request.id, cursor.draws);
        }
        cursor.row += left as usize * usize::from(self.num_loops);
        Ok(cursor)
    }

    /// Advances the requests whose rows exit to their next tokens. Returns how many of the exiting tokens agree with
    /// the last depth.
    pub fn exit(&self, pass: &Pass<'_>, exiting: &[u32], cursors: &mut [Cursor]) -> u64 {
        let num_loops = usize::from(self.num_loops);
        let signals: &[f32] = match pass.reads.signal {
            SignalRead::Signal(signal) => &self.signals[signal as usize],
            SignalRead::None | SignalRead::Oracle => &[],
        };
        let mut agreeing = 0;
        for &index in exiting {
            let segment = &pass.segments[index as usize];
            let cursor = &mut cursors[segment.slot as usize];
            agreeing += u64::from(self.agrees(cursor.at(segment.depth)));
            cursor.row += num_loops;
            if cursor.row == cursor.end {
                *cursor = self.drawn(cursor.request, cursor.draws);
            }
            // The pass that reads the next token's signals then does not wait for memory.
            prefetch(signals, cursor.row);
            prefetch(signals, cursor.row + num_loops - 1);
        }
        agreeing
    }

    /// Sets the signals of the rows of a pass, by segment; `cursors` are by slot. Rows whose signal is not read get one
    /// too, which spares the loop a branch that would be mispredicted.
    pub fn read_signals(&self, pass: &Pass<'_>, cursors: &[Cursor], signals: &mut [f32]) {
        let segments = pass.segments.iter().zip(signals);
        if let SignalRead::Signal(read) = pass.reads.signal
            && self.is_scripted
        {
            let certain = [false, true].map(|exits| read.certain(exits));
            for (segment, signal) in segments {
                let exit = (segment.depth + pass.reads.delay).min(self.num_loops - 1);
                *signal = certain[usize::from(self.agrees(cursors[segment.slot as usize].at(exit)))];
            }
            return;
        }
        let rows = segments.map(|(segment, signal)| (cursors[segment.slot as usize].at(segment.depth), signal));
        match pass.reads.signal {
            SignalRead::None => {}
            SignalRead::Oracle => rows.for_each(|(row, signal)| *signal = f32::from(u8::from(self.agrees(row)))),
            SignalRead::Signal(read) => {
                let values = &self.signals[read as usize];
                rows.for_each(|(row, signal)| *signal = values[row]);
            }
        }
    }

    fn tokens_left(&self, cursor: &Cursor) -> u32 {
        ((cursor.end - cursor.row) / usize::from(self.num_loops)) as u32
    }

    /// Whether the prediction in a row equals that of the last depth.
    #[inline]
    pub fn agrees(&self, row: usize) -> bool {
        self.agreement[row / 64] >> (row % 64) & 1 == 1
    }

    fn check_recorded(&self, request: &Request) -> Result<(), ExitError> {
        let generations = self.starts.len() - 1;
        let index = request.id as usize;
        if index >= generations {
            return Err(ExitError::NotRecorded { request: request.id, generations });
        }
        let recorded = self.starts[index + 1] - self.starts[index];
        if request.output_tokens > recorded {
            return Err(ExitError::TooShort { request: request.id, asked: request.output_tokens, recorded });
        }
        Ok(())
    }

    /// Start of the generation that a request takes after `draws` others.
    fn drawn(&self, request: u32, draws: u32) -> Cursor {
        let generations = self.starts.len() as u64 - 1;
        let index = match self.draw {
            Draw::Seeded(seed) => scaled(hash(seed, u64::from(request) << 32 | u64::from(draws)), generations) as usize,
            Draw::Recorded => request as usize,
        };
        let [row, end] = [index, index + 1].map(|at| self.starts[at] as usize * usize::from(self.num_loops));
        Cursor { request, draws: draws + 1, row, end }
    }
}

/// Prefetches the cache line of a value, where the processor has an instruction for it.
#[inline]
fn prefetch(values: &[f32], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(value) = values.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and the reference is valid.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
}

/// Packs bits, the lowest first.
fn bits(values: impl Iterator<Item = bool>) -> Vec<u64> {
    let mut words = Vec::new();
    for (index, value) in values.enumerate() {
        if index % 64 == 0 {
            words.push(0);
        }
        words[index / 64] |= u64::from(value) << (index % 64);
    }
    words
}

/// A position in an exit trace: the token that a request generates next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    request: u32,
    /// Number of generations drawn so far.
    draws: u32,
    /// The token's row at depth 0; rows of deeper depths follow.
    row: usize,
    /// End of the current generation's rows.
    end: usize,
}

impl Cursor {
    /// The token's row at a depth.
    #[inline]
    pub fn at(&self, depth: u8) -> usize {
        self.row + usize::from(depth)
    }
}

/// A well-mixed number from a seed and a key (SplitMix64's finalizer, twice).
pub(crate) fn hash(seed: u64, key: u64) -> u64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    mix(mix(seed) ^ key)
}

/// Maps a hash to a number below `bound`.
pub(crate) fn scaled(hash: u64, bound: u64) -> u64 {
    ((u128::from(hash) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::{BlockTables, ExitPolicy, RowKind, Segment, SignalReads};
    use traces::{Nanos, PassWork};

    /// Generation `g` has `g + 1` tokens, each predicted as `10 g + token` at the last depth.
    fn trace(generations: usize) -> ExitTrace {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "test".into(),
            fingerprint: "test".into(),
            num_loops: 2,
            source: "made up".into(),
        });
        for generation in 0..generations {
            let rows: Vec<_> = (0..2 * (generation + 1))
                .map(|row| (Signals { top1: row as f32, margin: 0.5, ..Signals::default() }, (row / 2) as u32))
                .collect();
            trace.push_generation(&rows);
        }
        trace
    }

    fn request(id: u32, output_tokens: u32) -> Request {
        Request { id, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens }
    }

    /// Makes the token at a cursor exit at the last depth.
    fn exit(model: &ExitModel, cursor: &mut Cursor) {
        let kind = RowKind::Decode;
        let segments = [Segment { slot: 0, start: 1, tokens: 1, depth: 1, kind, predicts: true, generated: true }];
        let (tables, reads) = (BlockTables::new(1, 1, 1), ExitPolicy::None.signal_reads(2));
        let pass = Pass { segments: &segments, reads, tables: &tables, work: &PassWork::default() };
        assert_eq!(model.exit(&pass, &[0], std::slice::from_mut(cursor)), 1);
    }

    fn tokens(model: &ExitModel, request: &Request, count: usize) -> Vec<u32> {
        let mut cursor = model.cursor(request, 0).unwrap();
        std::iter::repeat_with(|| {
            let token = cursor.row as u32 / u32::from(model.num_loops);
            exit(model, &mut cursor);
            token
        })
        .take(count)
        .collect()
    }

    #[test]
    fn requests_take_whole_generations_in_order() {
        let trace = trace(9);
        let model = ExitModel::new(&trace, Draw::Seeded(5)).unwrap();
        for id in 0..100 {
            let taken = tokens(&model, &request(id, 200), 200);
            let mut left = &taken[..];
            while let Some(first) = left.first() {
                let generation = trace.starts.iter().position(|start| start == first).expect("starts at a generation");
                let length = trace.generation(generation).len().min(left.len());
                assert!(left[..length].iter().copied().eq(*first..first + length as u32));
                left = &left[length..];
            }
        }
    }

    #[test]
    fn every_generation_is_drawn_about_equally_often() {
        let trace = trace(10);
        let model = ExitModel::new(&trace, Draw::Seeded(1)).unwrap();
        let mut counts = [0u32; 10];
        for id in 0..10_000 {
            let first = tokens(&model, &request(id, 1), 1)[0];
            counts[trace.starts.iter().position(|&start| start == first).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_preempted_request_goes_on_where_it_was() {
        let model = ExitModel::new(&trace(4), Draw::Seeded(5)).unwrap();
        let request = request(3, 60);
        for (generated, &token) in tokens(&model, &request, 60).iter().enumerate() {
            assert_eq!(model.cursor(&request, generated as u32).unwrap().row, 2 * token as usize);
        }
    }

    #[test]
    fn signals_are_those_of_the_trace() {
        let trace = trace(3);
        let model = ExitModel::new(&trace, Draw::Recorded).unwrap();
        let mut cursor = model.cursor(&request(2, 3), 0).unwrap();
        exit(&model, &mut cursor);
        let token = trace.generation(2).start + 1;
        let tables = BlockTables::new(1, 1, 1);
        for depth in 0..2u8 {
            let (kind, work) = (RowKind::Decode, PassWork::default());
            let segments = [Segment { slot: 0, start: 1, tokens: 1, depth, kind, predicts: true, generated: true }];
            let read = |signal| {
                let mut signals = [f32::NAN];
                let reads = SignalReads { signal, below: 1, delay: 0, head_from: 0 };
                let pass = Pass { segments: &segments, reads, tables: &tables, work: &work };
                model.read_signals(&pass, &[cursor], &mut signals);
                signals[0]
            };
            let signals = trace.signals_at(token, depth.into());
            for signal in ExitSignal::ALL {
                assert_eq!(read(SignalRead::Signal(signal)), signals.get(signal));
            }
            assert_eq!(model.agrees(cursor.at(depth)), trace.agrees(token, depth.into()));
            assert_eq!(read(SignalRead::Oracle) == 1.0, trace.agrees(token, depth.into()));
        }
    }

    #[test]
    fn scripted_tokens_exit_at_their_depths_whatever_signal_is_read() {
        let depths = [vec![2, 0, 1], vec![0, 2]];
        let model = ExitModel::from_depths(&depths, 3, "test", Draw::Recorded).unwrap();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let policies =
            ["oracle", "confidence:0.9", "entropy:0.5", "entropy:0", "similarity:1", "gate:0.3", "margin:-1"];
        for policy in policies {
            let policy: ExitPolicy = policy.parse().unwrap();
            assert!(model.answers(policy.signal_read()), "{policy}");
            let exits = |cursor: Cursor, depth| {
                let segments = [Segment {
                    slot: 0,
                    start: 1,
                    tokens: 1,
                    depth,
                    kind: RowKind::Decode,
                    predicts: true,
                    generated: true,
                }];
                let mut signals = [f32::NAN];
                let pass = Pass { segments: &segments, reads: policy.signal_reads(3), tables: &tables, work: &work };
                model.read_signals(&pass, &[cursor], &mut signals);
                policy.bound().is_reached(signals[0])
            };
            for (id, depths) in (0..).zip(&depths) {
                let tokens = depths.len() as u32;
                let exit_depth = |generated| {
                    let cursor = model.cursor(&request(id, tokens), generated).unwrap();
                    (0..3).find(|&depth| exits(cursor, depth)).unwrap()
                };
                assert_eq!((0..tokens).map(exit_depth).collect::<Vec<_>>(), *depths, "{policy}");
            }
        }
        assert!(ExitModel::from_depths(&[], 3, "test", Draw::Recorded).is_err());
    }

    #[test]
    fn scripted_tokens_exit_at_their_depths_when_the_exit_is_decided_one_depth_earlier() {
        let model = ExitModel::from_depths(&[vec![2, 1, 1]], 4, "test", Draw::Recorded).unwrap();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let policy: ExitPolicy = "delayed:gate:0.5".parse().unwrap();
        let sure_from = |generated| {
            let cursor = model.cursor(&request(0, 3), generated).unwrap();
            let kind = RowKind::Decode;
            let is_sure = |&depth: &u8| {
                let segments = [Segment { slot: 0, start: 1, tokens: 1, depth, kind, predicts: true, generated: true }];
                let pass = Pass { segments: &segments, reads: policy.signal_reads(4), tables: &tables, work: &work };
                let mut signals = [f32::NAN];
                model.read_signals(&pass, &[cursor], &mut signals);
                policy.bound().is_reached(signals[0])
            };
            (0..4).find(is_sure).unwrap()
        };
        assert_eq!([0, 1, 2].map(sure_from), [1, 0, 0]);
    }

    #[test]
    fn traces_without_tokens_are_refused() {
        assert!(matches!(ExitModel::new(&trace(0), Draw::Recorded), Err(ExitError::Empty(_))));
        let mut empty = trace(2);
        empty.push_generation(&[]);
        assert_eq!(ExitModel::new(&empty, Draw::Seeded(0)).unwrap_err(), ExitError::EmptyGeneration(2));
    }
}

//! The profiler: measures what the parts of a pass take, on the executor that replays run on.
//!
//! It composes passes of every shape of a grid as the scheduler would and has the executor time them. Parts that
//! cannot run alone are differences of two shapes, which run one soon after the other: what histories add is a pass with
//! histories less one without.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use scheduler::blocks::BlockTables;
use scheduler::{
    Clock, Executor, KvFill, Lengths, Look, Looks, Pass, RowKind, Segment, Slot, SteadyLoad, SteadyServer,
};
use traces::{Component, LatencyProfile, Measure, Nanos, Point, ProfileMeta, Request};

use crate::cache::TILE;
use crate::clock::{Idle, WallClock};
use crate::executor::{EngineExecutor, Generation, in_pool};
use crate::kernels::signals::mix;
use crate::replay::{Engine, ReplayError};

/// History of decode rows that stand for no history: the fewest tokens that one can follow.
const SHORT: u32 = 1;
/// What a probe takes at least. Whatever ran before, what comes after runs with cold caches: passes of a load in service
/// are 14% longer at first, and 2% after 18 ms.
const PROBE_TIME: Duration = Duration::from_millis(60);
/// Fewest passes of a probe, of models whose passes are long.
const PASSES_OF_PROBE: usize = 4;
/// Ways to serve the load, which probes take in turn: by sequence at full depth, depth-wise with exits, and depth-wise at
/// full depth. So there are passes of one depth, of a few and of all, and heads after heads.
const WAYS: usize = 3;
/// Times that a round comes to each shape, so that its times are of many moments.
const VISITS: usize = 2;
/// Prompt chunks of a pass that has several: one, and one beside it.
const PROMPTS: u32 = 2;
/// Passes in service that take longer are of a model that no cache holds: whatever runs before a pass is of no account.
const CACHED: Duration = Duration::from_millis(10);

/// The shapes to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Rows of a pass, without histories.
    rows: Vec<u32>,
    /// Decode rows of a pass.
    decodes: Vec<u32>,
    /// Histories of decode rows, and before prompt chunks.
    histories: Vec<u32>,
    /// Tokens of a prompt chunk.
    chunks: Vec<u32>,
}

/// What a replay asks for at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a pass.
    pub rows: u32,
    /// Decode rows of a pass: sequences that run at once.
    pub decodes: u32,
    /// Tokens of a sequence.
    pub history: u32,
    /// Prompt tokens of one chunk.
    pub chunk: u32,
}

impl Grid {
    /// A grid that reaches the limits, denser where passes are small.
    pub fn up_to(limits: Limits) -> Self {
        let up_to = |points: &[u32], limit: u32| {
            let mut points: Vec<u32> = points.iter().copied().filter(|&point| point < limit).collect();
            let mut next = 2 * points.last().copied().unwrap_or(1);
            while next < limit {
                points.push(next);
                next *= 2;
            }
            points.push(limit.max(1));
            points
        };
        Self {
            rows: up_to(
                &[1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256],
                limits.rows,
            ),
            decodes: up_to(&[1, 2, 4, 8, 16, 24, 32, 48, 64], limits.decodes.min(limits.rows)),
            histories: up_to(&[32, 64, 128, 256], limits.history),
            chunks: up_to(&[1, 8, 16, 32, 64, 128], limits.chunk.min(limits.rows)),
        }
    }

    fn max(points: &[u32]) -> u32 {
        points.iter().copied().max().unwrap_or(1)
    }
}

/// A pass that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    /// Decode rows at one depth below 0 and their history, with neither head nor embedding.
    Decode { rows: u32, history: u32 },
    /// Decode rows with a history, after a pass of more such rows.
    AfterMore { rows: u32, before: u32, history: u32 },
    /// Rows at the last depth with a history that leave, for which the exit head runs then: leaving alone counts. `again` if
    /// the passes before ran it too.
    Head { rows: u32, history: u32, again: bool },
    /// Rows that leave at the first depth, or at the last, once the head has run: leaving alone counts. They come with another
    /// history every time, since what they leave behind goes where nothing was for long, in no cache.
    Leave { rows: u32, skips: bool },
    /// Rows with a history, spread over depths, the first included, after a pass of the same kind.
    Mix { rows: u32, depths: u32, history: u32 },
    /// One prompt chunk.
    Prefill { tokens: u32, history: u32 },
    /// [`PROMPTS`] prompt chunks of as many tokens each.
    Prefills { tokens: u32, history: u32 },
}

impl Shape {
    /// All rows.
    fn rows(self) -> u32 {
        match self {
            Self::Prefill { tokens, .. } => tokens,
            Self::Prefills { tokens, .. } => PROMPTS * tokens,
            _ => self.decodes().unwrap_or_default(),
        }
    }

    /// What it is compared with: what it takes beyond is the time of a part. None where all of its time is.
    fn less(self) -> Option<Self> {
        let decode = |rows, history| Some(Self::Decode { rows, history });
        match self {
            Self::Decode { history: SHORT, .. } | Self::Head { .. } | Self::Leave { skips: false, .. } => None,
            Self::Decode { rows, .. } | Self::Prefill { tokens: rows, .. } => decode(rows, SHORT),
            Self::Prefills { tokens, .. } => decode(PROMPTS * tokens, SHORT),
            Self::AfterMore { rows, history, .. } | Self::Mix { rows, history, .. } => decode(rows, history),
            Self::Leave { rows, skips: true } => Some(Self::Leave { rows, skips: false }),
        }
    }

    /// Decode rows; none of a prompt chunk.
    fn decodes(self) -> Option<u32> {
        match self {
            Self::Decode { rows, .. }
            | Self::AfterMore { rows, .. }
            | Self::Head { rows, .. }
            | Self::Leave { rows, .. }
            | Self::Mix { rows, .. } => Some(rows),
            Self::Prefill { .. } | Self::Prefills { .. } => None,
        }
    }
}

/// Measures a latency profile in rounds, each of which measures every shape, so that an experiment can take turns between
/// rounds and replays; and, in probes, how fast the machine is in service, at any moment of a replay.
pub struct Profiler {
    engine: Engine,
    executor: EngineExecutor,
    tables: BlockTables,
    shapes: Vec<Shape>,
    rounds: Vec<Round>,
    grid: Grid,
    /// Machines in service with the batches of the grid, the smallest first. If no cache holds the model, there is only one,
    /// with the largest batch.
    services: Vec<SteadyServer<EngineExecutor>>,
    /// Whether shapes run among the passes of these machines.
    runs_among: bool,
    /// Machines in service with the largest batch, depth-wise: with exits, and at full depth.
    depth_wise: [SteadyServer<EngineExecutor>; WAYS - 1],
    /// Which of the ways to serve the load is the next probe's.
    next_way: usize,
    /// How often rows were given sequences.
    occupied: u64,
}

/// A shape's runs, and whether it is those at the first depth, where rows are embedded, that count.
type Counted = (Shape, bool);

/// What one round measured.
#[derive(Clone, Debug, Default)]
struct Round {
    visits: Vec<Visit>,
    probes: Vec<Probe>,
}

/// What every shape took at one visit, in microseconds.
type Visit = BTreeMap<Counted, Vec<f64>>;

/// How fast the machine was in service at one moment: what it took for some passes of the profiler's steady load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The way in which the load was served: its place in [`Profiler::loads`].
    pub way: usize,
    /// Number of the first pass in the load.
    pub first: usize,
    /// How long the executor says that each pass took.
    pub times: Vec<Nanos>,
    /// How long they took together, all that a serving loop does between them included.
    pub elapsed: Nanos,
}

impl Probe {
    fn in_executor(&self) -> Nanos {
        self.times.iter().copied().sum()
    }
}

/// A wall clock that stands still half of the time, while probes tell how fast the machine is.
///
/// As long as a probe goes on, so long the run goes on after it: what either does to the other's caches meets both alike.
pub struct ProbedClock<'p> {
    clock: WallClock,
    profiler: &'p mut Profiler,
    next: Instant,
    /// By the clock's time.
    probes: Vec<(Nanos, Probe)>,
    failure: Option<ReplayError>,
}

impl<'p> ProbedClock<'p> {
    /// A clock at zero.
    pub fn start(idle: Idle, profiler: &'p mut Profiler) -> Self {
        let clock = WallClock::start(idle);
        Self { clock, profiler, next: Instant::now(), probes: Vec::new(), failure: None }
    }

    /// What was told, and when.
    ///
    /// # Errors
    /// If the engine failed.
    pub fn into_probes(self) -> Result<Vec<(Nanos, Probe)>, ReplayError> {
        self.failure.map_or(Ok(self.probes), Err)
    }
}

impl Clock for ProbedClock<'_> {
    fn now(&mut self) -> Nanos {
        self.clock.now()
    }

    fn advance(&mut self, elapsed: Nanos) -> Nanos {
        let now = self.clock.advance(elapsed);
        let start = Instant::now();
        if start >= self.next && self.failure.is_none() {
            match self.clock.pause(|| self.profiler.probe()) {
                Ok(probe) => self.probes.push((now, probe)),
                Err(error) => self.failure = Some(error),
            }
            self.next = Instant::now() + start.elapsed();
        }
        now
    }

    fn wait_until(&mut self, time: Nanos) {
        self.clock.wait_until(time);
    }
}

impl Profiler {
    /// A profiler with nothing measured yet; the load in service has sequences of these lengths.
    ///
    /// # Errors
    /// If the grid does not fit the model's positions, or its cache the memory.
    pub fn new(engine: &Engine, grid: Grid, lengths: Lengths) -> Result<Self, ReplayError> {
        let block_tokens = TILE as u32;
        let (history, chunk) = (Grid::max(&grid.histories), Grid::max(&grid.chunks));
        let (rows, decodes) = (Grid::max(&grid.rows), Grid::max(&grid.decodes));
        let decode_blocks = (history + 1).div_ceil(block_tokens);
        let chunk_blocks = (history + chunk).div_ceil(block_tokens);
        let num_blocks = decodes * decode_blocks + (rows - decodes) + PROMPTS * chunk_blocks;
        // The last slots are those of prompt chunks.
        let mut tables = BlockTables::new(num_blocks, block_tokens, rows + PROMPTS);
        for slot in 0..rows + PROMPTS {
            let blocks = if slot >= rows {
                chunk_blocks
            } else if slot < decodes {
                decode_blocks
            } else {
                1
            };
            assert!(tables.grow(slot, blocks * block_tokens), "there are as many blocks as the slots hold");
        }
        let executor = EngineExecutor::new(
            engine.model.clone(),
            engine.prompts.clone(),
            engine.sampling,
            KvFill::Reuse,
            num_blocks,
            block_tokens,
        )?
        .with_any_history()?;
        let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: history + chunk, output_tokens: 1 };
        executor.check_request(&request)?;
        let num_loops = engine.model.config().num_loops;
        let shapes = shapes(&grid, num_loops as u32);
        // Several prompts share a pass, as they do in replays; the shapes have no longer chunks than `chunk`.
        let prompt_rows = if lengths.prompt <= chunk { rows } else { chunk };
        let load = |batch: u32| SteadyLoad::new(num_loops as u8, batch, rows, prompt_rows, block_tokens, lengths);
        let serve =
            |load: SteadyLoad| Ok::<_, ReplayError>(SteadyServer::new(load, engine.executor(load.settings())?)?);
        let mut profiler = Self {
            engine: engine.clone(),
            executor,
            tables,
            shapes,
            rounds: Vec::new(),
            grid,
            services: vec![serve(load(decodes))?],
            runs_among: false,
            depth_wise: [serve(load(decodes).with_exits())?, serve(load(decodes).depth_wise())?],
            next_way: 0,
            occupied: 0,
        };
        // The first passes find memory that was never touched.
        for _ in 0..WAYS {
            profiler.probe()?;
        }
        let probe = profiler.probe()?;
        if probe.elapsed.as_micros_f64() / (probe.times.len() as f64) < CACHED.as_secs_f64() * 1e6 {
            let smaller = profiler.grid.decodes.iter().filter(|&&batch| batch < decodes);
            let smaller = smaller.map(|&batch| serve(load(batch))).collect::<Result<Vec<_>, _>>()?;
            profiler.services.splice(0..0, smaller);
            profiler.runs_among = true;
        }
        Ok(profiler)
    }

    /// Measures every shape, several times, each time in another order; `progress` is told how many of how many are done.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn round(&mut self, mut progress: impl FnMut(usize, usize) + Send) -> Result<(), ReplayError> {
        let first = self.rounds.len() * VISITS;
        let (mut done, of) = (0, VISITS * self.shapes.len());
        let round = in_pool(|| {
            let mut round = Round::default();
            for number in first..first + VISITS {
                let order = |seed: u64| mix((number as u64 + 1) ^ mix(seed));
                let mut shapes = self.shapes.clone();
                // Shapes that are compared have as many rows, and run one soon after the other: the machine's speed changes
                // within seconds.
                shapes.sort_by_key(|&shape| (order(shape.rows().into()), order(key(shape))));
                let mut visit = Visit::new();
                for shape in shapes {
                    for (counts_for, time) in self.measure(shape)? {
                        visit.entry(counts_for).or_default().push(time);
                    }
                    done += 1;
                    progress(done, of);
                }
                round.visits.push(visit);
            }
            round.probes = (0..WAYS).map(|_| self.probe()).collect::<Result<_, _>>()?;
            Ok::<_, ReplayError>(round)
        })?;
        self.rounds.push(round);
        Ok(())
    }

    /// Serves the next passes of a steady load, to tell how fast the machine is at the moment: in each way in turn.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn probe(&mut self) -> Result<Probe, ReplayError> {
        let way = self.next_way;
        self.next_way = (way + 1) % WAYS;
        let service = match way {
            0 => self.services.last_mut().expect("there is always one"),
            depth_wise => &mut self.depth_wise[depth_wise - 1],
        };
        in_pool(|| {
            let (start, first, mut times) = (Instant::now(), service.passes(), Vec::new());
            while times.len() < PASSES_OF_PROBE || start.elapsed() < PROBE_TIME {
                times.push(service.pass(&mut ())?);
            }
            Ok(Probe { way, first, times, elapsed: start.elapsed().into() })
        })
    }

    /// What probes serve, by way.
    pub fn loads(&self) -> [SteadyLoad; WAYS] {
        let [with_exits, full_depth] = self.depth_wise.each_ref().map(SteadyServer::load);
        [self.services.last().expect("there is always one").load(), with_exits, full_depth]
    }

    /// What all rounds measured.
    ///
    /// # Panics
    /// If there was no round.
    pub fn measured(&self) -> Measured<'_> {
        self.measured_in(0..self.rounds.len())
    }

    /// What some rounds measured, counted from 0.
    ///
    /// # Panics
    /// If there was no such round.
    pub fn measured_in(&self, rounds: Range<usize>) -> Measured<'_> {
        let rounds = &self.rounds[rounds];
        assert!(!rounds.is_empty(), "a profile takes at least one round");
        Measured {
            profiler: self,
            visits: rounds.iter().flat_map(|round| &round.visits).collect(),
            probes: rounds.iter().flat_map(|round| &round.probes).collect(),
        }
    }

    /// How far the profile of the later half of the rounds is from that of the earlier half: the differences of all
    /// passes of the grid, added up, in a share of their times. None if there was only one round.
    pub fn disagreement(&self) -> Option<f64> {
        let half = self.rounds.len() / 2;
        if half == 0 {
            return None;
        }
        let (earlier, later) = (self.measured_in(0..half), self.measured_in(half..self.rounds.len()));
        let pairs = || earlier.counted().map(|counted| (earlier.of(counted).middle, later.of(counted).middle));
        let differences: f64 = pairs().map(|(earlier, later)| (earlier - later).abs()).sum();
        Some(differences / pairs().map(|(earlier, later)| (earlier + later) / 2.0).sum::<f64>())
    }

    /// Runs a shape at all depths in turn, each time after a pass in service of as many sequences as it has decode rows (half
    /// of the largest batch for prompt chunks), so that caches and the processor's clock are as there: what counts, in
    /// microseconds, and what it counts for.
    fn measure(&mut self, shape: Shape) -> Result<Vec<(Counted, f64)>, ReplayError> {
        let num_loops = self.num_loops();
        self.occupy(shape);
        let batch = shape.decodes().unwrap_or(Grid::max(&self.grid.decodes) / 2);
        let fits = |service: &SteadyServer<_>| batch <= service.load().settings().max_batch;
        let service = self.services.iter().position(fits).unwrap_or(self.services.len() - 1);
        let service = self.runs_among.then_some(service);
        // Each depth comes after the one before it, as in service: by sequence, passes take turns through the depths. But a
        // head that was just in use comes after a pass at the last depth, which ran it.
        let first_before = if matches!(shape, Shape::Head { again: true, .. }) { 0 } else { num_loops - 1 };
        if let Some(service) = service {
            while self.services[service].passes() % num_loops != first_before {
                self.services[service].pass(&mut ())?;
            }
        }
        let mut counted = Vec::new();
        // The first time, keys and values are in no cache.
        for turn in 0..2 * num_loops {
            if let Some(service) = service {
                self.services[service].pass(&mut ())?;
            }
            let before = match shape {
                Shape::AfterMore { before, history, .. } => Some(Shape::Decode { rows: before, history }),
                // Where depths are mixed, they were in the pass before as well, and every depth's own weights were in use.
                Shape::Mix { .. } => Some(shape),
                _ => None,
            };
            if let Some(before) = before {
                self.time(before, turn + num_loops - 1)?;
            }
            let time = self.time(shape, turn)?.as_micros_f64();
            if turn < num_loops {
                continue;
            }
            let depth = turn % num_loops;
            let (first, last) = (depth == 0, depth + 1 == num_loops);
            let counts = match shape {
                Shape::Decode { .. } | Shape::AfterMore { .. } | Shape::Prefill { .. } | Shape::Prefills { .. } => {
                    !first || num_loops == 1
                }
                Shape::Head { .. } => last,
                Shape::Leave { .. } | Shape::Mix { .. } => true,
            };
            counted.extend(counts.then_some(((shape, false), time)));
            let embeds = first && matches!(shape, Shape::Decode { history: SHORT, .. });
            counted.extend(embeds.then_some(((shape, true), time)));
        }
        Ok(counted)
    }

    fn num_loops(&self) -> usize {
        self.engine.model.config().num_loops
    }

    /// The history of a decode row: as asked for, where its slot has the room.
    fn history(&self, slot: Slot, asked: u32) -> u32 {
        if slot < Grid::max(&self.grid.decodes) { asked } else { SHORT }
    }

    /// The history of rows that leave by themselves.
    fn leaving_history(&self) -> u32 {
        1 + (mix(self.occupied) % u64::from(Grid::max(&self.grid.histories))) as u32
    }

    /// Gives every row of a shape a sequence of its history.
    fn occupy(&mut self, shape: Shape) {
        self.occupied += 1;
        let vocab = self.engine.model.config().vocab_size as u64;
        let last_depth = self.engine.model.config().num_loops as u8 - 1;
        let token = |index: u64| (mix(index) % vocab) as u32;
        let chunk_slot = Grid::max(&self.grid.rows);
        let (slots, prompt_tokens) = match shape {
            Shape::Decode { rows, history } | Shape::Head { rows, history, .. } | Shape::Mix { rows, history, .. } => {
                (0..rows, history)
            }
            Shape::AfterMore { before, history, .. } => (0..before, history),
            Shape::Leave { rows, .. } => (0..rows, self.leaving_history()),
            Shape::Prefill { tokens, history } => (chunk_slot..chunk_slot + 1, history + tokens),
            Shape::Prefills { tokens, history } => (chunk_slot..chunk_slot + PROMPTS, history + tokens),
        };
        for slot in slots {
            let prompt_tokens = if slot < chunk_slot { self.history(slot, prompt_tokens) } else { prompt_tokens };
            let generation = Generation {
                prompt: (0..u64::from(prompt_tokens)).map(token).collect(),
                tokens: vec![token(u64::from(slot))],
                exit_depths: vec![last_depth],
                recorded: Vec::new(),
            };
            self.executor.occupy(slot, slot, generation, prompt_tokens + 1);
        }
    }

    /// Has the executor run and time one pass of a shape, the depth of which follows from whose turn it is.
    fn time(&mut self, shape: Shape, turn: usize) -> Result<Nanos, ReplayError> {
        let segments = self.segments(shape, turn);
        let looks = match shape {
            // Of rows that nobody knows to leave until they do, the head is not read with the pass.
            Shape::Head { .. } => Looks { signal: Look::Oracle, below: 0, head_from: u8::MAX },
            _ => Looks { signal: Look::Measure(Measure::Top1), below: u8::MAX, head_from: 0 },
        };
        let pass = Pass { segments: &segments, looks, tables: &self.tables };
        let mut signals = vec![0.0; segments.len()];
        let ran = self.executor.run(&pass, &mut signals)?;
        if !segments[0].predicts {
            return Ok(ran);
        }
        let left = self.executor.emit(&pass, &(0..segments.len() as u32).collect::<Vec<_>>())?;
        self.occupy(shape);
        Ok(left)
    }

    fn segments(&self, shape: Shape, turn: usize) -> Vec<Segment> {
        let num_loops = self.num_loops();
        let (depth, last) = (turn % num_loops, num_loops - 1);
        let decode = |slot: Slot, history, depth: usize, predicts| Segment {
            slot,
            start: history,
            tokens: 1,
            depth: depth as u8,
            kind: RowKind::Decode,
            predicts,
        };
        let chunk = |number: u32, history, tokens| Segment {
            slot: Grid::max(&self.grid.rows) + number,
            start: history,
            tokens,
            depth: depth as u8,
            kind: RowKind::Prompt,
            predicts: false,
        };
        match shape {
            Shape::Decode { rows, history } | Shape::AfterMore { rows, history, .. } => {
                (0..rows).map(|slot| decode(slot, self.history(slot, history), depth, false)).collect()
            }
            Shape::Head { rows, history, again } => {
                (0..rows).map(|slot| decode(slot, history, depth, again || depth == last)).collect()
            }
            Shape::Leave { rows, skips } => {
                let depth = if skips { 0 } else { last };
                (0..rows).map(|slot| decode(slot, self.leaving_history(), depth, true)).collect()
            }
            Shape::Mix { rows, depths, history } => {
                let depth = |slot| ((slot % depths) as usize + turn) % num_loops;
                (0..rows).map(|slot| decode(slot, history, depth(slot), false)).collect()
            }
            Shape::Prefill { tokens, history } => vec![chunk(0, history, tokens)],
            Shape::Prefills { tokens, history } => (0..PROMPTS).map(|number| chunk(number, history, tokens)).collect(),
        }
    }
}

/// What some rounds of a [`Profiler`] measured.
pub struct Measured<'a> {
    profiler: &'a Profiler,
    visits: Vec<&'a Visit>,
    probes: Vec<&'a Probe>,
}

impl<'a> Measured<'a> {
    fn counted(&self) -> impl Iterator<Item = Counted> {
        self.visits[0].keys().copied()
    }

    /// What some runs took.
    fn of(&self, counted: Counted) -> Summary {
        Summary::of(&self.visits.iter().flat_map(|visit| &visit[&counted]).copied().collect::<Vec<_>>())
    }

    /// What some runs took beyond others, visit by visit.
    fn difference(&self, of: Counted, less: Counted) -> Summary {
        let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len() as f64;
        let differences = self.visits.iter().map(|visit| mean(&visit[&of]) - mean(&visit[&less]));
        Summary::of(&differences.collect::<Vec<_>>())
    }

    /// What other work on the machine took: the mean of all runs over that of each shape's middle half, over all shapes
    /// together. It is 1 on a machine that does nothing else.
    pub fn slowdown(&self) -> f64 {
        let all: f64 = self.visits.iter().flat_map(|visit| visit.values().flatten()).sum();
        let middles =
            self.counted().map(|counted| self.of(counted)).map(|found| found.middle * f64::from(found.repeats));
        all / middles.sum::<f64>()
    }

    /// How fast the machine was in service during the rounds.
    pub fn probes(&self) -> impl Iterator<Item = &'a Probe> {
        self.probes.iter().copied()
    }

    /// Microseconds that a pass in service takes beyond the executor's own time: the scheduler's and the serving loop's.
    fn overhead(&self) -> f64 {
        let passes: usize = self.probes().map(|probe| probe.times.len()).sum();
        self.probes().map(|probe| probe.elapsed.since(probe.in_executor()).as_micros_f64()).sum::<f64>() / passes as f64
    }

    /// The means of the middle halves. Parts that are differences are not below zero, but for those of prompt chunks; what
    /// interrupts single passes is left out: what passes take in service, the [probes](Self::probes) tell. `model` is the
    /// model's name, `source` says how the profile came about; how busy the machine was is added.
    pub fn profile(&self, model: &str, source: &str) -> LatencyProfile {
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
            },
            points: self.points(),
            mixed_attention: None,
        }
    }

    /// What the parts of all shapes take. More history never takes less: where noise says so, both take the mean, or parts
    /// of passes, which are not below zero, would come out too long on average.
    fn parts(&self) -> BTreeMap<Shape, Summary> {
        let part = |shape: Shape| match shape.less() {
            Some(less) => self.difference((shape, false), (less, false)),
            None => self.of((shape, false)),
        };
        let shapes = self.counted().filter(|&(_, embeds)| !embeds).map(|(shape, _)| shape);
        let mut parts: BTreeMap<Shape, Summary> = shapes.map(|shape| (shape, part(shape))).collect();
        let grid = &self.profiler.grid;
        let histories = || grid.histories.iter().copied();
        let decodes = grid.decodes.iter().map(|&rows| histories().map(move |history| Shape::Decode { rows, history }));
        let chunks = grid.chunks.iter().map(|&tokens| {
            std::iter::once(0).chain(histories()).map(move |history| Shape::Prefill { tokens, history })
        });
        let series = decodes.map(Iterator::collect).chain(chunks.map(Iterator::collect));
        for series in series.collect::<Vec<Vec<Shape>>>() {
            let series: Vec<Shape> = series.into_iter().filter(|shape| shape.less().is_some()).collect();
            let mut times: Vec<f64> = series.iter().map(|shape| parts[shape].middle).collect();
            make_rising(&mut times);
            for (shape, time) in series.iter().zip(times) {
                parts.get_mut(shape).expect("a shape of the grid is measured").middle = time;
            }
        }
        parts
    }

    fn points(&self) -> Vec<Point> {
        let num_loops = self.profiler.num_loops() as u32;
        let mut points: Vec<Point> = Vec::new();
        let embed = |rows| {
            let shape = Shape::Decode { rows, history: SHORT };
            self.difference((shape, true), (shape, false))
        };
        let mut add = |component: Component, rows, kv_tokens, depths, part: Summary| {
            let Summary { middle, spread, repeats } = part;
            let (time_us, spread_us) = (if component.can_take(middle) { middle } else { 0.0 }, spread);
            points.push(Point { component, rows, kv_tokens, depths, time_us, spread_us, repeats });
        };
        let parts = self.parts();
        for (&shape, &part) in &parts {
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
                Shape::Head { rows, again, .. } => {
                    add(if again { Component::HeadAgain } else { Component::Head }, rows, 0, 1, part);
                }
                Shape::Mix { rows, depths, .. } => {
                    // In turn, every row was at the first depth once.
                    let embeds = embed(rows).middle.max(0.0) / f64::from(num_loops);
                    add(Component::DepthMix, rows, 0, depths, Summary { middle: part.middle - embeds, ..part });
                }
                Shape::Prefill { tokens, history } => add(Component::PrefillAttention, tokens, history, 1, part),
                Shape::Prefills { tokens, history } => {
                    let first = parts[&Shape::Prefill { tokens, history }].middle;
                    add(Component::PrefillAgain, tokens, history, 1, Summary { middle: part.middle - first, ..part });
                }
                Shape::Leave { skips: false, .. } => {}
                Shape::Leave { rows, skips: true } => add(Component::KvFill, rows * (num_loops - 1), 0, 1, part),
            }
        }
        points.sort_by_key(|point| (point.component, point.depths, point.rows, point.kv_tokens));
        points
    }
}

fn shapes(grid: &Grid, num_loops: u32) -> Vec<Shape> {
    let mut shapes = Vec::new();
    let mut rows_of_differences: Vec<u32> =
        grid.rows.iter().chain(&grid.decodes).chain(&grid.chunks).copied().collect();
    let twice = grid.chunks.iter().copied().filter(|tokens| PROMPTS * tokens <= Grid::max(&grid.rows));
    let twice: Vec<u32> = twice.collect();
    rows_of_differences.extend(twice.iter().map(|tokens| PROMPTS * tokens));
    rows_of_differences.sort_unstable();
    rows_of_differences.dedup();
    for rows in rows_of_differences {
        shapes.push(Shape::Decode { rows, history: SHORT });
    }
    let typical = grid.histories[grid.histories.len() / 2];
    for &rows in &grid.decodes {
        shapes.push(Shape::Head { rows, history: typical, again: false });
        // With one loop every pass runs the head.
        if num_loops > 1 {
            shapes.push(Shape::Head { rows, history: typical, again: true });
            shapes.extend([true, false].map(|skips| Shape::Leave { rows, skips }));
        }
        shapes.extend(grid.histories.iter().map(|&history| Shape::Decode { rows, history }));
    }
    let largest = Grid::max(&grid.rows);
    for &rows in &grid.decodes {
        let befores = BTreeSet::from([2 * rows, Grid::max(&grid.decodes), largest]);
        let more = befores.into_iter().filter(|before| (rows + 1..=largest).contains(before));
        shapes.extend(more.map(|before| Shape::AfterMore { rows, before, history: typical }));
    }
    for rows in grid.decodes.iter().copied().filter(|&rows| rows < largest).chain([largest]) {
        let history = if grid.decodes.contains(&rows) { typical } else { SHORT };
        shapes.extend((2..=num_loops.min(rows)).map(|depths| Shape::Mix { rows, depths, history }));
    }
    for &tokens in &grid.chunks {
        let histories = [0].into_iter().chain(grid.histories.iter().copied());
        shapes.extend(histories.map(|history| Shape::Prefill { tokens, history }));
    }
    // What comes beside a chunk is little: the shortest and the longest history do for it.
    for tokens in twice {
        shapes.extend([0, Grid::max(&grid.histories)].map(|history| Shape::Prefills { tokens, history }));
    }
    shapes
}

/// A number for each shape.
fn key(shape: Shape) -> u64 {
    let (kind, a, b) = match shape {
        Shape::Decode { rows, history } => (0, rows, history),
        Shape::Head { rows, again, .. } => (2, rows, u32::from(again)),
        Shape::AfterMore { rows, before, .. } => (1, rows, before),
        Shape::Mix { rows, depths, .. } => (3, rows, depths),
        Shape::Prefill { tokens, history } => (4, tokens, history),
        Shape::Prefills { tokens, history } => (6, tokens, history),
        Shape::Leave { rows, skips } => (5, rows, u32::from(skips)),
    };
    (kind << 60) | (u64::from(a) << 30) | u64::from(b)
}

/// Replaces numbers by the nearest that do not fall (in the least squares, by pooling neighbours that do).
fn make_rising(numbers: &mut [f64]) {
    let mut pools: Vec<(f64, usize)> = Vec::new();
    for &number in numbers.iter() {
        let mut pool = (number, 1);
        while let Some(&(before, count)) = pools.last().filter(|(before, _)| *before > pool.0) {
            pool = ((before * count as f64 + pool.0 * pool.1 as f64) / (count + pool.1) as f64, count + pool.1);
            pools.pop();
        }
        pools.push(pool);
    }
    let pooled = pools.into_iter().flat_map(|(number, count)| std::iter::repeat_n(number, count));
    numbers.iter_mut().zip(pooled).for_each(|(number, pooled)| *number = pooled);
}

/// The mean of the middle half, and half the distance between the quartiles. Where a machine has two moods, the median is
/// that of the one or the other by chance; and single runs that other work interrupts are left out of both.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Summary {
    middle: f64,
    spread: f64,
    repeats: u32,
}

impl Summary {
    fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let quantile = |share: f64| {
            let place = share * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        let middle = &sorted[sorted.len() / 4..sorted.len() - sorted.len() / 4];
        Self {
            middle: middle.iter().sum::<f64>() / middle.len() as f64,
            spread: (quantile(0.75) - quantile(0.25)) / 2.0,
            repeats: sorted.len() as u32,
        }
    }
}

/// The CPU's name, and the threads that kernels use.
pub fn device_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |line: &str| line.split_once(':').map(|(_, value)| value.trim().to_owned());
    let name = info.lines().find(|line| line.starts_with("model name")).and_then(field);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let name = name.unwrap_or_else(|| format!("CPU ({})", std::env::consts::ARCH));
    format!("{name}, {cores} cores, {} threads", rayon::current_num_threads())
}

/// How busy the machine is and how fast it runs, as far as the system tells.
pub(crate) fn machine_state() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split_whitespace().take(3).collect();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let clock = info.lines().filter(|line| line.starts_with("cpu MHz")).filter_map(|line| line.split_once(':'));
    let clock = clock.filter_map(|(_, mhz)| mhz.trim().parse::<f64>().ok()).reduce(f64::max);
    let clock = clock.map_or(String::new(), |mhz| format!(", cores at up to {:.2} GHz", mhz / 1e3));
    match load.is_empty() {
        true => format!("load unknown{clock}"),
        false => format!("load {} over 1, 5 and 15 minutes{clock}", load.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_means_of_the_middle_half_and_half_quartile_distances() {
        let summary = Summary::of(&[5.0, 1.0, 2.0, 4.0, 100.0]);
        assert_eq!(summary, Summary { middle: 11.0 / 3.0, spread: 1.5, repeats: 5 });
        assert_eq!(Summary::of(&[3.0]), Summary { middle: 3.0, spread: 0.0, repeats: 1 });
    }

    #[test]
    fn numbers_that_fall_are_pooled_with_those_before() {
        let mut numbers = [1.0, 5.0, 3.0, 4.0, 9.0, 2.0];
        make_rising(&mut numbers);
        assert_eq!(numbers, [1.0, 4.0, 4.0, 4.0, 5.5, 5.5]);
        let mut falling = [3.0, 2.0, 1.0];
        make_rising(&mut falling);
        assert_eq!(falling, [2.0; 3]);
    }

    #[test]
    fn a_grid_rises_to_its_limits() {
        for (rows, decodes, history, chunk) in [(1, 1, 1, 1), (320, 64, 700, 256), (600, 600, 33, 600), (7, 64, 40, 9)]
        {
            let grid = Grid::up_to(Limits { rows, decodes, history, chunk });
            for points in [&grid.rows, &grid.decodes, &grid.histories, &grid.chunks] {
                assert!(points.is_sorted() && points.windows(2).all(|pair| pair[0] < pair[1]), "{points:?}");
            }
            assert_eq!((Grid::max(&grid.rows), Grid::max(&grid.histories)), (rows, history));
            assert_eq!((Grid::max(&grid.decodes), Grid::max(&grid.chunks)), (decodes.min(rows), chunk.min(rows)));
        }
    }

    #[test]
    fn what_a_shape_is_compared_with_is_measured_and_has_as_many_rows() {
        for (rows, decodes, num_loops) in [(20, 5, 3), (64, 64, 4), (3, 1, 1)] {
            let grid = Grid::up_to(Limits { rows, decodes, history: 40, chunk: 12 });
            let shapes = shapes(&grid, num_loops);
            for shape in &shapes {
                let Some(less) = shape.less() else { continue };
                assert!(shapes.contains(&less) && less.rows() == shape.rows(), "{shape:?} less {less:?}");
                assert_eq!(less.less().and_then(Shape::less), None, "{shape:?}");
            }
            let more = shapes.iter().filter(|shape| matches!(shape, Shape::AfterMore { .. })).count();
            assert_eq!(more > 0, rows > 1, "{shapes:?}");
        }
    }
}

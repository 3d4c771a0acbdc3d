//! The profiler: measures the components of a pass on the executor of replays.
//!
//! The profiler composes passes of every shape of a grid as the scheduler would, and the executor times them. A
//! component that cannot run by itself is the difference of two shapes, which run one soon after the other: the time of
//! histories is that of a pass with histories less that of one without. Between shapes, and in probes, the profiler
//! serves a steady load. It scales the components to the passes of that load: [`Profiler::profile`].

mod grid;
mod machine;
mod measured;
mod probe;
mod statistics;

use std::sync::Arc;
use std::time::{Duration, Instant};

use latency::{LatencyError, LatencyModel, SteadyFactors};
use scheduler::blocks::BlockTables;
use scheduler::{
    Executor, ExitPolicy, KvFill, Lengths, Observer, Pass, PassRecord, PassRecorder, RowKind, Segment, SignalRead,
    SignalReads, Slot, SteadyLoad, SteadyServer, pass_work,
};
use traces::hash::mix;
use traces::{ExitSignal, LatencyProfile, Nanos, PassBefore, PassOrigin, PassRun, Request, unix_micros};

use grid::{Measurable, PROMPTS, SHORT, Shape, key, shapes};
use measured::{Counted, Round, Visit};

use crate::backend::PassLimits;
use crate::cache::TILE;
use crate::executor::{EngineExecutor, Generation, in_pool};
use crate::replay::{Engine, ReplayError};

pub use grid::{Grid, Limits};
pub use machine::device_name;
pub(crate) use machine::machine_state;
pub use measured::Measured;
pub use probe::Probe;

/// Minimum duration of a probe. Work before a probe leaves the caches cold: passes under steady load take 14% longer at
/// first, and 2% after 18 ms.
const PROBE_TIME: Duration = Duration::from_millis(60);
/// Minimum number of passes of a probe, for models with long passes.
const PASSES_OF_PROBE: usize = 4;
/// Number of ways to serve the load, which probes take in turn: sequence-wise at full depth, depth-wise with exits,
/// depth-wise at full depth, and with exits that are decided after each pass, depth-wise and sequence-wise. They give passes
/// of one depth, of a few and of all, consecutive passes with the head, heads that run in a step of their own, and few rows
/// after many.
const WAYS: usize = 5;
/// The exit policy of the last two ways, where the model has gates. Gates that were not trained are about as large.
const ADAPTIVE: ExitPolicy = ExitPolicy::Confidence { signal: ExitSignal::Gate, threshold: 0.5 };
/// Probability of an exit at each depth in the last two ways, where the model has no gates.
const CHANCE: f64 = 0.5;
/// Number of times that probes take every way in turn in a round, if nothing else is asked for.
const CYCLES: usize = 4;
/// Number of visits to each shape in a round, so that its times are from several moments.
const VISITS: usize = 2;
/// Mean time of a pass above which no cache can contain the model, so that earlier passes do not matter.
const CACHED: Duration = Duration::from_millis(10);

/// Measures a latency profile in rounds. A round measures every shape, and serves the steady load in probes.
pub struct Profiler {
    engine: Engine,
    executor: EngineExecutor,
    tables: BlockTables,
    shapes: Vec<Shape>,
    rounds: Vec<Round>,
    grid: Grid,
    /// Machines under steady load with the batches of the grid, in ascending order. If no cache can contain the model,
    /// there is only one, with the largest batch.
    services: Vec<SteadyServer<EngineExecutor>>,
    /// Whether shapes run between the passes of these machines.
    runs_among: bool,
    /// Machines under steady load with the largest batch: depth-wise with exits and at full depth, and with exits that are
    /// decided after each pass, depth-wise and sequence-wise.
    others: [SteadyServer<EngineExecutor>; WAYS - 1],
    /// Index of the next probe's way to serve the load.
    next_way: usize,
    /// Number of times that probes take every way in turn in a round.
    cycles: usize,
    /// Number of times that rows got sequences.
    occupied: u64,
    /// The last pass of the shapes' processor.
    last: LastPass,
    /// Log of the current round's shapes, on a clock that started with the profiler.
    log: PassRecorder,
    started: Instant,
}

/// Whether a pass goes into the log.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Logging {
    On,
    Off,
}

/// Remembers what the next pass depends on.
#[derive(Default)]
struct LastPass(PassBefore);

impl Observer for LastPass {
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.0 = record.pass.work.as_before();
    }
}

/// A log of a round's shapes. They run among passes of a load, whose settings it names.
fn log_of_shapes(load: SteadyLoad) -> PassRecorder {
    PassRecorder::new(load.settings(), PassOrigin::Grid, unix_micros)
}

impl Profiler {
    /// A profiler without measurements. `lengths` are those of the steady load's sequences.
    ///
    /// # Errors
    /// If the grid does not fit the model's positions, or its cache does not fit in memory.
    pub fn new(engine: &Engine, grid: Grid, lengths: Lengths) -> Result<Self, ReplayError> {
        let block_tokens = TILE as u32;
        let (history, chunk) = (Grid::max(&grid.histories), Grid::max(&grid.chunks));
        // The profiler's requests are not those that prompts may have been given for.
        let prompts = Arc::new(engine.prompts.of_any_length(history.max(lengths.longest) as usize));
        let engine = &Engine { prompts, ..engine.clone() };
        let (rows, decodes) = (Grid::max(&grid.rows), Grid::max(&grid.decodes));
        let decode_blocks = (history + 1).div_ceil(block_tokens);
        let chunk_blocks = (history + chunk).div_ceil(block_tokens);
        let num_blocks = decodes * decode_blocks + (rows - decodes) + PROMPTS * chunk_blocks;
        // The last slots belong to prompt chunks.
        let mut tables = BlockTables::new(num_blocks, block_tokens, rows + PROMPTS);
        for slot in 0..rows + PROMPTS {
            let blocks = if slot >= rows {
                chunk_blocks
            } else if slot < decodes {
                decode_blocks
            } else {
                1
            };
            assert!(tables.grow(slot, blocks * block_tokens), "there are blocks for every slot");
        }
        let mut executor = EngineExecutor::new(
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
        let [all, decoding, positions] = [rows, decodes, history + chunk].map(|limit| limit as usize);
        executor.prepare(PassLimits { rows: all, heads: decoding, sequences: decoding, positions })?;
        let num_loops = engine.model.config().num_loops;
        let measurable = Measurable {
            num_loops: num_loops as u32,
            has_gate: engine.model.config().gate,
            heads_are_trips: engine.model.heads_ahead_from().is_some(),
        };
        let shapes = shapes(&grid, measurable);
        // Several prompts share a pass, as in replays; chunks of the shapes are at most `chunk` long.
        let prompt_rows = if lengths.prompt <= chunk { rows } else { chunk };
        // Keys and values that all loops share are part of the model; other fills differ in what exits copy.
        let kv_fill = match engine.model.config().kv_fill {
            KvFill::First => KvFill::First,
            KvFill::Reuse | KvFill::Skip | KvFill::Backfill | KvFill::Last | KvFill::Cycle(_) => KvFill::Reuse,
        };
        let load = |batch: u32| {
            SteadyLoad::new(num_loops as u8, batch, rows, prompt_rows, block_tokens, lengths).under(kv_fill)
        };
        let serve = |load: SteadyLoad| {
            let mut executor = engine.executor(load.settings())?.with_chance(0, CHANCE);
            executor.prepare(PassLimits::of(load.settings(), lengths.longest))?;
            Ok::<_, ReplayError>(SteadyServer::new(load, executor)?)
        };
        let adaptive = match engine.model.config().gate && num_loops > 1 {
            true => ADAPTIVE,
            false => ExitPolicy::Oracle { charged: false, recorded: false },
        };
        let mut profiler = Self {
            engine: engine.clone(),
            executor,
            tables,
            shapes,
            rounds: Vec::new(),
            grid,
            services: vec![serve(load(decodes))?],
            runs_among: false,
            others: [
                serve(load(decodes).with_exits())?,
                serve(load(decodes).depth_wise())?,
                serve(load(decodes).with_exits_by(adaptive))?,
                serve(load(decodes).with_exits_in_lockstep(adaptive))?,
            ],
            next_way: 0,
            cycles: CYCLES,
            occupied: 0,
            last: LastPass::default(),
            log: log_of_shapes(load(decodes)),
            started: Instant::now(),
        };
        // The first passes touch new memory.
        for _ in 0..WAYS {
            profiler.probe()?;
        }
        let probe = profiler.probe()?;
        if probe.elapsed.as_micros_f64() / (probe.passes.len() as f64) < CACHED.as_secs_f64() * 1e6 {
            let smaller = profiler.grid.decodes.iter().filter(|&&batch| batch < decodes);
            let smaller = smaller.map(|&batch| serve(load(batch))).collect::<Result<Vec<_>, _>>()?;
            profiler.services.splice(0..0, smaller);
            profiler.runs_among = true;
        }
        Ok(profiler)
    }

    /// Sets the number of cycles of probes in a round. In a cycle the load is served once in every way.
    pub fn with_cycles(self, cycles: usize) -> Self {
        Self { cycles, ..self }
    }

    /// Measures every shape, several times, each time in another order. Calls `progress` with the shapes done and their
    /// total.
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
                // Shapes with the same number of rows are timed back to back: a component that cannot run alone is a
                // difference, so both must be timed before the machine's speed drifts.
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
            round.probes = (0..self.cycles * WAYS).map(|_| self.probe()).collect::<Result<_, _>>()?;
            Ok::<_, ReplayError>(round)
        })?;
        let next = log_of_shapes(self.loads()[0]);
        let log = std::mem::replace(&mut self.log, next);
        self.rounds.push(Round { shapes: log.into_run(), ..round });
        Ok(())
    }

    /// Serves the next passes of a steady load, in each way in turn, to measure the current speed of the machine.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn probe(&mut self) -> Result<Probe, ReplayError> {
        let way = self.next_way;
        self.next_way = (way + 1) % WAYS;
        let service = match way {
            0 => self.services.last_mut().expect("there is always one"),
            other => &mut self.others[other - 1],
        };
        let mut recorder = PassRecorder::new(service.load().settings(), PassOrigin::Steady, unix_micros);
        in_pool(|| {
            let start = Instant::now();
            while recorder.passes().len() < PASSES_OF_PROBE || start.elapsed() < PROBE_TIME {
                service.pass(&mut recorder)?;
            }
            Ok(Probe { way, elapsed: start.elapsed().into(), passes: recorder.into_run().passes })
        })
    }

    /// Loads of the probes, by way.
    pub fn loads(&self) -> [SteadyLoad; WAYS] {
        let [with_exits, full_depth, adaptive, in_lockstep] = self.others.each_ref().map(SteadyServer::load);
        [self.services.last().expect("there is always one").load(), with_exits, full_depth, adaptive, in_lockstep]
    }

    /// Logged passes as runs of a pass log: all shapes of each round, and passes of the steady load of each probe.
    pub fn pass_runs(&self) -> impl Iterator<Item = PassRun> {
        let loads = self.loads();
        let shapes = self.rounds.iter().zip(0..).map(|(round, repeat)| PassRun { repeat, ..round.shapes.clone() });
        let probes = self.rounds.iter().flat_map(|round| &round.probes).zip(0..);
        shapes.chain(probes.map(move |(probe, number)| probe.clone().into_run(loads[probe.way].settings(), number)))
    }

    /// The profile of some rounds, counted from 0: components scaled to the passes of the steady load in their probes.
    /// `model` is the model's name, and `source` describes how the profile was made. The load of the machine, and the
    /// difference between passes under load and the sum of components, are added to it.
    ///
    /// # Errors
    /// If the profile cannot be interpolated.
    ///
    /// # Panics
    /// Without a round, or if a round does not exist.
    pub fn profile(
        &self,
        rounds: impl IntoIterator<Item = usize>,
        model: &str,
        source: &str,
    ) -> Result<LatencyProfile, LatencyError> {
        let measured = self.measured_in(rounds);
        let components = measured.profile(model, source);
        let factors = SteadyFactors::new(&components, &measured.steady_passes_over(&components)?)?;
        let mut profile = factors.apply(&components);
        let (least, most) = factors.range();
        let extra = |range: Option<(f64, f64)>, of: &str| {
            range.map_or(String::new(), |(least, most)| format!(", and {least:+.1} to {most:+.1} us {of}"))
        };
        let after = extra(factors.after_range_us(), "after larger passes");
        let mixing = extra(factors.mixing_range_us(), "where depths are mixed");
        let filling = extra(factors.filling_range_us(), "where keys and values are copied");
        let deciding = extra(factors.deciding_range_us(), "where exits are decided after the pass");
        let [at_one, at_several] = measured.beside_chunks(&LatencyModel::new(&components)?);
        let beside = match (at_one, at_several.or(at_one)) {
            (Some(at_one), Some(at_several)) => format!(
                "; chunks beside decode rows differ from the sum by {:+.1}% at one depth, {:+.1}% at several",
                100.0 * at_one,
                100.0 * at_several
            ),
            _ => String::new(),
        };
        profile.meta.source = format!(
            "{}; scaled by {least:.3} to {most:.3}, by rows: passes under steady load over the sum of \
             components{after}{mixing}{filling}{deciding}{beside}",
            profile.meta.source
        );
        LatencyModel::new(&profile)?;
        Ok(profile)
    }

    /// Measurements of all rounds.
    ///
    /// # Panics
    /// Without a round.
    pub fn measured(&self) -> Measured<'_> {
        self.measured_in(0..self.rounds.len())
    }

    /// Measurements of some rounds, counted from 0.
    ///
    /// # Panics
    /// If a round does not exist.
    pub fn measured_in(&self, rounds: impl IntoIterator<Item = usize>) -> Measured<'_> {
        let rounds: Vec<&Round> = rounds.into_iter().map(|round| &self.rounds[round]).collect();
        assert!(!rounds.is_empty(), "a profile takes at least one round");
        Measured {
            profiler: self,
            visits: rounds.iter().flat_map(|round| &round.visits).collect(),
            probes: rounds.iter().flat_map(|round| &round.probes).collect(),
            passes: rounds.iter().flat_map(|round| &round.shapes.passes).collect(),
        }
    }

    /// Disagreement of the profiles from the earlier and the later half of the rounds: the sum of absolute differences
    /// over all passes of the grid, as a share of their times. `None` with fewer than two rounds.
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

    /// Runs a shape at all depths in turn, each time after a pass of the steady load with as many sequences as the
    /// shape has decode rows (half of the largest batch for prompt chunks), so that caches and the processor's clock
    /// are as under load. Returns the times that count, in microseconds.
    fn measure(&mut self, shape: Shape) -> Result<Vec<(Counted, f64)>, ReplayError> {
        let num_loops = self.num_loops();
        self.occupy(shape);
        let batch = shape.decodes().unwrap_or(Grid::max(&self.grid.decodes) / 2);
        let fits = |service: &SteadyServer<_>| batch <= service.load().settings().max_batch;
        let service = self.services.iter().position(fits).unwrap_or(self.services.len() - 1);
        let service = self.runs_among.then_some(service);
        // Each depth follows the previous one, as under sequence-wise batching. A head that was just used follows a
        // pass at the last depth, which ran it.
        let is_again = matches!(shape, Shape::Head { again: true, .. });
        let first_before = if is_again { 0 } else { num_loops - 1 };
        if let Some(service) = service {
            while self.services[service].passes() % num_loops != first_before {
                self.services[service].pass(&mut self.last)?;
            }
        }
        let mut counted = Vec::new();
        // In the first turn, keys and values are not in the caches.
        for turn in 0..2 * num_loops {
            if let Some(service) = service {
                self.services[service].pass(&mut self.last)?;
            }
            let before = match shape {
                Shape::AfterMore { before, history, .. } => Some(Shape::Decode { rows: before, history }),
                // With mixed depths, the previous pass used every depth's own weights as well.
                Shape::Mix { .. } => Some(shape),
                Shape::Beside { depths, .. } if depths > 1 => Some(shape),
                _ => None,
            };
            if let Some(before) = before {
                self.time(before, turn + num_loops - 1, Logging::Off)?;
            }
            let logging = if turn < num_loops { Logging::Off } else { Logging::On };
            let time = self.time(shape, turn, logging)?.as_micros_f64();
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
                Shape::Signal { .. } => !first && !last,
                Shape::Exit { .. } | Shape::Mix { .. } | Shape::Beside { .. } => true,
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

    /// History of a decode row: the requested one, if its slot has room for it.
    fn history(&self, slot: Slot, asked: u32) -> u32 {
        if slot < Grid::max(&self.grid.decodes) { asked } else { SHORT }
    }

    /// History of rows that exit.
    fn exit_history(&self) -> u32 {
        1 + (mix(self.occupied) % u64::from(Grid::max(&self.grid.histories))) as u32
    }

    /// Gives every row of a shape a sequence with its history.
    fn occupy(&mut self, shape: Shape) {
        self.occupied += 1;
        let vocab = self.engine.model.config().vocab_size as u64;
        let last_depth = self.engine.model.config().num_loops as u8 - 1;
        let token = |index: u64| (mix(index) % vocab) as u32;
        let chunk_slot = Grid::max(&self.grid.rows);
        let (decodes, chunks, history, tokens) = match shape {
            Shape::Decode { rows, history }
            | Shape::Head { rows, history, .. }
            | Shape::Signal { rows, history }
            | Shape::Mix { rows, history, .. } => (rows, 0, history, 0),
            Shape::AfterMore { before, history, .. } => (before, 0, history, 0),
            Shape::Exit { rows, .. } => (rows, 0, self.exit_history(), 0),
            Shape::Prefill { tokens, history } => (0, 1, history, tokens),
            Shape::Prefills { tokens, history } => (0, PROMPTS, history, tokens),
            Shape::Beside { tokens, rows, history, .. } => (rows, 1, history, tokens),
        };
        for slot in (0..decodes).chain(chunk_slot..chunk_slot + chunks) {
            let prompt_tokens = if slot < chunk_slot { self.history(slot, history) } else { history + tokens };
            let generation = Generation {
                prompt: (0..u64::from(prompt_tokens)).map(token).collect(),
                tokens: vec![token(u64::from(slot))],
                exit_depths: vec![last_depth],
                ..Generation::default()
            };
            self.executor.occupy(slot, slot, generation, prompt_tokens + 1);
        }
    }

    /// Runs and times one pass of a shape, at the depth given by `turn`. Of exits that run after the pass, only their time is
    /// returned; a log gets the time of all.
    fn time(&mut self, shape: Shape, turn: usize, logging: Logging) -> Result<Nanos, ReplayError> {
        let segments = self.segments(shape, turn);
        let reads = match shape {
            // The exits of these rows are not known before the pass, so the head does not run within it.
            Shape::Head { within: false, .. } => SignalReads {
                signal: SignalRead::Oracle,
                below: 0,
                delay: 0,
                head_from: u8::MAX,
                verified_at: SignalReads::NO_DRAFTS,
            },
            Shape::Signal { .. } => SignalReads {
                signal: SignalRead::Signal(ExitSignal::Gate),
                below: self.num_loops() as u8 - 1,
                delay: 0,
                head_from: u8::MAX,
                verified_at: SignalReads::NO_DRAFTS,
            },
            _ => {
                let signal = SignalRead::Signal(ExitSignal::Top1);
                SignalReads { signal, below: u8::MAX, delay: 0, head_from: 0, verified_at: SignalReads::NO_DRAFTS }
            }
        };
        let exits = segments[0].predicts && !matches!(shape, Shape::Signal { .. });
        let exiting: Vec<u32> = if exits { (0..segments.len() as u32).collect() } else { Vec::new() };
        let work = pass_work(&segments, &exiting, reads, self.num_loops() as u8, self.last.0);
        let pass = Pass::new(&segments, reads, &self.tables, &work);
        let mut signals = vec![0.0; segments.len()];
        let start = self.started.elapsed().into();
        let ran = self.executor.run(&pass, &mut signals)?;
        let exits = if exiting.is_empty() { Nanos::ZERO } else { self.executor.emit(&pass, &exiting)? };
        let (elapsed, running) = (ran + exits, segments.len() as u32);
        let device = self.executor.device_pass();
        let record = PassRecord { start, elapsed, pass, exiting: &exiting, running, waiting: 0, device };
        self.last.pass(&record);
        if logging == Logging::On {
            self.log.pass(&record);
        }
        if exiting.is_empty() {
            return Ok(ran);
        }
        self.occupy(shape);
        Ok(if matches!(shape, Shape::Head { within: true, .. }) { ran } else { exits })
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
            generated: true,
        };
        let chunk = |number: u32, history, tokens| Segment {
            slot: Grid::max(&self.grid.rows) + number,
            start: history,
            tokens,
            depth: depth as u8,
            kind: RowKind::Prompt,
            predicts: false,
            generated: false,
        };
        match shape {
            Shape::Decode { rows, history } | Shape::AfterMore { rows, history, .. } => {
                (0..rows).map(|slot| decode(slot, self.history(slot, history), depth, false)).collect()
            }
            Shape::Signal { rows, history } => {
                (0..rows).map(|slot| decode(slot, history, depth, depth != last)).collect()
            }
            Shape::Head { rows, history, again, .. } => {
                (0..rows).map(|slot| decode(slot, history, depth, again || depth == last)).collect()
            }
            Shape::Exit { rows, skips } => {
                let depth = if skips { 0 } else { last };
                (0..rows).map(|slot| decode(slot, self.exit_history(), depth, true)).collect()
            }
            Shape::Mix { rows, depths, history } => {
                let depth = |slot| ((slot % depths) as usize + turn) % num_loops;
                (0..rows).map(|slot| decode(slot, history, depth(slot), false)).collect()
            }
            Shape::Prefill { tokens, history } => vec![chunk(0, history, tokens)],
            Shape::Prefills { tokens, history } => (0..PROMPTS).map(|number| chunk(number, history, tokens)).collect(),
            Shape::Beside { tokens, rows, depths, history } => {
                let depth = |slot| ((slot % depths) as usize + turn) % num_loops;
                let rows = (0..rows).map(|slot| decode(slot, self.history(slot, history), depth(slot), false));
                rows.chain([chunk(0, history, tokens)]).collect()
            }
        }
    }
}

//! The interface between executor and device: a model on the device and, for each executor, a KV cache with the hidden
//! states of rows in flight. This module contains the CPU's implementation.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use scheduler::blocks::BlockId;
use scheduler::{ExitPolicy, KvFill, Settings, Speculation};
use traces::DevicePass;

use crate::cache::{KvCache, TILE, bytes_per_token};
use crate::config::ModelConfig;
use crate::executor::EngineError;
use crate::kernels::attention::{Fill, fill_deeper};
use crate::kernels::rows::{Change, Source, compare, gather};
use crate::kernels::signals::{Verdict, divergence, log_probability};
use crate::model::{InFlight, Model, Rows};
use crate::profile;

/// A model on a device.
pub trait ServedModel: Debug + Send + Sync {
    /// Configuration of the model.
    fn config(&self) -> &ModelConfig;

    /// Fingerprint of configuration and weights, after rounding.
    fn fingerprint(&self) -> &str;

    /// Storage type of the weights, as in a latency profile.
    fn storage(&self) -> String;

    /// Bytes of all weights.
    fn weight_bytes(&self) -> u64;

    /// Bytes of keys and values of one token, over all layers and the depths that a KV fill keeps.
    fn kv_bytes_per_token(&self, kv_fill: KvFill) -> u64;

    /// Name of the device, as in a latency profile.
    fn device_name(&self) -> String;

    /// Current load and speed of the device, as far as they are known.
    fn device_state(&self) -> String;

    /// Minimum number of rows whose exit signal does not need the head from which the head runs for all of them within the
    /// pass, rather than after the exits are decided, for those that exit. It should where a second trip to the device
    /// takes longer than the rows that do not exit. `None` if nothing is a trip: then the head always runs after.
    fn heads_ahead_from(&self) -> Option<usize> {
        None
    }

    /// Creates the backend of an executor, with an empty cache of `num_blocks` blocks of `block_tokens` positions.
    ///
    /// # Errors
    /// If the cache cannot be allocated.
    fn backend(
        self: Arc<Self>,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> std::result::Result<Box<dyn Backend>, EngineError>;
}

/// Runs passes over a cache and rows in flight.
///
/// The executor keeps track of both: the owners of blocks, and free rows in flight.
pub trait Backend: Debug + Send {
    /// Makes room for `rows` rows in flight. Existing rows keep their contents.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn reserve(&mut self, rows: usize) -> Result<()>;

    /// Makes unwritten memory, in the cache and in flight, read as ordinary numbers from now on, for timed passes on
    /// histories that were never run. The CPU's memory always does.
    ///
    /// # Errors
    /// If the device fails.
    fn fill_with_numbers(&mut self) -> Result<()> {
        Ok(())
    }

    /// Allocates what passes within these limits need, and captures their graphs, so that neither happens while they are
    /// timed. Passes beyond the limits run as well.
    ///
    /// # Errors
    /// If there is not enough memory, or the device fails.
    fn prepare(&mut self, _limits: PassLimits) -> Result<()> {
        Ok(())
    }

    /// How sections of passes ran so far; `None` if the device has no graphs.
    fn graphs(&self) -> Option<GraphCounts> {
        None
    }

    /// How the last pass ran, with the heads that were read after it; `None` if no device beside the host ran it.
    fn device_pass(&self) -> Option<DevicePass> {
        None
    }

    /// Runs rows through the block once and returns what is requested of them.
    ///
    /// # Errors
    /// As [`run_beside`](Self::run_beside).
    fn run(&mut self, work: &Work<'_>) -> Result<Answers> {
        self.run_beside(work, &mut || ())
    }

    /// As [`run`](Self::run), with `meanwhile` called while the device runs, where the device is not the host.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, a row in flight does not exist, a position is beyond `max_positions` or its
    /// blocks, or the device fails.
    fn run_beside(&mut self, work: &Work<'_>, meanwhile: &mut dyn FnMut()) -> Result<Answers>;

    /// Runs the head for more rows of the last pass. Entry `i` of `heads` belongs to row `i` of `rows`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn read_head(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>>;

    /// Keeps from now on also what the coda makes of rows that are kept in flight, if the model has a coda, so that the head
    /// can run for them after later passes.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn keep_exits(&mut self) -> Result<()>;

    /// As [`read_head`](Self::read_head), of rows in flight, whose indices are in `heads`. If the model has a coda, what it
    /// makes of them must [be kept](Self::keep_exits).
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn read_head_of_kept(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>>;

    /// Logits of the head for rows of the last pass, each over the whole vocabulary. Entry `i` of `picks` (as
    /// [`Heads::rows`]) belongs to row `i` of `rows`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn logits(&mut self, rows: &Rows<'_>, picks: &[usize]) -> Result<Vec<Vec<f32>>>;

    /// Natural logarithms of the probabilities that the head gives to tokens at temperature 1, for rows as of
    /// [`logits`](Self::logits). NaN if a logit is not finite.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn log_likelihoods(&mut self, rows: &Rows<'_>, picks: &[usize], tokens: &[u32]) -> Result<Vec<f64>> {
        let logits = self.logits(rows, picks)?;
        Ok(logits.iter().zip(tokens).map(|(logits, &token)| log_probability(logits, token as usize)).collect())
    }

    /// Copies keys and values to the depths below those at which they were written, for KV fill by reuse. The copy may
    /// run until the end of the next pass, or until something else waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    fn fill_deeper(&mut self, fills: &[Fill]) -> Result<()>;

    /// Time of the exit head so far, as part of the time of all passes.
    fn head_time(&self) -> Duration;

    /// Keys and values of the first `positions` entries of a sequence in its `blocks`, of every layer and depth.
    ///
    /// # Errors
    /// If the device fails.
    fn cached(&self, blocks: &[BlockId], positions: usize) -> Result<Vec<f32>>;
}

/// The largest passes that are expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassLimits {
    /// Rows of a pass.
    pub rows: usize,
    /// Rows of the head.
    pub heads: usize,
    /// Sequences of a pass, each as often as it may have rows that attend by themselves.
    pub sequences: usize,
    /// Positions of a sequence.
    pub positions: usize,
}

impl PassLimits {
    /// Limits under `settings`, of sequences of up to `positions` positions.
    pub fn of(settings: &Settings, positions: u32) -> Self {
        // Under backfill, rows of one sequence may run at every depth.
        let rows_alone = if settings.kv_fill == KvFill::Backfill { settings.num_loops } else { 1 };
        let sequences = settings.max_batch as usize * usize::from(rows_alone);
        // Full depth verifies all drafts of a sequence at once.
        let of_sequence = match settings.exit {
            ExitPolicy::Speculate(Speculation { drafts, .. }) => 1 + usize::from(drafts.calm.max(drafts.busy)),
            _ => 1,
        };
        Self {
            rows: settings.token_budget.max(settings.max_batch) as usize,
            heads: settings.max_batch as usize * of_sequence,
            sequences,
            positions: positions as usize,
        }
    }
}

/// How the sections of passes ran on a device. A section is rows that run through the same layers: a pass has one for the
/// block, or one for each loop, and one for the head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Sections that ran as a graph.
    pub replayed: usize,
    /// Sections whose work was launched piece by piece.
    pub eager: usize,
    /// Graphs captured.
    pub captured: usize,
    /// Graphs dropped, because memory moved or there were too many.
    pub dropped: usize,
}

/// A pass: its rows by depth, and what is requested of them. Rows are given by their indices in `rows`.
#[derive(Debug, Default)]
pub struct Work<'a> {
    /// The rows.
    pub rows: Rows<'a>,
    /// Source of each row: a token's embedding (`First`) or a row in flight (`Second`).
    pub sources: Vec<Source>,
    /// Rows that run the coda, if the model has one.
    pub coda: Range<usize>,
    /// Row in flight that stores each row after the pass.
    pub places: Vec<Option<u32>>,
    /// Rows that run the head.
    pub heads: Heads,
    /// Rows whose gate is read, by depth; the last depth has none.
    pub gates: Vec<usize>,
    /// Rows whose states before and after the pass are compared, each with the row in flight that it was before.
    pub compared: Vec<(usize, u32)>,
    /// Rows whose distribution is compared with an earlier one.
    pub diverging: Vec<Diverging>,
}

/// A row whose next-token distribution is compared with that of an earlier pass, and kept for a later one.
#[derive(Clone, Copy, Debug)]
pub struct Diverging {
    /// Its index among the rows of the head.
    pub head: usize,
    /// The place of the earlier distribution; `None` for the uniform one.
    pub before: Option<u32>,
    /// The place in which this one is kept. Places of a pass differ.
    pub place: u32,
}

/// Rows that run the head, and how their tokens are sampled.
#[derive(Clone, Debug, Default)]
pub struct Heads {
    /// The rows, by depth: indices among those that run the coda.
    pub rows: Vec<usize>,
    /// Random key of each row.
    pub keys: Vec<u64>,
    /// Sampling temperature; 0 selects the most likely token.
    pub temperature: f32,
}

/// Results of a pass, each list in the order of the requests.
#[derive(Debug, Default)]
pub struct Answers {
    /// Results of the head.
    pub verdicts: Vec<Verdict>,
    /// Gate scores, 0 to 1.
    pub gates: Vec<f32>,
    /// Changes of states.
    pub changes: Vec<Change>,
    /// Divergences of the distributions before from those after, as [`divergence`].
    pub divergences: Vec<f32>,
}

impl ServedModel for Model {
    fn config(&self) -> &ModelConfig {
        self.config()
    }

    fn fingerprint(&self) -> &str {
        self.fingerprint()
    }

    fn storage(&self) -> String {
        self.weight_type().to_string()
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes()
    }

    fn kv_bytes_per_token(&self, kv_fill: KvFill) -> u64 {
        bytes_per_token(self.config(), kv_fill)
    }

    fn device_name(&self) -> String {
        profile::device_name()
    }

    fn device_state(&self) -> String {
        profile::machine_state()
    }

    fn backend(
        self: Arc<Self>,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> std::result::Result<Box<dyn Backend>, EngineError> {
        let cache = KvCache::new(self.config(), kv_fill, num_blocks, block_tokens, &Device::Cpu)?;
        let in_flight = InFlight::new(self.config())?;
        let exits = in_flight.states.clone();
        let (head_time, distributions) = (Duration::ZERO, Vec::new());
        Ok(Box::new(Cpu { model: self, cache, in_flight, exits, first_exit: 0, head_time, distributions }))
    }
}

/// Backend of the CPU.
#[derive(Debug)]
struct Cpu {
    model: Arc<Model>,
    cache: KvCache,
    in_flight: InFlight,
    /// Inputs of the head from the last pass: the rows from `first_exit` on, after the coda.
    exits: Tensor,
    first_exit: usize,
    head_time: Duration,
    /// Logits of kept distributions, by place.
    distributions: Vec<Vec<f32>>,
}

impl Cpu {
    /// Runs the head of a pass; returns its results, and the divergences that are asked for.
    fn read_heads_of(&mut self, work: &Work<'_>) -> Result<(Vec<Verdict>, Vec<f32>)> {
        let (heads, rows) = (&work.heads, work.rows.pick(work.heads.rows.iter().copied()));
        if work.diverging.is_empty() {
            return Ok((self.read_head(&rows, heads)?, Vec::new()));
        }
        let start = Instant::now();
        let of_exits: Vec<usize> = heads.rows.iter().map(|&row| row - self.first_exit).collect();
        let exits = picked(&self.exits, &of_exits)?;
        let (temperature, keys) = (heads.temperature, &heads.keys);
        let (verdicts, logits) = self.model.verdicts_with_logits(&exits, &rows, &self.cache, temperature, keys)?;
        let mut logits = logits.to_vec2::<f32>()?;
        let compare = |&Diverging { head, before, .. }: &Diverging| {
            let of_place = |place: u32| match self.distributions.get(place as usize) {
                Some(kept) if kept.len() == logits[head].len() => Ok(kept.as_slice()),
                _ => candle_core::bail!("the distribution of place {place} was asked for, it is not kept"),
            };
            Ok(divergence(before.map(of_place).transpose()?, &logits[head]))
        };
        let divergences = work.diverging.par_iter().map(compare).collect::<Result<_>>()?;
        for &Diverging { head, place, .. } in &work.diverging {
            let place = place as usize;
            self.distributions.resize(self.distributions.len().max(place + 1), Vec::new());
            self.distributions[place] = std::mem::take(&mut logits[head]);
        }
        self.head_time += start.elapsed();
        Ok((verdicts, divergences))
    }

    /// Runs the coda for the rows of a pass that may exit.
    fn run_coda(&mut self, hidden: &Tensor, work: &Work<'_>) -> Result<()> {
        let whole = self.model.config().coda_layers == 0;
        let range = if whole { 0..work.rows.len() } else { work.coda.clone() };
        self.first_exit = range.start;
        self.exits = if whole || range.is_empty() {
            hidden.clone()
        } else {
            let exiting = hidden.narrow(0, range.start, range.len())?;
            self.model.forward_coda(&exiting, &work.rows.part(range), &self.cache)?
        };
        Ok(())
    }

    /// Runs the head for some rows of `states`.
    fn verdicts(&mut self, states: &Tensor, picks: &[usize], rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>> {
        if picks.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let exits = picked(states, picks)?;
        let verdicts = self.model.verdicts(&exits, rows, &self.cache, heads.temperature, &heads.keys)?;
        self.head_time += start.elapsed();
        Ok(verdicts)
    }

    /// Gate scores of some rows.
    fn gates(&self, hidden: &Tensor, work: &Work<'_>) -> Result<Vec<f32>> {
        if work.gates.is_empty() {
            return Ok(Vec::new());
        }
        let rows = work.rows.pick(work.gates.iter().copied());
        self.model.gate_scores(&picked(hidden, &work.gates)?, &rows)?.to_vec1()
    }

    /// Changes of some rows from their states before the pass.
    fn changes(&self, hidden: &Tensor, pairs: &[(usize, u32)]) -> Result<Vec<Change>> {
        if pairs.is_empty() {
            return Ok(Vec::new());
        }
        let (after, before): (Vec<usize>, Vec<usize>) = pairs.iter().map(|&(row, kept)| (row, kept as usize)).unzip();
        let changes = compare(&picked(&self.in_flight.states, &before)?, &picked(hidden, &after)?)?;
        Ok(Change::of(&changes.flatten_all()?.to_vec1::<f32>()?))
    }
}

/// Some rows of a tensor.
fn picked(rows: &Tensor, places: &[usize]) -> Result<Tensor> {
    let sources: Vec<Source> = places.iter().map(|&place| Source::First(place as u32)).collect();
    gather(rows, rows, &sources)
}

impl Backend for Cpu {
    fn reserve(&mut self, rows: usize) -> Result<()> {
        self.in_flight.reserve(rows)
    }

    fn run_beside(&mut self, work: &Work<'_>, meanwhile: &mut dyn FnMut()) -> Result<Answers> {
        let entering = self.model.embed(&self.in_flight, &work.sources, &work.rows, &self.cache)?;
        let hidden = &entering.hidden;
        self.model.forward_block(hidden, &work.rows, &self.cache)?;
        self.run_coda(hidden, work)?;
        if !work.coda.is_empty() {
            self.in_flight.keep_exits(&self.exits, &work.places[work.coda.clone()])?;
        }
        let (verdicts, divergences) = self.read_heads_of(work)?;
        let answers = Answers {
            verdicts,
            divergences,
            gates: self.gates(hidden, work)?,
            changes: self.changes(hidden, &work.compared)?,
        };
        self.in_flight.keep(&entering, &work.places)?;
        meanwhile();
        Ok(answers)
    }

    fn read_head(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>> {
        let of_exits: Vec<usize> = heads.rows.iter().map(|&row| row - self.first_exit).collect();
        self.verdicts(&self.exits.clone(), &of_exits, rows, heads)
    }

    fn keep_exits(&mut self) -> Result<()> {
        if self.model.config().coda_layers > 0 {
            self.in_flight.exits = Some(self.in_flight.states.zeros_like()?);
        }
        Ok(())
    }

    fn read_head_of_kept(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>> {
        let InFlight { states, exits, .. } = &self.in_flight;
        let states = exits.as_ref().unwrap_or(states).clone();
        self.verdicts(&states, &heads.rows, rows, heads)
    }

    fn logits(&mut self, rows: &Rows<'_>, picks: &[usize]) -> Result<Vec<Vec<f32>>> {
        if picks.is_empty() {
            return Ok(Vec::new());
        }
        let of_exits: Vec<usize> = picks.iter().map(|&row| row - self.first_exit).collect();
        self.model.logits(&picked(&self.exits, &of_exits)?, rows, &self.cache)?.to_vec2()
    }

    fn fill_deeper(&mut self, fills: &[Fill]) -> Result<()> {
        fill_deeper(&self.cache, fills)
    }

    fn head_time(&self) -> Duration {
        self.head_time
    }

    fn cached(&self, blocks: &[BlockId], positions: usize) -> Result<Vec<f32>> {
        let (layout, pages) = (self.cache.layout(), self.cache.pages().to_vec1::<f32>()?);
        let mut entries = Vec::new();
        for (kept, depth) in layout.layers() {
            for position in 0..positions {
                let block = blocks[position / layout.block_tokens] as usize;
                let page = &pages[layout.pages(kept, depth) + block * layout.page_numbers()..][..layout.page_numbers()];
                let offset = position % layout.block_tokens;
                for kv_head in 0..layout.kv_heads {
                    let key = &page[layout.key_tile(kv_head, offset) + offset % TILE..];
                    entries.extend(key.iter().step_by(TILE).take(layout.head_dim));
                    entries.extend(&page[layout.value(kv_head, offset)..][..layout.head_dim]);
                }
            }
        }
        Ok(entries)
    }
}

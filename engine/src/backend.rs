//! What an executor asks of a device: a model on it, and for each executor a KV cache with the hidden states of rows
//! between two passes. The CPU's answer to that is here.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use scheduler::KvFill;
use scheduler::blocks::BlockId;

use crate::cache::{KvCache, TILE, bytes_per_token};
use crate::config::ModelConfig;
use crate::executor::EngineError;
use crate::kernels::attention::{Fill, fill_deeper};
use crate::kernels::rows::{Source, cosines, gather, scatter};
use crate::kernels::signals::Verdict;
use crate::model::{Model, Rows};
use crate::profile;

/// A model on a device.
pub trait ServedModel: Debug + Send + Sync {
    /// The sizes.
    fn config(&self) -> &ModelConfig;

    /// Fingerprint of configuration and weights, rounded as they are.
    fn fingerprint(&self) -> &str;

    /// How weights are stored, as a latency profile has it.
    fn storage(&self) -> String;

    /// Bytes of all weights.
    fn weight_bytes(&self) -> u64;

    /// Bytes of the keys and values of one token, over all layers and the depths that a KV fill keeps.
    fn kv_bytes_per_token(&self, kv_fill: KvFill) -> u64;

    /// The device's name, as a latency profile has it.
    fn device_name(&self) -> String;

    /// How busy the device is and how fast it runs, as far as is known now.
    fn device_state(&self) -> String;

    /// What an executor runs its passes on, with an empty cache of `num_blocks` blocks of `block_tokens` positions.
    ///
    /// # Errors
    /// If the cache cannot be made.
    fn backend(
        self: Arc<Self>,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> std::result::Result<Box<dyn Backend>, EngineError>;
}

/// Runs passes over a cache and rows in flight.
///
/// An executor keeps count of both: which blocks are whose and which rows in flight are free.
pub trait Backend: Debug + Send {
    /// Makes room for `rows` rows in flight. Those that are there stay.
    ///
    /// # Errors
    /// If there is no memory.
    fn reserve(&mut self, rows: usize) -> Result<()>;

    /// Has what nobody wrote, in the cache and in flight, read as ordinary numbers from now on: for passes that are timed
    /// on histories that were never run. On the CPU it does so already.
    ///
    /// # Errors
    /// If the device fails.
    fn fill_with_numbers(&mut self) -> Result<()> {
        Ok(())
    }

    /// Runs rows through the block once and answers what is asked of them.
    ///
    /// # Errors
    /// As [`run_beside`](Self::run_beside).
    fn run(&mut self, work: &Work<'_>) -> Result<Answers> {
        self.run_beside(work, &mut || ())
    }

    /// The same, with `meanwhile` called while the device is at work, where that is not the host's.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, a row in flight does not exist, a position is beyond `max_positions` or its
    /// blocks, or the device fails.
    fn run_beside(&mut self, work: &Work<'_>, meanwhile: &mut dyn FnMut()) -> Result<Answers>;

    /// Whether the head of that many rows of a pass, of which some may leave, is better read with the pass than after
    /// it, when it is known which do: where another trip to the device takes longer than the rows that stay.
    fn reads_heads_ahead(&self, _rows: usize) -> bool {
        false
    }

    /// Reads the head for more rows of the last pass; row `i` of `rows` is the one that `heads` asks for at `i`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn read_head(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>>;

    /// Copies keys and values to the depths below which they were left: KV fill by reuse. It may be at work until the end of
    /// the next pass, or of whatever else waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    fn fill_deeper(&mut self, fills: &[Fill]) -> Result<()>;

    /// What the exit head has taken so far, of the time of all passes.
    fn head_time(&self) -> Duration;

    /// Keys and values that the first `positions` entries of a sequence left in its `blocks`, of every layer and depth.
    ///
    /// # Errors
    /// If the device fails.
    fn cached(&self, blocks: &[BlockId], positions: usize) -> Result<Vec<f32>>;
}

/// A pass: its rows by depth, and what is asked of them. Rows are named by their places among `rows`.
#[derive(Debug, Default)]
pub struct Work<'a> {
    /// The rows.
    pub rows: Rows<'a>,
    /// Where each comes from: a token's embedding (`First`), or a row in flight (`Second`).
    pub sources: Vec<Source>,
    /// Those that run the coda, where the model has one.
    pub coda: Range<usize>,
    /// The row in flight that each becomes.
    pub places: Vec<Option<u32>>,
    /// Those whose head is read.
    pub heads: Heads,
    /// Those whose gate is read, by depth; none of the last depth.
    pub gates: Vec<usize>,
    /// Those that are compared with what they were, a row in flight, before the pass.
    pub similarities: Vec<(usize, u32)>,
}

/// Rows whose head is read, and how their tokens are drawn.
#[derive(Clone, Debug, Default)]
pub struct Heads {
    /// The rows, by depth: of those that run the coda.
    pub rows: Vec<usize>,
    /// The key of the dice of each.
    pub keys: Vec<u64>,
    /// 0 takes the most likely token.
    pub temperature: f32,
}

/// What was asked of the rows of a pass, in the order in which it was.
#[derive(Debug, Default)]
pub struct Answers {
    /// What the head says.
    pub verdicts: Vec<Verdict>,
    /// Scores of the gates, 0 to 1.
    pub gates: Vec<f32>,
    /// Cosines.
    pub similarities: Vec<f32>,
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
        let in_flight = Tensor::zeros((1, self.config().hidden_size), DType::F32, &Device::Cpu)?;
        let hidden = in_flight.clone();
        Ok(Box::new(Cpu { model: self, cache, in_flight, exits: hidden, first_exit: 0, head_time: Duration::ZERO }))
    }
}

/// The CPU's backend.
#[derive(Debug)]
struct Cpu {
    model: Arc<Model>,
    cache: KvCache,
    /// `[capacity, hidden]`
    in_flight: Tensor,
    /// What the head reads of the last pass: the rows from `first_exit` on, which have run the coda.
    exits: Tensor,
    first_exit: usize,
    head_time: Duration,
}

impl Cpu {
    /// Runs the coda for the rows of a pass that may leave.
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

    /// Scores of the gates of some rows.
    fn gates(&self, hidden: &Tensor, work: &Work<'_>) -> Result<Vec<f32>> {
        if work.gates.is_empty() {
            return Ok(Vec::new());
        }
        let rows = work.rows.pick(work.gates.iter().copied());
        self.model.gate_scores(&picked(hidden, &work.gates)?, &rows)?.to_vec1()
    }

    /// Cosines of some rows with what they were before.
    fn similarities(&self, hidden: &Tensor, pairs: &[(usize, u32)]) -> Result<Vec<f32>> {
        if pairs.is_empty() {
            return Ok(Vec::new());
        }
        let (after, before): (Vec<usize>, Vec<usize>) = pairs.iter().map(|&(row, kept)| (row, kept as usize)).unzip();
        cosines(&picked(&self.in_flight, &before)?, &picked(hidden, &after)?)?.to_vec1()
    }
}

/// Some rows of a tensor.
fn picked(rows: &Tensor, places: &[usize]) -> Result<Tensor> {
    let sources: Vec<Source> = places.iter().map(|&place| Source::First(place as u32)).collect();
    gather(rows, rows, &sources)
}

impl Backend for Cpu {
    fn reserve(&mut self, rows: usize) -> Result<()> {
        let (capacity, width) = self.in_flight.dims2()?;
        if rows > capacity {
            let zeros = Tensor::zeros((rows - capacity, width), DType::F32, &Device::Cpu)?;
            self.in_flight = Tensor::cat(&[&self.in_flight, &zeros], 0)?;
        }
        Ok(())
    }

    fn run_beside(&mut self, work: &Work<'_>, meanwhile: &mut dyn FnMut()) -> Result<Answers> {
        let hidden = self.model.embed(&self.in_flight, &work.sources, &work.rows, &self.cache)?;
        self.model.forward_block(&hidden, &work.rows, &self.cache)?;
        self.run_coda(&hidden, work)?;
        let answers = Answers {
            verdicts: self.read_head(&work.rows.pick(work.heads.rows.iter().copied()), &work.heads)?,
            gates: self.gates(&hidden, work)?,
            similarities: self.similarities(&hidden, &work.similarities)?,
        };
        scatter(&self.in_flight, &hidden, &work.places)?;
        meanwhile();
        Ok(answers)
    }

    fn read_head(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>> {
        if heads.rows.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let of_exits: Vec<usize> = heads.rows.iter().map(|&row| row - self.first_exit).collect();
        let exits = picked(&self.exits, &of_exits)?;
        let verdicts = self.model.verdicts(&exits, rows, &self.cache, heads.temperature, &heads.keys)?;
        self.head_time += start.elapsed();
        Ok(verdicts)
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

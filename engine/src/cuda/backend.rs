//! Runs passes on a device: one upload of indices, launches and products, one download of the results.
//!
//! A pass is divided into sections of rows that run through the same layers. Each section is padded by itself to one of a
//! few sizes, unless it has more than [`MOST_ROWS`] rows, and runs as a graph of its launches. Graphs are captured before
//! passes run, as far as their sizes are known; the others when a size occurs again. The indices that a graph reads keep
//! their addresses while no size is larger than all before.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::{self, Debug, Formatter};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Result, bail};
use scheduler::KvFill;
use scheduler::blocks::BlockId;
use traces::DevicePass;

use super::device::{Device, Held, Stored, View, any_numbers, bytes_of_mut};
use super::kernels::{self, Kernels, Target, sweep_bytes};
use super::layers::{Layer, Run, Scratch, wide_bytes};
use super::model::CudaModel;
use super::pass::{Arrays, BlockTable, OnDevice, PassRows, Room};
use super::sizes::{MOST_ROWS, SectionLimits, padded};
use super::source::{Scalar, Specialization};
use crate::backend::{Answers, Backend, GraphCounts, Heads, PassLimits, Work};
use crate::cache::{CacheError, PageLayout, check_block_tokens};
use crate::config::ModelConfig;
use crate::executor::EngineError;
use crate::kernels::attention::{Fill, Row};
use crate::kernels::rows::{Change, Source};
use crate::kernels::signals::Verdict;
use crate::model::Rows;
use crate::parameters::Loops;

/// Maximum number of graphs. Beyond it, all graphs are dropped, and captured again as their sizes occur.
const MAX_GRAPHS: usize = 8192;
/// Rows, of [`FILL_WORDS`] four-byte words, of the buffer with which the cache is filled, copied until it is full.
const FILL_ROWS: usize = 256;
const FILL_WORDS: usize = 4096;
/// Minimum number of rows whose head runs before their exits are decided. With this many rows, almost every pass has one that
/// exits. The head's weights are read once for all rows, so further rows add no time.
pub(super) const FEWEST_AHEAD: usize = 8;

/// A section: rows that run through the same layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Layers {
    /// The last layer of the coda, and the head. Usually the smallest section; their indices lie in this order.
    Head,
    /// The coda, up to the last layer's keys and values.
    Coda,
    Prelude,
    /// Rows of one depth, if loops share nothing.
    Loop(usize),
    /// All rows of a pass through the block, if its loops share it; otherwise no layers.
    Block,
}

/// Key of a graph: a section, its size, and the address of the rows that it gathers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Size {
    layers: Layers,
    room: Room,
    from: u64,
}

/// What makes the driver load kernels: a section, its number of rows, and which kernels of attention run.
type Loaded = (Layers, usize, [bool; 3]);

fn loaded(layers: Layers, room: Room) -> Loaded {
    (layers, room.rows, [room.items, room.joins, room.tiles].map(|size| size > 0))
}

/// What the head reads besides its rows.
#[derive(Clone, Copy)]
struct Draws {
    /// Random keys of the rows.
    keys: View<u64>,
    /// The temperature, one number.
    temperature: View<f32>,
}

/// A section of a pass.
#[derive(Clone, Copy)]
struct Section {
    layers: Layers,
    /// The rows of the section, padded if it runs as a graph.
    rows: OnDevice,
    /// Source of each row among those of the preceding section, in the format of `enter_rows`. `None` for the block,
    /// whose rows are in place.
    gather: Option<View<i32>>,
    /// Rows of the pass to which the section's rows are written back.
    scatter: Option<View<i32>>,
    /// Of the head.
    draws: Option<Draws>,
    /// The padded size, if it runs as a graph.
    graph: Option<Room>,
}

impl Section {
    /// The section with its indices moved by a number of bytes.
    fn moved(self, bytes: u64) -> Self {
        Self {
            rows: self.rows.moved(bytes),
            gather: self.gather.map(|gather| gather.moved(bytes)),
            scatter: self.scatter.map(|scatter| scatter.moved(bytes)),
            draws: self.draws.map(|Draws { keys, temperature }| Draws {
                keys: keys.moved(bytes),
                temperature: temperature.moved(bytes),
            }),
            ..self
        }
    }
}

/// What rows read of the cache.
#[derive(Clone, Copy)]
struct RowsInCache {
    /// Window of layers that have one.
    window: Option<usize>,
    /// Number of depths with their own pages.
    slots: usize,
}

/// The sections of a pass, before they are laid out for an upload.
#[derive(Default)]
struct Plan {
    /// Rows of each section, with their indices among the rows that ran before.
    sections: BTreeMap<Layers, (PassRows, Vec<i32>)>,
    /// The blocks of the rows that attend.
    table: BlockTable,
}

impl Plan {
    /// Adds a section; `cache` is what its rows read of it, if they attend.
    fn push(
        &mut self,
        layers: Layers,
        rows: &[Row<'_>],
        cache: Option<RowsInCache>,
        places: impl Iterator<Item = usize>,
    ) {
        if !rows.is_empty() {
            let rows = match cache {
                Some(RowsInCache { window, slots }) => PassRows::new(rows, window, slots, &mut self.table),
                None => PassRows::without_attention(rows),
            };
            self.sections.insert(layers, (rows, places.map(|place| place as i32).collect()));
        }
    }
}

/// Memory that grows to the largest pass so far.
struct Growing<D: Device>(Option<Held<D, u8>>);

impl<D: Device> Growing<D> {
    /// Makes room for `bytes` bytes; returns whether the memory was replaced.
    fn fit(&mut self, device: &D, bytes: usize) -> Result<bool> {
        if self.0.as_ref().is_some_and(|held| held.view.len() >= bytes) {
            return Ok(false);
        }
        self.0 = None;
        self.0 = Some(Held::room(device, bytes.next_power_of_two(), 1)?);
        Ok(true)
    }

    fn held(&self) -> &Held<D, u8> {
        self.0.as_ref().expect("memory was made to fit before it is used")
    }

    fn carve(&self) -> Carver {
        Carver(self.held().view.address())
    }
}

/// Divides memory into arrays, each aligned to 16 bytes.
struct Carver(u64);

impl Carver {
    fn take<T>(&mut self, len: usize, bytes_of_number: usize) -> View<T> {
        let view = View::new(self.0, len);
        self.0 += (len * bytes_of_number).next_multiple_of(16) as u64;
        view
    }
}

/// Memory of the rows of a pass.
struct RowMemory {
    /// residual stream of all rows,
    hidden: View<f32>,
    /// with input injection: the residual stream of all rows after the prelude,
    injected: View<f32>,
    /// and the input of the adapter,
    adapted: View<Stored>,
    /// residual stream of the rows of a smaller section,
    part: View<f32>,
    /// residual stream of the rows after the coda.
    exits: View<f32>,
    scratch: Scratch,
}

impl RowMemory {
    /// Memory for `rows` rows; `partial` is set later.
    fn carve(carver: &mut Carver, config: &ModelConfig, scalar: Scalar, rows: usize) -> Self {
        let &ModelConfig { hidden_size, intermediate_size, .. } = config;
        let (queries, qkv) = (config.q_size(), config.q_size() + 2 * config.kv_size());
        let gate_up = intermediate_size * if config.architecture.gated_mlp { 2 } else { 1 };
        let residual = |carver: &mut Carver| carver.take(rows * hidden_size, size_of::<f32>());
        let (hidden, part, exits) = (residual(carver), residual(carver), residual(carver));
        let injected = config.injection.map_or(View::new(0, 0), |_| residual(carver));
        let mut stored = |width| carver.take(rows * width, scalar.bytes());
        let adapted = config.injection.map_or(View::new(0, 0), |_| stored(2 * hidden_size));
        let scratch = Scratch {
            normed: stored(hidden_size),
            mlp_normed: stored(hidden_size),
            qkv: stored(qkv),
            mixed: stored(queries),
            gate_up: stored(gate_up),
            inner: stored(intermediate_size),
            projected: stored(hidden_size),
            wide: carver.take(rows * wide_bytes(config, scalar), 1),
            partial: View::new(0, 0),
        };
        Self { hidden, injected, adapted, part, exits, scratch }
    }
}

/// Memory of the rows that run the head.
struct HeadMemory {
    hidden: View<f32>,
    /// Destination of the logits.
    logits: View<f32>,
    sweep: View<u8>,
}

impl HeadMemory {
    fn carve<D: Device>(carver: &mut Carver, model: &CudaModel<D>, rows: usize) -> Self {
        let &ModelConfig { hidden_size, vocab_size, .. } = &model.config;
        Self {
            hidden: carver.take(rows * hidden_size, size_of::<f32>()),
            logits: carver.take(rows * vocab_size, size_of::<f32>()),
            sweep: carver.take(sweep_bytes(rows, vocab_size), 1),
        }
    }
}

/// Memory of the results of a pass, which are downloaded together.
struct AnswerMemory {
    verdicts: View<kernels::Verdict>,
    gates: View<f32>,
    /// Two numbers of each row.
    changes: View<f32>,
    divergences: View<f32>,
}

impl AnswerMemory {
    fn carve(carver: &mut Carver, [verdicts, gates, compared, diverging]: AnswerSizes) -> Self {
        Self {
            verdicts: carver.take(verdicts, size_of::<kernels::Verdict>()),
            gates: carver.take(gates, size_of::<f32>()),
            changes: carver.take(2 * compared, size_of::<f32>()),
            divergences: carver.take(diverging, size_of::<f32>()),
        }
    }
}

/// Numbers of verdicts, gate scores, comparisons of states and divergences.
type AnswerSizes = [usize; 4];

/// Events before and after a piece of work.
struct Span<D: Device> {
    start: D::Event,
    end: D::Event,
}

impl<D: Device> Span<D> {
    fn new(device: &D) -> Result<Self> {
        Ok(Self { start: device.event()?, end: device.event()? })
    }
}

/// Memory of a backend with the objects that depend on its addresses: kernels and graphs. The memory outlives the
/// backend, so that the next backend can use its graphs.
pub(super) struct Memory<D: Device> {
    module: D::Module,
    layout: PageLayout,
    pages: Held<D, Stored>,
    /// States of rows in flight, `[capacity, hidden]`.
    in_flight: Option<Held<D, f32>>,
    /// With input injection: their residual streams after the prelude, `[capacity, hidden]`.
    injected_in_flight: Option<Held<D, f32>>,
    /// What the coda made of them, where it is kept, `[capacity, hidden]`.
    exits_in_flight: Option<Held<D, f32>>,
    /// Logits of kept distributions, `[places, vocab]`.
    distributions: Option<Held<D, f32>>,
    indices: Growing<D>,
    row_memory: Growing<D>,
    head_memory: Growing<D>,
    partial: Growing<D>,
    answers: Growing<D>,
    fills: Growing<D>,
    /// Number of rows that `row_memory` and `head_memory` have room for.
    rows: usize,
    head_rows: usize,
    /// Bytes that the indices of each section take at most, where they run as graphs.
    regions: BTreeMap<Layers, usize>,
    graphs: HashMap<Size, D::Graph>,
    /// Kernels that have run once, so that a run can be captured.
    seen: HashSet<Loaded>,
}

impl<D: Device> Memory<D> {
    fn new(
        model: &CudaModel<D>,
        specialization: &Specialization,
        layout: PageLayout,
    ) -> std::result::Result<Self, EngineError> {
        let (device, scalar_bytes) = (&*model.device, model.scalar.bytes());
        let numbers = layout.layers().count() * layout.blocks * page_numbers(&layout);
        let pages = Held::room(device, numbers, scalar_bytes).map_err(|source| CacheError::Allocate {
            blocks: layout.blocks as u32,
            bytes: (numbers * scalar_bytes) as u64,
            source,
        })?;
        Ok(Self {
            module: device.load(specialization)?,
            layout,
            pages,
            in_flight: None,
            injected_in_flight: None,
            exits_in_flight: None,
            distributions: None,
            indices: Growing(None),
            row_memory: Growing(None),
            head_memory: Growing(None),
            partial: Growing(None),
            answers: Growing(None),
            fills: Growing(None),
            rows: 0,
            head_rows: 0,
            regions: BTreeMap::new(),
            graphs: HashMap::new(),
            seen: HashSet::new(),
        })
    }
}

/// Backend of a device.
pub(super) struct CudaBackend<D: Device> {
    model: Arc<CudaModel<D>>,
    specialization: Specialization,
    /// Given back to the model when the backend is dropped.
    memory: ManuallyDrop<Memory<D>>,
    /// Whether unwritten memory reads as ordinary numbers.
    filled: bool,
    /// Whether what the coda makes of rows in flight is kept.
    keeps_exits: bool,
    /// Data that is uploaded for a pass, with its layout.
    arrays: Arrays,
    /// The first row of the last pass that ran the coda.
    first_exit: usize,
    heads: Span<D>,
    head_time: Duration,
    /// The kernels of a pass.
    kernels_of_pass: Span<D>,
    counts: GraphCounts,
    last_pass: LastPass,
}

/// The last pass, with the heads that were read after it.
#[derive(Clone, Copy, Default)]
struct LastPass {
    /// Counts of sections and graphs before it.
    before: GraphCounts,
    /// Time until the host had submitted it.
    submitted: Duration,
    /// Time on the device.
    device: Duration,
}

impl<D: Device> Drop for CudaBackend<D> {
    fn drop(&mut self) {
        // SAFETY: a dropped backend is not used again.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        self.model.exit(memory);
    }
}

impl<D: Device> Debug for CudaBackend<D> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBackend")
            .field("model", &self.model)
            .field("layout", &self.memory.layout)
            .finish_non_exhaustive()
    }
}

impl<D: Device> CudaBackend<D> {
    /// A backend with an unwritten cache. It takes the memory of the previous backend if that has the same layout.
    pub fn new(
        model: Arc<CudaModel<D>>,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> std::result::Result<Self, EngineError> {
        check_block_tokens(block_tokens)?;
        let layout = PageLayout::new(&model.config, kv_fill, num_blocks, block_tokens);
        let specialization = model.specialization(layout.block_tokens)?;
        // Memory that does not fit is freed before new memory is allocated.
        let left = model.take_left().filter(|memory| memory.layout == layout);
        let memory = match left {
            Some(memory) => memory,
            None => Memory::new(&model, &specialization, layout)?,
        };
        let (heads, kernels_of_pass) = (Span::new(&*model.device)?, Span::new(&*model.device)?);
        Ok(Self {
            specialization,
            memory: ManuallyDrop::new(memory),
            filled: false,
            keeps_exits: false,
            arrays: Arrays::default(),
            first_exit: 0,
            heads,
            head_time: Duration::ZERO,
            kernels_of_pass,
            counts: GraphCounts::default(),
            last_pass: LastPass::default(),
            model,
        })
    }

    fn kernels(&self) -> Kernels<'_, D> {
        Kernels { device: &self.model.device, module: &self.memory.module, specialization: self.specialization }
    }

    fn width(&self) -> usize {
        self.model.config.hidden_size
    }

    fn row_views(&self) -> RowMemory {
        let mut views = RowMemory::carve(
            &mut self.memory.row_memory.carve(),
            &self.model.config,
            self.model.scalar,
            self.memory.rows,
        );
        let partial = self.memory.partial.held().view;
        views.scratch.partial = View::new(partial.address(), partial.len() / size_of::<f32>());
        views
    }

    fn head_views(&self) -> HeadMemory {
        HeadMemory::carve(&mut self.memory.head_memory.carve(), &self.model, self.memory.head_rows)
    }

    fn run_of(&self, rows: OnDevice) -> Run<'_, D> {
        Run {
            kernels: self.kernels(),
            rows,
            scratch: self.row_views().scratch,
            rotary: self.model.rotary(),
            pages: self.memory.pages.view,
            layout: self.memory.layout,
        }
    }

    /// Rejects work for which kernels would access memory out of bounds.
    fn check(&self, work: &Work<'_>) -> Result<()> {
        let &ModelConfig { vocab_size, max_positions, .. } = &self.model.config;
        for row in work.rows.rows() {
            let reach = max_positions.min(row.blocks.len() * self.memory.layout.block_tokens);
            if row.position >= reach {
                bail!("a row is at position {}, its sequence has room for {reach}", row.position);
            }
        }
        let in_flight = self.in_flight().len() / self.width();
        let kept = work.places.iter().flatten().map(|&row| Source::Second(row));
        let compared = work.compared.iter().map(|&(_, row)| Source::Second(row));
        for source in work.sources.iter().copied().chain(kept).chain(compared) {
            let (row, rows) = match source {
                Source::First(token) => (token as usize, vocab_size),
                Source::Second(row) => (row as usize, in_flight),
            };
            if row >= rows {
                bail!("row {row} was asked for, there are {rows}");
            }
        }
        let distributions = self.memory.distributions.as_ref().map_or(0, |held| held.view.len() / vocab_size);
        for row in &work.diverging {
            if row.head >= work.heads.rows.len() || row.before.is_some_and(|place| place as usize >= distributions) {
                bail!("the distribution of {row:?} was asked for, {distributions} are kept");
            }
        }
        match work.gates.is_empty() || self.model.gates.is_some() {
            true => Ok(()),
            false => bail!("the model has no gates"),
        }
    }

    /// The sections of a pass.
    fn plan(&self, work: &Work<'_>) -> Plan {
        let rows = work.rows.rows();
        let mut plan = Plan::default();
        plan.push(Layers::Block, rows, self.attending(Layers::Block), 0..rows.len());
        let mut part = |layers, range: Range<usize>| {
            plan.push(layers, &rows[range.clone()], self.attending(layers), range);
        };
        if !self.model.prelude.is_empty() {
            part(Layers::Prelude, work.rows.range(0..1));
        }
        if let Loops::Own(loops) = &self.model.loops {
            (0..loops.len()).for_each(|depth| part(Layers::Loop(depth), work.rows.range(depth..depth + 1)));
        }
        if !self.model.coda.is_empty() {
            part(Layers::Coda, work.coda.clone());
        }
        let first_exit = if self.model.coda.is_empty() { 0 } else { work.coda.start };
        let of_exits = work.heads.rows.iter().map(|&row| row - first_exit);
        let heads = work.rows.pick(work.heads.rows.iter().copied());
        plan.push(Layers::Head, heads.rows(), self.attending(Layers::Head), of_exits);
        plan
    }

    /// The sections of a pass between the prelude and the head, in order.
    fn order(&self) -> Vec<Layers> {
        let block = match &self.model.loops {
            Loops::Shared(_) => vec![Layers::Block],
            Loops::Own(loops) => (0..loops.len()).map(Layers::Loop).collect(),
        };
        [block, vec![Layers::Coda]].concat()
    }

    /// Whether a section is work that a graph can hold.
    fn has_work(&self, layers: Layers) -> bool {
        layers != Layers::Block || matches!(self.model.loops, Loops::Shared(_))
    }

    /// What the rows of a section read of the cache; `None` if they do not attend.
    fn attending(&self, layers: Layers) -> Option<RowsInCache> {
        let attends = match layers {
            Layers::Head => !self.model.coda.is_empty(),
            layers => self.has_work(layers),
        };
        let window = self.model.config.architecture.sliding_window.as_ref().map(|window| window.tokens);
        attends.then_some(RowsInCache { window, slots: self.memory.layout.depths })
    }

    /// Bytes of a section's indices.
    fn bytes_of(layers: Layers, room: Room) -> usize {
        let (places, keys) = (Arrays::bytes_of_array::<i32>(room.rows), Arrays::bytes_of_array::<u64>(room.rows));
        room.bytes()
            + match layers {
                Layers::Block => 0,
                Layers::Coda => places,
                Layers::Prelude | Layers::Loop(_) => 2 * places,
                Layers::Head => places + keys + Arrays::bytes_of_array::<f32>(1),
            }
    }

    /// Makes the indices of a section's graphs fit. Graphs that were captured with less room are dropped.
    fn fit_region(&mut self, layers: Layers, bytes: usize) {
        let region = self.memory.regions.entry(layers).or_default();
        if *region < bytes {
            *region = bytes;
            self.drop_graphs();
        }
    }

    fn drop_graphs(&mut self) {
        self.counts.dropped += self.memory.graphs.len();
        self.memory.graphs.clear();
    }

    /// Where the indices of a section's graphs begin.
    fn region_start(&self, layers: Layers) -> usize {
        self.memory.regions.iter().take_while(|(before, _)| **before < layers).map(|(_, bytes)| bytes).sum()
    }

    /// Lays out the sections of a plan among the indices. Views are relative to the start of the indices.
    fn lay_out(&mut self, mut plan: Plan, heads: &Heads) -> Vec<Section> {
        let loops = self.model.config.num_loops;
        let graph_of = |rows: &PassRows| (rows.room().rows <= MOST_ROWS).then(|| padded(rows.room(), loops));
        let sections = plan.sections.iter().filter(|(layers, _)| self.has_work(**layers));
        let graphs: BTreeMap<Layers, Room> =
            sections.filter_map(|(&layers, (rows, _))| Some((layers, graph_of(rows)?))).collect();
        for (&layers, &room) in &graphs {
            self.fit_region(layers, Self::bytes_of(layers, room));
        }
        // What graphs read comes first: its address depends on nothing else in the pass.
        let end = |(&layers, &room): (&Layers, &Room)| self.region_start(layers) + Self::bytes_of(layers, room);
        let end = graphs.iter().map(end).max().unwrap_or(0);
        self.arrays.clear();
        let mut placed = Vec::new();
        for (&layers, (rows, places)) in &mut plan.sections {
            rows.move_blocks(end / size_of::<i32>());
            if let Some(&room) = graphs.get(&layers) {
                self.arrays.begin_at(self.region_start(layers));
                placed.push(Section { graph: Some(room), ..self.push_section(layers, rows, room, places, heads) });
            }
        }
        self.arrays.begin_at(end);
        plan.table.append(&mut self.arrays);
        for (&layers, (rows, places)) in &plan.sections {
            if !graphs.contains_key(&layers) {
                placed.push(self.push_section(layers, rows, rows.room(), places, heads));
            }
        }
        placed
    }

    /// Appends the indices of a section, padded. Its rows' blocks are counted from the start of the indices.
    fn push_section(&mut self, layers: Layers, rows: &PassRows, room: Room, places: &[i32], heads: &Heads) -> Section {
        let arrays = &mut self.arrays;
        let rows = rows.append(arrays, room, View::new(0, 0));
        let before: Vec<i32> = places.iter().map(|place| -1 - place).collect();
        // Padding gathers the first row; nothing of it is kept.
        let gather = (layers != Layers::Block).then(|| arrays.push(&before, room.rows, -1));
        let stays = matches!(layers, Layers::Block | Layers::Coda | Layers::Head);
        let scatter = (!stays).then(|| arrays.push(places, room.rows, -1));
        let draws = (layers == Layers::Head).then(|| Draws {
            keys: arrays.push(&heads.keys, room.rows, 0),
            temperature: arrays.push(&[heads.temperature], 1, 0.0),
        });
        Section { layers, rows, gather, scatter, draws, graph: None }
    }

    /// Makes memory fit sections, and drops graphs with old addresses.
    fn fit(&mut self, sections: &[Section]) -> Result<()> {
        let most = |size: &dyn Fn(&Section) -> usize| sections.iter().map(size).max().unwrap_or(0);
        let heads = most(&|section| if section.layers == Layers::Head { section.rows.rows.len() } else { 0 });
        self.fit_rows(most(&|section| section.rows.rows.len()), heads, most(&|section| section.rows.items.len()))
    }

    /// Grows memory to hold `rows` rows of a pass, `heads` rows of the head, and `items` splits of histories. Graphs are dropped
    /// if memory moves.
    fn fit_rows(&mut self, rows: usize, heads: usize, items: usize) -> Result<()> {
        let model = self.model.clone();
        let (device, config) = (&*model.device, &model.config);
        let mut moved = false;
        if rows > self.memory.rows {
            let mut carver = Carver(0);
            RowMemory::carve(&mut carver, config, model.scalar, rows.next_power_of_two());
            self.memory.row_memory.fit(device, carver.0 as usize)?;
            (self.memory.rows, moved) = (rows.next_power_of_two(), true);
        }
        if heads > self.memory.head_rows {
            let mut carver = Carver(0);
            HeadMemory::carve(&mut carver, &self.model, heads.next_power_of_two());
            self.memory.head_memory.fit(device, carver.0 as usize)?;
            (self.memory.head_rows, moved) = (heads.next_power_of_two(), true);
        }
        let partial = items * config.num_heads * (2 + config.head_dim) * size_of::<f32>();
        moved |= self.memory.partial.fit(device, partial)?;
        if moved {
            self.drop_graphs();
        }
        Ok(())
    }

    /// Uploads the indices; returns their address.
    fn upload(&mut self) -> Result<u64> {
        let device = self.model.device.clone();
        self.fit_indices(self.arrays.len())?;
        for (start, bytes) in self.arrays.parts() {
            device.upload_at(self.memory.indices.held().memory(), start, bytes)?;
        }
        Ok(self.memory.indices.held().view.address())
    }

    fn fit_indices(&mut self, bytes: usize) -> Result<()> {
        let device = self.model.device.clone();
        if self.memory.indices.fit(&device, bytes)? {
            self.drop_graphs();
        }
        Ok(())
    }

    /// Makes room for results, and drops graphs that write theirs elsewhere.
    fn fit_answers(&mut self, sizes: AnswerSizes) -> Result<AnswerMemory> {
        let mut carver = Carver(0);
        AnswerMemory::carve(&mut carver, sizes);
        if self.memory.answers.fit(&self.model.device, carver.0 as usize)? {
            self.drop_graphs();
        }
        Ok(AnswerMemory::carve(&mut self.memory.answers.carve(), sizes))
    }

    /// What the prelude reads and writes, of all rows of a pass.
    fn entered(&self, views: &RowMemory) -> View<f32> {
        if self.model.adapter.is_some() { views.injected } else { views.hidden }
    }

    /// Computes what the block reads from the rows' states and what is injected, or norms the outputs of loops.
    fn enter_loop(&self, rows: OnDevice, sources: View<i32>) -> Result<()> {
        let (views, run) = (self.row_views(), self.run_of(rows));
        if let Some(adapter) = &self.model.adapter {
            let (states, width) = ((self.in_flight(), sources), self.width());
            let initial = adapter.initial_states.view;
            run.kernels.inject_rows(states, rows.rows, initial, views.injected, width, views.adapted)?;
            run.kernels.product(views.adapted, sources.len(), adapter.matrix, Target::F32(views.hidden))?;
        }
        match self.model.config.norm_between_loops {
            true => self.model.norm.apply(&run, views.hidden, 1),
            false => Ok(()),
        }
    }

    /// Makes room for the distributions that a pass keeps. Earlier ones are kept.
    fn fit_distributions(&mut self, work: &Work<'_>) -> Result<()> {
        let (device, vocab) = (self.model.device.clone(), self.model.config.vocab_size);
        let there = self.memory.distributions.as_ref().map_or(0, |held| held.view.len() / vocab);
        let places = work.diverging.iter().map(|row| row.place as usize + 1).max().unwrap_or(0);
        if places <= there {
            return Ok(());
        }
        let larger = Held::room(&*device, places.next_power_of_two() * vocab, size_of::<f32>())?;
        if let Some(smaller) = &self.memory.distributions {
            let places = Held::of(&*device, &(0..there as i32).collect::<Vec<_>>())?;
            self.kernels().keep_rows(smaller.view, places.view, vocab, larger.view)?;
            // The source of a copy must not be freed before the copy is done.
            device.download(larger.memory(), &mut [])?;
        }
        self.memory.distributions = Some(larger);
        Ok(())
    }

    /// The rows that a section gathers, and the residual stream that its layers change in place.
    fn streams(&self, layers: Layers) -> (View<f32>, View<f32>) {
        let views = self.row_views();
        match layers {
            Layers::Block => (views.hidden, views.hidden),
            Layers::Prelude => (self.entered(&views), views.part),
            Layers::Loop(_) => (views.hidden, views.part),
            Layers::Coda => (views.hidden, views.exits),
            Layers::Head => (self.exits(), self.head_views().hidden),
        }
    }

    /// Runs a section's rows through its layers.
    fn run_section(&mut self, section: &Section) -> Result<()> {
        let (whole, _) = self.streams(section.layers);
        self.perform(section, whole, |backend| backend.run_once(section, whole, View::new(0, 0)))
    }

    /// Submits the work of a section on rows of `whole`; that of the head writes `verdicts`.
    fn run_once(&self, section: &Section, whole: View<f32>, verdicts: View<kernels::Verdict>) -> Result<()> {
        let (_, residual) = self.streams(section.layers);
        if let Some(gather) = section.gather {
            self.gather(whole, gather, residual)?;
        }
        self.run_layers(section, residual)?;
        if let Some(draws) = section.draws {
            self.read_logits(section, residual, draws, verdicts)?;
        }
        match section.scatter {
            Some(scatter) => self.kernels().keep_rows(residual, scatter, self.width(), whole),
            None => Ok(()),
        }
    }

    fn gather(&self, from: View<f32>, gather: View<i32>, to: View<f32>) -> Result<()> {
        self.kernels().enter_rows(self.model.embedding.view, from, gather, self.width(), 1.0, to)
    }

    /// Runs a section's work, as a graph where its kernels have run before.
    fn perform(&mut self, section: &Section, from: View<f32>, work: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let size = section.graph.map(|room| Size { layers: section.layers, room, from: from.address() });
        // A first run may make the driver load kernels, which is not allowed during capture.
        let Some(size) = size.filter(|size| !self.memory.seen.insert(loaded(size.layers, size.room))) else {
            self.counts.eager += 1;
            return work(self);
        };
        if !self.memory.graphs.contains_key(&size) {
            self.capture(size, work)?;
        }
        self.counts.replayed += 1;
        // SAFETY: graphs are dropped when memory that they use is freed.
        unsafe { self.model.device.replay(&self.memory.graphs[&size]) }
    }

    fn capture(&mut self, size: Size, work: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let graph = self.model.device.capture(|| work(self))?;
        if self.memory.graphs.len() == MAX_GRAPHS {
            self.drop_graphs();
        }
        self.memory.graphs.insert(size, graph);
        self.counts.captured += 1;
        Ok(())
    }

    /// The sections that passes can have.
    fn all_layers(&self) -> Vec<Layers> {
        let prelude = (!self.model.prelude.is_empty()).then_some(Layers::Prelude);
        let coda = |layers: &Layers| *layers != Layers::Coda || !self.model.coda.is_empty();
        prelude.into_iter().chain(self.order()).filter(coda).chain([Layers::Head]).collect()
    }

    /// Makes all memory fit passes within limits, and captures the graphs of their sections.
    fn prepare_graphs(&mut self, limits: PassLimits) -> Result<()> {
        let (loops, block_tokens) = (self.model.config.num_loops, self.memory.layout.block_tokens);
        let PassLimits { rows, heads, sequences, positions } = limits;
        let positions = positions.min(self.model.config.max_positions);
        let rooms_of = |layers: Layers| {
            let rows = if layers == Layers::Head { heads.min(rows) } else { rows };
            let positions = self.attending(layers).map(|_| positions);
            (layers, SectionLimits { rows, sequences, positions, loops }.rooms())
        };
        let wanted: Vec<(Layers, Vec<Room>)> = self.all_layers().into_iter().map(rooms_of).collect();
        for (layers, rooms) in &wanted {
            let bytes = rooms.iter().map(|&room| Self::bytes_of(*layers, room)).max().unwrap_or(0);
            self.fit_region(*layers, bytes);
        }
        let most = |size: fn(Layers, &Room) -> usize| {
            let sizes = wanted.iter().flat_map(|(layers, rooms)| rooms.iter().map(|room| size(*layers, room)));
            sizes.max().unwrap_or(0)
        };
        let rows = most(|_, room| room.rows).max(rows);
        let heads = most(|layers, room| if layers == Layers::Head { room.rows } else { 0 });
        self.fit_rows(rows, heads, most(|_, room| room.items))?;
        self.fit_answers([heads, rows, rows, rows])?;
        // Besides what graphs read: the blocks of each sequence, and up to eight numbers of each row.
        let table = sequences * positions.div_ceil(block_tokens);
        let regions: usize = self.memory.regions.values().sum();
        self.fit_indices(regions + (table + 8 * rows + 64) * size_of::<i32>())?;
        wanted.into_iter().try_for_each(|(layers, rooms)| self.capture_all(layers, rooms))
    }

    /// Captures the graphs of a section that are not there yet.
    fn capture_all(&mut self, layers: Layers, mut rooms: Vec<Room>) -> Result<()> {
        let ((whole, _), nothing) = (self.streams(layers), Heads::default());
        let (answers, indices) = (self.memory.answers.held().view, self.memory.indices.held().view.address());
        // The sizes with the most kernels come first: they run before they are captured.
        rooms.sort_by_key(|room| Reverse((room.rows, [room.items, room.joins, room.tiles].map(|size| size > 0))));
        let mut ran = 0;
        for room in rooms {
            self.arrays.clear();
            self.arrays.begin_at(self.region_start(layers));
            let section = self.push_section(layers, &PassRows::default(), room, &[], &nothing);
            let section = Section { graph: Some(room), ..section }.moved(indices);
            let size = Size { layers, room, from: whole.address() };
            if self.memory.graphs.contains_key(&size) {
                continue;
            }
            let verdicts = View::new(answers.address(), room.rows);
            let work = |backend: &Self| backend.run_once(&section, whole, verdicts);
            if self.memory.seen.insert(loaded(layers, room)) && ran != room.rows {
                self.upload()?;
                work(self)?;
                ran = room.rows;
            }
            self.capture(size, work)?;
        }
        Ok(())
    }

    fn run_layers(&self, section: &Section, residual: View<f32>) -> Result<()> {
        let run = self.run_of(section.rows);
        let forward = |layers: &[Layer<D>]| layers.iter().try_for_each(|layer| layer.forward(&run, residual));
        match (section.layers, &self.model.loops) {
            (Layers::Prelude, _) => forward(&self.model.prelude),
            (Layers::Block, Loops::Shared(layers)) => forward(layers),
            (Layers::Loop(depth), Loops::Own(loops)) => forward(&loops[depth]),
            (Layers::Coda, _) => match self.model.coda.split_last() {
                Some((last, before)) => {
                    if self.model.config.norm_before_coda {
                        self.model.norm.apply(&run, residual, 0)?;
                    }
                    forward(before)?;
                    last.keep(&run, residual).map(drop)
                }
                None => Ok(()),
            },
            (Layers::Head, _) => forward(self.model.coda.last().map_or(&[], std::slice::from_ref)),
            (Layers::Block, Loops::Own(_)) | (Layers::Loop(_), Loops::Shared(_)) => {
                unreachable!("the block is one section or one for each loop")
            }
        }
    }

    /// Inputs of the head from the last pass.
    fn exits(&self) -> View<f32> {
        let views = self.row_views();
        if self.model.coda.is_empty() { views.hidden } else { views.exits }
    }

    /// Rows in flight, `[capacity, hidden]`.
    fn in_flight(&self) -> View<f32> {
        self.memory.in_flight.as_ref().map_or(View::new(0, 0), |held| held.view)
    }

    /// Inputs of the head for rows in flight, `[capacity, hidden]`.
    fn kept_exits(&self) -> View<f32> {
        let kept = self.memory.exits_in_flight.as_ref().filter(|_| self.keeps_exits);
        kept.map_or_else(|| self.in_flight(), |held| held.view)
    }

    /// Runs the head in a trip of its own, for some rows of `states`.
    fn read_head_of(
        &mut self,
        states: impl Fn(&Self) -> View<f32>,
        picks: &[usize],
        rows: &Rows<'_>,
        heads: &Heads,
    ) -> Result<Vec<Verdict>> {
        let started = Instant::now();
        let mut plan = Plan::default();
        plan.push(Layers::Head, rows.rows(), self.attending(Layers::Head), picks.iter().copied());
        let sections = self.lay_out(plan, heads);
        let [section] = &sections[..] else { return Ok(Vec::new()) };
        self.fit(&sections)?;
        let padded = [section.rows.rows.len(), 0, 0, 0];
        let answers = self.fit_answers(padded)?;
        let indices = self.upload()?;
        let states = states(self);
        self.run_head(&section.moved(indices), states, answers.verdicts)?;
        self.last_pass.submitted += started.elapsed();
        let head_time = self.head_time;
        let mut answers = self.finish(padded)?;
        self.last_pass.device += self.head_time - head_time;
        answers.verdicts.truncate(picks.len());
        Ok(answers.verdicts)
    }

    /// Runs the head for the rows of a section, which it gathers from `exits`.
    fn run_head(&mut self, section: &Section, exits: View<f32>, verdicts: View<kernels::Verdict>) -> Result<()> {
        let device = self.model.device.clone();
        device.record(&self.heads.start)?;
        self.perform(section, exits, |backend| backend.run_once(section, exits, verdicts))?;
        device.record(&self.heads.end)
    }

    /// The head after the last layer: norm, logits and what is read of them.
    fn read_logits(
        &self,
        section: &Section,
        hidden: View<f32>,
        draws: Draws,
        verdicts: View<kernels::Verdict>,
    ) -> Result<()> {
        let (model, head, run) = (&self.model, self.head_views(), self.run_of(section.rows));
        let (normed, rows) = (run.scratch.normed, section.rows.rows.len());
        model.norm.of_rows(&run, hidden, None, normed)?;
        run.kernels.product(normed, rows, model.head, Target::F32(head.logits))?;
        if let Some(lora) = &model.head_lora {
            lora.add_to(&run, normed, head.logits)?;
        }
        let vocab = model.config.vocab_size;
        run.kernels.read_logits(head.logits, draws.keys, vocab, draws.temperature, head.sweep, verdicts)
    }

    /// Gate scores of some rows.
    fn run_gates(&self, rows: OnDevice, picks: View<i32>, out: View<f32>) -> Result<()> {
        let Some(gates) = &self.model.gates else { return Ok(()) };
        let (run, views) = (self.run_of(rows), self.row_views());
        let normed = views.scratch.normed;
        self.model.norm.of_rows(&run, views.hidden, Some(picks), normed)?;
        run.kernels.gates(normed, picks, rows.rows, gates.view, self.width(), out)
    }

    /// Waits for the pass and downloads its results.
    fn finish(&mut self, sizes: AnswerSizes) -> Result<Answers> {
        let device = self.model.device.clone();
        let mut bytes = Carver(0);
        let places = AnswerMemory::carve(&mut bytes, sizes);
        let mut found = vec![0; bytes.0 as usize];
        device.download(self.memory.answers.held().memory(), &mut found)?;
        if sizes[0] > 0 {
            self.head_time += device.elapsed(&self.heads.start, &self.heads.end)?;
        }
        let mut verdicts = vec![kernels::Verdict::default(); sizes[0]];
        let (mut gates, mut changes) = (vec![0.0_f32; sizes[1]], vec![0.0_f32; 2 * sizes[2]]);
        let mut divergences = vec![0.0_f32; sizes[3]];
        let at = |address: u64, bytes: &mut [u8]| bytes.copy_from_slice(&found[address as usize..][..bytes.len()]);
        at(places.verdicts.address(), bytes_of_mut(&mut verdicts));
        at(places.gates.address(), bytes_of_mut(&mut gates));
        at(places.changes.address(), bytes_of_mut(&mut changes));
        at(places.divergences.address(), bytes_of_mut(&mut divergences));
        let verdict = |verdict: kernels::Verdict| {
            let kernels::Verdict { top1, margin, entropy, token, .. } = verdict;
            Verdict { top1, margin, entropy, token: token as u32 }
        };
        let verdicts = verdicts.into_iter().map(verdict).collect();
        Ok(Answers { verdicts, gates, changes: Change::of(&changes), divergences })
    }
}

/// Numbers of a page on the device: keys, then values, as in `attention.cu`.
fn page_numbers(layout: &PageLayout) -> usize {
    2 * layout.kv_heads * layout.block_tokens * layout.head_dim
}

impl<D: Device + 'static> Backend for CudaBackend<D> {
    fn reserve(&mut self, rows: usize) -> Result<()> {
        let width = self.width();
        let there = self.in_flight().len() / width;
        if rows <= there {
            return Ok(());
        }
        let device = self.model.device.clone();
        let grown = |smaller: Option<&Held<D, f32>>| {
            let larger = match self.filled {
                true => Held::of(&*device, &any_numbers(rows * width))?,
                false => Held::room(&*device, rows * width, size_of::<f32>())?,
            };
            if let Some(smaller) = smaller {
                let places = Held::of(&*device, &(0..there as i32).collect::<Vec<_>>())?;
                self.kernels().keep_rows(smaller.view, places.view, width, larger.view)?;
                // The source of a copy must not be freed before the copy is done.
                device.download(larger.memory(), &mut [])?;
            }
            Ok::<_, candle_core::Error>(larger)
        };
        let states = grown(self.memory.in_flight.as_ref())?;
        let injected =
            self.model.adapter.as_ref().map(|_| grown(self.memory.injected_in_flight.as_ref())).transpose()?;
        let exits = self.keeps_exits.then(|| grown(self.memory.exits_in_flight.as_ref())).transpose()?;
        self.memory.in_flight = Some(states);
        self.memory.injected_in_flight = injected;
        self.memory.exits_in_flight = exits;
        Ok(())
    }

    fn fill_with_numbers(&mut self) -> Result<()> {
        let (device, scalar) = (self.model.device.clone(), self.model.scalar);
        // Pages are copied in four-byte words, whatever their type.
        let words = self.memory.pages.view.len() * scalar.bytes() / size_of::<f32>();
        let width = words.min(FILL_WORDS);
        let rows = (words / width).min(FILL_ROWS);
        let numbers = any_numbers(rows * width * size_of::<f32>() / scalar.bytes());
        let numbers = Held::stored(&*device, scalar, &numbers)?;
        let source = View::new(numbers.view.address(), rows * width);
        let places = Held::of(&*device, &(0..rows as i32).collect::<Vec<_>>())?;
        // The last copy ends where the pages end, and overlaps the previous one.
        let last = words - rows * width;
        for start in (0..last).step_by(rows * width).chain([last]) {
            let target = View::new(self.memory.pages.view.address() + (start * size_of::<f32>()) as u64, rows * width);
            self.kernels().keep_rows(source, places.view, width, target)?;
        }
        // The source of a copy must not be freed before the copy is done.
        device.download(numbers.memory(), &mut [])?;
        self.filled = true;
        Ok(())
    }

    fn run_beside(&mut self, work: &Work<'_>, meanwhile: &mut dyn FnMut()) -> Result<Answers> {
        if work.rows.is_empty() {
            meanwhile();
            return Ok(Answers::default());
        }
        let started = Instant::now();
        self.last_pass.before = self.counts;
        self.check(work)?;
        let plan = self.plan(work);
        self.first_exit = if self.model.coda.is_empty() { 0 } else { work.coda.start };
        let sections = self.lay_out(plan, &work.heads);
        let mut push = |numbers: Vec<i32>| self.arrays.push(&numbers, numbers.len(), 0);
        let sources = push(work.sources.iter().map(|&source| source_number(source)).collect());
        let places = push(work.places.iter().map(|place| place.map_or(-1, |place| place as i32)).collect());
        let gates = push(work.gates.iter().map(|&row| row as i32).collect());
        let compared = push(work.compared.iter().map(|&(row, _)| row as i32).collect());
        let before = push(work.compared.iter().map(|&(_, row)| row as i32).collect());
        let diverging = push(work.diverging.iter().map(|row| row.head as i32).collect());
        let diverging_from =
            push(work.diverging.iter().map(|row| row.before.map_or(-1, |place| place as i32)).collect());
        let mut kept_heads = vec![-1; if work.diverging.is_empty() { 0 } else { work.heads.rows.len() }];
        work.diverging.iter().for_each(|row| kept_heads[row.head] = row.place as i32);
        let kept_heads = push(kept_heads);
        self.fit(&sections)?;
        let head = sections.iter().find(|section| section.layers == Layers::Head);
        let padded = [head.map_or(0, |head| head.rows.rows.len()), gates.len(), compared.len(), diverging.len()];
        self.fit_distributions(work)?;
        let answers = self.fit_answers(padded)?;
        let indices = self.upload()?;
        let sections: Vec<Section> = sections.iter().map(|section| section.moved(indices)).collect();

        let (views, in_flight) = (self.row_views(), self.in_flight());
        let (width, factor) = (self.width(), self.model.config.architecture.embedding_scale);
        let (sources, entered) = (sources.moved(indices), self.entered(&views));
        let kept = self.memory.injected_in_flight.as_ref().map_or(in_flight, |held| held.view);
        let device = self.model.device.clone();
        device.record(&self.kernels_of_pass.start)?;
        self.kernels().enter_rows(self.model.embedding.view, kept, sources, width, factor, entered)?;
        let whole = *sections.iter().find(|section| section.layers == Layers::Block).expect("every pass has rows");
        let section_of = |layers| sections.iter().find(|section| section.layers == layers);
        if let Some(prelude) = section_of(Layers::Prelude) {
            self.run_section(prelude)?;
        }
        self.enter_loop(whole.rows, sources)?;
        for section in self.order().into_iter().filter_map(section_of) {
            self.run_section(section)?;
        }
        if let Some(section) = sections.iter().find(|section| section.layers == Layers::Head) {
            let exits = self.exits();
            self.run_head(section, exits, answers.verdicts)?;
        }
        if let Some(kept) = self.memory.distributions.as_ref().filter(|_| diverging.len() > 0) {
            let (logits, vocab) = (self.head_views().logits, self.model.config.vocab_size);
            let (from, to) = (diverging_from.moved(indices), diverging.moved(indices));
            self.kernels().diverge((kept.view, from), (logits, to), vocab, answers.divergences)?;
            self.kernels().keep_rows(logits, kept_heads.moved(indices), vocab, kept.view)?;
        }
        if gates.len() > 0 {
            self.run_gates(whole.rows, gates.moved(indices), answers.gates)?;
        }
        if compared.len() > 0 {
            let (after, before) = (compared.moved(indices), before.moved(indices));
            self.kernels().compare((in_flight, before), (views.hidden, after), width, answers.changes)?;
        }
        let places = places.moved(indices);
        self.kernels().keep_rows(views.hidden, places, width, in_flight)?;
        if let Some(injected) = &self.memory.injected_in_flight {
            self.kernels().keep_rows(views.injected, places, width, injected.view)?;
        }
        if let Some(exits) = self.memory.exits_in_flight.as_ref().filter(|_| self.keeps_exits) {
            let of_coda = View::new(places.address() + (work.coda.start * size_of::<i32>()) as u64, work.coda.len());
            self.kernels().keep_rows(views.exits, of_coda, width, exits.view)?;
        }
        device.record(&self.kernels_of_pass.end)?;
        self.last_pass.submitted = started.elapsed();
        meanwhile();
        let mut answers = self.finish(padded)?;
        self.last_pass.device = device.elapsed(&self.kernels_of_pass.start, &self.kernels_of_pass.end)?;
        answers.verdicts.truncate(work.heads.rows.len());
        Ok(answers)
    }

    fn read_head(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>> {
        let of_exits: Vec<usize> = heads.rows.iter().map(|&row| row - self.first_exit).collect();
        self.read_head_of(Self::exits, &of_exits, rows, heads)
    }

    fn keep_exits(&mut self) -> Result<()> {
        self.keeps_exits = !self.model.coda.is_empty();
        let rows = self.in_flight().len() / self.width();
        if self.keeps_exits && rows > 0 {
            let device = self.model.device.clone();
            self.memory.exits_in_flight = Some(Held::room(&*device, rows * self.width(), size_of::<f32>())?);
        }
        Ok(())
    }

    fn read_head_of_kept(&mut self, rows: &Rows<'_>, heads: &Heads) -> Result<Vec<Verdict>> {
        self.read_head_of(Self::kept_exits, &heads.rows, rows, heads)
    }

    fn logits(&mut self, rows: &Rows<'_>, picks: &[usize]) -> Result<Vec<Vec<f32>>> {
        if picks.is_empty() {
            return Ok(Vec::new());
        }
        self.read_head(rows, &Heads { rows: picks.to_vec(), keys: vec![0; picks.len()], temperature: 0.0 })?;
        // The logits are kept until the head runs again.
        let (device, vocab) = (&self.model.device, self.model.config.vocab_size);
        let (memory, logits) = (self.memory.head_memory.held().memory(), self.head_views().logits);
        let first = (logits.address() - device.address(memory)) as usize / size_of::<f32>();
        let mut numbers = vec![0.0_f32; first + picks.len() * vocab];
        device.download(memory, bytes_of_mut(&mut numbers))?;
        Ok(numbers[first..].chunks_exact(vocab).map(<[f32]>::to_vec).collect())
    }

    fn fill_deeper(&mut self, fills: &[Fill]) -> Result<()> {
        if fills.is_empty() {
            return Ok(());
        }
        let device = self.model.device.clone();
        let fill = |fill: &Fill| kernels::Fill {
            block: fill.block as i32,
            offset: fill.offset as i32,
            depth: fill.depth as i32,
        };
        let mut arrays = Arrays::default();
        let fills: Vec<kernels::Fill> = fills.iter().map(fill).collect();
        let view = arrays.push(&fills, fills.len(), fills[0]);
        self.memory.fills.fit(&device, arrays.bytes().len())?;
        device.upload(self.memory.fills.held().memory(), arrays.bytes())?;
        let view = view.moved(self.memory.fills.held().view.address());
        let first = match &self.model.loops {
            Loops::Shared(layers) => &layers[0],
            Loops::Own(loops) => &loops[0][0],
        };
        let geometry = first.geometry(self.model.rotary(), &self.memory.layout);
        // The host does not wait for the copy: it is done before the next pass, whose results are waited for.
        self.kernels().fill_deeper(view, geometry, self.memory.layout.depth_layers, self.memory.pages.view)
    }

    fn head_time(&self) -> Duration {
        self.head_time
    }

    fn prepare(&mut self, limits: PassLimits) -> Result<()> {
        self.prepare_graphs(limits)
    }

    fn graphs(&self) -> Option<GraphCounts> {
        Some(self.counts)
    }

    fn device_pass(&self) -> Option<DevicePass> {
        let LastPass { before, submitted, device } = self.last_pass;
        let since = |count: fn(&GraphCounts) -> usize| (count(&self.counts) - count(&before)) as u32;
        Some(DevicePass {
            submitted: submitted.into(),
            device: device.into(),
            graphs: since(|counts| counts.replayed),
            eager: since(|counts| counts.eager),
            captured: since(|counts| counts.captured),
            dropped: since(|counts| counts.dropped),
        })
    }

    fn cached(&self, blocks: &[BlockId], positions: usize) -> Result<Vec<f32>> {
        let (layout, scalar) = (&self.memory.layout, self.model.scalar);
        let mut bytes = vec![0; self.memory.pages.view.len() * scalar.bytes()];
        self.model.device.download(self.memory.pages.memory(), &mut bytes)?;
        let pages = scalar.decode(&bytes);
        let mut entries = Vec::new();
        for layer in 0..layout.layers().count() {
            for position in 0..positions {
                let block = layer * layout.blocks + blocks[position / layout.block_tokens] as usize;
                let (keys, values) =
                    pages[block * page_numbers(layout)..][..page_numbers(layout)].split_at(page_numbers(layout) / 2);
                for kv_head in 0..layout.kv_heads {
                    let at = (kv_head * layout.block_tokens + position % layout.block_tokens) * layout.head_dim;
                    entries.extend(&keys[at..][..layout.head_dim]);
                    entries.extend(&values[at..][..layout.head_dim]);
                }
            }
        }
        Ok(entries)
    }
}

/// A source in the format of `enter_rows`.
fn source_number(source: Source) -> i32 {
    match source {
        Source::First(token) => token as i32,
        Source::Second(row) => -1 - row as i32,
    }
}

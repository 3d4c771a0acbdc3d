//! Measured times of the operations of a pass on a device, each by itself, beside their minimum times.
//!
//! Every operation runs with its data out of the caches, as the weights of a large model are.

use candle_core::Result;
use serde::Serialize;

use super::device::{Device, Out, Plain, Product, Stored, View, any_numbers, bytes_of};
use super::floors::{Ceilings, Load, Operation, Projections, Sizes, Work};
use super::kernels::{
    AttentionInputs, Fill, Formula, Geometry, Kernels, LoraInputs, Part, Sight, Slice, Verdict, sweep_bytes,
};
use super::pass::{Arrays, BlockTable, OnDevice, PassRows};
use super::source::{Scalar, Specialization};
use crate::kernels::attention::Row;

/// Positions per KV block.
const BLOCK_TOKENS: usize = 16;

const ALL_PROJECTIONS: [Projections; 5] =
    [Projections::Qkv, Projections::Output, Projections::Up, Projections::Down, Projections::Head];

/// Extent of the measurement.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Number of runs of each operation, after one warm-up; the median counts.
    pub repeats: usize,
    /// Bytes of the copy that measures memory bandwidth and clears the caches.
    pub copied_bytes: usize,
    /// Rows, inputs and outputs of the product that measures arithmetic throughput.
    pub product: usize,
}

impl Effort {
    /// Effort for a GPU: a copy larger than its caches, and a product that uses all of it.
    pub const GPU: Self = Self { repeats: 20, copied_bytes: 1 << 29, product: 8192 };
}

/// A line of `kernels.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelTime {
    /// The operation.
    pub operation: String,
    /// Decode rows of the pass.
    pub rows: usize,
    /// Number of depths that the rows are spread over.
    pub depths: usize,
    /// Number of entries that each row attends to.
    pub history: usize,
    /// Rows of the prompt chunk.
    pub chunk: usize,
    /// Bytes to move.
    pub bytes: f64,
    /// Additions and multiplications.
    pub operations: f64,
    /// The binding limit: `memory` or `arithmetic`.
    pub bound: &'static str,
    /// Minimum time on this device, in microseconds.
    pub floor_us: f64,
    /// Measured median time, in microseconds.
    pub time_us: f64,
}

/// Further results of a profile on a GPU: `device.yaml` and `kernels.csv`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the device.
    pub device: String,
    /// Driver, CUDA, clocks and power, right after the measurement.
    pub state: String,
    /// Storage type.
    pub stored: &'static str,
    /// Measured peak rates of the device.
    pub ceilings: Ceilings,
    /// Times of the operations.
    #[serde(skip)]
    pub times: Vec<KernelTime>,
}

/// Measures the peak rates of a device and every operation of passes with these loads.
///
/// # Errors
/// If the kernels do not support the model's sizes, the memory is too small, or the device fails.
pub fn report<D: Device>(device: &D, sizes: &Sizes<'_>, loads: &[Load], effort: Effort) -> Result<Report> {
    let ceilings = ceilings(device, sizes.scalar, effort)?;
    let mut times = Vec::new();
    for load in loads {
        times.extend(kernel_times(device, sizes, load, &ceilings, effort)?);
    }
    let (name, state) = (device.name(), device.state());
    Ok(Report { device: name, state, stored: sizes.scalar.name(), ceilings, times })
}

/// Measures the peak rates of a device, with a copy, a product in `f32` and one in the storage type.
///
/// # Errors
/// If the device fails.
fn ceilings<D: Device>(device: &D, scalar: Scalar, effort: Effort) -> Result<Ceilings> {
    let bench = Bench::new(device, &Specialization::new(scalar, 2 * scalar.pack(), 1, BLOCK_TOKENS)?, effort)?;
    let copy_s = bench.median_s(|| bench.clear_caches())?;
    let size = effort.product;
    let product_s = |scalar: Scalar| {
        let matrix = || bench.numbers(scalar, size * size);
        let (x, weight, y) = (matrix()?, matrix()?, matrix()?);
        let product = Product {
            scalar,
            rows: size,
            inputs: size,
            outputs: size,
            x: device.address(&x),
            weight: device.address(&weight),
            y: device.address(&y),
            out: Out::Stored,
        };
        // SAFETY: all three have the size of the product.
        bench.median_s(|| unsafe { device.product(&product) })
    };
    let operations = 2.0 * (size as f64).powi(3);
    Ok(Ceilings {
        bytes_per_s: 2.0 * bench.copied_numbers as f64 * 4.0 / copy_s,
        operations_per_s: operations / product_s(Scalar::F32)?,
        product_operations_per_s: operations / product_s(scalar)?,
    })
}

/// Measures every operation of a pass.
///
/// # Errors
/// If the kernels do not support the model's sizes, the memory is too small, or the device fails.
fn kernel_times<D: Device>(
    device: &D,
    sizes: &Sizes<'_>,
    load: &Load,
    ceilings: &Ceilings,
    effort: Effort,
) -> Result<Vec<KernelTime>> {
    let config = sizes.config;
    let heads = config.num_heads / config.num_kv_heads;
    let specialization = Specialization::new(sizes.scalar, config.head_dim, heads, BLOCK_TOKENS)?;
    let bench = Bench::new(device, &specialization, effort)?;
    let pass = Inputs::new(&bench, sizes, load)?;
    let time = |operation: Operation| {
        let seconds = bench.median_s(|| pass.run(&bench, operation))?;
        let work = sizes.work(operation, load);
        Ok(KernelTime::new(operation, load, &work, ceilings, 1e6 * seconds))
    };
    sizes.operations().into_iter().map(time).collect()
}

impl KernelTime {
    fn new(operation: Operation, load: &Load, work: &Work, ceilings: &Ceilings, time_us: f64) -> Self {
        let by_memory = work.memory_us(ceilings) >= work.arithmetic_us(ceilings);
        let &Load { rows, depths, history, chunk } = load;
        Self {
            operation: operation.to_string(),
            rows,
            depths,
            history,
            chunk,
            bytes: work.bytes,
            operations: work.operations,
            bound: if by_memory { "memory" } else { "arithmetic" },
            floor_us: work.floor_us(ceilings),
            time_us,
        }
    }
}

/// A device with kernels, and memory for measurements.
struct Bench<'d, D: Device> {
    device: &'d D,
    module: D::Module,
    specialization: Specialization,
    effort: Effort,
    /// Number of `f32` numbers in the copy.
    copied_numbers: usize,
    copied: Copied<D>,
    events: [D::Event; 2],
}

/// Source and destination of the copy.
struct Copied<D: Device> {
    from: D::Memory,
    to: D::Memory,
    /// Destination of each row: the rows stay in order.
    places: D::Memory,
}

/// Numbers per row of the copy.
const COPIED_WIDTH: usize = 4096;

impl<'d, D: Device> Bench<'d, D> {
    fn new(device: &'d D, specialization: &Specialization, effort: Effort) -> Result<Self> {
        let rows = (effort.copied_bytes / 2 / 4 / COPIED_WIDTH).max(1);
        let places: Vec<i32> = (0..rows as i32).collect();
        let side = || device.allocate(rows * COPIED_WIDTH * 4);
        let copied = Copied { from: side()?, to: side()?, places: device.allocate(rows * 4)? };
        device.upload(&copied.places, bytes_of(&places))?;
        Ok(Self {
            device,
            module: device.load(specialization)?,
            specialization: *specialization,
            effort,
            copied_numbers: rows * COPIED_WIDTH,
            copied,
            events: [device.event()?, device.event()?],
        })
    }

    fn kernels(&self) -> Kernels<'_, D> {
        Kernels { device: self.device, module: &self.module, specialization: self.specialization }
    }

    fn view<T>(&self, memory: &D::Memory, len: usize) -> View<T> {
        View::new(self.device.address(memory), len)
    }

    /// Copies more than the caches hold.
    fn clear_caches(&self) -> Result<()> {
        let (rows, Copied { from, to, places }) = (self.copied_numbers / COPIED_WIDTH, &self.copied);
        let [from, to] = [from, to].map(|side| self.view(side, self.copied_numbers));
        self.kernels().keep_rows(from, self.view(places, rows), COPIED_WIDTH, to)
    }

    /// Median time of `work`, in seconds.
    fn median_s(&self, work: impl Fn() -> Result<()>) -> Result<f64> {
        let [from, to] = &self.events;
        let mut seconds = Vec::new();
        for _ in 0..=self.effort.repeats {
            self.clear_caches()?;
            self.device.record(from)?;
            work()?;
            self.device.record(to)?;
            seconds.push(self.device.elapsed(from, to)?.as_secs_f64());
        }
        let counted = &mut seconds[1..];
        counted.sort_unstable_by(f64::total_cmp);
        Ok(counted[counted.len() / 2])
    }

    /// Memory of `numbers` numbers from -1 to 1.
    fn numbers(&self, scalar: Scalar, numbers: usize) -> Result<D::Memory> {
        const TILE: usize = 1 << 14;
        let tile = scalar.encode(&any_numbers(TILE));
        let bytes: Vec<u8> = tile.iter().copied().cycle().take(numbers * scalar.bytes()).collect();
        self.uploaded(&bytes)
    }

    /// The rows of a pass over a cache with so many slots, and the memory that they are in.
    fn rows(&self, rows: &[Row<'_>], slots: usize) -> Result<(OnDevice, D::Memory)> {
        let (mut table, mut arrays) = (BlockTable::default(), Arrays::default());
        let pass = PassRows::new(rows, None, slots, &mut table);
        let table = table.append(&mut arrays);
        let views = pass.append(&mut arrays, pass.room(), table);
        let held = self.uploaded(arrays.bytes())?;
        Ok((views.moved(self.device.address(&held)), held))
    }

    fn uploaded<T: Plain>(&self, numbers: &[T]) -> Result<D::Memory> {
        let memory = self.device.allocate(size_of_val(numbers))?;
        self.device.upload(&memory, bytes_of(numbers))?;
        Ok(memory)
    }
}

/// Memory of the inputs and outputs of a pass's operations. An operation may read numbers that no other operation has
/// written.
struct Inputs<'a, D: Device> {
    sizes: &'a Sizes<'a>,
    load: &'a Load,
    decode: OnDevice,
    chunk: OnDevice,
    _rows: [D::Memory; 2],
    geometry: Geometry,
    /// `[rows, the widest input]`, in the storage type.
    x: D::Memory,
    /// `[rows, the widest output]`, in `f32`.
    y: D::Memory,
    /// Of the size of the largest weight.
    weight: D::Memory,
    adapters: Vec<Adapter<D>>,
    /// Products with weights and the downs of adapters, in `f32`.
    wide: D::Memory,
    /// Destination of kept rows.
    kept: D::Memory,
    rotary: D::Memory,
    pages: D::Memory,
    sight: D::Memory,
    partial: D::Memory,
    vectors: D::Memory,
    /// By row: a token, the row itself, its random key, and its entry for deeper depths.
    tokens: D::Memory,
    places: D::Memory,
    keys: D::Memory,
    temperature: D::Memory,
    fills: D::Memory,
    sweep: D::Memory,
    verdicts: D::Memory,
}

impl<'a, D: Device> Inputs<'a, D> {
    fn new(bench: &Bench<'_, D>, sizes: &'a Sizes<'a>, load: &'a Load) -> Result<Self> {
        let (config, scalar) = (sizes.config, sizes.scalar);
        let (rows, most_rows) = (load.rows, load.rows.max(load.chunk));
        let of_row = load.history.div_ceil(BLOCK_TOKENS);
        let tables: Vec<Vec<u32>> = (0..rows).map(|row| ((row * of_row) as u32..).take(of_row).collect()).collect();
        let depth = |row: usize| row * load.depths / rows;
        let decode: Vec<Row<'_>> =
            tables.iter().enumerate().map(|(row, table)| Row::new(load.history - 1, depth(row), table)).collect();
        let chunk_table: Vec<u32> = (0..load.chunk.div_ceil(BLOCK_TOKENS) as u32).collect();
        let chunk: Vec<Row<'_>> = (0..load.chunk).map(|position| Row::new(position, 0, &chunk_table)).collect();

        let blocks = (rows * of_row).max(chunk_table.len());
        let positions = load.history.max(load.chunk);
        let rotary_dims = config.architecture.rotary_dims(config.head_dim);
        let page = 2 * config.num_kv_heads * BLOCK_TOKENS * config.head_dim;
        let most = |numbers: &dyn Fn(Projections) -> usize| ALL_PROJECTIONS.map(numbers).into_iter().max().unwrap_or(1);
        // `x` is the input of projections, attention and the activation.
        let inputs =
            most(&|of| sizes.inputs(of)).max(sizes.outputs(Projections::Qkv)).max(2 * config.intermediate_size);
        let outputs = most(&|of| sizes.outputs(of)).max(config.hidden_size).max(config.q_size());
        let wide = most(&|of| Adapter::<D>::stride(sizes, of));
        let weight = most(&|of| {
            let columns = Adapter::<D>::columns(sizes, of).max(Adapter::<D>::stride(sizes, of));
            (sizes.inputs(of) * columns).max(Adapter::<D>::slices(sizes, of).1)
        });
        let weight = bench.numbers(scalar, weight)?;
        let (decode, decode_held) = bench.rows(&decode, config.num_loops)?;
        let (chunk, chunk_held) = bench.rows(&chunk, config.num_loops)?;
        let partial = bench.kernels().partial_numbers(&decode, config.num_heads);
        let fill = |row: usize| Fill { block: (row * of_row) as i32, offset: 0, depth: 0 };
        Ok(Self {
            sizes,
            load,
            chunk,
            _rows: [decode_held, chunk_held],
            geometry: Geometry {
                heads: config.num_heads as i32,
                kv_heads: config.num_kv_heads as i32,
                blocks: blocks as i32,
                first_layer: 0,
                layer_stride: 1,
                depths: config.num_loops as i32,
                once: 0,
                sights: 1,
                positions: positions as i32,
                rotary_dims: rotary_dims as i32,
                scale: config.architecture.attention_scale(config.head_dim),
            },
            x: bench.numbers(scalar, most_rows * inputs)?,
            y: bench.numbers(Scalar::F32, most_rows * outputs)?,
            adapters: Adapter::of_model(bench, sizes, &weight)?,
            weight,
            wide: bench.numbers(Scalar::F32, rows * wide)?,
            kept: bench.device.allocate(4 * rows * config.hidden_size)?,
            rotary: bench.numbers(Scalar::F32, positions * rotary_dims)?,
            pages: bench.numbers(scalar, config.num_loops * blocks * page)?,
            sight: bench.uploaded(&[Sight { windowed: 0, rotary: 0 }])?,
            partial: bench.device.allocate(4 * partial)?,
            vectors: bench.numbers(Scalar::F32, 2 * config.hidden_size)?,
            tokens: bench.uploaded(&(0..rows).map(|row| (row * 97 % config.vocab_size) as i32).collect::<Vec<_>>())?,
            places: bench.uploaded(&(0..rows as i32).collect::<Vec<_>>())?,
            keys: bench.uploaded(&(0..rows as u64).collect::<Vec<_>>())?,
            temperature: bench.uploaded(&[0.0_f32])?,
            fills: bench.uploaded(&(0..rows).map(fill).collect::<Vec<_>>())?,
            sweep: bench.device.allocate(sweep_bytes(rows, config.vocab_size))?,
            verdicts: bench.device.allocate(rows * size_of::<Verdict>())?,
            decode,
        })
    }

    fn run(&self, bench: &Bench<'_, D>, operation: Operation) -> Result<()> {
        match operation {
            Operation::Product(of) => self.multiply(bench, of),
            Operation::HeadDowns => {
                let columns = self.adapter(Projections::Head).stride;
                self.multiply_by(bench, Projections::Head, columns, (&self.wide, Out::F32))
            }
            Operation::LoraExpand(of) | Operation::LoraAdd(of) => self.adapt(bench, of),
            Operation::LoraActivate => self.activate_adapted(bench),
            Operation::RotateAndStore | Operation::AttendSplits | Operation::AttendJoin | Operation::AttendTiles => {
                self.attend(bench, operation)
            }
            _ => self.by_row(bench, operation),
        }
    }

    fn x(&self, bench: &Bench<'_, D>, width: usize) -> View<Stored> {
        bench.view(&self.x, self.load.rows.max(self.load.chunk) * width)
    }

    fn y<T>(&self, bench: &Bench<'_, D>, width: usize) -> View<T> {
        bench.view(&self.y, self.load.rows.max(self.load.chunk) * width)
    }

    fn multiply(&self, bench: &Bench<'_, D>, of: Projections) -> Result<()> {
        let adapted = self.sizes.ranks(of) > 0;
        let out = match of {
            Projections::Qkv | Projections::Up => Out::Stored,
            Projections::Output | Projections::Down if !adapted => Out::AddedToF32,
            Projections::Output | Projections::Down | Projections::Head => Out::F32,
        };
        let to = if adapted && of != Projections::Head { &self.wide } else { &self.y };
        self.multiply_by(bench, of, Adapter::<D>::columns(self.sizes, of), (to, out))
    }

    fn multiply_by(&self, bench: &Bench<'_, D>, of: Projections, outputs: usize, to: (&D::Memory, Out)) -> Result<()> {
        let product = Product {
            scalar: self.sizes.scalar,
            rows: self.load.rows,
            inputs: self.sizes.inputs(of),
            outputs,
            x: bench.device.address(&self.x),
            weight: bench.device.address(&self.weight),
            y: bench.device.address(to.0),
            out: to.1,
        };
        // SAFETY: all three have the largest size that is needed.
        unsafe { bench.device.product(&product) }
    }

    /// The adapters of projections that have some.
    fn adapter(&self, of: Projections) -> &LoraInputs {
        &self.adapters.iter().find(|adapter| adapter.of == of).expect("only adapted projections have operations").lora
    }

    fn adapt(&self, bench: &Bench<'_, D>, of: Projections) -> Result<()> {
        let (kernels, lora, rows) = (bench.kernels(), self.adapter(of), self.load.rows);
        let groups = (rows, self.decode.groups);
        if matches!(of, Projections::Qkv | Projections::Up) {
            let wide = bench.view(&self.wide, rows * lora.stride);
            return kernels.lora_expand(lora, wide, groups, None, self.y(bench, lora.outputs));
        }
        let (wide, has_base) = (bench.view(&self.wide, rows * lora.stride), of != Projections::Head);
        kernels.lora_add(lora, wide, has_base, groups, None, self.y(bench, lora.outputs))
    }

    fn activate_adapted(&self, bench: &Bench<'_, D>) -> Result<()> {
        let (lora, rows) = (self.adapter(Projections::Up), self.load.rows);
        let wide = bench.view(&self.wide, rows * lora.stride);
        let (activation, y) = (self.sizes.config.architecture.activation, self.y(bench, lora.outputs / 2));
        bench.kernels().lora_activate(lora, wide, (rows, self.decode.groups), None, activation, y)
    }

    fn attend(&self, bench: &Bench<'_, D>, operation: Operation) -> Result<()> {
        let (kernels, config) = (bench.kernels(), self.sizes.config);
        let inputs = AttentionInputs {
            qkv: self.x(bench, self.sizes.outputs(Projections::Qkv)),
            rotary: bench.view(&self.rotary, (self.geometry.positions * self.geometry.rotary_dims) as usize),
            pages: bench.view(&self.pages, 0),
            sights: bench.view(&self.sight, 1),
            geometry: self.geometry,
        };
        let partial = bench.view(&self.partial, kernels.partial_numbers(&self.decode, config.num_heads));
        let out = self.y(bench, config.num_heads * config.head_dim);
        match operation {
            Operation::RotateAndStore => kernels.rotate_and_store(&inputs, &self.decode),
            Operation::AttendSplits => kernels.attend_splits(&inputs, &self.decode, partial, out),
            Operation::AttendJoin => kernels.attend_join(&inputs, &self.decode, partial, out),
            _ => kernels.attend_tiles(&inputs, &self.chunk, out),
        }
    }

    fn by_row(&self, bench: &Bench<'_, D>, operation: Operation) -> Result<()> {
        let (kernels, config, rows) = (bench.kernels(), self.sizes.config, self.load.rows);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let architecture = &config.architecture;
        let (tokens, places) = (bench.view(&self.tokens, rows), bench.view(&self.places, rows));
        match operation {
            Operation::EnterRows => {
                let embedding = bench.view(&self.weight, vocab * hidden);
                kernels.enter_rows(embedding, self.y(bench, hidden), tokens, hidden, 1.0, self.y(bench, hidden))
            }
            Operation::NormRows => {
                let formula = Formula::new(architecture.norm, hidden, 1, architecture.norm_eps);
                let vectors = bench.view(&self.vectors, 2 * hidden);
                kernels.norm_rows(
                    self.y(bench, hidden),
                    None,
                    self.decode.rows,
                    vectors,
                    formula,
                    self.x(bench, hidden),
                )
            }
            Operation::Activate => {
                let (inner, gated) = (config.intermediate_size, architecture.gated_mlp);
                let x = self.x(bench, if gated { 2 * inner } else { inner });
                kernels.activate(x, rows, inner, gated, architecture.activation, self.y(bench, inner))
            }
            Operation::KeepRows => {
                kernels.keep_rows(self.y(bench, hidden), places, hidden, bench.view(&self.kept, rows * hidden))
            }
            Operation::FillDeeper => {
                kernels.fill_deeper(bench.view(&self.fills, rows), self.geometry, 1, bench.view(&self.pages, 0))
            }
            _ => {
                let (keys, scratch) = (bench.view(&self.keys, rows), bench.view(&self.sweep, sweep_bytes(rows, vocab)));
                let (temperature, verdicts) = (bench.view(&self.temperature, 1), bench.view(&self.verdicts, rows));
                kernels.read_logits(self.y(bench, vocab), keys, vocab, temperature, scratch, verdicts)
            }
        }
    }
}

/// Adapters of projections.
struct Adapter<D: Device> {
    of: Projections,
    lora: LoraInputs,
    _slices: D::Memory,
}

impl<D: Device> Adapter<D> {
    /// Adapters of a model, whose numbers are in `weight`.
    fn of_model(bench: &Bench<'_, D>, sizes: &Sizes<'_>, weight: &D::Memory) -> Result<Vec<Self>> {
        let is_adapted = |of: &Projections| sizes.ranks(*of) > 0;
        ALL_PROJECTIONS.into_iter().filter(is_adapted).map(|of| Self::new(bench, sizes, weight, of)).collect()
    }

    /// Outputs of the product with a weight and the downs of its adapters; of the head, without them.
    fn columns(sizes: &Sizes<'_>, of: Projections) -> usize {
        match (sizes.ranks(of), of) {
            (0, _) | (_, Projections::Head) => sizes.outputs(of),
            _ => Self::stride(sizes, of),
        }
    }

    /// Numbers per row of the product that has the ranks of all depths.
    fn stride(sizes: &Sizes<'_>, of: Projections) -> usize {
        let base = if of == Projections::Head { 0 } else { sizes.outputs(of) };
        LoraInputs::stride(base, sizes.config.num_loops, sizes.ranks(of), sizes.scalar)
    }

    /// Slices of the outputs, and how many numbers the ups have.
    fn slices(sizes: &Sizes<'_>, of: Projections) -> (Vec<Slice>, usize) {
        let parts: Vec<Part> = sizes.parts(of).into_iter().map(|(rank, outputs)| Part { rank, outputs }).collect();
        Part::slices(&parts, sizes.config.num_loops, sizes.scalar)
    }

    fn new(bench: &Bench<'_, D>, sizes: &Sizes<'_>, weight: &D::Memory, of: Projections) -> Result<Self> {
        let (slices, numbers) = Self::slices(sizes, of);
        let (held, depths, ranks) = (bench.uploaded(&slices)?, sizes.config.num_loops, sizes.ranks(of));
        let lora = LoraInputs {
            ups: bench.view(weight, numbers),
            slices: bench.view(&held, slices.len()),
            depths,
            ranks,
            outputs: sizes.outputs(of),
            stride: Self::stride(sizes, of),
        };
        Ok(Self { of, lora, _slices: held })
    }
}

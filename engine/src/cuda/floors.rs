//! Data volume and arithmetic of the operations of a pass, and the minimum time that follows.
//! `docs/notebook/gpu-engine.md` has the theoretical values; `kernels.csv` of a profile has them beside measured times.
//!
//! Bytes count every datum once, as if caches were empty. An operation is one addition or multiplication.

use std::fmt;

use serde::Serialize;

use super::pass::SPLIT;
use super::source::Scalar;
use crate::config::{ModelConfig, ProjectionKind};

/// Projections of one input, which are multiplied as one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// Queries, keys and values.
    Qkv,
    /// Output projection of attention.
    Output,
    /// First matrices of the MLP: gate and up, or only up.
    Up,
    /// Last matrix of the MLP.
    Down,
    /// The head over the vocabulary, with a product in `f32`.
    Head,
}

/// A launch in a pass: of a kernel or of the matrix library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `enter_rows`
    EnterRows,
    /// `norm_rows`
    NormRows,
    /// A product with a weight and the downs of its adapters at all depths.
    Product(Projections),
    /// A product with the downs of the head's adapters.
    HeadDowns,
    /// `lora_expand`
    LoraExpand(Projections),
    /// `lora_add`
    LoraAdd(Projections),
    /// `lora_activate`
    LoraActivate,
    /// `rotate_and_store`
    RotateAndStore,
    /// `attend_splits`, for decode rows
    AttendSplits,
    /// `attend_join`, for decode rows
    AttendJoin,
    /// `attend_tiles`, for a prompt chunk
    AttendTiles,
    /// `activate`
    Activate,
    /// `keep_rows`
    KeepRows,
    /// `fill_deeper`, for one layer
    FillDeeper,
    /// `sweep_logits`
    SweepLogits,
}

impl fmt::Display for Projections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qkv => "q, k, v",
            Self::Output => "o",
            Self::Up => "gate and up",
            Self::Down => "down",
            Self::Head => "head",
        })
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnterRows => f.write_str("enter_rows"),
            Self::NormRows => f.write_str("norm_rows"),
            Self::Product(of) => write!(f, "product of {of}"),
            Self::HeadDowns => f.write_str("product of the head's downs"),
            Self::LoraExpand(of) => write!(f, "lora_expand of {of}"),
            Self::LoraAdd(of) => write!(f, "lora_add of {of}"),
            Self::LoraActivate => f.write_str("lora_activate"),
            Self::RotateAndStore => f.write_str("rotate_and_store"),
            Self::AttendSplits => f.write_str("attend_splits"),
            Self::AttendJoin => f.write_str("attend_join"),
            Self::AttendTiles => f.write_str("attend_tiles of the chunk"),
            Self::Activate => f.write_str("activate"),
            Self::KeepRows => f.write_str("keep_rows"),
            Self::FillDeeper => f.write_str("fill_deeper"),
            Self::SweepLogits => f.write_str("sweep_logits"),
        }
    }
}

/// The rows of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Decode rows.
    pub rows: usize,
    /// Number of depths that the rows are spread over.
    pub depths: usize,
    /// Number of entries that each row attends to.
    pub history: usize,
    /// Rows of a prompt chunk without history, for its attention.
    pub chunk: usize,
}

/// Data volume and arithmetic of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Bytes to move.
    pub bytes: f64,
    /// Additions and multiplications.
    pub operations: f64,
    /// Whether the operations belong to matrix products, which run on tensor cores unless the numbers are `f32`.
    pub is_product: bool,
}

/// Peak rates of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes per second, reading and writing.
    pub bytes_per_s: f64,
    /// Operations per second, in `f32` outside tensor cores.
    pub operations_per_s: f64,
    /// Operations per second of matrix products, in the storage type.
    pub product_operations_per_s: f64,
}

impl Work {
    /// Time to move the bytes, in microseconds.
    pub fn memory_us(&self, ceilings: &Ceilings) -> f64 {
        1e6 * self.bytes / ceilings.bytes_per_s
    }

    /// Time of the arithmetic, in microseconds.
    pub fn arithmetic_us(&self, ceilings: &Ceilings) -> f64 {
        let rate = if self.is_product { ceilings.product_operations_per_s } else { ceilings.operations_per_s };
        1e6 * self.operations / rate
    }

    /// Minimum time in microseconds: the greater of the two.
    pub fn floor_us(&self, ceilings: &Ceilings) -> f64 {
        self.memory_us(ceilings).max(self.arithmetic_us(ceilings))
    }
}

/// Sizes of a model that determine the work of its passes.
#[derive(Clone, Debug)]
pub struct Sizes<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Storage type of weights, activations, keys and values.
    pub scalar: Scalar,
}

impl Sizes<'_> {
    /// The operations of one layer of the block and of a pass around it, in order, except those that take no more than
    /// a launch.
    pub fn operations(&self) -> Vec<Operation> {
        use Operation::*;
        let mut operations = vec![EnterRows, NormRows];
        operations.extend(self.projection(Projections::Qkv));
        operations.extend([RotateAndStore, AttendSplits, AttendJoin, AttendTiles]);
        operations
            .extend([Projections::Output, Projections::Up, Projections::Down].map(|of| self.projection(of)).concat());
        operations.extend([KeepRows, FillDeeper]);
        operations.extend(self.projection(Projections::Head));
        operations.push(SweepLogits);
        operations
    }

    /// How often a layer of the block launches an operation in a decode pass with these histories.
    pub fn launches(&self, operation: Operation, load: &Load) -> usize {
        match operation {
            Operation::NormRows => 2,
            Operation::AttendJoin => usize::from(load.history > SPLIT),
            Operation::Product(Projections::Head) | Operation::LoraAdd(Projections::Head) => 0,
            Operation::Product(_) | Operation::LoraExpand(_) | Operation::LoraAdd(_) | Operation::LoraActivate => 1,
            Operation::RotateAndStore | Operation::AttendSplits | Operation::Activate => 1,
            Operation::EnterRows
            | Operation::AttendTiles
            | Operation::KeepRows
            | Operation::FillDeeper
            | Operation::HeadDowns
            | Operation::SweepLogits => 0,
        }
    }

    /// The operations of projections and, of the first matrices of the MLP, of the activation.
    fn projection(&self, of: Projections) -> Vec<Operation> {
        use Operation::*;
        let (adapted, gated) = (self.ranks(of) > 0, self.config.architecture.gated_mlp);
        match of {
            Projections::Up if !adapted => vec![Product(of), Activate],
            Projections::Up if !gated => vec![Product(of), LoraExpand(of), Activate],
            Projections::Up => vec![Product(of), LoraActivate],
            _ if !adapted => vec![Product(of)],
            Projections::Qkv => vec![Product(of), LoraExpand(of)],
            Projections::Output | Projections::Down => vec![Product(of), LoraAdd(of)],
            Projections::Head => vec![Product(of), HeadDowns, LoraAdd(of)],
        }
    }

    fn kinds(&self, of: Projections) -> Vec<ProjectionKind> {
        match of {
            Projections::Qkv => vec![ProjectionKind::Q, ProjectionKind::K, ProjectionKind::V],
            Projections::Output => vec![ProjectionKind::O],
            Projections::Up if self.config.architecture.gated_mlp => vec![ProjectionKind::Gate, ProjectionKind::Up],
            Projections::Up => vec![ProjectionKind::Up],
            Projections::Down => vec![ProjectionKind::Down],
            Projections::Head => Vec::new(),
        }
    }

    /// Rank (0 without an adapter) and outputs of each projection.
    pub fn parts(&self, of: Projections) -> Vec<(usize, usize)> {
        if of == Projections::Head {
            return vec![(self.config.head_lora_rank, self.config.vocab_size)];
        }
        let ranks = self.config.lora.as_ref().map(|lora| lora.ranks).unwrap_or_default();
        self.kinds(of).into_iter().map(|kind| (ranks.of(kind), self.config.projection(kind).outputs)).collect()
    }

    /// Sum of the projections' ranks.
    pub fn ranks(&self, of: Projections) -> usize {
        self.parts(of).iter().map(|(rank, _)| rank).sum()
    }

    /// Sum of the projections' outputs.
    pub fn outputs(&self, of: Projections) -> usize {
        self.parts(of).iter().map(|(_, outputs)| outputs).sum()
    }

    /// Width of the projections' input.
    pub fn inputs(&self, of: Projections) -> usize {
        match self.kinds(of).first() {
            Some(&kind) => self.config.projection(kind).inputs,
            None => self.config.hidden_size,
        }
    }

    /// Work of an operation in a pass.
    pub fn work(&self, operation: Operation, load: &Load) -> Work {
        let (bytes, operations) = match operation {
            Operation::Product(of) => self.product(of, load),
            Operation::HeadDowns => {
                self.product_of(Projections::Head, self.adapted_columns(Projections::Head), 4, load)
            }
            Operation::LoraExpand(of) | Operation::LoraAdd(of) => self.expand(of, load),
            Operation::LoraActivate => self.expand(Projections::Up, load),
            Operation::AttendSplits | Operation::AttendJoin | Operation::AttendTiles | Operation::RotateAndStore => {
                self.attention(operation, load)
            }
            _ => self.by_row(operation, load),
        };
        let on_tensor_cores = self.scalar != Scalar::F32;
        let is_product = match operation {
            Operation::Product(_) | Operation::HeadDowns => true,
            Operation::AttendSplits | Operation::AttendTiles => on_tensor_cores,
            Operation::LoraExpand(_) | Operation::LoraAdd(_) | Operation::LoraActivate => on_tensor_cores,
            _ => false,
        };
        Work { bytes: bytes as f64, operations: operations as f64, is_product }
    }

    /// Outputs of the adapters' downs at all depths.
    fn adapted_columns(&self, of: Projections) -> usize {
        self.config.num_loops * self.ranks(of)
    }

    fn product(&self, of: Projections, load: &Load) -> (usize, usize) {
        let adapted = self.ranks(of) > 0;
        let bytes_of_output = match of {
            // Logits are `f32`, and the residual stream is accumulated, unless adapters come in between.
            Projections::Head => 4,
            Projections::Output | Projections::Down if adapted => 4,
            Projections::Output | Projections::Down => 8,
            Projections::Qkv | Projections::Up => self.scalar.bytes(),
        };
        let downs = if of == Projections::Head { 0 } else { self.adapted_columns(of) };
        self.product_of(of, self.outputs(of) + downs, bytes_of_output, load)
    }

    fn product_of(&self, of: Projections, outputs: usize, bytes_of_output: usize, load: &Load) -> (usize, usize) {
        let (inputs, stored) = (self.inputs(of), self.scalar.bytes());
        let bytes = inputs * outputs * stored + load.rows * (inputs * stored + outputs * bytes_of_output);
        (bytes, 2 * load.rows * inputs * outputs)
    }

    fn expand(&self, of: Projections, load: &Load) -> (usize, usize) {
        let (stored, parts) = (self.scalar.bytes(), self.parts(of));
        let numbers: usize = parts.iter().map(|(rank, outputs)| rank * outputs).sum();
        let (outputs, ranks) = (self.outputs(of), self.ranks(of));
        let of_row = match of {
            Projections::Up if self.config.architecture.gated_mlp => {
                (ranks + outputs) * stored + self.config.intermediate_size * stored
            }
            Projections::Qkv | Projections::Up => (ranks + 2 * outputs) * stored,
            // A destination that is added to is read and written.
            Projections::Output | Projections::Down => 4 * (ranks + 3 * outputs),
            Projections::Head => 4 * (ranks + 2 * outputs),
        };
        (load.depths * numbers * stored + load.rows * of_row, 2 * load.rows * numbers)
    }

    fn attention(&self, operation: Operation, load: &Load) -> (usize, usize) {
        let config = self.config;
        let (stored, head_dim, heads) = (self.scalar.bytes(), config.head_dim, config.num_heads);
        let (queries, entry) = (heads * head_dim * stored, 2 * config.num_kv_heads * head_dim * stored);
        let splits = load.history.div_ceil(SPLIT);
        // A history of one split needs no join.
        let partial = if splits > 1 { splits * heads * (2 + head_dim) * 4 } else { 0 };
        match operation {
            Operation::RotateAndStore => (2 * load.rows * (queries + entry), 0),
            Operation::AttendSplits => {
                let out = if splits > 1 { partial } else { queries };
                (load.rows * (load.history * entry + queries + out), 4 * load.rows * load.history * heads * head_dim)
            }
            Operation::AttendJoin if splits > 1 => (load.rows * (partial + queries), 0),
            Operation::AttendTiles => {
                let pairs = load.chunk * (load.chunk + 1) / 2;
                (load.chunk * (2 * queries + entry), 4 * pairs * heads * head_dim)
            }
            _ => (0, 0),
        }
    }

    fn by_row(&self, operation: Operation, load: &Load) -> (usize, usize) {
        let config = self.config;
        let (stored, hidden) = (self.scalar.bytes(), config.hidden_size);
        let inputs_of_activation = if config.architecture.gated_mlp { 2 } else { 1 };
        let (bytes_of_row, operations_of_row) = match operation {
            Operation::EnterRows => (hidden * (stored + 4), 0),
            Operation::NormRows => (hidden * (4 + stored), 4 * hidden),
            Operation::Activate => (config.intermediate_size * (inputs_of_activation + 1) * stored, 0),
            Operation::KeepRows => (hidden * 8, 0),
            // A copy from one depth to every deeper one.
            Operation::FillDeeper => (config.num_loops * 2 * config.num_kv_heads * config.head_dim * stored, 0),
            // Maximum, second maximum, and sums of exponentials and of their products with the logits.
            Operation::SweepLogits => (4 * config.vocab_size, 10 * config.vocab_size),
            _ => (0, 0),
        };
        (load.rows * bytes_of_row, load.rows * operations_of_row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;
    use crate::config::{LoraConfig, LoraRanks};

    fn adapted() -> ModelConfig {
        ModelConfig { lora: Some(LoraConfig { ranks: LoraRanks::all(2), scale: 1.0 }), ..tiny() }
    }

    #[test]
    fn a_floor_is_the_greater_of_memory_and_arithmetic() {
        let ceilings = Ceilings { bytes_per_s: 1e9, operations_per_s: 1e6, product_operations_per_s: 1e9 };
        let work = |is_product| Work { bytes: 2000.0, operations: 5.0, is_product };
        assert_eq!(work(false).floor_us(&ceilings), 5.0);
        assert_eq!(work(true).floor_us(&ceilings), 2.0);
    }

    #[test]
    fn decode_attention_reads_every_entry_of_every_row_once() {
        let config = tiny();
        let sizes = Sizes { config: &config, scalar: Scalar::Bf16 };
        let load = |history| Load { rows: 3, depths: 1, history, chunk: 0 };
        let work = |history| sizes.work(Operation::AttendSplits, &load(history));
        let entry = 2 * config.num_kv_heads * config.head_dim * 2;
        assert_eq!(work(101).bytes - work(100).bytes, 3.0 * entry as f64);
        assert_eq!(work(100).operations, (3 * 100 * config.num_heads * config.head_dim * 4) as f64);
        assert_eq!(sizes.work(Operation::AttendJoin, &load(SPLIT)).bytes, 0.0);
        assert!(sizes.work(Operation::AttendJoin, &load(SPLIT + 1)).bytes > 0.0);
    }

    #[test]
    fn ups_are_read_once_for_each_depth_of_a_pass_and_downs_at_all_depths_with_the_weight() {
        let (config, plain) = (adapted(), tiny());
        let sizes = |config| Sizes { config, scalar: Scalar::Bf16 };
        let work =
            |config, operation, depths| sizes(config).work(operation, &Load { rows: 4, depths, history: 1, chunk: 0 });
        let of = Projections::Qkv;
        let ups: usize = sizes(&config).parts(of).iter().map(|(rank, outputs)| rank * outputs * 2).sum();
        let [one, three] = [1, 3].map(|depths| work(&config, Operation::LoraExpand(of), depths).bytes);
        assert_eq!(three - one, 2.0 * ups as f64);
        let columns = config.num_loops * sizes(&config).ranks(of);
        let [with, without] = [&config, &plain].map(|config| work(config, Operation::Product(of), 1));
        let inputs = sizes(&config).inputs(of);
        assert_eq!(with.bytes - without.bytes, (columns * (inputs + 4) * 2) as f64);
        assert_eq!(with.operations - without.operations, (2 * 4 * columns * inputs) as f64);
    }

    #[test]
    fn adapters_are_one_launch_after_each_product_and_take_the_activation_along() {
        let operations = |config: &ModelConfig| Sizes { config, scalar: Scalar::F32 }.operations();
        let launches = |config: &ModelConfig, name: &str| {
            operations(config).iter().filter(|operation| operation.to_string().contains(name)).count()
        };
        assert_eq!((launches(&adapted(), "lora"), launches(&adapted(), "activate")), (4, 1));
        assert_eq!((launches(&tiny(), "lora"), launches(&tiny(), "activate")), (0, 1));
        assert_eq!(operations(&adapted()).len(), operations(&tiny()).len() + 3);
        let head = ModelConfig { head_lora_rank: 2, ..tiny() };
        assert_eq!(operations(&head).len(), operations(&tiny()).len() + 2);
    }
}

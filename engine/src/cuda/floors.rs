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
    /// A product with a weight.
    Product(Projections),
    /// `lora_shrink`
    LoraShrink(Projections),
    /// `lora_expand`
    LoraExpand(Projections),
    /// `store_kv`
    StoreKv,
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
            Self::LoraShrink(of) => write!(f, "lora_shrink of {of}"),
            Self::LoraExpand(of) => write!(f, "lora_expand of {of}"),
            Self::StoreKv => f.write_str("store_kv"),
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
        let adapted = |of: Projections| match self.ranks(of) {
            0 => vec![Product(of)],
            _ => vec![Product(of), LoraShrink(of), LoraExpand(of)],
        };
        operations.extend(adapted(Projections::Qkv));
        operations.extend([StoreKv, AttendSplits, AttendJoin, AttendTiles]);
        operations.extend(adapted(Projections::Output));
        operations.extend(adapted(Projections::Up));
        operations.push(Activate);
        operations.extend(adapted(Projections::Down));
        operations.extend([KeepRows, FillDeeper]);
        operations.extend(adapted(Projections::Head));
        operations.push(SweepLogits);
        operations
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
            Operation::LoraShrink(of) => self.shrink(of, load),
            Operation::LoraExpand(of) => self.expand(of, load),
            Operation::AttendSplits | Operation::AttendJoin | Operation::AttendTiles | Operation::StoreKv => {
                self.attention(operation, load)
            }
            _ => self.by_row(operation, load),
        };
        let attends = matches!(operation, Operation::AttendSplits | Operation::AttendTiles);
        let is_product = matches!(operation, Operation::Product(_)) || attends && self.scalar != Scalar::F32;
        Work { bytes: bytes as f64, operations: operations as f64, is_product }
    }

    fn product(&self, of: Projections, load: &Load) -> (usize, usize) {
        let (inputs, outputs, stored) = (self.inputs(of), self.outputs(of), self.scalar.bytes());
        let y = match of {
            // Logits are `f32`, and the residual stream is accumulated.
            Projections::Head => 4,
            Projections::Output | Projections::Down => 8,
            Projections::Qkv | Projections::Up => stored,
        };
        let bytes = inputs * outputs * stored + load.rows * (inputs * stored + outputs * y);
        (bytes, 2 * load.rows * inputs * outputs)
    }

    fn shrink(&self, of: Projections, load: &Load) -> (usize, usize) {
        let (inputs, ranks, stored) = (self.inputs(of), self.ranks(of), self.scalar.bytes());
        let bytes = load.depths * ranks * inputs * stored + load.rows * (inputs * stored + 4 * ranks);
        (bytes, 2 * load.rows * ranks * inputs)
    }

    fn expand(&self, of: Projections, load: &Load) -> (usize, usize) {
        let (stored, adapted) = (self.scalar.bytes(), |&(rank, _): &(usize, usize)| rank > 0);
        let parts: Vec<(usize, usize)> = self.parts(of).into_iter().filter(adapted).collect();
        let numbers: usize = parts.iter().map(|(rank, outputs)| rank * outputs).sum();
        let outputs: usize = parts.iter().map(|(_, outputs)| outputs).sum();
        // A destination that is added to is read and written.
        let y = match of {
            Projections::Qkv | Projections::Up => 2 * stored,
            Projections::Output | Projections::Down | Projections::Head => 8,
        };
        let bytes = load.depths * numbers * stored + load.rows * (4 * self.ranks(of) + outputs * y);
        (bytes, 2 * load.rows * numbers)
    }

    fn attention(&self, operation: Operation, load: &Load) -> (usize, usize) {
        let config = self.config;
        let (stored, head_dim, heads) = (self.scalar.bytes(), config.head_dim, config.num_heads);
        let (queries, entry) = (heads * head_dim * stored, 2 * config.num_kv_heads * head_dim * stored);
        let splits = load.history.div_ceil(SPLIT);
        // A history of one split needs no join.
        let partial = if splits > 1 { splits * heads * (2 + head_dim) * 4 } else { 0 };
        match operation {
            Operation::StoreKv => (2 * load.rows * entry, 0),
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
    fn adapters_are_read_once_for_each_depth_and_weights_once() {
        let config = adapted();
        let sizes = Sizes { config: &config, scalar: Scalar::Bf16 };
        let bytes = |operation, depths| sizes.work(operation, &Load { rows: 4, depths, history: 1, chunk: 0 }).bytes;
        let of = Projections::Qkv;
        let downs = sizes.ranks(of) * sizes.inputs(of) * 2;
        assert_eq!(bytes(Operation::LoraShrink(of), 3) - bytes(Operation::LoraShrink(of), 1), 2.0 * downs as f64);
        assert_eq!(bytes(Operation::Product(of), 3), bytes(Operation::Product(of), 1));
    }

    #[test]
    fn a_model_without_adapters_has_no_lora() {
        let has_lora = |config: &ModelConfig| {
            let operations = Sizes { config, scalar: Scalar::F32 }.operations();
            operations.iter().any(|operation| operation.to_string().starts_with("lora"))
        };
        assert!(has_lora(&adapted()));
        assert!(!has_lora(&tiny()));
    }
}

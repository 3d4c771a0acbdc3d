//! The kernels' source code, joined and specialized.

use candle_core::{Result, bail};
use half::{bf16, f16};

use super::device::bytes_of;

/// Storage type of weights, activations, keys and values on the device. Sums are always in `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// Brain floats: the upper halves of 32-bit floats, rounded.
    Bf16,
}

impl Scalar {
    /// All storage types.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Name in the kernels.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Rounds numbers to the nearest stored value and encodes them.
    pub fn encode(self, numbers: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => bytes_of(numbers).to_vec(),
            Self::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Self::Bf16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }

    /// Decodes stored numbers.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        match self {
            Self::F32 => bytes
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                .collect(),
            Self::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            Self::Bf16 => halves().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        }
    }

    /// Numbers per 16-byte load.
    pub fn pack(self) -> usize {
        16 / self.bytes()
    }
}

/// Constants of a model that the kernels are compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Specialization {
    /// Storage type.
    pub scalar: Scalar,
    /// Width of a head.
    pub head_dim: usize,
    /// Query heads that share the loads of a key-value head.
    pub group: usize,
    /// Positions per KV block.
    pub block_tokens: usize,
}

/// Maximum width of a head: the kernels keep heads in shared memory.
pub const MAX_HEAD_DIM: usize = 256;
/// Maximum number of query heads that share loads: their sums must fit in registers.
pub const MAX_GROUP: usize = 8;

impl Specialization {
    /// The kernels of a model with `heads_per_kv_head` query heads for each key-value head.
    ///
    /// # Errors
    /// If heads are wider than [`MAX_HEAD_DIM`], narrower than two 16-byte loads, or not a whole number of loads.
    pub fn new(scalar: Scalar, head_dim: usize, heads_per_kv_head: usize, block_tokens: usize) -> Result<Self> {
        let pack = scalar.pack();
        if !(2 * pack..=MAX_HEAD_DIM).contains(&head_dim) || !head_dim.is_multiple_of(pack) {
            bail!(
                "a head is {head_dim} wide: in {} the GPU kernels take multiples of {pack}, from {} to {MAX_HEAD_DIM}",
                scalar.name(),
                2 * pack
            );
        }
        let divides = |group: &usize| heads_per_kv_head.is_multiple_of(*group);
        let group = (1..=MAX_GROUP).rev().find(divides).expect("1 divides every number");
        Ok(Self { scalar, head_dim, group, block_tokens })
    }

    /// Source code for NVRTC or a C++ compiler.
    pub fn source(&self) -> String {
        let Self { scalar, head_dim, group, block_tokens } = self;
        let mut source =
            format!("#define SCALAR {}\n#define HEAD_DIM {head_dim}\n#define GROUP {group}\n", scalar.name());
        source += &format!("#define BLOCK_TOKENS {block_tokens}\n");
        let attention = match scalar {
            Scalar::F32 => ("attend_f32.cu", include_str!("attend_f32.cu")),
            Scalar::F16 | Scalar::Bf16 => ("attend_16.cu", include_str!("attend_16.cu")),
        };
        for (name, text) in FILES.into_iter().chain([attention]) {
            source += &format!("#line 1 \"{name}\"\n{text}");
        }
        source
    }
}

const FILES: [(&str, &str); 6] = [
    ("scalar.cuh", include_str!("scalar.cuh")),
    ("attention.cu", include_str!("attention.cu")),
    ("norm.cu", include_str!("norm.cu")),
    ("rows.cu", include_str!("rows.cu")),
    ("lora.cu", include_str!("lora.cu")),
    ("signals.cu", include_str!("signals.cu")),
];

/// Every kernel.
pub const KERNELS: [&str; 23] = [
    "rotate_and_store",
    "fill_deeper",
    "attend_splits",
    "attend_join",
    "attend_tiles",
    "norm_rows",
    "add_normed",
    "norm_in_place",
    "norm_heads",
    "enter_rows",
    "keep_rows",
    "inject_rows",
    "add_bias_to_rows",
    "add_bias_to_residual",
    "activate",
    "compare",
    "gates",
    "lora_expand",
    "lora_add",
    "lora_activate",
    "sweep_logits",
    "judge_rows",
    "diverge",
];

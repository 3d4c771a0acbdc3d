//! How many KV blocks a device holds, and so how many sequences.

use crate::model::ModelShape;

/// Whose keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPolicy {
    /// Each depth its own.
    PerDepth,
    /// All depths share those of one.
    Shared,
}

/// What a device's memory is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// All of it, in bytes.
    pub device_bytes: u64,
    /// Share that the server may use, 0 to 1 (vLLM's `gpu_memory_utilization`).
    pub utilization: f64,
    /// Bytes that neither weights nor activations nor keys and values take: context, workspaces, communication.
    pub other_bytes: u64,
}

impl Memory {
    /// KV blocks of `block_tokens` positions that fit beside the weights and the activations of `max_rows` rows, of
    /// which `max_batch` predict; none if even the weights do not fit.
    pub fn kv_blocks(
        &self,
        shape: &ModelShape,
        policy: KvPolicy,
        block_tokens: u32,
        max_rows: u32,
        max_batch: u32,
    ) -> u32 {
        let usable = (self.device_bytes as f64 * self.utilization) as u64;
        let taken = shape.total_weight_bytes() + activation_bytes(shape, max_rows, max_batch) + self.other_bytes;
        let block = kv_bytes_per_token(shape, policy) * u64::from(block_tokens);
        (usable.saturating_sub(taken) / block).min(u32::MAX.into()) as u32
    }
}

/// Bytes of keys and values of one token.
pub fn kv_bytes_per_token(shape: &ModelShape, policy: KvPolicy) -> u64 {
    match policy {
        KvPolicy::PerDepth => shape.num_loops * shape.kv_bytes_per_depth(),
        KvPolicy::Shared => shape.kv_bytes_per_depth(),
    }
}

/// Bytes of the largest activations that live together: residual, its norm, and what goes into and comes out of the
/// widest linear layer for every row, or the logits in 32-bit floats and their softmax for every sequence that
/// predicts.
pub fn activation_bytes(shape: &ModelShape, max_rows: u32, max_batch: u32) -> u64 {
    let widest = shape.linears().into_iter().map(|(inputs, outputs)| inputs + outputs).max().unwrap_or(0);
    let rows = u64::from(max_rows) * (2 * shape.hidden + widest) * shape.weight_bytes;
    let logits = u64::from(max_batch) * shape.vocab * (shape.weight_bytes + 2 * 4);
    rows.max(logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{GEMMA, LLAMA, shape};

    const RTX_4090: Memory = Memory { device_bytes: 25_250_627_584, utilization: 0.9, other_bytes: 0 };

    #[test]
    fn blocks_fill_what_weights_and_activations_leave() {
        let llama = shape(LLAMA, 1, 0).unwrap();
        let blocks = RTX_4090.kv_blocks(&llama, KvPolicy::PerDepth, 16, 2048, 256);
        let taken = llama.total_weight_bytes() + activation_bytes(&llama, 2048, 256);
        let left = (25_250_627_584_f64 * 0.9) as u64 - taken;
        assert_eq!(u64::from(blocks), left / (16 * 131_072));
        let small = Memory { device_bytes: 1 << 30, ..RTX_4090 };
        assert_eq!(small.kv_blocks(&llama, KvPolicy::PerDepth, 16, 2048, 256), 0);
    }

    #[test]
    fn sharing_one_cache_among_depths_holds_as_many_times_more() {
        let gemma = shape(GEMMA, 3, 64).unwrap();
        let blocks = |policy| RTX_4090.kv_blocks(&gemma, policy, 16, 2048, 256);
        assert_eq!(blocks(KvPolicy::Shared) / blocks(KvPolicy::PerDepth), 3);
        let vanilla = shape(GEMMA, 1, 0).unwrap();
        assert!(blocks(KvPolicy::PerDepth) > RTX_4090.kv_blocks(&vanilla, KvPolicy::PerDepth, 16, 2048, 256));
    }
}

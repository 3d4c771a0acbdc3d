//! KV blocks that fit in a device's memory beside weights and activations.

use scheduler::{KvFill, Settings};
use traces::{MemoryFigures, ProfileMeta};

/// Memory that a model needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelMemory {
    /// Number of loops of the model.
    pub num_loops: u32,
    /// Bytes of all weights: the block once, and the low-rank weights of each loop.
    pub weight_bytes: u64,
    /// Bytes of keys and values of one token, over all depths.
    pub kv_bytes_per_token: u64,
    /// Other memory use, and the size of the memory, as far as they are known.
    pub figures: MemoryFigures,
    /// The KV fill that the model is made for.
    pub kv_fill: KvFill,
}

impl From<&ProfileMeta> for ModelMemory {
    fn from(meta: &ProfileMeta) -> Self {
        Self {
            num_loops: meta.num_loops,
            weight_bytes: meta.weight_bytes,
            kv_bytes_per_token: meta.kv_bytes_per_token,
            figures: meta.memory.unwrap_or_default(),
            kv_fill: meta.kv_fill.as_deref().and_then(|fill| fill.parse().ok()).unwrap_or_default(),
        }
    }
}

/// Memory that a server may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryBudget {
    /// Memory of the device, in bytes.
    pub device_bytes: u64,
    /// Share of the memory that the server uses, above 0 and up to 1 (vLLM's `gpu_memory_utilization`).
    pub utilization: f64,
}

impl MemoryBudget {
    /// Default of [`utilization`](Self::utilization).
    pub const DEFAULT_UTILIZATION: f64 = 0.9;
}

/// How memory is divided, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Memory that the server may use.
    pub usable: u64,
    /// Memory for the weights.
    pub weights: u64,
    /// Memory for the activations of the largest pass or for its logits, whichever is larger: they are never live
    /// together.
    pub activations: u64,
    /// Memory for anything other than weights, activations, keys and values.
    pub other: u64,
    /// Keys and values of one token.
    pub kv_per_token: u64,
    /// KV blocks that fit in the remaining memory.
    pub num_blocks: u32,
}

/// Memory that cannot be planned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MemoryError {
    /// A utilization that is not a share.
    #[error("the memory utilization is {0}, expected more than 0 and at most 1")]
    Utilization(f64),
    /// A profile without the bytes of keys and values of a token.
    #[error(
        "the latency profile has 0 bytes for the keys and values of a token: expected more than 0 to size the KV cache"
    )]
    NoKvBytes,
    /// Memory in which not even one block fits.
    #[error(
        "not one KV block fits into {usable} usable bytes of memory: weights take {weights}, activations \
         {activations}, other uses {other}, a block of {block_tokens} tokens {block}"
    )]
    Full {
        /// See [`MemoryPlan`].
        usable: u64,
        /// See [`MemoryPlan`].
        weights: u64,
        /// See [`MemoryPlan`].
        activations: u64,
        /// See [`MemoryPlan`].
        other: u64,
        /// Tokens per block.
        block_tokens: u32,
        /// Bytes per block.
        block: u64,
    },
}

impl ModelMemory {
    /// Bytes of keys and values of one token, at the depths that a KV fill keeps.
    pub fn kv_bytes(&self, fill: KvFill) -> u64 {
        let kept = u64::from(fill.cached_depths(self.num_loops as u8));
        self.kv_bytes_per_token.saturating_mul(kept) / u64::from(self.num_loops)
    }

    /// Divides a budget under these settings, whose own number of blocks is ignored.
    ///
    /// # Errors
    /// If not even one block fits, or the bytes of a block are unknown.
    pub fn plan(&self, budget: MemoryBudget, settings: &Settings) -> Result<MemoryPlan, MemoryError> {
        if !(budget.utilization > 0.0 && budget.utilization <= 1.0) {
            return Err(MemoryError::Utilization(budget.utilization));
        }
        let kv_per_token = self.kv_bytes(settings.kv_fill);
        if kv_per_token == 0 {
            return Err(MemoryError::NoKvBytes);
        }
        let figures = &self.figures;
        let usable = (budget.device_bytes as f64 * budget.utilization) as u64;
        let rows = u64::from(settings.token_budget).saturating_mul(figures.row_bytes);
        let logits = u64::from(settings.max_batch).saturating_mul(figures.logits_bytes);
        let (weights, activations, other) = (self.weight_bytes, rows.max(logits), figures.other_bytes);
        let left = usable.saturating_sub(weights).saturating_sub(activations).saturating_sub(other);
        let block = kv_per_token.saturating_mul(settings.block_tokens.max(1).into());
        let num_blocks = (left / block).min(u32::MAX.into()) as u32;
        if num_blocks == 0 {
            let block_tokens = settings.block_tokens;
            return Err(MemoryError::Full { usable, weights, activations, other, block_tokens, block });
        }
        Ok(MemoryPlan { usable, weights, activations, other, kv_per_token, num_blocks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::Batching;

    /// Three loops; 5 GB of weights; 36 KiB of keys and values per token.
    const MODEL: ModelMemory = ModelMemory {
        num_loops: 3,
        weight_bytes: 5_000_000_000,
        kv_bytes_per_token: 36 << 10,
        figures: MemoryFigures {
            device_bytes: None,
            other_bytes: 1_000_000_000,
            row_bytes: 100_000,
            logits_bytes: 2_000_000,
        },
        kv_fill: KvFill::Reuse,
    };
    const BUDGET: MemoryBudget = MemoryBudget { device_bytes: 20_000_000_000, utilization: 0.9 };

    fn settings(max_batch: u32, token_budget: u32) -> Settings {
        Settings {
            max_batch,
            token_budget,
            prefill_chunk: 64,
            num_blocks: 0,
            ..Settings::new(Batching::Depth, "none".parse().unwrap(), 3)
        }
    }

    #[test]
    fn blocks_fill_the_memory_beside_weights_activations_and_other_uses() {
        let plan = MODEL.plan(BUDGET, &settings(8, 2000)).unwrap();
        assert_eq!((plan.usable, plan.activations), (18_000_000_000, 200_000_000));
        let left = 18_000_000_000 - 5_000_000_000 - 200_000_000 - 1_000_000_000;
        assert_eq!(u64::from(plan.num_blocks), left / (16 * (36 << 10)));
        let many_logits = MODEL.plan(BUDGET, &settings(256, 2000)).unwrap();
        assert_eq!(many_logits.activations, 512_000_000, "rows and logits do not live together");
    }

    #[test]
    fn a_cache_shared_by_all_depths_fits_num_loops_times_the_tokens() {
        let blocks = |kv_fill| MODEL.plan(BUDGET, &Settings { kv_fill, ..settings(8, 64) }).unwrap().num_blocks;
        assert_eq!(blocks(KvFill::First) / blocks(KvFill::Reuse), 3);
        assert_eq!(blocks(KvFill::Last), blocks(KvFill::First));
        assert!((2 * blocks(KvFill::Cycle(2))).abs_diff(3 * blocks(KvFill::Reuse)) <= 3, "two of three loops");
        assert_eq!(blocks(KvFill::Cycle(3)), blocks(KvFill::Reuse));
        assert_eq!(blocks(KvFill::Backfill), blocks(KvFill::Reuse));
    }

    #[test]
    fn memory_without_room_is_an_error_that_says_who_takes_it() {
        let plan = |model: ModelMemory, budget| model.plan(budget, &settings(8, 64));
        let small = MemoryBudget { device_bytes: 6_000_000_000, ..BUDGET };
        let message = plan(MODEL, small).unwrap_err().to_string();
        assert!(message.contains("5400000000 usable") && message.contains("weights take 5000000000"), "{message}");
        let unknown = ModelMemory { kv_bytes_per_token: 0, ..MODEL };
        assert_eq!(plan(unknown, BUDGET), Err(MemoryError::NoKvBytes));
        for utilization in [0.0, 1.1, f64::NAN] {
            let error = plan(MODEL, MemoryBudget { utilization, ..BUDGET }).unwrap_err();
            assert!(matches!(error, MemoryError::Utilization(_)));
        }
    }
}

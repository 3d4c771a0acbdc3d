//! Random models for tests.

#![allow(dead_code)] // each test file uses its own share

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use engine::config::{LoraConfig, LoraRanks, ModelConfig};
use engine::kernels::signals::mix;
use engine::weights::Weights;
use proptest::prelude::*;

/// Small models of every kind: multi-head, grouped and multi-query attention, tied and untied, with LoRA and without.
pub fn configs() -> impl Strategy<Value = ModelConfig> {
    let heads = prop_oneof![Just((1, 1)), Just((4, 4)), Just((4, 2)), Just((4, 1)), Just((6, 2)), Just((9, 1))];
    let sizes = (17_usize..70, 1_usize..5, 5_usize..50, prop_oneof![Just(2), Just(6), Just(16), Just(20), Just(32)]);
    let lora = prop_oneof![
        Just(None),
        (1_usize..5).prop_map(|rank| Some(LoraConfig { ranks: LoraRanks::all(rank), scale: 0.75 }))
    ];
    (heads, sizes, 1_usize..3, 1_usize..5, any::<bool>(), lora).prop_map(
        |((num_heads, num_kv_heads), (vocab, width, inner, head_dim), layers, loops, tied, lora)| ModelConfig {
            vocab_size: vocab,
            hidden_size: width * 12,
            intermediate_size: inner,
            num_heads,
            num_kv_heads,
            head_dim,
            block_layers: layers,
            num_loops: loops,
            tie_embeddings: tied,
            max_positions: 128,
            lora,
            ..ModelConfig::default()
        },
    )
}

/// One small model with grouped-query attention, three loops and a head of its own.
pub fn grouped() -> ModelConfig {
    ModelConfig {
        vocab_size: 40,
        hidden_size: 24,
        intermediate_size: 40,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        block_layers: 2,
        num_loops: 3,
        tie_embeddings: false,
        max_positions: 128,
        ..ModelConfig::default()
    }
}

/// Weights that are random everywhere: fresh ones have norms of one and adapters that do nothing, and their logits
/// are so small that all tokens are nearly equal.
pub fn weights(config: &ModelConfig, seed: u64) -> Weights {
    let fresh = Weights::random(config.clone(), seed).unwrap();
    let mut tensors = HashMap::new();
    for (name, tensor) in fresh.tensors() {
        let noise_scale = if name.ends_with(".b") || name.ends_with("norm.weight") { 0.3 } else { 0.0 };
        let noise = |index| (mix(seed ^ mix(index)) as f32 / u64::MAX as f32 - 0.5) * noise_scale;
        let noise = Tensor::from_iter((0..tensor.elem_count() as u64).map(noise), &Device::Cpu).unwrap();
        let scale = if name.contains("embed_tokens") || name.contains("lm_head") { 12.0 } else { 1.0 };
        let scaled = (tensor * scale).unwrap() + noise.reshape(tensor.shape()).unwrap();
        tensors.insert(name.clone(), scaled.unwrap());
    }
    Weights::from_tensors(config.clone(), tensors, "test").unwrap()
}

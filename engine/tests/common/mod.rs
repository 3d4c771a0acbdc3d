//! Random models for tests.

#![allow(dead_code)] // each test file uses its own share

pub mod devices;
#[cfg(not(feature = "cuda"))]
#[path = "../cuda/emulator.rs"]
pub mod emulator;
#[cfg(feature = "cuda")]
#[path = "../cuda/gpu.rs"]
pub mod emulator;

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use engine::Weights;
use engine::config::{
    Activation, Architecture, InitialState, Injection, LoraConfig, LoraRanks, ModelConfig, Norm, RopeScaling, Sharing,
    SlidingWindow,
};
use proptest::prelude::*;
use traces::hash::mix;

/// Small models of every kind that a configuration allows.
pub fn configs() -> impl Strategy<Value = ModelConfig> {
    let own_layers = (0_usize..3, 0_usize..3);
    let exits = (any::<bool>(), prop_oneof![Just(0_usize), 1_usize..4], prop_oneof![Just(0_usize), 1_usize..6]);
    let (masks, between) = ((windows(), prop_oneof![Just(0), any::<u32>()]), between_loops());
    (llamas(), architectures(), masks, sharings(), own_layers, exits, between).prop_map(
        |(
            llama,
            architecture,
            (window, unrotated),
            (sharing, lora),
            (prelude_layers, coda_layers),
            (gate, head_lora_rank, gate_hidden),
            (norm_between_loops, injection, norm_before_coda, shared_gate),
        )| {
            let shared_gate = gate && shared_gate;
            let mut config = ModelConfig {
                norm_between_loops,
                norm_before_coda: norm_before_coda && coda_layers > 0,
                injection,
                shared_gate,
                architecture,
                sharing,
                prelude_layers,
                coda_layers,
                lora: lora.filter(|_| sharing != Sharing::Nothing),
                head_lora_rank,
                gate,
                gate_hidden: if gate && !shared_gate { gate_hidden } else { 0 },
                ..llama
            };
            let architecture = &mut config.architecture;
            if let (false, Some(lora)) = (architecture.gated_mlp, &mut config.lora) {
                lora.ranks.gate = 0;
            }
            // Heads that are rotated partially may have odd sizes.
            config.head_dim += architecture.rotary_dims.map_or(0, |_| config.vocab_size % 2);
            architecture.rotary_dims = architecture.rotary_dims.map(|dims| dims.min(config.head_dim / 2 * 2));
            let layers = config.num_layers();
            config.architecture.unrotated_layers = (0..layers).filter(|layer| unrotated >> layer & 1 == 1).collect();
            config.architecture.sliding_window = window.map(|(tokens, mask)| SlidingWindow {
                tokens,
                rope_theta: 500.0,
                layers: (0..layers).filter(|layer| mask >> layer & 1 == 1).collect(),
            });
            config
        },
    )
}

/// Small models for the CUDA kernels: heads of one size, since the emulated kernels are compiled for each, and linear
/// gates.
pub fn configs_of_one_head_size() -> impl Strategy<Value = ModelConfig> {
    configs().prop_map(|mut config| {
        (config.num_heads, config.num_kv_heads, config.head_dim) = (4, 2, 8);
        config.vocab_size = config.vocab_size.min(30);
        config.gate_hidden = 0;
        config
    })
}

/// Small Llamas: multi-head, grouped and multi-query attention, tied and untied, narrow heads and wide ones.
fn llamas() -> impl Strategy<Value = ModelConfig> {
    let heads = prop_oneof![Just((1, 1)), Just((4, 4)), Just((4, 2)), Just((4, 1)), Just((6, 2)), Just((9, 1))];
    let head_dims = prop::sample::select(vec![2, 6, 16, 20, 32, 70, 254]);
    let sizes = (17_usize..70, 1_usize..5, 5_usize..50, head_dims);
    (heads, sizes, 1_usize..3, 1_usize..5, any::<bool>()).prop_map(
        |((num_heads, num_kv_heads), (vocab, width, inner, head_dim), layers, loops, tied)| ModelConfig {
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
            ..ModelConfig::default()
        },
    )
}

fn architectures() -> impl Strategy<Value = Architecture> {
    let llama3 =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 64 };
    let scaling = prop::sample::select(vec![None, Some(RopeScaling::Linear { factor: 3.0 }), Some(llama3)]);
    let activation = prop::sample::select(vec![Activation::Silu, Activation::Gelu, Activation::GeluTanh]);
    let flags = prop::collection::vec(any::<bool>(), 9);
    let rotary_dims = prop::sample::select(vec![None, Some(2), Some(4)]);
    let scale = prop::sample::select(vec![None, Some(0.3_f32)]);
    (flags, activation, scaling, rotary_dims, scale, prop::sample::select(vec![1.0_f32, 3.5])).prop_map(
        |(flags, activation, rope_scaling, rotary_dims, attention_scale, embedding_scale)| Architecture {
            norm: if flags[0] { Norm::Layer } else { Norm::Rms },
            post_norms: flags[1],
            norm_after_addition: flags[1] && !flags[4] && flags[8],
            qk_norm: flags[2],
            activation,
            gated_mlp: flags[3],
            parallel_residual: flags[4],
            qkv_bias: flags[5],
            output_bias: flags[6],
            mlp_bias: flags[7],
            rotary_dims,
            rope_scaling,
            attention_scale,
            embedding_scale,
            ..Architecture::default()
        },
    )
}

/// A norm between loops or input injection, a norm before the coda, and a gate of all loops.
fn between_loops() -> impl Strategy<Value = (bool, Option<Injection>, bool, bool)> {
    let injection = |initial_state| Some(Injection { initial_state });
    let normal = InitialState::Normal { deviation: 0.6, seed: 5 };
    let between = prop_oneof![
        Just((false, None)),
        Just((true, None)),
        Just((false, injection(InitialState::Zeros))),
        Just((false, injection(normal))),
    ];
    let flags = (any::<bool>(), any::<bool>());
    (between, flags).prop_map(|((normed, injection), (before_coda, shared))| (normed, injection, before_coda, shared))
}

/// Length of a window, and a bit for each layer that has one.
fn windows() -> impl Strategy<Value = Option<(usize, u32)>> {
    prop_oneof![Just(None), (1_usize..100, any::<u32>()).prop_map(Some)]
}

fn sharings() -> impl Strategy<Value = (Sharing, Option<LoraConfig>)> {
    let sharing = prop::sample::select(vec![Sharing::Block, Sharing::Matrices, Sharing::Nothing]);
    let ranks = prop::collection::vec(prop_oneof![Just(0_usize), 1_usize..5], 7).prop_map(|ranks| LoraRanks {
        q: ranks[0],
        k: ranks[1],
        v: ranks[2],
        o: ranks[3],
        gate: ranks[4],
        up: ranks[5],
        down: ranks[6],
    });
    let lora = prop_oneof![Just(None), ranks.prop_map(|ranks| Some(LoraConfig { ranks, scale: 0.75 }))];
    (sharing, lora)
}

/// A small model with grouped-query attention, three loops and an untied head.
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

/// The model with every feature: prelude and coda, norms and low-rank differences by depth, windows and gates.
pub fn with_everything() -> ModelConfig {
    let mut config = ModelConfig {
        sharing: Sharing::Matrices,
        prelude_layers: 1,
        coda_layers: 2,
        lora: Some(LoraConfig { ranks: LoraRanks { q: 2, v: 3, ..LoraRanks::default() }, scale: 0.5 }),
        head_lora_rank: 2,
        gate: true,
        ..grouped()
    };
    let layers = vec![0, 2, 5, 7];
    config.architecture.sliding_window = Some(SlidingWindow { tokens: 9, rope_theta: 500.0, layers });
    config
}

/// Weights that are random everywhere. Initial weights have norms of one and adapters without effect, and their logits
/// are so small that all tokens are nearly equal.
pub fn weights(config: &ModelConfig, seed: u64) -> Weights {
    let fresh = Weights::random(config.clone(), seed).unwrap();
    let mut tensors = HashMap::new();
    for (name, tensor) in fresh.tensors() {
        let is_vector = name.ends_with("norm.weight") || name.ends_with(".bias") || name.ends_with(".b");
        let noise_scale = if name.starts_with("gate.") { 3.0 } else { 0.3 * f32::from(u8::from(is_vector)) };
        let noise = |index| (mix(seed ^ mix(index)) as f32 / u64::MAX as f32 - 0.5) * noise_scale;
        let noise = Tensor::from_iter((0..tensor.elem_count() as u64).map(noise), &Device::Cpu).unwrap();
        let scale = if name.contains("embed_tokens") || name.contains("lm_head") { 12.0 } else { 1.0 };
        let scaled = (tensor * scale).unwrap() + noise.reshape(tensor.shape()).unwrap();
        tensors.insert(name.clone(), scaled.unwrap());
    }
    Weights::from_tensors(config.clone(), tensors, "test").unwrap()
}

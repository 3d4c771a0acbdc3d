//! The model as on paper: dense, unbatched by depth, differentiable. Training differentiates it,
//! and tests hold the serving path against it.
//!
//! A Recursive Transformer (arXiv 2410.20672, equation 1) of the Llama kind: a block of layers,
//! each attention and an MLP with pre-norms, run `num_loops` times on the residual stream. Every
//! loop's output can be read through the same final norm and head.

use std::sync::Arc;

use candle_core::Tensor;

use crate::config::ModelConfig;
use crate::differentiable;
use crate::weights::{Weights, WeightsError};

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// A projection `W x`, plus a low-rank difference per loop if the model has them.
struct Linear {
    /// `[in, out]`
    weight: Tensor,
    /// Per loop, `A` `[in, rank]` and `B` `[rank, out]`, the scale included.
    adapters: Vec<(Tensor, Tensor)>,
    scale: f64,
}

impl Linear {
    fn load(weights: &Weights, layer: usize, name: &str) -> Result<Self, WeightsError> {
        let transposed = |name: String| {
            let tensor = weights.get(&name)?.t();
            tensor.map_err(|source| WeightsError::Tensor { name, source })
        };
        let config = weights.config();
        let mut adapters = Vec::new();
        if weights.tensors().contains_key(&format!("lora.0.layers.{layer}.{name}.a")) {
            for depth in 0..config.num_loops {
                let prefix = format!("lora.{depth}.layers.{layer}.{name}");
                let a = transposed(format!("{prefix}.a"))?;
                adapters.push((a, transposed(format!("{prefix}.b"))?));
            }
        }
        Ok(Self {
            weight: transposed(format!("block.layers.{layer}.{name}.weight"))?,
            adapters,
            scale: config.lora.as_ref().map_or(0.0, |lora| f64::from(lora.scale)),
        })
    }

    /// `[rows, in]` to `[rows, out]`.
    fn forward(&self, x: &Tensor, depth: usize) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        match self.adapters.get(depth) {
            None => Ok(y),
            Some((a, b)) => y + (x.matmul(a)?.matmul(b)? * self.scale)?,
        }
    }
}

/// `x / rms(x) * weight` (arXiv 1910.07467).
struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    fn load(weights: &Weights, name: &str) -> Result<Self, WeightsError> {
        Ok(Self { weight: weights.get(name)?.clone(), eps: weights.config().architecture.norm_eps })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        differentiable::rms_norm(x, &self.weight, self.eps)
    }
}

/// Rotary position embedding (arXiv 2104.09864), with dimension `i` of a head paired with
/// `i + head_dim / 2` as in Hugging Face's Llama.
struct Rotary {
    /// Cosine and sine of the angle at `[position][i]`.
    table: Arc<[(f32, f32)]>,
}

impl Rotary {
    fn new(config: &ModelConfig) -> Self {
        let half = config.head_dim / 2;
        let angle = |index: usize| {
            let (position, i) = (index / half, index % half);
            let frequency = config.architecture.rope_theta.powf(-(i as f32) / half as f32);
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            (cos, sin)
        };
        let table = (0..config.max_positions * half).map(angle).collect();
        Self { table }
    }

    /// Turns `[batch, heads, seq, head_dim]` by each token's position.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        differentiable::rotate(x, &self.table)
    }
}

/// Causal attention in which `num_heads / num_kv_heads` query heads share a key-value head
/// (arXiv 2305.13245).
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(weights: &Weights, layer: usize) -> Result<Self, WeightsError> {
        let config = weights.config();
        Ok(Self {
            q_proj: Linear::load(weights, layer, "self_attn.q_proj")?,
            k_proj: Linear::load(weights, layer, "self_attn.k_proj")?,
            v_proj: Linear::load(weights, layer, "self_attn.v_proj")?,
            o_proj: Linear::load(weights, layer, "self_attn.o_proj")?,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        })
    }

    /// `[batch * seq, hidden]` to the same.
    fn forward(&self, x: &Tensor, batch: usize, rotary: &Rotary, depth: usize) -> Result<Tensor> {
        let seq = x.dim(0)? / batch;
        let by_head = |x: Tensor, heads| {
            let x = x.reshape((batch, seq, heads, self.head_dim))?;
            x.transpose(1, 2)?.contiguous()
        };
        let q = rotary.forward(&by_head(self.q_proj.forward(x, depth)?, self.num_heads)?)?;
        let k = rotary.forward(&by_head(self.k_proj.forward(x, depth)?, self.num_kv_heads)?)?;
        let v = by_head(self.v_proj.forward(x, depth)?, self.num_kv_heads)?;

        // The query heads of a key-value head are adjacent, so their rows stack over it.
        let group_rows = self.num_heads / self.num_kv_heads * seq;
        let q = q.reshape((batch, self.num_kv_heads, group_rows, self.head_dim))?;
        let scores = q.matmul(&k.t()?)?.reshape((batch, self.num_heads, seq, seq))?;
        let weights = differentiable::causal_softmax(&scores, (self.head_dim as f32).powf(-0.5))?;
        let weights = weights.reshape((batch, self.num_kv_heads, group_rows, seq))?;
        let mixed = weights.matmul(&v)?;

        let mixed = mixed.reshape((batch, self.num_heads, seq, self.head_dim))?;
        let mixed = mixed.transpose(1, 2)?.contiguous()?;
        let rows = mixed.reshape((batch * seq, self.num_heads * self.head_dim))?;
        self.o_proj.forward(&rows, depth)
    }
}

/// `down(silu(gate(x)) * up(x))` (arXiv 2002.05202).
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(weights: &Weights, layer: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            gate_proj: Linear::load(weights, layer, "mlp.gate_proj")?,
            up_proj: Linear::load(weights, layer, "mlp.up_proj")?,
            down_proj: Linear::load(weights, layer, "mlp.down_proj")?,
        })
    }

    fn forward(&self, x: &Tensor, depth: usize) -> Result<Tensor> {
        let gate = self.gate_proj.forward(x, depth)?;
        let up = self.up_proj.forward(x, depth)?;
        let inner = differentiable::swiglu(&gate, &up)?;
        self.down_proj.forward(&inner, depth)
    }
}

/// A layer of the block: attention and MLP, each behind a norm and added to the residual stream.
struct Layer {
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(weights: &Weights, layer: usize) -> Result<Self, WeightsError> {
        let norm = |name| RmsNorm::load(weights, &format!("block.layers.{layer}.{name}.weight"));
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(weights, layer)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(weights, layer)?,
        })
    }

    fn forward(&self, x: &Tensor, batch: usize, rotary: &Rotary, depth: usize) -> Result<Tensor> {
        let normed = self.input_norm.forward(x)?;
        let x = (x + self.attention.forward(&normed, batch, rotary, depth)?)?;
        let normed = self.post_attention_norm.forward(&x)?;
        &x + self.mlp.forward(&normed, depth)?
    }
}

/// The whole model.
pub struct Reference {
    embed_tokens: Tensor,
    block: Vec<Layer>,
    norm: RmsNorm,
    /// `[hidden, vocab]`
    head: Tensor,
    rotary: Rotary,
    config: ModelConfig,
}

impl Reference {
    /// Builds the model on `weights`, whose tensors it shares: it sees later changes of candle
    /// variables among them, and gradients reach those.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn new(weights: &Weights) -> Result<Self, WeightsError> {
        let config = weights.config().clone();
        let head = match config.tie_embeddings {
            true => "embed_tokens.weight",
            false => "lm_head.weight",
        };
        let in_head = |source| WeightsError::Tensor { name: head.to_owned(), source };
        Ok(Self {
            embed_tokens: weights.get("embed_tokens.weight")?.clone(),
            block: (0..config.block_layers).map(|layer| Layer::load(weights, layer)).collect::<Result<_, _>>()?,
            norm: RmsNorm::load(weights, "norm.weight")?,
            head: weights.get(head)?.t().map_err(in_head)?,
            rotary: Rotary::new(&config),
            config,
        })
    }

    /// The residual stream after every loop, each `[batch * seq, hidden]`, of `tokens`
    /// `[batch, seq]` of type `u32`.
    ///
    /// # Errors
    /// If `tokens` is of another shape or type, longer than `max_positions`, or out of the
    /// vocabulary.
    pub fn hidden_states(&self, tokens: &Tensor) -> Result<Vec<Tensor>> {
        let (batch, seq) = tokens.dims2()?;
        let max_positions = self.config.max_positions;
        if seq > max_positions {
            candle_core::bail!("{seq} tokens in a sequence, expected at most {max_positions}");
        }
        let mut x = self.embed_tokens.index_select(&tokens.flatten_all()?, 0)?;
        let mut states = Vec::with_capacity(self.config.num_loops);
        for depth in 0..self.config.num_loops {
            for layer in &self.block {
                x = layer.forward(&x, batch, &self.rotary, depth)?;
            }
            states.push(x.clone());
        }
        Ok(states)
    }

    /// The head's scores `[rows, vocab]` of residual streams `[rows, hidden]` at any depth.
    ///
    /// # Errors
    /// If `hidden` is of another shape.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.norm.forward(hidden)?.matmul(&self.head)
    }

    /// The head's scores after every loop, each `[batch * seq, vocab]`.
    ///
    /// # Errors
    /// As for [`Reference::hidden_states`].
    pub fn forward(&self, tokens: &Tensor) -> Result<Vec<Tensor>> {
        let states = self.hidden_states(tokens)?;
        states.iter().map(|hidden| self.logits(hidden)).collect()
    }

    /// The sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;
    use crate::config::{LoraConfig, LoraRanks};
    use candle_core::{DType, Device};

    fn logits(weights: &Weights, tokens: &[[u32; 6]]) -> Vec<Vec<f32>> {
        let shape = (tokens.len(), 6);
        let tokens = Tensor::from_slice(tokens.as_flattened(), shape, &Device::Cpu).unwrap();
        let logits = Reference::new(weights).unwrap().forward(&tokens).unwrap();
        let flat = |logits: &Tensor| logits.flatten_all().unwrap().to_vec1().unwrap();
        logits.iter().map(flat).collect()
    }

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
        }
    }

    #[test]
    fn a_token_sees_only_itself_and_what_is_before_it() {
        let weights = Weights::random(tiny(), 3).unwrap();
        let before = logits(&weights, &[[1, 2, 3, 4, 5, 6]]);
        let after = logits(&weights, &[[1, 2, 3, 4, 9, 6]]);
        for (before, after) in before.iter().zip(&after) {
            let (same, changed) = (4 * 11, 4 * 11..5 * 11);
            assert_close(&before[..same], &after[..same]);
            assert!(before[changed.clone()] != after[changed]);
        }
    }

    #[test]
    fn sequences_of_a_batch_do_not_mix() {
        let weights = Weights::random(tiny(), 3).unwrap();
        let (a, b) = ([1, 2, 3, 4, 5, 6], [9, 8, 7, 1, 0, 10]);
        let both = logits(&weights, &[a, b]);
        let (first, second) = (logits(&weights, &[a]), logits(&weights, &[b]));
        for depth in 0..3 {
            assert_close(&both[depth], &[&first[depth][..], &second[depth]].concat());
        }
    }

    #[test]
    fn looping_equals_a_deeper_block_with_repeated_layers() {
        let looped = Weights::random(tiny(), 3).unwrap();
        let mut unrolled = tiny();
        (unrolled.block_layers, unrolled.num_loops) = (6, 1);
        let names = crate::weights::expected_tensors(&unrolled).into_keys();
        let copy = |name: String| {
            let mut source = name.clone();
            for layer in (2..6).rev() {
                let own = format!("layers.{layer}.");
                source = source.replace(&own, &format!("layers.{}.", layer % 2));
            }
            let tensor = looped.get(&source).unwrap().clone();
            (name, tensor)
        };
        let unrolled = Weights::from_tensors(unrolled, names.map(copy).collect(), "test").unwrap();
        let tokens = [[1, 2, 3, 4, 5, 6]];
        assert_close(&logits(&unrolled, &tokens)[0], &logits(&looped, &tokens)[2]);
    }

    #[test]
    fn a_lora_of_zero_b_changes_nothing_and_a_loops_own_b_changes_that_loop_on() {
        let mut config = tiny();
        config.lora = Some(LoraConfig { ranks: LoraRanks::all(2), scale: 2.0 });
        let adapted = Weights::random(config.clone(), 3).unwrap();
        let mut tensors: std::collections::HashMap<_, _> = adapted.tensors().clone().into_iter().collect();
        let shared = tensors.clone().into_iter().filter(|(name, _)| !name.starts_with("lora"));
        let plain = Weights::from_tensors(tiny(), shared.collect(), "test").unwrap();
        let tokens = [[1, 2, 3, 4, 5, 6]];
        let expected = logits(&plain, &tokens);
        assert_close(&logits(&adapted, &tokens)[2], &expected[2]);

        let b = Tensor::ones((8, 2), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("lora.1.layers.0.mlp.down_proj.b".to_owned(), b);
        let adapted = Weights::from_tensors(config, tensors, "test").unwrap();
        let found = logits(&adapted, &tokens);
        assert_close(&found[0], &expected[0]);
        assert!(found[1] != expected[1]);
    }

    #[test]
    fn too_long_a_sequence_is_refused() {
        let model = Reference::new(&Weights::random(tiny(), 3).unwrap()).unwrap();
        let tokens = Tensor::zeros((1, 17), DType::U32, &Device::Cpu).unwrap();
        let message = model.forward(&tokens).unwrap_err().to_string();
        assert!(message.contains("17 tokens in a sequence, expected at most 16"), "{message}");
    }
}

//! The model for serving: the same recursive transformer as [`crate::reference`], over rows of different sequences,
//! positions and depths, with keys and values in a paged cache.

use std::ops::Range;

use candle_core::{Device, Tensor};
use scheduler::blocks::BlockId;

use crate::cache::KvCache;
use crate::config::ModelConfig;
use crate::kernels::attention::{Heads, Row, attend, rotary_table};
use crate::kernels::linear::Linear;
use crate::kernels::rows::{RmsNorm, Source, gather, swiglu};
use crate::weights::{Weights, WeightsError};

/// The rows of a pass: what the block must know of each, and where in the order of rows each depth lies.
#[derive(Clone, Debug, Default)]
pub struct Rows<'a> {
    /// Position, depth and blocks of each row; sorted by depth.
    rows: Vec<Row<'a>>,
    /// The rows of each depth that occurs.
    depths: Vec<(usize, Range<usize>)>,
}

impl<'a> Rows<'a> {
    /// Appends a row of a sequence that holds `blocks`, leaving keys and values at the depths `fills`.
    ///
    /// # Panics
    /// If the row before it was deeper: rows come by depth.
    pub fn push(&mut self, position: usize, depth: usize, fills: Range<usize>, blocks: &'a [BlockId]) {
        let index = self.rows.len();
        match self.depths.last_mut() {
            Some((last, rows)) if *last == depth => rows.end = index + 1,
            last => {
                assert!(last.is_none_or(|(last, _)| *last < depth), "rows of a pass come by depth");
                self.depths.push((depth, index..index + 1));
            }
        }
        self.rows.push(Row { position, depth, fills, blocks });
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Projections of the same input side by side, plus a low-rank difference per depth if the model has them.
#[derive(Debug)]
struct Projection {
    weight: Linear,
    /// Per depth: down to the ranks of all parts side by side, and up from them, scale included.
    adapters: Vec<(Linear, Linear)>,
}

impl Projection {
    /// Loads the named projections of a layer as one, in their order.
    fn load(weights: &Weights, layer: usize, names: &[&str]) -> Result<Self, WeightsError> {
        let get = |name: &str| weights.get(&format!("block.layers.{layer}.{name}.weight"));
        let parts = names.iter().map(|name| get(name)).collect::<Result<Vec<_>, _>>()?;
        let in_layer = |source| WeightsError::Tensor { name: format!("block.layers.{layer}.{}", names[0]), source };
        let mut adapters = Vec::new();
        if let Some(lora) = &weights.config().lora {
            for depth in 0..weights.config().num_loops {
                let part = |name: &&str, side| weights.get(&format!("lora.{depth}.layers.{layer}.{name}.{side}"));
                let downs = names.iter().map(|name| part(name, "a")).collect::<Result<Vec<_>, _>>()?;
                let ups = names.iter().map(|name| part(name, "b")).collect::<Result<Vec<_>, _>>()?;
                let adapter =
                    || Ok((Linear::stacked(&downs)?, Linear::new(&(block_diagonal(&ups)? * f64::from(lora.scale))?)?));
                adapters.push(adapter().map_err(in_layer)?);
            }
        }
        Ok(Self { weight: Linear::stacked(&parts).map_err(in_layer)?, adapters })
    }

    fn forward(&self, x: &Tensor, rows: &Rows<'_>) -> candle_core::Result<Tensor> {
        let y = self.weight.forward(x)?;
        self.add_adapters(&y, x, rows)?;
        Ok(y)
    }

    /// Adds the projection of `x` to `y`.
    fn add_to(&self, y: &Tensor, x: &Tensor, rows: &Rows<'_>) -> candle_core::Result<()> {
        self.weight.add_to(y, x)?;
        self.add_adapters(y, x, rows)
    }

    fn add_adapters(&self, y: &Tensor, x: &Tensor, rows: &Rows<'_>) -> candle_core::Result<()> {
        if self.adapters.is_empty() {
            return Ok(());
        }
        for (depth, range) in &rows.depths {
            let (down, up) = &self.adapters[*depth];
            let of_depth = |tensor: &Tensor| tensor.narrow(0, range.start, range.len());
            up.add_to(&of_depth(y)?, &down.forward(&of_depth(x)?)?)?;
        }
        Ok(())
    }
}

/// Matrices along the diagonal, zero elsewhere.
fn block_diagonal(blocks: &[&Tensor]) -> candle_core::Result<Tensor> {
    let columns: usize = blocks.iter().map(|block| block.dims()[1]).sum();
    let mut before = 0;
    let mut rows = Vec::new();
    for block in blocks {
        let width = block.dims2()?.1;
        rows.push(block.pad_with_zeros(1, before, columns - before - width)?);
        before += width;
    }
    Tensor::cat(&rows, 0)
}

/// Grouped-query attention with rotary embedding.
#[derive(Debug)]
struct Attention {
    qkv_proj: Projection,
    o_proj: Projection,
    heads: Heads,
    layer: usize,
}

impl Attention {
    fn load(weights: &Weights, layer: usize) -> Result<Self, WeightsError> {
        let config = weights.config();
        Ok(Self {
            qkv_proj: Projection::load(weights, layer, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
            o_proj: Projection::load(weights, layer, &["self_attn.o_proj"])?,
            heads: Heads { heads: config.num_heads, kv_heads: config.num_kv_heads, head_dim: config.head_dim },
            layer,
        })
    }

    /// Adds the attention of `x` to `residual`.
    fn add_to(
        &self,
        residual: &Tensor,
        x: &Tensor,
        rotary: &Tensor,
        cache: &KvCache,
        rows: &Rows<'_>,
    ) -> candle_core::Result<()> {
        let qkv = self.qkv_proj.forward(x, rows)?;
        let mixed = attend(&qkv, rotary, cache, self.layer, self.heads, &rows.rows)?;
        self.o_proj.add_to(residual, &mixed, rows)
    }
}

/// `down(silu(gate(x)) * up(x))` (arXiv 2002.05202).
#[derive(Debug)]
struct Mlp {
    gate_up_proj: Projection,
    down_proj: Projection,
}

impl Mlp {
    fn load(weights: &Weights, layer: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            gate_up_proj: Projection::load(weights, layer, &["mlp.gate_proj", "mlp.up_proj"])?,
            down_proj: Projection::load(weights, layer, &["mlp.down_proj"])?,
        })
    }

    /// Adds the MLP of `x` to `residual`.
    fn add_to(&self, residual: &Tensor, x: &Tensor, rows: &Rows<'_>) -> candle_core::Result<()> {
        let inner = swiglu(&self.gate_up_proj.forward(x, rows)?)?;
        self.down_proj.add_to(residual, &inner, rows)
    }
}

/// A layer of the block: attention and MLP, each behind a norm and added to the residual stream.
#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(weights: &Weights, layer: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            input_norm: load_norm(weights, &format!("block.layers.{layer}.input_layernorm.weight"))?,
            attention: Attention::load(weights, layer)?,
            post_attention_norm: load_norm(weights, &format!("block.layers.{layer}.post_attention_layernorm.weight"))?,
            mlp: Mlp::load(weights, layer)?,
        })
    }

    /// Runs the rows of the residual stream through the layer, in place.
    fn forward(&self, hidden: &Tensor, rotary: &Tensor, cache: &KvCache, rows: &Rows<'_>) -> candle_core::Result<()> {
        self.attention.add_to(hidden, &self.input_norm.forward(hidden)?, rotary, cache, rows)?;
        self.mlp.add_to(hidden, &self.post_attention_norm.forward(hidden)?, rows)
    }
}

fn load_norm(weights: &Weights, name: &str) -> Result<RmsNorm, WeightsError> {
    Ok(RmsNorm::new(weights.get(name)?.clone(), weights.config().architecture.norm_eps))
}

/// The whole model.
#[derive(Debug)]
pub struct Model {
    /// `[vocab, hidden]`
    embed_tokens: Tensor,
    block: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    /// `[max_positions, head_dim]`
    rotary: Tensor,
    config: ModelConfig,
    fingerprint: String,
    weight_bytes: u64,
}

impl Model {
    /// Builds the model on weights, whose projections it packs.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn load(weights: &Weights) -> Result<Self, WeightsError> {
        let config = weights.config().clone();
        let head = if config.tie_embeddings { "embed_tokens.weight" } else { "lm_head.weight" };
        let in_tensor = |name: &str| {
            let name = name.to_owned();
            move |source| WeightsError::Tensor { name, source }
        };
        let table = rotary_table(config.max_positions, config.head_dim, config.architecture.rope_theta);
        let rotary = Tensor::from_vec(table, (config.max_positions, config.head_dim), &Device::Cpu);
        Ok(Self {
            embed_tokens: weights.get("embed_tokens.weight")?.clone(),
            block: (0..config.block_layers).map(|layer| Layer::load(weights, layer)).collect::<Result<_, _>>()?,
            norm: load_norm(weights, "norm.weight")?,
            lm_head: Linear::new(weights.get(head)?).map_err(in_tensor(head))?,
            rotary: rotary.map_err(in_tensor("rotary table"))?,
            fingerprint: weights.fingerprint()?,
            weight_bytes: (weights.num_parameters() * size_of::<f32>()) as u64,
            config,
        })
    }

    /// The rows `[sources, hidden]` that enter the block: embeddings of tokens (`First`) and rows in flight (`Second`).
    ///
    /// # Errors
    /// If a token is not in the vocabulary or a row does not exist.
    pub fn embed(&self, in_flight: &Tensor, sources: &[Source]) -> candle_core::Result<Tensor> {
        gather(&self.embed_tokens, in_flight, sources)
    }

    /// Runs `hidden` `[rows, hidden]` once through the shared block, in place, each row at its own depth.
    ///
    /// # Errors
    /// If a row's position is beyond `max_positions` or its blocks.
    pub fn forward_block(&self, hidden: &Tensor, rows: &Rows<'_>, cache: &KvCache) -> candle_core::Result<()> {
        self.block.iter().try_for_each(|layer| layer.forward(hidden, &self.rotary, cache, rows))
    }

    /// The exit head's scores `[rows, vocab]` of `hidden` `[rows, hidden]`, at any depth.
    ///
    /// # Errors
    /// If `hidden` is of another shape.
    pub fn logits(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        self.lm_head.forward(&self.norm.forward(hidden)?)
    }

    /// The sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Fingerprint of configuration and weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }
}

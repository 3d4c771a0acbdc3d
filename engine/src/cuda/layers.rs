//! The layers of a model on a device: their weights, and runs of rows through them.

use std::cell::Cell;

use candle_core::{Result, Tensor};

use super::device::{Device, Held, Plain, Stored, View};
use super::kernels::{AttentionInputs, Formula, Geometry, Kernels, LoraInputs, Matrix, Part, Sight, Target};
use super::pass::OnDevice;
use super::source::Scalar;
use crate::cache::{Kept, PageLayout};
use crate::config::{Activation, ModelConfig};
use crate::kernels::adapters::Adapter;
use crate::kernels::attention::Heads;
use crate::parameters::{LayerParameters, Projections, in_tensor};
use crate::weights::WeightsError;

/// Copies weights to a device.
pub(super) struct Loading<'d, D> {
    pub device: &'d D,
    pub scalar: Scalar,
    pub config: &'d ModelConfig,
    /// Bytes of all weights so far.
    pub bytes: Cell<u64>,
}

impl<D: Device> Loading<'_, D> {
    fn count<T>(&self, numbers: &View<T>, bytes_of_number: usize) {
        self.bytes.set(self.bytes.get() + (numbers.len() * bytes_of_number) as u64);
    }

    /// A tensor without rounding.
    pub fn exact(&self, tensor: &Tensor) -> Result<Held<D, f32>> {
        self.plain(&tensor.flatten_all()?.to_vec1::<f32>()?)
    }

    fn plain<T: Plain>(&self, numbers: &[T]) -> Result<Held<D, T>> {
        let held = Held::of(self.device, numbers)?;
        self.count(&held.view, size_of::<T>());
        Ok(held)
    }

    /// Concatenated tensors, rounded to the storage type.
    pub fn stored(&self, tensors: &[&Tensor]) -> Result<Held<D, Stored>> {
        let mut numbers = Vec::new();
        for tensor in tensors {
            numbers.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
        }
        let held = Held::stored(self.device, self.scalar, &numbers)?;
        self.count(&held.view, self.scalar.bytes());
        Ok(held)
    }

    /// A norm of rows, or of heads, of `width` numbers.
    pub fn norm(&self, vectors: &Tensor, width: usize) -> Result<Norm<D>> {
        let architecture = &self.config.architecture;
        let formula = Formula::new(architecture.norm, width, vectors.dim(0)?, architecture.norm_eps);
        Ok(Norm { vectors: self.exact(vectors)?, formula })
    }

    /// The low-rank differences of projections at each depth; `None` if no depth has any.
    pub fn lora(&self, adapters: &[Adapter<'_>]) -> Result<Option<Lora<D>>> {
        let Some(first) = adapters.first() else { return Ok(None) };
        let (mut parts, mut ups) = (Vec::new(), Vec::new());
        let (mut ranks, mut outputs, mut inputs, mut at) = (0, 0, 0, 0);
        for (index, &(width, matrices)) in first.parts.iter().enumerate() {
            if let Some((down, _)) = matrices {
                let (rank, of_inputs) = down.dims2()?;
                parts.push(Part {
                    first_rank: ranks as i32,
                    ranks: rank as i32,
                    first_output: outputs as i32,
                    outputs: width as i32,
                    at: at as i64,
                });
                for adapter in adapters {
                    let (_, up) = adapter.parts[index].1.expect("a projection is adapted at every depth or none");
                    ups.push((up.t()? * f64::from(adapter.scale))?);
                }
                ranks += rank;
                inputs = of_inputs;
                at += adapters.len() * rank * width;
            }
            outputs += width;
        }
        let downs: Vec<&Tensor> =
            adapters.iter().flat_map(|adapter| &adapter.parts).filter_map(|part| Some(part.1?.0)).collect();
        let memory = (self.stored(&downs)?, self.stored(&ups.iter().collect::<Vec<_>>())?, self.plain(&parts)?);
        let widest = parts.iter().map(|part| part.outputs as usize).max().unwrap_or(0);
        let (downs, ups, parts) = (memory.0.view, memory.1.view, memory.2.view);
        let sizes = LoraInputs { downs, ups, parts, widest, depths: adapters.len(), ranks, inputs, outputs };
        Ok(Some(Lora { sizes, _memory: memory }))
    }

    fn projection(&self, parameters: &Projections<'_>) -> Result<Projection<D>> {
        let (outputs, inputs) = parameters.weights.iter().try_fold((0, 0), |(outputs, _), weight| {
            Ok::<_, candle_core::Error>({
                let (more, inputs) = weight.dims2()?;
                (outputs + more, inputs)
            })
        })?;
        let weight = self.stored(&parameters.weights)?;
        let biases = parameters.biases.as_ref();
        Ok(Projection {
            matrix: Matrix { numbers: weight.view, outputs, inputs },
            _weight: weight,
            biases: biases
                .map(|biases| Ok::<_, candle_core::Error>((self.exact(biases)?, biases.dim(0)?)))
                .transpose()?,
            lora: self.lora(&parameters.adapters)?,
        })
    }

    /// A layer.
    pub fn layer(&self, parameters: LayerParameters<'_>) -> std::result::Result<Layer<D>, WeightsError> {
        let name = parameters.qkv.name.clone();
        self.try_layer(parameters).map_err(in_tensor(&name))
    }

    fn try_layer(&self, parameters: LayerParameters<'_>) -> Result<Layer<D>> {
        let &ModelConfig { hidden_size, head_dim, intermediate_size, ref architecture, .. } = self.config;
        let norm = |vectors: Option<&Tensor>, width| vectors.map(|vectors| self.norm(vectors, width)).transpose();
        let post_norm = |norm| PostNorm { norm, after_addition: architecture.norm_after_addition };
        let sight = |sight: &crate::kernels::attention::Sight| Sight {
            windowed: i32::from(sight.window.is_some()),
            rotary: sight.rotary as i32,
        };
        Ok(Layer {
            input_norm: self.norm(&parameters.input_norm, hidden_size)?,
            qkv: self.projection(&parameters.qkv)?,
            head_norm: norm(parameters.head_norm.as_ref(), head_dim)?,
            o: self.projection(&parameters.o)?,
            attention_post_norm: norm(parameters.attention_post_norm.as_ref(), hidden_size)?.map(post_norm),
            mlp_norm: self.norm(&parameters.mlp_norm, hidden_size)?,
            gate_up: self.projection(&parameters.gate_up)?,
            activation: architecture.activation,
            gated: architecture.gated_mlp,
            inner: intermediate_size,
            down: self.projection(&parameters.down)?,
            mlp_post_norm: norm(parameters.mlp_post_norm.as_ref(), hidden_size)?.map(post_norm),
            parallel: architecture.parallel_residual,
            sights: self.plain(&parameters.heads.sights.iter().map(sight).collect::<Vec<_>>())?,
            heads: parameters.heads,
        })
    }
}

/// A norm.
pub(super) struct Norm<D: Device> {
    vectors: Held<D, f32>,
    formula: Formula,
}

impl<D: Device> Norm<D> {
    /// Norms rows of the residual stream at `first_depth` and below in place.
    pub fn apply(&self, run: &Run<'_, D>, x: View<f32>, first_depth: usize) -> Result<()> {
        run.kernels.norm_in_place(x, run.rows.rows, self.vectors.view, self.formula, first_depth)
    }

    /// Norms rows of the residual stream: those in `picks`, or all.
    pub fn of_rows(&self, run: &Run<'_, D>, x: View<f32>, picks: Option<View<i32>>, out: View<Stored>) -> Result<()> {
        run.kernels.norm_rows(x, picks, run.rows.rows, self.vectors.view, self.formula, out)
    }
}

/// The norm that follows attention or MLP.
struct PostNorm<D: Device> {
    norm: Norm<D>,
    /// Whether it norms the sum with the residual, or what is added.
    after_addition: bool,
}

/// Low-rank differences by depth.
pub(super) struct Lora<D: Device> {
    sizes: LoraInputs,
    _memory: (Held<D, Stored>, Held<D, Stored>, Held<D, Part>),
}

impl<D: Device> Lora<D> {
    /// Adds the low-rank product of `x` to the residual stream, or to logits.
    pub fn add_to(&self, run: &Run<'_, D>, x: View<Stored>, y: View<f32>) -> Result<()> {
        let (rows, groups, shrunk) = (run.rows.rows.len(), run.rows.groups, run.scratch.shrunk);
        run.kernels.lora_shrink(&self.sizes, x, rows, groups, shrunk)?;
        run.kernels.lora_expand_f32(&self.sizes, shrunk, rows, groups, y)
    }

    fn add_to_stored(&self, run: &Run<'_, D>, x: View<Stored>, y: View<Stored>) -> Result<()> {
        let (rows, groups, shrunk) = (run.rows.rows.len(), run.rows.groups, run.scratch.shrunk);
        run.kernels.lora_shrink(&self.sizes, x, rows, groups, shrunk)?;
        run.kernels.lora_expand(&self.sizes, shrunk, rows, groups, y)
    }
}

/// Concatenated projections of one input.
struct Projection<D: Device> {
    matrix: Matrix,
    _weight: Held<D, Stored>,
    /// Biases and the number of their sets.
    biases: Option<(Held<D, f32>, usize)>,
    lora: Option<Lora<D>>,
}

impl<D: Device> Projection<D> {
    fn forward(&self, run: &Run<'_, D>, x: View<Stored>, y: View<Stored>) -> Result<()> {
        run.kernels.product(x, run.rows.rows.len(), self.matrix, Target::Stored(y))?;
        if let Some((biases, sets)) = &self.biases {
            run.kernels.add_bias(y, run.rows.rows, biases.view, *sets, self.matrix.outputs)?;
        }
        self.lora.as_ref().map_or(Ok(()), |lora| lora.add_to_stored(run, x, y))
    }

    /// Adds the projection of `x` to the residual stream. If there is a norm, either the projection or the sum is normed.
    fn add_to(&self, run: &Run<'_, D>, x: View<Stored>, norm: Option<&PostNorm<D>>, residual: View<f32>) -> Result<()> {
        if let Some(PostNorm { norm: Norm { vectors, formula }, after_addition: false }) = norm {
            let projected = run.scratch.projected;
            self.forward(run, x, projected)?;
            return run.kernels.add_normed(projected, run.rows.rows, vectors.view, *formula, residual);
        }
        run.kernels.product(x, run.rows.rows.len(), self.matrix, Target::AddedTo(residual))?;
        if let Some((biases, sets)) = &self.biases {
            run.kernels.add_bias_to_residual(residual, run.rows.rows, biases.view, *sets, self.matrix.outputs)?;
        }
        self.lora.as_ref().map_or(Ok(()), |lora| lora.add_to(run, x, residual))?;
        norm.map_or(Ok(()), |sum| sum.norm.apply(run, residual, 0))
    }
}

/// A layer: attention and MLP, each after a norm and added to the residual stream.
pub(super) struct Layer<D: Device> {
    input_norm: Norm<D>,
    qkv: Projection<D>,
    head_norm: Option<Norm<D>>,
    o: Projection<D>,
    attention_post_norm: Option<PostNorm<D>>,
    mlp_norm: Norm<D>,
    gate_up: Projection<D>,
    activation: Activation,
    gated: bool,
    inner: usize,
    down: Projection<D>,
    mlp_post_norm: Option<PostNorm<D>>,
    parallel: bool,
    heads: Heads,
    sights: Held<D, Sight>,
}

/// State of a run of rows through layers.
pub(super) struct Run<'a, D: Device> {
    pub kernels: Kernels<'a, D>,
    pub rows: OnDevice,
    pub scratch: Scratch,
    /// [`rotary::tables`](crate::kernels::rotary::tables): number of positions, number of rotated dimensions, values.
    pub rotary: (usize, usize, View<f32>),
    pub pages: View<Stored>,
    pub layout: PageLayout,
}

/// Memory for intermediate results of a layer. By row:
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// input of attention,
    pub normed: View<Stored>,
    /// input of the MLP,
    pub mlp_normed: View<Stored>,
    /// queries, keys and values,
    pub qkv: View<Stored>,
    /// output of attention,
    pub mixed: View<Stored>,
    /// gates and ups,
    pub gate_up: View<Stored>,
    /// activations of gates and ups,
    pub inner: View<Stored>,
    /// outputs that are normed before they are added,
    pub projected: View<Stored>,
    /// ranks of LoRA.
    pub shrunk: View<f32>,
    /// By split of attention.
    pub partial: View<f32>,
}

impl<D: Device> Layer<D> {
    /// Runs rows of the residual stream through the layer, in place.
    pub fn forward(&self, run: &Run<'_, D>, residual: View<f32>) -> Result<()> {
        let Scratch { mlp_normed, mixed, gate_up, inner, partial, .. } = run.scratch;
        if self.parallel {
            self.mlp_norm.of_rows(run, residual, None, mlp_normed)?;
        }
        let attention = self.keep(run, residual)?;
        run.kernels.attend(&attention, &run.rows, partial, mixed)?;
        self.o.add_to(run, mixed, self.attention_post_norm.as_ref(), residual)?;
        if !self.parallel {
            self.mlp_norm.of_rows(run, residual, None, mlp_normed)?;
        }
        self.gate_up.forward(run, mlp_normed, gate_up)?;
        run.kernels.activate(gate_up, run.rows.rows.len(), self.inner, self.gated, self.activation, inner)?;
        self.down.add_to(run, inner, self.mlp_post_norm.as_ref(), residual)
    }

    /// Stores the keys and values as [`forward`](Self::forward), and nothing more. Returns the inputs of attention.
    pub fn keep(&self, run: &Run<'_, D>, residual: View<f32>) -> Result<AttentionInputs> {
        let Scratch { normed, qkv, .. } = run.scratch;
        self.input_norm.of_rows(run, residual, None, normed)?;
        self.qkv.forward(run, normed, qkv)?;
        let Heads { heads, kv_heads, .. } = self.heads;
        if let Some(Norm { vectors, formula }) = &self.head_norm {
            run.kernels.norm_heads(qkv, run.rows.rows, vectors.view, *formula, heads, kv_heads)?;
        }
        let attention = AttentionInputs {
            qkv,
            rotary: run.rotary.2,
            pages: run.pages,
            sights: self.sights.view,
            geometry: self.geometry(run.rotary, &run.layout),
        };
        run.kernels.store_kv(&attention, &run.rows)?;
        Ok(attention)
    }

    /// Geometry of the layer's attention over a cache.
    pub fn geometry(&self, (positions, rotary_dims, _): (usize, usize, View<f32>), layout: &PageLayout) -> Geometry {
        let &PageLayout { prelude_layers, depth_layers, blocks, depths, .. } = layout;
        let (first_layer, layer_stride) = match self.heads.kept {
            Kept::Once(layer) => (layer, 0),
            Kept::AtEachDepth(layer) => (prelude_layers + layer, depth_layers),
        };
        Geometry {
            heads: self.heads.heads as i32,
            kv_heads: self.heads.kv_heads as i32,
            blocks: blocks as i32,
            first_layer: first_layer as i32,
            layer_stride: layer_stride as i32,
            depths: depths as i32,
            once: i32::from(matches!(self.heads.kept, Kept::Once(_))),
            sights: self.sights.view.len() as i32,
            positions: positions as i32,
            rotary_dims: rotary_dims as i32,
            scale: self.heads.scale,
        }
    }
}

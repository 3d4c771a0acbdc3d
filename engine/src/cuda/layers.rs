//! The layers of a model on a device: their weights, and runs of rows through them.

use std::cell::Cell;

use candle_core::{DType, Device as CandleDevice, Result, Tensor};

use super::device::{Device, Held, Plain, Stored, View};
use super::floors::Sizes;
use super::kernels::{
    AttentionInputs, Biases, Formula, Geometry, Kernels, LoraInputs, Matrix, Part, Sight, Slice, Target,
};
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

    /// The low-rank differences of projections at each depth, added to a product that begins with `base` outputs; `None`
    /// if no depth has any.
    fn lora(&self, adapters: &[Adapter<'_>], base: usize) -> Result<Option<Lora<D>>> {
        let Some(first) = adapters.first() else { return Ok(None) };
        let rank_of = |matrices: &Option<(&Tensor, &Tensor)>| matrices.map_or(Ok(0), |(down, _)| down.dim(0));
        let part = |(outputs, matrices): &(usize, _)| Ok(Part { rank: rank_of(matrices)?, outputs: *outputs });
        let parts = first.parts.iter().map(part).collect::<Result<Vec<_>>>()?;
        let (depths, ranks) = (adapters.len(), parts.iter().map(|part| part.rank).sum());
        if ranks == 0 {
            return Ok(None);
        }
        let mut ups = Vec::new();
        for (index, part) in parts.iter().enumerate().filter(|(_, part)| part.rank > 0) {
            for adapter in adapters {
                let (_, up) = adapter.parts[index].1.expect("a projection is adapted at every depth or none");
                let up = (up * f64::from(adapter.scale))?;
                ups.push(up.pad_with_zeros(1, 0, part.padded_rank(self.scalar) - part.rank)?);
            }
        }
        let (slices, numbers) = Part::slices(&parts, depths, self.scalar);
        let memory = (self.stored(&ups.iter().collect::<Vec<_>>())?, self.plain(&slices)?);
        assert_eq!(memory.0.view.len(), numbers, "the slices cover the ups");
        let sizes = LoraInputs {
            ups: memory.0.view,
            slices: memory.1.view,
            depths,
            ranks,
            outputs: parts.iter().map(|part| part.outputs).sum(),
            stride: LoraInputs::stride(base, depths, ranks, self.scalar),
        };
        Ok(Some(Lora { sizes, _memory: memory }))
    }

    /// Weights and, below them, the downs of adapters of all depths: a matrix of `stride` outputs, zeros beyond the last.
    fn with_downs(
        &self,
        weights: &[&Tensor],
        adapters: &[Adapter<'_>],
        stride: usize,
    ) -> Result<(Held<D, Stored>, Matrix)> {
        let downs = adapters.iter().flat_map(|adapter| &adapter.parts).filter_map(|part| Some(part.1?.0));
        let mut tensors: Vec<&Tensor> = weights.iter().copied().chain(downs).collect();
        let inputs = tensors[0].dim(1)?;
        let outputs =
            tensors.iter().try_fold(0, |outputs, tensor| Ok::<_, candle_core::Error>(outputs + tensor.dim(0)?))?;
        let zeros = Tensor::zeros((stride - outputs, inputs), DType::F32, &CandleDevice::Cpu)?;
        tensors.push(&zeros);
        let held = self.stored(&tensors)?;
        let matrix = Matrix { numbers: held.view, outputs: stride, inputs };
        Ok((held, matrix))
    }

    /// The low-rank differences of the head at each depth; `None` if no depth has any.
    pub fn head_lora(&self, adapters: &[Adapter<'_>]) -> Result<Option<HeadLora<D>>> {
        let Some(lora) = self.lora(adapters, 0)? else { return Ok(None) };
        let (_downs, downs) = self.with_downs(&[], adapters, lora.sizes.stride)?;
        Ok(Some(HeadLora { downs, _downs, lora }))
    }

    fn projection(&self, parameters: &Projections<'_>) -> Result<Projection<D>> {
        let outputs = parameters.weights.iter().map(|weight| weight.dim(0)).sum::<Result<usize>>()?;
        let lora = self.lora(&parameters.adapters, outputs)?;
        let stride = lora.as_ref().map_or(outputs, |lora| lora.sizes.stride);
        let (_weight, matrix) = self.with_downs(&parameters.weights, &parameters.adapters, stride)?;
        let biases = parameters.biases.as_ref();
        Ok(Projection {
            matrix,
            _weight,
            outputs,
            biases: biases
                .map(|biases| Ok::<_, candle_core::Error>((self.exact(biases)?, biases.dim(0)?)))
                .transpose()?,
            lora,
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

/// Low-rank differences by depth, without the downs.
struct Lora<D: Device> {
    sizes: LoraInputs,
    _memory: (Held<D, Stored>, Held<D, Slice>),
}

/// Low-rank differences of the head by depth. The logits are swept in place, so the ranks are a product of their own.
pub(super) struct HeadLora<D: Device> {
    downs: Matrix,
    _downs: Held<D, Stored>,
    lora: Lora<D>,
}

impl<D: Device> HeadLora<D> {
    /// Adds the low-rank product of `x` to logits.
    pub fn add_to(&self, run: &Run<'_, D>, x: View<Stored>, logits: View<f32>) -> Result<()> {
        let (rows, shrunk) = (run.rows.rows.len(), run.scratch.wide_f32());
        run.kernels.product(x, rows, self.downs, Target::F32(shrunk))?;
        run.kernels.lora_add(&self.lora.sizes, shrunk, false, (rows, run.rows.groups), None, logits)
    }
}

/// Concatenated projections of one input.
struct Projection<D: Device> {
    /// The weight and, below it, the downs of adapters.
    matrix: Matrix,
    _weight: Held<D, Stored>,
    outputs: usize,
    /// Biases and the number of their sets.
    biases: Option<(Held<D, f32>, usize)>,
    lora: Option<Lora<D>>,
}

impl<D: Device> Projection<D> {
    fn biases(&self) -> Option<Biases> {
        self.biases.as_ref().map(|(held, sets)| Biases { numbers: held.view, sets: *sets })
    }

    fn forward(&self, run: &Run<'_, D>, x: View<Stored>, y: View<Stored>) -> Result<()> {
        let rows = run.rows.rows.len();
        if let Some(lora) = &self.lora {
            let wide = run.scratch.wide_stored(run.kernels.specialization.scalar);
            run.kernels.product(x, rows, self.matrix, Target::Stored(wide))?;
            return run.kernels.lora_expand(&lora.sizes, wide, (rows, run.rows.groups), self.biases(), y);
        }
        run.kernels.product(x, rows, self.matrix, Target::Stored(y))?;
        match self.biases() {
            Some(Biases { numbers, sets }) => run.kernels.add_bias(y, run.rows.rows, numbers, sets, self.outputs),
            None => Ok(()),
        }
    }

    /// Adds the projection of `x` to the residual stream. If there is a norm, either the projection or the sum is normed.
    fn add_to(&self, run: &Run<'_, D>, x: View<Stored>, norm: Option<&PostNorm<D>>, residual: View<f32>) -> Result<()> {
        if let Some(PostNorm { norm: Norm { vectors, formula }, after_addition: false }) = norm {
            let projected = run.scratch.projected;
            self.forward(run, x, projected)?;
            return run.kernels.add_normed(projected, run.rows.rows, vectors.view, *formula, residual);
        }
        self.add_product(run, x, residual)?;
        norm.map_or(Ok(()), |sum| sum.norm.apply(run, residual, 0))
    }

    fn add_product(&self, run: &Run<'_, D>, x: View<Stored>, residual: View<f32>) -> Result<()> {
        let rows = run.rows.rows.len();
        if let Some(lora) = &self.lora {
            let wide = run.scratch.wide_f32();
            run.kernels.product(x, rows, self.matrix, Target::F32(wide))?;
            return run.kernels.lora_add(&lora.sizes, wide, true, (rows, run.rows.groups), self.biases(), residual);
        }
        run.kernels.product(x, rows, self.matrix, Target::AddedTo(residual))?;
        match self.biases() {
            Some(Biases { numbers, sets }) => {
                run.kernels.add_bias_to_residual(residual, run.rows.rows, numbers, sets, self.outputs)
            }
            None => Ok(()),
        }
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
    /// products with a weight and the downs of its adapters, in the storage type or in `f32`, in bytes.
    pub wide: View<u8>,
    /// By split of attention.
    pub partial: View<f32>,
}

impl Scratch {
    fn wide_stored(&self, scalar: Scalar) -> View<Stored> {
        View::new(self.wide.address(), self.wide.len() / scalar.bytes())
    }

    fn wide_f32(&self) -> View<f32> {
        View::new(self.wide.address(), self.wide.len() / size_of::<f32>())
    }
}

/// Bytes per row of the widest product with a weight and the downs of its adapters.
pub(super) fn wide_bytes(config: &ModelConfig, scalar: Scalar) -> usize {
    use super::floors::Projections::{Down, Head, Output, Qkv, Up};
    let (sizes, depths) = (Sizes { config, scalar }, config.num_loops);
    let bytes = |of| {
        let (ranks, outputs) = (sizes.ranks(of), if of == Head { 0 } else { sizes.outputs(of) });
        let bytes_of_number = if matches!(of, Qkv | Up) { scalar.bytes() } else { size_of::<f32>() };
        if ranks == 0 { 0 } else { LoraInputs::stride(outputs, depths, ranks, scalar) * bytes_of_number }
    };
    [Qkv, Output, Up, Down, Head].map(bytes).into_iter().max().unwrap_or(0)
}

impl<D: Device> Layer<D> {
    /// Runs rows of the residual stream through the layer, in place.
    pub fn forward(&self, run: &Run<'_, D>, residual: View<f32>) -> Result<()> {
        let Scratch { mlp_normed, mixed, inner, partial, .. } = run.scratch;
        if self.parallel {
            self.mlp_norm.of_rows(run, residual, None, mlp_normed)?;
        }
        let attention = self.keep(run, residual)?;
        run.kernels.attend(&attention, &run.rows, partial, mixed)?;
        self.o.add_to(run, mixed, self.attention_post_norm.as_ref(), residual)?;
        if !self.parallel {
            self.mlp_norm.of_rows(run, residual, None, mlp_normed)?;
        }
        self.activate(run)?;
        self.down.add_to(run, inner, self.mlp_post_norm.as_ref(), residual)
    }

    /// The activations of the MLP.
    fn activate(&self, run: &Run<'_, D>) -> Result<()> {
        let Scratch { mlp_normed, gate_up, inner, .. } = run.scratch;
        let rows = run.rows.rows.len();
        if let (Some(lora), true) = (&self.gate_up.lora, self.gated) {
            let wide = run.scratch.wide_stored(run.kernels.specialization.scalar);
            run.kernels.product(mlp_normed, rows, self.gate_up.matrix, Target::Stored(wide))?;
            let (groups, biases) = ((rows, run.rows.groups), self.gate_up.biases());
            return run.kernels.lora_activate(&lora.sizes, wide, groups, biases, self.activation, inner);
        }
        self.gate_up.forward(run, mlp_normed, gate_up)?;
        run.kernels.activate(gate_up, rows, self.inner, self.gated, self.activation, inner)
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
        run.kernels.rotate_and_store(&attention, &run.rows)?;
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

//! A model on a device: its weights, uploaded once, and other state that executors share.

use std::cell::Cell;
use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex, PoisonError};

use scheduler::KvFill;

use super::backend::{CudaBackend, FEWEST_AHEAD, Memory};
use super::device::{Device, Held, Stored, View};
use super::kernels::Matrix;
use super::layers::{HeadLora, Layer, Loading, Norm};
use super::source::{Scalar, Specialization};
use crate::backend::{Backend, ServedModel};
use crate::cache::{PageLayout, TILE};
use crate::config::ModelConfig;
use crate::executor::EngineError;
use crate::kernels;
use crate::parameters::{InjectionParameters, Loops, ModelParameters, head_name, in_tensor};
use crate::weights::{ADAPTER, Weights, WeightsError};

/// A model on a device. Weights have one storage type; norms, biases, gates and rotary tables are `f32`.
pub struct CudaModel<D: Device> {
    pub(super) device: Arc<D>,
    pub(super) scalar: Scalar,
    pub(super) config: ModelConfig,
    pub(super) embedding: Held<D, Stored>,
    pub(super) prelude: Vec<Layer<D>>,
    pub(super) loops: Loops<Layer<D>>,
    pub(super) coda: Vec<Layer<D>>,
    pub(super) norm: Norm<D>,
    pub(super) adapter: Option<Adapter<D>>,
    pub(super) head: Matrix,
    /// The head's numbers, unless the embedding is shared.
    _head: Option<Held<D, Stored>>,
    pub(super) head_lora: Option<HeadLora<D>>,
    /// `[num_loops - 1, hidden + 1]`
    pub(super) gates: Option<Held<D, f32>>,
    rotary: Held<D, f32>,
    rotary_dims: usize,
    fingerprint: String,
    weight_bytes: u64,
    /// Memory of the last backend.
    left: Mutex<Option<Memory<D>>>,
}

/// Input injection.
pub(super) struct Adapter<D: Device> {
    pub matrix: Matrix,
    _weight: Held<D, Stored>,
    /// `[states, hidden]`
    pub initial_states: Held<D, f32>,
}

impl<D: Device> Adapter<D> {
    fn new(loading: &Loading<'_, D>, parameters: &InjectionParameters<'_>) -> candle_core::Result<Self> {
        let (outputs, inputs) = parameters.adapter.dims2()?;
        let weight = loading.stored(&[parameters.adapter])?;
        let initial_states = loading.exact(&parameters.initial_states)?;
        Ok(Self { matrix: Matrix { numbers: weight.view, outputs, inputs }, _weight: weight, initial_states })
    }
}

impl<D: Device> Debug for CudaModel<D> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let device = self.device.name();
        f.debug_struct("CudaModel").field("device", &device).field("config", &self.config).finish_non_exhaustive()
    }
}

impl<D: Device> CudaModel<D> {
    /// Uploads weights.
    ///
    /// # Errors
    /// If the kernels do not support the heads' sizes or the gates, the device has too little memory, or it fails.
    pub fn load(device: Arc<D>, weights: &Weights, scalar: Scalar) -> Result<Self, WeightsError> {
        let config = weights.config();
        if config.gate_hidden > 0 {
            let (found, expected) =
                (config.gate_hidden.to_string(), "0 on a GPU, which runs linear gates only".to_owned());
            return Err(crate::config::InvalidField { field: "gate_hidden", found, expected }.into());
        }
        specialization(config, scalar, TILE).map_err(in_tensor("self_attn.q_proj.weight"))?;
        let parameters = ModelParameters::new(weights)?;
        let loading = Loading { device: &*device, scalar, config, bytes: Cell::new(0) };
        let layer = |of_layer| loading.layer(of_layer);
        let embedding = loading.stored(&[parameters.embedding]).map_err(in_tensor("embed_tokens.weight"))?;
        let own_head = || loading.stored(&[parameters.head]).map_err(in_tensor(head_name(config)));
        let head = if config.tie_embeddings { None } else { Some(own_head()?) };
        let head_adapter =
            |&(down, up)| kernels::adapters::Adapter { parts: vec![(config.vocab_size, Some((down, up)))], scale: 1.0 };
        let head_adapters: Vec<_> = parameters.head_adapters.iter().map(head_adapter).collect();
        let adapter = parameters.injection.as_ref().map(|injection| Adapter::new(&loading, injection)).transpose();
        let gates = parameters.gates.as_ref().map(|gates| loading.exact(&gates.score)).transpose();
        Ok(Self {
            prelude: parameters.prelude.into_iter().map(layer).collect::<Result<_, _>>()?,
            loops: parameters.loops.try_map(layer)?,
            coda: parameters.coda.into_iter().map(layer).collect::<Result<_, _>>()?,
            norm: loading.norm(&parameters.norm, config.hidden_size).map_err(in_tensor("norm"))?,
            adapter: adapter.map_err(in_tensor(ADAPTER))?,
            head: Matrix {
                numbers: head.as_ref().map_or(embedding.view, |head| head.view),
                outputs: config.vocab_size,
                inputs: config.hidden_size,
            },
            _head: head,
            head_lora: loading.head_lora(&head_adapters).map_err(in_tensor("head_lora"))?,
            gates: gates.map_err(in_tensor("gate"))?,
            weight_bytes: loading.bytes.get(),
            rotary: loading.exact(&parameters.rotary).map_err(in_tensor("rotary tables"))?,
            rotary_dims: config.architecture.rotary_dims(config.head_dim),
            fingerprint: fingerprint(weights, scalar)?,
            scalar,
            embedding,
            config: config.clone(),
            device,
            left: Mutex::new(None),
        })
    }

    /// The kernels for blocks of `block_tokens` positions.
    pub(super) fn specialization(&self, block_tokens: usize) -> candle_core::Result<Specialization> {
        specialization(&self.config, self.scalar, block_tokens)
    }

    /// Takes the memory of the previous backend, if there is any.
    pub(super) fn take_left(&self) -> Option<Memory<D>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Keeps the memory of a backend for the next.
    pub(super) fn exit(&self, memory: Memory<D>) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
    }

    /// Rotary tables: number of positions, number of rotated dimensions, values.
    pub(super) fn rotary(&self) -> (usize, usize, View<f32>) {
        (self.config.max_positions, self.rotary_dims, self.rotary.view)
    }
}

fn specialization(config: &ModelConfig, scalar: Scalar, block_tokens: usize) -> candle_core::Result<Specialization> {
    Specialization::new(scalar, config.head_dim, config.num_heads / config.num_kv_heads, block_tokens)
}

/// Fingerprint of the weights and their rounding. All matrices are rounded, whereas the CPU rounds only projections and
/// head.
fn fingerprint(weights: &Weights, scalar: Scalar) -> Result<String, WeightsError> {
    let exact = weights.fingerprint()?;
    Ok(match scalar {
        Scalar::F32 => exact,
        Scalar::F16 | Scalar::Bf16 => format!("{exact}-cuda-{}", scalar.name()),
    })
}

impl<D: Device + 'static> ServedModel for CudaModel<D> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn storage(&self) -> String {
        self.scalar.name().to_owned()
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn kv_bytes_per_token(&self, kv_fill: KvFill) -> u64 {
        let PageLayout { prelude_layers, depths, depth_layers, kv_heads, head_dim, .. } =
            PageLayout::new(&self.config, kv_fill, 1, TILE as u32);
        ((prelude_layers + depths * depth_layers) * 2 * kv_heads * head_dim * self.scalar.bytes()) as u64
    }

    fn heads_ahead_from(&self) -> Option<usize> {
        Some(FEWEST_AHEAD)
    }

    fn device_name(&self) -> String {
        self.device.name()
    }

    fn device_state(&self) -> String {
        self.device.state()
    }

    fn backend(
        self: Arc<Self>,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> Result<Box<dyn Backend>, EngineError> {
        Ok(Box::new(CudaBackend::new(self, kv_fill, num_blocks, block_tokens)?))
    }
}

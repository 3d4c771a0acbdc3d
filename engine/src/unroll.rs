//! Unrolling: the ordinary transformer that computes what a recursive one computes at full depth.

use std::collections::HashMap;

use candle_core::Tensor;
use scheduler::KvFill;

use crate::config::{InvalidField, ModelConfig, Place, Projection, Sharing};
use crate::weights::{Weights, WeightsError};

impl ModelConfig {
    /// Whether the model is an ordinary transformer: its loops share nothing, and nothing serves only early exits.
    pub fn is_ordinary(&self) -> bool {
        let shares = self.num_loops > 1 && (self.sharing != Sharing::Nothing || self.shares_kv());
        !shares && self.unlike_ordinary().is_none() && self.lora.is_none() && self.head_lora_rank == 0 && !self.gate
    }

    /// What happens between the layers that does not in an ordinary transformer.
    pub(crate) fn unlike_ordinary(&self) -> Option<&'static str> {
        let norms = self.norm_between_loops && self.num_loops > 1;
        let parts = [
            (norms, "norm_between_loops"),
            (self.norm_before_coda, "norm_before_coda"),
            (self.injection.is_some(), "injection"),
        ];
        parts.into_iter().find_map(|(there, name)| there.then_some(name))
    }

    /// The ordinary transformer with the layers that a token runs at full depth.
    pub(crate) fn unrolled(&self) -> Self {
        Self {
            block_layers: self.num_layers(),
            num_loops: 1,
            sharing: Sharing::Nothing,
            prelude_layers: 0,
            coda_layers: 0,
            norm_between_loops: false,
            lora: None,
            head_lora_rank: 0,
            gate: false,
            shared_gate: false,
            gate_hidden: 0,
            kv_fill: KvFill::default(),
            ..self.clone()
        }
    }
}

impl Weights {
    /// The ordinary transformer with the last loop's logits: the layers of every loop, with low-rank differences added
    /// to the matrices (`W + scale B A`). Heads' differences and gates, which serve only earlier exits, are left out.
    ///
    /// # Errors
    /// If the loops share keys and values, or more than layers lies between embedding and head, as in no ordinary
    /// transformer; or a tensor operation fails.
    pub fn unrolled(&self) -> Result<Self, WeightsError> {
        if let Some(field) = self.config().unlike_ordinary() {
            let expected = "none: no ordinary transformer has it".to_owned();
            return Err(InvalidField { field, found: "given".to_owned(), expected }.into());
        }
        if self.config().shares_kv() && self.config().num_loops > 1 {
            let expected =
                "another: no ordinary transformer attends to keys and values of depth 0 in every loop".into();
            return Err(InvalidField { field: "kv_fill", found: self.config().kv_fill.to_string(), expected }.into());
        }
        self.written_out(self.config().unrolled())
    }

    /// The weights with their layers spread over the blocks of `config`, which share nothing.
    pub(crate) fn written_out(&self, config: ModelConfig) -> Result<Self, WeightsError> {
        let mut tensors = HashMap::new();
        for name in ["embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"] {
            if let Some(tensor) = self.tensors().get(name) {
                tensors.insert(name.to_owned(), tensor.clone());
            }
        }
        for (place, unrolled) in self.config().places().zip(config.places()) {
            let prefix = config.matrices_prefix(unrolled);
            for projection in config.projections() {
                let name = format!("{prefix}.{}.weight", projection.name);
                let merged = self.merged(place, &projection);
                tensors.insert(name.clone(), merged.map_err(|source| WeightsError::Tensor { name, source })?);
            }
            let vectors = format!("{}.", self.config().vectors_prefix(place));
            for (name, tensor) in self.tensors() {
                if let Some(part) = name.strip_prefix(&vectors).filter(|_| tensor.rank() == 1) {
                    tensors.insert(format!("{prefix}.{part}"), tensor.clone());
                }
            }
        }
        Self::from_tensors(config, tensors, "unrolled weights")
    }

    /// A layer's matrix with its low-rank difference.
    fn merged(&self, place: Place, projection: &Projection) -> candle_core::Result<Tensor> {
        let config = self.config();
        let weight = &self.tensors()[&format!("{}.{}.weight", config.matrices_prefix(place), projection.name)];
        match (place, &config.lora) {
            (Place::Block { depth, layer }, Some(lora)) if lora.ranks.of(projection.kind) > 0 => {
                let prefix = ModelConfig::lora_prefix(depth, layer, projection);
                let (a, b) = (&self.tensors()[&format!("{prefix}.a")], &self.tensors()[&format!("{prefix}.b")]);
                weight + (b.matmul(a)? * f64::from(lora.scale))?
            }
            _ => Ok(weight.clone()),
        }
    }
}

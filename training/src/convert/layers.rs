//! The layers of a transformer by number, and the tensors of a layer.

use std::collections::HashMap;

use candle_core::Tensor;
use engine::config::{ModelConfig, Norm, Place, Projection};
use engine::weights::{Weights, WeightsError};

/// The layers of an ordinary transformer, numbered from the embedding to the head.
pub struct SourceLayers<'a> {
    weights: &'a Weights,
    places: Vec<Place>,
}

impl<'a> SourceLayers<'a> {
    pub fn new(weights: &'a Weights) -> Self {
        Self { weights, places: weights.config().places().collect() }
    }

    /// A projection's matrix `[outputs, inputs]`.
    pub fn matrix(&self, layer: usize, projection: &Projection) -> Result<&'a Tensor, WeightsError> {
        let prefix = self.weights.config().matrices_prefix(self.places[layer]);
        self.weights.get(&format!("{prefix}.{}.weight", projection.name))
    }

    /// A norm's weight or bias or a projection's bias, by one of [`vector_names`].
    pub fn vector(&self, layer: usize, name: &str) -> Result<&'a Tensor, WeightsError> {
        let prefix = self.weights.config().vectors_prefix(self.places[layer]);
        self.weights.get(&format!("{prefix}.{name}"))
    }

    /// Tensors outside the layers: embedding, last norm and head.
    pub fn outside(&self) -> HashMap<String, Tensor> {
        let in_a_layer = |name: &str| name.contains(".layers.");
        let tensors = self.weights.tensors().iter().filter(|(name, _)| !in_a_layer(name));
        tensors.map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
    }
}

/// Names within a layer of its norms' weights, which end in `.weight`, and of all biases, which end in `.bias`.
pub fn vector_names(config: &ModelConfig) -> Vec<String> {
    let mut names = Vec::new();
    for (norm, _) in config.norms() {
        names.push(format!("{norm}.weight"));
        if config.architecture.norm == Norm::Layer {
            names.push(format!("{norm}.bias"));
        }
    }
    let biased = config.projections().into_iter().filter(|projection| projection.bias);
    names.extend(biased.map(|projection| format!("{}.bias", projection.name)));
    names
}

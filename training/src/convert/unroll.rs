//! A recursive model written out as an ordinary transformer, for tools that know no loops.

use std::collections::HashMap;

use candle_core::Tensor;
use engine::config::{ModelConfig, Place, Projection, Sharing};
use engine::weights::Weights;

use super::ConversionError;
use super::layers::vector_names;

/// The transformer that computes what the last loop of `model` does: a layer for each that a token meets on its way,
/// with adapters merged into matrices, `W' + scale B A`. Exit heads and gates of earlier loops are left out.
///
/// # Errors
/// If a tensor operation fails.
pub fn unroll(model: &Weights) -> Result<Weights, ConversionError> {
    let recursive = model.config();
    let config = ModelConfig {
        block_layers: recursive.num_layers(),
        num_loops: 1,
        prelude_layers: 0,
        coda_layers: 0,
        sharing: Sharing::Nothing,
        lora: None,
        head_lora_rank: 0,
        gate: false,
        ..recursive.clone()
    };
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for name in ["embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"] {
        tensors.extend(model.tensors().get(name).map(|tensor| (name.to_owned(), tensor.clone())));
    }
    for (from, to) in recursive.places().zip(config.places()) {
        let prefix = config.matrices_prefix(to);
        for projection in config.projections() {
            let name = format!("{prefix}.{}.weight", projection.name);
            tensors.insert(name, merged(model, from, &projection)?);
        }
        for vector in vector_names(&config) {
            let tensor = model.get(&format!("{}.{vector}", recursive.vectors_prefix(from)))?;
            tensors.insert(format!("{prefix}.{vector}"), tensor.clone());
        }
    }
    Ok(Weights::from_tensors(config, tensors, "unrolled model")?)
}

/// A projection's matrix at a place, its adapter included.
fn merged(model: &Weights, place: Place, projection: &Projection) -> Result<Tensor, ConversionError> {
    let config = model.config();
    let matrix = model.get(&format!("{}.{}.weight", config.matrices_prefix(place), projection.name))?;
    let lora = config.lora.as_ref().filter(|lora| lora.ranks.of(projection.kind) > 0);
    let (Some(lora), Place::Block { depth, layer }) = (lora, place) else { return Ok(matrix.clone()) };
    let prefix = ModelConfig::lora_prefix(depth, layer, projection);
    let (a, b) = (model.get(&format!("{prefix}.a"))?, model.get(&format!("{prefix}.b"))?);
    Ok((matrix + (b.matmul(a)? * f64::from(lora.scale))?)?)
}

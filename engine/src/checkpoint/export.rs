//! Checkpoints written for other programs: a Hugging Face folder of the family whose layers do what the model's do.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Map, Value};

use super::family::Family;
use super::keys::Keys;
use super::{CheckpointError, Result};
use crate::config::ModelConfig;
use crate::tokenizer::Tokenizer;
use crate::weights::{
    CONFIG_FILE, Stored, TENSORS_FILE, TOKENIZER_FILE, Weights, WeightsError, write_safetensors, write_then_rename,
};

/// Writes a model as a Hugging Face folder that other programs can load: `config.json`, `model.safetensors` and, if
/// there is a tokenizer, `tokenizer.json`. A recursive model is written unrolled, as by [`Weights::unrolled`]; one that is
/// no ordinary transformer even so, as the looped family that it is. Nothing is written if any part of it cannot be.
///
/// # Errors
/// If no family of [`super`] computes what the model's layers do, or a file cannot be written.
pub fn write_hugging_face(
    weights: &Weights,
    tokenizer: Option<&Tokenizer>,
    folder: &Path,
    stored: Stored,
) -> Result<()> {
    let looped = weights.config().unlike_ordinary().and_then(|_| family_of(weights.config()).ok());
    let unrolled;
    let (weights, (family, json)) = match looped {
        Some(family) => (weights, family),
        None => {
            unrolled = weights.unrolled()?;
            (&unrolled, family_of(unrolled.config())?)
        }
    };
    let tensors = in_family(weights, family, stored)?;
    let fail = |path: &Path, error: String| CheckpointError::Write { path: path.to_owned(), message: error };
    std::fs::create_dir_all(folder).map_err(|error| fail(folder, error.to_string()))?;
    let write = |name: &str, write: &dyn Fn(&Path) -> std::io::Result<()>| {
        let path = folder.join(name);
        write_then_rename(&path, write).map_err(|error| fail(&path, error.to_string()))
    };
    // Some readers refuse files that do not say whose tensors they hold.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write(TENSORS_FILE, &|part| write_safetensors(part, &tensors, Some(format.clone())))?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(&folder.join(TOKENIZER_FILE))?;
    }
    write(CONFIG_FILE, &|part| std::fs::write(part, format!("{:#}", Value::Object(json.clone()))))
}

/// The tensors of a model as a family stores them.
fn in_family(weights: &Weights, family: Family, stored: Stored) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for entry in family.naming().entries(weights.config()) {
        let ours: Vec<&Tensor> = entry.ours.iter().map(|name| &weights.tensors()[name]).collect();
        let joined = entry.join(&ours).and_then(|tensor| tensor.to_dtype(stored.dtype())?.contiguous());
        let name = entry.theirs;
        let tensor = joined.map_err(|source| WeightsError::Tensor { name: name.clone(), source })?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The family that computes what the model's layers do, and its `config.json`: the one whose reader understands what
/// its writer says of the model.
fn family_of(config: &ModelConfig) -> Result<(Family, Map<String, Value>)> {
    let understood = |family: Family| {
        let json = family.to_json(config);
        let read = family.config(&Keys::new(Path::new(CONFIG_FILE), json.clone())).ok()?;
        (explicit(read) == explicit(config.clone())).then_some((family, json))
    };
    let layers = || serde_json::to_string(&config.architecture).unwrap_or_default();
    Family::ALL.into_iter().find_map(understood).ok_or_else(|| CheckpointError::NoFamily(layers()))
}

/// The configuration with what it leaves to defaults spelled out.
fn explicit(mut config: ModelConfig) -> ModelConfig {
    let head_dim = config.head_dim;
    config.architecture.rotary_dims = Some(config.architecture.rotary_dims(head_dim));
    config.architecture.attention_scale = Some(config.architecture.attention_scale(head_dim));
    config
}

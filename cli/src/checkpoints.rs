//! Models by name, ours or published by others.

use std::path::Path;

use anyhow::Result;
use engine::checkpoint::Checkpoint;
use engine::config::MODEL_TYPE;
use engine::tokenizer::Tokenizer;
use engine::weights::{CONFIG_FILE, TOKENIZER_FILE, Weights};

/// Opens a model folder of ours, or a checkpoint as [`Checkpoint::open`] does.
///
/// # Errors
/// If there is none, or it is damaged or not supported.
pub fn open(name: &str) -> Result<Checkpoint> {
    let folder = Path::new(name);
    if !is_ours(folder) {
        return Ok(Checkpoint::open(name, 1)?);
    }
    let weights = Weights::load(folder)?;
    let tokenizer = folder.join(TOKENIZER_FILE);
    let tokenizer = tokenizer.exists().then(|| Tokenizer::load(&tokenizer)).transpose()?;
    Ok(Checkpoint { weights, tokenizer })
}

fn is_ours(folder: &Path) -> bool {
    std::fs::read_to_string(folder.join(CONFIG_FILE)).is_ok_and(|json| json.contains(&format!("\"{MODEL_TYPE}\"")))
}

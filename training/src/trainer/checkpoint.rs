//! Checkpoints: everything that a run needs to resume with identical results.
//!
//! The state file contains, as `f32`, every weight of the model and the optimizer's running means of each trained one,
//! and the number of steps. Random draws of a step depend only on the run's seed and the step.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use engine::weights::{
    CONFIG_FILE, Stored, TENSORS_FILE, TOKENIZER_FILE, Weights, write_safetensors, write_then_rename,
};
use engine::{ModelConfig, Tokenizer};

use super::{LOSS_FILE, LossRow, OPTIONS_FILE, Trainer};
use crate::error::TrainingError;

/// Weights and optimizer state of the latest checkpoint.
pub const STATE_FILE: &str = "training-state.safetensors";
const STEP: &str = "step";

/// The optimizer's running means of gradients and squared gradients, flat, by tensor.
pub type Means = HashMap<String, (Tensor, Tensor)>;

/// Contents of a checkpoint.
pub struct State {
    pub weights: Weights,
    pub means: Means,
    pub tokenizer: Tokenizer,
    /// One row for each step taken.
    pub curve: Vec<LossRow>,
}

/// Whether a folder contains a checkpoint.
pub fn exists(folder: &Path) -> bool {
    folder.join(STATE_FILE).exists()
}

/// Whether a folder contains what a run leaves that ends before its first checkpoint: it may start again.
pub fn is_before_first(folder: &Path) -> bool {
    let is_there = |file| folder.join(file).exists();
    is_there(OPTIONS_FILE) && !is_there(STATE_FILE) && !is_there(TENSORS_FILE)
}

/// Writes the checkpoint, whose model is never older than its state. Only the first time the state is there before the
/// model, so that a folder with a model but no state is not that of a run which ended meanwhile.
///
/// # Errors
/// If a file cannot be written.
pub fn save(trainer: &Trainer) -> Result<(), TrainingError> {
    let is_first = !exists(&trainer.folder);
    if !is_first {
        save_model(trainer)?;
    }
    save_state(trainer)?;
    if is_first {
        save_model(trainer)?;
    }
    Ok(())
}

/// Writes the model that a first checkpoint lacks whose run ended before it was whole.
///
/// # Errors
/// If it cannot be written.
pub fn ensure_model(trainer: &Trainer) -> Result<(), TrainingError> {
    match exists(&trainer.folder) && !trainer.folder.join(TENSORS_FILE).exists() {
        true => save_model(trainer),
        false => Ok(()),
    }
}

fn save_model(trainer: &Trainer) -> Result<(), TrainingError> {
    let stored = if trainer.options.half_precision { Stored::F16 } else { Stored::F32 };
    Ok(trainer.weights.save(&trainer.folder, stored)?)
}

/// Writes the state after all that it needs.
fn save_state(trainer: &Trainer) -> Result<(), TrainingError> {
    let folder = &trainer.folder;
    let path = folder.join(CONFIG_FILE);
    write_then_rename(&path, |part| std::fs::write(part, trainer.weights.config().to_json()))
        .map_err(|e| TrainingError::in_file(&path, e))?;
    trainer.tokenizer.save(&folder.join(TOKENIZER_FILE))?;
    let path = folder.join(LOSS_FILE);
    write_then_rename(&path, |part| -> std::io::Result<()> {
        let mut file = csv::Writer::from_path(part)?;
        for row in &trainer.curve {
            file.serialize(row)?;
        }
        file.flush()
    })
    .map_err(|e| TrainingError::in_file(&path, e))?;

    let mut tensors = HashMap::new();
    for (name, tensor) in trainer.weights.tensors() {
        tensors.insert(format!("value.{name}"), tensor.clone());
    }
    for (name, parameter) in &trainer.parameters {
        for (kind, numbers) in [("mean", &parameter.mean), ("square", &parameter.square)] {
            tensors.insert(format!("{kind}.{name}"), numbers.clone());
        }
    }
    tensors.insert(STEP.to_owned(), Tensor::new(trainer.curve.len() as u32, &Device::Cpu)?);
    let path = folder.join(STATE_FILE);
    write_then_rename(&path, |part| write_safetensors(part, &tensors, None))
        .map_err(|e| TrainingError::in_file(&path, e))
}

/// Reads the latest checkpoint in `folder`.
///
/// # Errors
/// If a file is missing, cannot be read, or does not belong to the others.
pub fn load(folder: &Path) -> Result<State, TrainingError> {
    let config = ModelConfig::load(&folder.join(CONFIG_FILE)).map_err(engine::WeightsError::from)?;
    let path = folder.join(STATE_FILE);
    let wrong = |problem: String| TrainingError::Checkpoint { path: path.clone(), problem };
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|e| wrong(format!("cannot read the training state: {e}")))?;
    let step = tensors.remove(STEP).ok_or_else(|| wrong(format!("`{STEP}` is missing")))?;
    let step = step.to_scalar::<u32>()? as usize;

    let (mut values, mut means, mut squares) = (HashMap::new(), HashMap::new(), HashMap::new());
    for (name, tensor) in tensors {
        match name.split_once('.') {
            Some(("value", name)) => drop(values.insert(name.to_owned(), tensor)),
            Some(("mean", name)) => drop(means.insert(name.to_owned(), tensor)),
            Some(("square", name)) => drop(squares.insert(name.to_owned(), tensor)),
            _ => return Err(wrong(format!("unexpected tensor `{name}`"))),
        }
    }
    let mut both = Means::new();
    for (name, mean) in means {
        let square = squares.remove(&name);
        let count = values.get(&name).map(Tensor::elem_count);
        let flat = |means: &Tensor| {
            means.dtype() == DType::F32 && means.dims().len() == 1 && Some(means.elem_count()) == count
        };
        let fits = flat(&mean) && square.as_ref().is_some_and(flat);
        let square = square.filter(|_| fits).ok_or_else(|| wrong(format!("the means of `{name}` do not fit it")))?;
        both.insert(name, (mean, square));
    }
    let curve = read_curve(&folder.join(LOSS_FILE), step)?;
    let tokenizer = Tokenizer::load(&folder.join(TOKENIZER_FILE))?;
    let weights = Weights::from_tensors(config, values, &path.display().to_string())?;
    Ok(State { weights, means: both, tokenizer, curve })
}

/// Rows of a loss curve before `step`.
fn read_curve(path: &Path, step: usize) -> Result<Vec<LossRow>, TrainingError> {
    let read = || -> csv::Result<Vec<LossRow>> { csv::Reader::from_path(path)?.deserialize().take(step).collect() };
    let curve = read().map_err(|e| TrainingError::in_file(path, e))?;
    match curve.len() == step {
        true => Ok(curve),
        false => Err(TrainingError::Checkpoint {
            path: path.to_owned(),
            problem: format!("{} rows, expected at least {step}", curve.len()),
        }),
    }
}

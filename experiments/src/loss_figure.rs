//! The loss curves of training runs, one over the other.

use std::path::Path;

use anyhow::{Context, Result};
use plots::{Figure, LossCurve, Origin};
use training::trainer::{LOSS_FILE, LossRow};

/// Points of a curve of training losses, each a mean over neighbouring steps.
const POINTS: usize = 120;

/// Draws the curves of runs in their folders as `loss` in `folder`.
///
/// # Errors
/// If a curve does not read or the figure cannot be written.
pub fn draw(runs: &[&Path], folder: &Path) -> Result<()> {
    let curves = runs.iter().map(|run| curve(run)).collect::<Result<Vec<_>>>()?;
    let figure = Figure {
        folder: folder.to_owned(),
        name: "loss".to_owned(),
        title: "Cross-entropy of the last loop over training steps".to_owned(),
        setting: "training batches averaged over neighbouring steps".to_owned(),
        device: engine::device_name(),
        origin: Origin::Measured,
    };
    Ok(plots::or_left_out(plots::losses(&figure, &curves))?)
}

fn curve(run: &Path) -> Result<LossCurve> {
    let path = run.join(LOSS_FILE);
    let rows = csv::Reader::from_path(&path).and_then(|reader| reader.into_deserialize().collect());
    let rows: Vec<LossRow> = rows.with_context(|| path.display().to_string())?;
    let name = run.file_name().unwrap_or(run.as_os_str()).to_string_lossy().into_owned();
    let taken = |row: &LossRow| row.step as f64 + 1.0;
    let mean = |rows: &[LossRow], value: fn(&LossRow) -> f64| rows.iter().map(value).sum::<f64>() / rows.len() as f64;
    let neighbours = rows.chunks(rows.len().div_ceil(POINTS).max(1));
    Ok(LossCurve {
        name,
        train: neighbours
            .map(|rows| (mean(rows, |row| row.step as f64 + 1.0), mean(rows, |row| row.loss_nats_per_token)))
            .collect(),
        validation: rows.iter().filter_map(|row| Some((taken(row), row.held_out_nats_per_token?))).collect(),
    })
}

//! Where the time of a simulated token goes: `time_by_part.csv` and its figures.

use std::path::Path;

use anyhow::Result;
use plots::{Figure, Origin, TokenTime};
use serde::Serialize;
use simulator::write_csv;
use traces::Component;

use crate::figures::{Caption, policy};
use crate::systems::SystemRun;

/// Parts as people name them, and what of a profile each is.
const PARTS: [(&str, &[Component]); 7] = [
    ("linear layers", &[Component::Block, Component::AfterMore]),
    ("norms and activations", &[Component::Elementwise]),
    ("sums over devices", &[Component::AllReduce]),
    (
        "attention",
        &[Component::DecodeAttention, Component::PrefillAttention, Component::KvFill, Component::ExitAttention],
    ),
    ("LoRA", &[Component::Lora, Component::DepthMix]),
    ("exit head", &[Component::Head, Component::ExitSignal, Component::ExitDecision]),
    ("embedding", &[Component::Embed]),
];
const OVERHEAD: &str = "between passes";

/// A line of `time_by_part.csv`.
#[derive(Serialize)]
struct PartLine<'a> {
    system: &'a str,
    batching: &'static str,
    exit_policy: &'a str,
    max_batch: u32,
    part: &'static str,
    /// Per generated token, prompts included.
    us_per_token: f64,
}

impl SystemRun<'_> {
    /// Names and times per generated token, in microseconds.
    fn parts(&self) -> Vec<(&'static str, f64)> {
        let per_token = |seconds: f64| 1e6 * seconds / self.summary.output_tokens as f64;
        let of = |components: &[Component]| components.iter().map(|&component| self.time.of(component)).sum::<f64>();
        let parts = PARTS.iter().map(|&(part, components)| (part, per_token(of(components))));
        parts.chain([(OVERHEAD, per_token(self.time.overhead_s()))]).collect()
    }

    fn bar(&self) -> TokenTime {
        TokenTime {
            label: format!("{}: {}", self.system.name, policy(self.summary.batching, &self.summary.exit_policy)),
            parts_us: self.parts().into_iter().map(|(_, time)| time).collect(),
            speedup: self.speedup,
        }
    }
}

/// Writes `time_by_part.csv`.
///
/// # Errors
/// If it cannot be written.
pub fn write_time_by_part(results: &Path, runs: &[SystemRun<'_>]) -> Result<()> {
    let lines = runs.iter().flat_map(|run| {
        run.parts().into_iter().map(|(part, us_per_token)| PartLine {
            system: &run.system.name,
            batching: run.summary.batching.name(),
            exit_policy: &run.summary.exit_policy,
            max_batch: run.summary.max_batch,
            part,
            us_per_token,
        })
    });
    Ok(write_csv(&results.join("time_by_part.csv"), lines)?)
}

/// Draws the same, a figure for each batch limit where that is swept.
///
/// # Errors
/// If a figure cannot be drawn.
pub fn draw_time_by_part(results: &Path, caption: &Caption, runs: &[SystemRun<'_>]) -> Result<()> {
    let names: Vec<&str> = PARTS.iter().map(|part| part.0).chain([OVERHEAD]).collect();
    let title = "Where the time of a generated token goes";
    let sizes = runs.iter().map(|run| run.size + 1).max().unwrap_or(0);
    for size in 0..sizes {
        let runs: Vec<&SystemRun<'_>> = runs.iter().filter(|run| run.size == size).collect();
        let batch = runs[0].summary.max_batch;
        let (name, title) = match sizes {
            1 => ("time-by-part".to_owned(), title.to_owned()),
            _ => (format!("time-by-part-{batch}"), format!("{title}, up to {batch} sequences at once")),
        };
        let figure = Figure {
            folder: results.join("figures"),
            name,
            title,
            setting: caption.setting.clone(),
            device: caption.device.clone(),
            origin: Origin::Simulated,
        };
        let bars: Vec<TokenTime> = runs.into_iter().map(SystemRun::bar).collect();
        plots::or_left_out(plots::token_times(&figure, &names, &bars))?;
    }
    Ok(())
}

//! Where the time of a simulated token goes: `time_by_part.csv` and its figures.

use std::path::Path;

use anyhow::Result;
use plots::{Figure, Origin, TokenTime};
use serde::Serialize;
use simulator::{Summary, TimeByPart, write_csv};
use traces::Component;

use crate::figures::Caption;

/// Parts as people name them, and what of a profile each is.
const PARTS: [(&str, &[Component]); 6] = [
    ("linear layers", &[Component::Block]),
    ("norms, activations", &[Component::Elementwise]),
    ("LoRA", &[Component::Lora, Component::DepthMix]),
    ("attention", &[Component::DecodeAttention, Component::PrefillAttention]),
    ("embedding", &[Component::Embed]),
    ("exit head", &[Component::Head]),
];
const OVERHEAD: &str = "between passes";

/// A run of a system, and where its time went.
pub struct SystemTime<'a> {
    /// The system's name.
    pub system: &'a str,
    /// What the run came to.
    pub summary: &'a Summary,
    /// Of the whole run.
    pub time: &'a TimeByPart,
}

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

impl SystemTime<'_> {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        let per_token = |seconds: f64| 1e6 * seconds / self.summary.output_tokens as f64;
        let of = |components: &[Component]| components.iter().map(|&component| self.time.of(component)).sum::<f64>();
        let parts = PARTS.iter().map(|&(part, components)| (part, per_token(of(components))));
        parts.chain([(OVERHEAD, per_token(self.time.overhead_s()))]).collect()
    }

    fn bar(&self) -> TokenTime {
        let Summary { batching, exit_policy, .. } = self.summary;
        let parts_us = self.parts().into_iter().map(|(_, time)| time).collect();
        TokenTime { label: format!("{}: {batching}, {}", self.system, exit_policy.replace(':', " ")), parts_us }
    }
}

/// Writes `time_by_part.csv` and a figure for each batch limit, in which the first run is what others are compared with.
///
/// # Errors
/// If something cannot be written.
pub fn write_time_by_part(results: &Path, caption: &Caption, runs: &[SystemTime<'_>]) -> Result<()> {
    let lines = runs.iter().flat_map(|run| {
        run.parts().into_iter().map(|(part, us_per_token)| PartLine {
            system: run.system,
            batching: run.summary.batching.name(),
            exit_policy: &run.summary.exit_policy,
            max_batch: run.summary.max_batch,
            part,
            us_per_token,
        })
    });
    write_csv(&results.join("time_by_part.csv"), lines)?;
    let mut batches: Vec<u32> = runs.iter().map(|run| run.summary.max_batch).collect();
    batches.sort_unstable();
    batches.dedup();
    let names: Vec<&str> = PARTS.iter().map(|part| part.0).chain([OVERHEAD]).collect();
    for batch in batches {
        let bars: Vec<TokenTime> =
            runs.iter().filter(|run| run.summary.max_batch == batch).map(SystemTime::bar).collect();
        let figure = Figure {
            folder: results.join("figures"),
            name: format!("time-by-part-{batch}"),
            title: format!("Where the time of a generated token goes, up to {batch} sequences at once"),
            setting: caption.setting.clone(),
            device: caption.device.clone(),
            origin: Origin::Simulated,
        };
        plots::token_times(&figure, &names, &bars)?;
    }
    Ok(())
}

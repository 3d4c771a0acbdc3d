//! Draws the exit depths of the study of looped models (`docs/notebook/looped-models.md`).
//!
//! ```text
//! cargo run --release -p traces --example looped_exits -- results/looped/exits
//! ```
//!
//! Where a source says only how many loops tokens run on average, depths are drawn from the distribution of greatest
//! entropy with that mean between the fewest and the most loops: loop k with a probability in proportion to r^k. Tokens
//! are independent. Depths have no quality: nothing is known of what a model would have said.

use std::error::Error;
use std::path::Path;

use traces::{ExitTable, ExitTrace, ExitTraceMeta, LoopShares, TraceError};

/// Generations and tokens of each trace.
const GENERATIONS: usize = 64;
const TOKENS: usize = 256;

/// What is known of a distribution of loops.
enum Known {
    /// Shares of tokens that run 1, 2, ... loops.
    Shares(&'static [f64]),
    /// Fewest loops, and the mean.
    Mean(u8, f64),
    /// Fewest loops, and the largest speed-up over full depth that their mean allows: (F0 + most) / (F0 + mean), where F0
    /// is the work of a token outside the loops, in loops.
    Bound { fewest: u8, speedup: f64, outside: f64 },
}

/// Work of a token outside the loops, in loops, by numbers of weights: its head over the 24 layers of Ouro-1.4B; head,
/// prelude and coda over the 4 layers and the adapter of Huginn (`configs/looped`).
const OURO: f64 = (49_152.0 * 2048.0) / (24.0 * (4.0 * 2048.0 * 2048.0 + 3.0 * 2048.0 * 5632.0));
const HUGINN_LAYER: f64 = 4.0 * 5280.0 * 5280.0 + 3.0 * 5280.0 * 17_920.0;
const HUGINN: f64 = (65_536.0 * 5280.0 + 4.0 * HUGINN_LAYER) / (4.0 * HUGINN_LAYER + 2.0 * 5280.0 * 5280.0);

/// Name, loops at full depth, what is known, and where from.
const DISTRIBUTIONS: [(&str, u8, Known, &str); 12] = [
    ("ouro-mean-2.5", 4, Known::Mean(1, 2.5), "mean of 2.5: arXiv 2510.25741, section 5.4.1"),
    ("ouro-narrow", 4, Known::Shares(&[0.0, 0.5, 0.5, 0.0]), "mean of 2.5 as in arXiv 2510.25741, least spread"),
    ("ouro-bimodal", 4, Known::Shares(&[0.5, 0.0, 0.0, 0.5]), "bimodal_50 of looped_cdb, mean of 2.5"),
    ("ouro-shallow", 4, Known::Shares(&[0.4, 0.3, 0.2, 0.1]), "gate_shallow_heavy of looped_cdb"),
    ("ouro-deep", 4, Known::Shares(&[0.1, 0.2, 0.3, 0.4]), "gate_deep_heavy of looped_cdb"),
    ("ouro-cdb", 4, Known::Bound { fewest: 2, speedup: 1.6, outside: OURO }, "bound of 1.6: arXiv 2608.09444"),
    ("ouro-3", 4, Known::Shares(&[0.0, 0.0, 1.0, 0.0]), "all tokens run 3 loops, prompts 4, as in vllm-rlt"),
    ("nanbeige-mean-1.5", 2, Known::Mean(1, 1.5), "no source: half of the tokens exit"),
    ("huginn-mean-12.7", 32, Known::Mean(1, 12.7), "mean of 12.7: arXiv 2502.05171, figure 10, mathematics"),
    ("huginn-mean-16.2", 32, Known::Mean(1, 16.2), "mean of 16.2: arXiv 2502.05171, figure 10, moral scenarios"),
    (
        "huginn-cdb-low",
        16,
        Known::Bound { fewest: 2, speedup: 1.9 / 0.92, outside: HUGINN },
        "1.9 times is 92% of the bound: arXiv 2608.09444",
    ),
    (
        "huginn-cdb-high",
        16,
        Known::Bound { fewest: 2, speedup: 1.9 / 0.73, outside: HUGINN },
        "1.9 times is 73% of the bound: arXiv 2608.09444",
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out] = &arguments[..] else { return Err("expected a folder".into()) };
    for (seed, (name, loops, known, source)) in DISTRIBUTIONS.into_iter().enumerate() {
        let shares = shares(&known, loops)?;
        let mean = shares.mean();
        let meta = ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: format!("exit depths, {name}"),
            fingerprint: name.to_owned(),
            num_loops: loops.into(),
            source: format!("drawn, not recorded: {source}; {mean:.3} loops of {loops}"),
            recording: None,
        };
        let trace = ExitTrace::from_depths(meta, &shares.draw(GENERATIONS, TOKENS, seed as u64));
        trace.write(Path::new(out).join(name), ExitTable::Parquet)?;
        println!("{name}: mean {mean:.3} of {loops} loops, drawn {:.3}", trace.mean_oracle_passes());
    }
    Ok(())
}

fn shares(known: &Known, loops: u8) -> Result<LoopShares, TraceError> {
    match *known {
        Known::Shares(shares) => LoopShares::new(shares),
        Known::Mean(fewest, mean) => LoopShares::of_mean(loops, fewest, mean),
        Known::Bound { fewest, speedup, outside } => {
            LoopShares::of_mean(loops, fewest, (outside + f64::from(loops)) / speedup - outside)
        }
    }
}

//! Converts the tables of "Relaxed Recursive Transformers" (arXiv 2410.20672) to profiles and exit traces.
//!
//! ```text
//! cargo run --release -p traces --example paper_configs -- ../shared/data/paper configs/paper
//! ```
//!
//! The example reads the times per token and the published throughputs of Gemma in a 16 GB budget. For each kind of
//! model it fits the one number that the paper does not publish: passes per token under the oracle, on SlimPajama. It
//! writes the profiles, the exit traces and `expected.csv`, and prints how well the other published numbers follow.
//! `docs/notebook/paper.md` explains what is derived and what is assumed.

use std::error::Error;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use traces::{Component, ExitTable, ExitTrace, ExitTraceMeta, LatencyProfile, Point, ProfileMeta, Signals};

/// A row of `time_per_token_a100_16gb_budget.csv`; times in milliseconds, per token where the batch is full.
#[derive(Debug, Deserialize)]
struct Times {
    non_embedding_params: String,
    loops: u32,
    lora_rank: u32,
    max_batch: u32,
    embed_ms_b1: f64,
    embed_ms_bmax: f64,
    block_ms_b1: f64,
    block_ms_bmax: f64,
    head_ms_bmax: f64,
}

/// A row of `throughput_gemma_16gb_by_dataset.csv`; tokens per second.
#[derive(Debug, Deserialize)]
struct Published {
    loops: u32,
    lora_rank: u32,
    batching: String,
    early_exit: String,
    batch: u32,
    slimpajama_tok_s: f64,
    redpajama_tok_s: f64,
    pg19_tok_s: f64,
}

/// A row of `expected.csv`.
#[derive(Serialize)]
struct Expected<'a> {
    loops: u32,
    lora_rank: u32,
    batching: &'a str,
    exit: &'a str,
    max_batch: u32,
    tok_s: f64,
}

/// Models that share one distribution of exits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Vanilla,
    Recursive,
    Relaxed,
}

/// Of `period` tokens, `deep` need the second loop.
#[derive(Clone, Copy, Debug)]
struct Share {
    deep: u32,
    period: u32,
}

impl Times {
    fn kind(&self) -> Kind {
        match (self.loops, self.lora_rank) {
            (1, _) => Kind::Vanilla,
            (_, 0) => Kind::Recursive,
            _ => Kind::Relaxed,
        }
    }

    fn name(&self) -> String {
        match self.kind() {
            Kind::Vanilla => "gemma-vanilla".into(),
            _ => format!("gemma-{}-loops-rank-{}", self.loops, self.lora_rank),
        }
    }

    /// Passes per token for which `embed + passes * block` gives a throughput.
    fn implied_passes(&self, tok_s: f64) -> f64 {
        (1e3 / tok_s - self.embed_ms_bmax) / self.block_ms_bmax
    }

    fn throughput(&self, passes: f64) -> f64 {
        1e3 / (self.embed_ms_bmax + passes * self.block_ms_bmax)
    }

    fn throughput_with_head(&self, passes: f64) -> f64 {
        1e3 / (self.embed_ms_bmax + passes * self.block_ms_bmax + self.head_ms_bmax)
    }

    fn profile(&self) -> Result<LatencyProfile, Box<dyn Error>> {
        const EMBEDDING_PARAMS: f64 = 256_000.0 * 2048.0;
        let billions: f64 = self.non_embedding_params.trim_end_matches('B').parse()?;
        let point = |component, rows, time_ms: f64| {
            // The tables have three decimals. Rounding removes digits of the products that were never measured.
            let time_us = (time_ms * 1e6).round() / 1e3;
            Point { component, rows, kv_tokens: 0, depths: 1, time_us, spread_us: 0.0, repeats: 0 }
        };
        let whole = f64::from(self.max_batch);
        let points = vec![
            point(Component::Block, 1, self.block_ms_b1),
            point(Component::Block, self.max_batch, self.block_ms_bmax * whole),
            point(Component::Embed, 1, self.embed_ms_b1),
            point(Component::Embed, self.max_batch, self.embed_ms_bmax * whole),
            point(Component::Head, 1, 0.0),
            point(Component::Head, self.max_batch, 0.0),
        ];
        let meta = ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: format!("Gemma 2B, {} loop(s), LoRA rank {}", self.loops, self.lora_rank),
            fingerprint: LatencyProfile::ANY_MODEL.into(),
            num_loops: self.loops,
            device: "NVIDIA A100 40GB, batch within a 16 GB budget".into(),
            software: "as in the paper; 16-bit numbers assumed".into(),
            source: format!(
                "arXiv 2410.20672, time per token of Gemma on A100 in a 16 GB budget ({} non-embedding parameters): \
                 prefix of 512 tokens, 2048 decoded, so histories are part of the block. Times of a pass of \
                 {} rows are the paper's times per token times {}. The head is set to 0, since the paper's \
                 throughputs leave it out (measured: {} ms a token). weight_bytes and kv_bytes_per_token are \
                 computed from Gemma's shape.",
                self.non_embedding_params, self.max_batch, self.max_batch, self.head_ms_bmax
            ),
            overhead_us: 0.0,
            weight_bytes: (2.0 * (billions * 1e9 + EMBEDDING_PARAMS)).round() as u64,
            // 18 layers, one head of 256 numbers, keys and values, 2 bytes each.
            kv_bytes_per_token: 18 * 256 * 2 * 2,
            memory: None,
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        };
        Ok(LatencyProfile { meta, points, mixed_attention: None })
    }
}

impl Share {
    /// The nearest fraction to a number of passes from 1 to 2, with a period short enough to be visible in a file.
    fn nearest(passes: f64) -> Self {
        let error = |share: &Self| (share.passes() - passes).abs();
        let shares = (2..=16).flat_map(|period| (0..=period).map(move |deep| Self { deep, period }));
        shares.min_by(|a, b| error(a).total_cmp(&error(b))).expect("there are shares")
    }

    fn passes(self) -> f64 {
        1.0 + f64::from(self.deep) / f64::from(self.period)
    }

    /// Whether a token needs the second loop: `deep` tokens of any `period` consecutive ones do, evenly spread.
    fn needs_second_loop(self, token: u32) -> bool {
        (token + 1) * self.deep / self.period > token * self.deep / self.period
    }
}

/// Generations of four periods each; generation `g` starts `g` tokens into the pattern.
fn exit_trace(kind: Kind, share: Share, source: String) -> ExitTrace {
    let num_loops = if kind == Kind::Vanilla { 1 } else { 2 };
    let name = format!("{kind:?}").to_lowercase();
    let (schema_version, fingerprint) = (ExitTrace::SCHEMA_VERSION, format!("paper-gemma-{name}"));
    let model = format!("Gemma 2B, {name}, as in the paper");
    let mut trace =
        ExitTrace::new(ExitTraceMeta { schema_version, model, fingerprint, num_loops, source, recording: None });
    // The signals are unknown. These are of a model that is never confident (the entropy of 256,000 equal
    // probabilities).
    let unsure = Signals { entropy: 12.45, ..Signals::default() };
    for generation in 0..share.period {
        let rows = (generation..generation + 4 * share.period).flat_map(|token| {
            (1..=num_loops).map(move |pass| {
                let agrees = pass == num_loops || !share.needs_second_loop(token);
                (unsure, u32::from(agrees))
            })
        });
        trace.push_generation(&rows.collect::<Vec<_>>());
    }
    trace
}

fn read_rows<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Vec<T>, Box<dyn Error>> {
    Ok(csv::Reader::from_path(path)?.deserialize().collect::<Result<_, _>>()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut folders = std::env::args().skip(1).map(PathBuf::from);
    let (Some(tables), Some(configs)) = (folders.next(), folders.next()) else {
        return Err("usage: paper_configs TABLES CONFIGS (two folders)".into());
    };
    let mut times: Vec<Times> = read_rows(&tables.join("time_per_token_a100_16gb_budget.csv"))?;
    times.retain(|times| times.loops <= 2);
    let published: Vec<Published> = read_rows(&tables.join("throughput_gemma_16gb_by_dataset.csv"))?;
    let times_of = |row: &Published| {
        let same = |times: &&Times| (times.loops, times.lora_rank) == (row.loops, row.lora_rank);
        times.iter().find(same).ok_or_else(|| format!("no times for {row:?}"))
    };
    for times in &times {
        times.profile()?.write(configs.join("profiles").join(times.name()))?;
    }

    let mut shares = Vec::new();
    for kind in [Kind::Vanilla, Kind::Recursive, Kind::Relaxed] {
        let mut implied = Vec::new();
        for row in published.iter().filter(|row| row.early_exit == "oracle") {
            let times = times_of(row)?;
            if times.kind() == kind {
                implied.push(times.implied_passes(row.slimpajama_tok_s));
            }
        }
        let (share, source) = match implied.len() {
            0 => (Share { deep: 0, period: 16 }, "One loop: nothing to leave early.".to_owned()),
            models => {
                let passes = implied.iter().sum::<f64>() / models as f64;
                let share = Share::nearest(passes);
                println!(
                    "{kind:?}: passes implied {implied:.4?}, mean {passes:.4}, used {:.4} ({share:?})",
                    share.passes()
                );
                let source = format!(
                    "Made, not recorded: {} of any {} tokens in a row need the second loop, evenly spread; generation g \
                     begins g tokens into the pattern. The share was fitted to the paper's throughput on SlimPajama \
                     ({models} model(s), {passes:.4} passes per token). Predictions: 1 the token of full depth, 0 another. \
                     The signals are made up such that no confidence policy ever exits.",
                    share.deep, share.period
                );
                (share, source)
            }
        };
        let name = format!("{kind:?}").to_lowercase();
        exit_trace(kind, share, source).write(configs.join("exits").join(name), ExitTable::Csv)?;
        shares.push((kind, share));
    }

    let mut expected = csv::Writer::from_path(configs.join("expected.csv"))?;
    println!(
        "| model | batching | batch | predicted | SlimPajama | error | RedPajama | error | PG19 | error | with head |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in &published {
        let times = times_of(row)?;
        let exit = if row.early_exit == "no" { "none" } else { "oracle" };
        let (loops, lora_rank, batching, max_batch) = (row.loops, row.lora_rank, &row.batching, row.batch);
        expected.serialize(Expected { loops, lora_rank, batching, exit, max_batch, tok_s: row.slimpajama_tok_s })?;
        let share = shares.iter().find(|(kind, _)| *kind == times.kind()).ok_or("a kind without share")?.1;
        let predicted = times.throughput(share.passes());
        print!("| {} | {batching} | {max_batch} | {predicted:.0} |", times.name());
        for tok_s in [row.slimpajama_tok_s, row.redpajama_tok_s, row.pg19_tok_s] {
            print!(" {tok_s:.0} | {:+.1}% |", (predicted / tok_s - 1.0) * 100.0);
        }
        println!(" {:.0} |", times.throughput_with_head(share.passes()));
    }
    expected.flush()?;
    Ok(())
}

//! Generates the exit traces of the GPU study (`docs/notebook/gpu-study.md`). Exit depths follow the paper; signals
//! follow those measured on the model of this repository.
//!
//! ```text
//! cargo run --release -p traces --example gpu_exits -- RECORDED configs/gpu/exits
//! ```
//!
//! `RECORDED` is an exit trace of a model with four loops, as written by `depthwise record`. A token of the synthetic
//! model becomes right after its first, second, ... loop, in the shares below. Its signals at a loop are those of a
//! recorded token at the nearest loop that was equally right or wrong there. A measure therefore separates right from
//! wrong tokens as well as in the recorded model, and no better. The gate equals the margin, but is read without the
//! vocabulary.

use std::error::Error;
use std::path::Path;

use traces::{ExitSignal, ExitTable, ExitTrace, ExitTraceMeta, LatencyProfile, SignalSet, Signals};

/// Folder, loops, and how many of 13 tokens become right after each loop. The first loop has 9, as in the paper's
/// relaxed models with two loops (`docs/notebook/paper.md`). The split of the rest at three loops is an assumption.
const MODELS: [(&str, &[usize]); 3] = [("vanilla", &[13]), ("2-loops", &[9, 4]), ("3-loops", &[9, 3, 1])];

/// Number of times that the 13 tokens repeat with other signals.
const ROUNDS: usize = 40;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [recorded, out] = &arguments[..] else { return Err("expected RECORDED and a folder".into()) };
    let recorded = ExitTrace::read(recorded)?;
    for (name, becoming_right) in MODELS {
        let trace = exits(name, becoming_right, &recorded);
        trace.write(Path::new(out).join(name), ExitTable::Csv)?;
        println!("{name}: {:.3} passes under the oracle", trace.mean_oracle_passes());
        if becoming_right.len() > 1 {
            for measure in [ExitSignal::Top1, ExitSignal::Margin, ExitSignal::Similarity] {
                print_thresholds(&trace, measure);
            }
        }
    }
    Ok(())
}

fn exits(name: &str, becoming_right: &[usize], recorded: &ExitTrace) -> ExitTrace {
    let loops = becoming_right.len();
    let mut pools: Vec<[Pool; 2]> =
        (0..loops).map(|depth| pools(recorded, recorded_depth(depth, loops, recorded))).collect();
    let meta = ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: format!("Gemma-like, {name}"),
        fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
        num_loops: loops as u32,
        source: format!(
            "of 13 tokens {becoming_right:?} become right after each loop; signals drawn from {}, gate = margin",
            recorded.meta.model
        ),
        recording: None,
    };
    let mut trace = ExitTrace { recorded: SignalSet::ALWAYS.with(ExitSignal::Gate), ..ExitTrace::new(meta) };
    for _ in 0..ROUNDS {
        let mut rows = Vec::new();
        for token in 0..13 {
            // Spread evenly: token t has place 5 t modulo 13.
            let place: usize = token * 5 % 13;
            let right_from =
                (0..loops).find(|&depth| place < becoming_right[..=depth].iter().sum::<usize>()).unwrap_or(loops - 1);
            for (depth, pool) in pools.iter_mut().enumerate() {
                let is_right = depth >= right_from;
                let signals = pool[usize::from(is_right)].next(recorded);
                // After the first loop there is no earlier hidden state to compare with.
                let similarity = if depth == 0 { 0.0 } else { signals.similarity };
                rows.push((Signals { gate: signals.margin, similarity, ..signals }, u32::from(is_right)));
            }
        }
        trace.push_generation(&rows);
    }
    trace
}

/// The depth of the recorded model with the nearest share of all layers.
fn recorded_depth(depth: usize, loops: usize, recorded: &ExitTrace) -> usize {
    let share = (depth + 1) as f64 / loops as f64;
    let distance = |other: &usize| (share - (other + 1) as f64 / recorded.num_loops() as f64).abs();
    let nearest = (0..recorded.num_loops()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
    nearest.unwrap_or_default()
}

/// Recorded tokens at one depth, taken in turn.
struct Pool {
    depth: usize,
    tokens: Vec<usize>,
    taken: usize,
}

impl Pool {
    /// The next token is far away, so that neighbours come from different texts.
    fn next(&mut self, recorded: &ExitTrace) -> Signals {
        const STRIDE: usize = 7919;
        let token = self.tokens[self.taken * STRIDE % self.tokens.len()];
        self.taken += 1;
        *recorded.signals_at(token, self.depth)
    }
}

/// The tokens that are not right at a depth, and those that are.
fn pools(recorded: &ExitTrace, depth: usize) -> [Pool; 2] {
    [false, true].map(|is_right| {
        let tokens = (0..recorded.num_tokens()).filter(|&token| recorded.agrees(token, depth) == is_right).collect();
        Pool { depth, tokens, taken: 0 }
    })
}

/// Prints the lowest thresholds of a measure that keep given shares of tokens right: passes per token, and the share
/// that is right.
fn print_thresholds(trace: &ExitTrace, measure: ExitSignal) {
    let tokens = trace.num_tokens();
    let at = |threshold: f32| {
        let depths = (0..tokens).map(|token| trace.confident_depth(token, measure, threshold));
        let (passes, right) = depths.enumerate().fold((0, 0), |(passes, right), (token, depth)| {
            (passes + depth + 1, right + usize::from(trace.agrees(token, depth)))
        });
        let share = |count: usize| count as f64 / tokens as f64;
        (share(passes), share(right))
    };
    for target in [0.9, 0.95, 0.99] {
        let mut thousandths = (0..=1000).map(|thousandth| thousandth as f32 / 1000.0);
        if let Some(threshold) = thousandths.find(|&threshold| at(threshold).1 >= target) {
            let (passes, right) = at(threshold);
            println!("  {measure} {threshold}: {passes:.3} passes, {:.1}% right", 100.0 * right);
        }
    }
}

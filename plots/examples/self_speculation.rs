//! Tables and figure of `docs/notebook/self-speculation.md`, from the sweeps of `configs/speculation/study.sh`.
//!
//! ```text
//! cargo run --release -p plots --example self_speculation -- results/speculation docs/notebook/self-speculation.md docs/figures/self-speculation.png
//! ```
//!
//! A table replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the page.

mod study;

use std::fmt::Write;
use std::path::Path;

use plots::{SweepLine, SweepPoint};
use study::{Point, Result, Sweep, THROUGHPUT, draw, fill, number};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [results, page, picture] = &arguments[..] else { return Err("expected results, page and picture".into()) };
    let read = |name: &str| Sweep::read(&Path::new(results).join(name));
    let [four, six, long] = [read("four-loops")?, read("six-loops")?, read("long-histories")?];
    let mut text = std::fs::read_to_string(page)?;
    for (name, table) in [
        ("four-loops", speedups(&four, &FOUR_LOOPS, &[1, 4, 16, 64, 256])?),
        ("six-loops", speedups(&six, &SIX_LOOPS, &[1, 4, 16, 64, 256])?),
        ("long-histories", speedups(&long, &LONG, &[1, 4, 16, 64])?),
        ("drafts", by_drafts(&four)?),
    ] {
        text = fill(&text, name, &table)?;
    }
    std::fs::write(page, text)?;
    draw_speedups(&four, Path::new(picture))
}

const FOUR_LOOPS: [&str; 4] = ["H100 Ouro-1.4B", "H100 Llama 8B", "L40S Ouro-1.4B", "L40S Llama 8B"];
const SIX_LOOPS: [&str; 2] = ["H100 Gemma 2B", "H100 Qwen3 8B"];
const LONG: [&str; 1] = ["H100 Llama 8B"];

/// Kinds of drafts: at a static depth, by a signal with a number of drafts that stays, and one that follows the load.
fn is_static(exit: &str) -> bool {
    exit.starts_with("speculate:static:")
}

fn is_by_signal(exit: &str) -> bool {
    exit.starts_with("speculate:") && !is_static(exit) && !exit.contains("..")
}

fn is_by_load(exit: &str) -> bool {
    exit.starts_with("speculate:") && exit.contains("..")
}

/// Points of one system and batch limit.
struct At<'a> {
    sweep: &'a Sweep,
    system: &'a str,
    max_batch: String,
}

impl<'a> At<'a> {
    fn best(&self, batching: &str, exits: impl Fn(&str) -> bool) -> Result<&'a Point> {
        self.sweep.best_of(&[("system", self.system), ("batching", batching), ("max_batch", &self.max_batch)], exits)
    }

    /// Throughput of full depth under sequence-wise batching.
    fn full_depth(&self) -> Result<f64> {
        Ok(number(self.best("sequence", |exit| exit == "none")?, THROUGHPUT))
    }

    fn speedup(&self, point: &Point) -> Result<f64> {
        Ok(number(point, THROUGHPUT) / self.full_depth()?)
    }
}

/// The best speed-up of each kind of drafts, with its policy, and the best early exit beside it.
fn speedups(sweep: &Sweep, systems: &[&str], batches: &[u32]) -> Result<String> {
    let mut table =
        "| system | batch limit | full depth | static drafts, sequence-wise | drafts by signal, sequence-wise | \
        static drafts, depth-wise | drafts by signal, depth-wise | depth-wise over sequence-wise | \
        early exit, depth-wise (agreement) |\n\
        | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            .to_owned();
    for (system, max_batch) in systems.iter().flat_map(|system| batches.iter().map(move |batch| (system, batch))) {
        let at = At { sweep, system, max_batch: max_batch.to_string() };
        let cell = |point: &Point| -> Result<String> {
            let policy = point["exit_policy"].trim_start_matches("speculate:").to_owned();
            Ok(format!("{:.2}x ({policy})", at.speedup(point)?))
        };
        let best = |batching| at.best(batching, |exit| is_static(exit) || is_by_signal(exit));
        let exits = at.best("depth", |exit| exit.starts_with("confidence:"))?;
        writeln!(
            table,
            "| {system} | {max_batch} | {:.0} tok/s | {} | {} | {} | {} | **{:.2}x** | {:.2}x ({:.3}) |",
            at.full_depth()?,
            cell(at.best("sequence", is_static)?)?,
            cell(at.best("sequence", is_by_signal)?)?,
            cell(at.best("depth", is_static)?)?,
            cell(at.best("depth", is_by_signal)?)?,
            number(best("depth")?, THROUGHPUT) / number(best("sequence")?, THROUGHPUT),
            at.speedup(exits)?,
            number(exits, "token_agreement"),
        )?;
    }
    Ok(table)
}

/// One system under depth-wise batching: how many drafts are best, and one number for every load.
fn by_drafts(sweep: &Sweep) -> Result<String> {
    const DRAFTS: [u32; 4] = [1, 2, 4, 8];
    let mut table = "| system | batch limit | 1 draft | 2 | 4 | 8 | 8 to 1 by load | confirmed drafts | tokens per verification with 8 | \
        wasted rows per token with 8 |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for (system, max_batch) in
        FOUR_LOOPS[..2].iter().flat_map(|system| [1, 4, 16, 64, 256].map(|batch| (system, batch)))
    {
        let at = At { sweep, system, max_batch: max_batch.to_string() };
        write!(table, "| {system} | {max_batch} |")?;
        for drafts in DRAFTS {
            let point = at.best("depth", |exit| exit == format!("speculate:margin:0.05:{drafts}"))?;
            write!(table, " {:.2}x |", at.speedup(point)?)?;
        }
        let most = at.best("depth", |exit| exit == "speculate:margin:0.05:8")?;
        writeln!(
            table,
            " {:.2}x | {:.1}% | {:.2} | {:.2} |",
            at.speedup(at.best("depth", is_by_load)?)?,
            100.0 * number(most, "draft_acceptance"),
            number(most, "tokens_per_verification"),
            number(most, "wasted_rows") / number(most, "output_tokens"),
        )?;
    }
    Ok(table)
}

/// Name of a line, batching policy, and which exit policies to take the best of.
type Kind = (&'static str, &'static str, fn(&str) -> bool);

fn draw_speedups(sweep: &Sweep, picture: &Path) -> Result<()> {
    let kinds: [Kind; 5] = [
        ("early exit, depth-wise (another text)", "depth", |exit| exit.starts_with("confidence:")),
        ("drafts by signal, depth-wise", "depth", is_by_signal),
        ("static drafts, depth-wise", "depth", is_static),
        ("static drafts, sequence-wise", "sequence", is_static),
        ("drafts by signal, sequence-wise", "sequence", is_by_signal),
    ];
    let line = |(name, batching, exits): Kind| -> Result<SweepLine> {
        let point = |max_batch: u32| -> Result<SweepPoint> {
            let at = At { sweep, system: "H100 Llama 8B", max_batch: max_batch.to_string() };
            let y = at.speedup(at.best(batching, exits)?)?;
            Ok(SweepPoint { x: f64::from(max_batch), y, low: y, high: y })
        };
        let points = [1, 4, 16, 64, 256].into_iter().map(point).collect::<Result<_>>()?;
        Ok(SweepLine { name: name.to_owned(), points })
    };
    let lines = kinds.into_iter().map(line).collect::<Result<Vec<_>>>()?;
    let setting = "Llama 8B in 4 loops, exits of models/kjv; the best number of drafts of each kind";
    let titles = ["What do drafts bring at the text of full depth?", setting, "one H100"];
    draw(picture, titles, "speed-up over full depth, sequence-wise", &lines)
}

//! Tables and figure of `docs/notebook/looped-models.md`, from the sweeps of `configs/looped/study.sh`.
//!
//! ```text
//! cargo run --release -p plots --example looped_models -- results/looped docs/notebook/looped-models.md docs/figures/looped-models.png
//! ```
//!
//! A table replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the page.

mod study;

use std::fmt::Write;
use std::path::Path;

use plots::{SweepLine, SweepPoint};
use study::{Point, Result, Sweep, THROUGHPUT, draw, fill, number};

/// Work of a token outside the loops, in loops, by numbers of weights: F0 / Fr of arXiv 2608.09444. Head over block of
/// Ouro-1.4B; head, prelude and coda over block and adapter of Huginn.
const OURO: f64 = (49_152.0 * 2048.0) / (24.0 * (4.0 * 2048.0 * 2048.0 + 3.0 * 2048.0 * 5632.0));
const HUGINN_LAYER: f64 = 4.0 * 5280.0 * 5280.0 + 3.0 * 5280.0 * 17_920.0;
const HUGINN: f64 = (65_536.0 * 5280.0 + 4.0 * HUGINN_LAYER) / (4.0 * HUGINN_LAYER + 2.0 * 5280.0 * 5280.0);

/// MMLU of Ouro-1.4B after 2 and 3 loops, and of its gate trained for exits at 2.5 loops: arXiv 2510.25741, table 10 and
/// section 5.4.1.
const MMLU: (f64, f64, f64) = (60.43, 66.71, 66.0);

/// Shares of the bound that arXiv 2608.09444 reports, in percent.
const PUBLISHED: [(&str, f64, f64); 2] =
    [("band: Ouro, published by CDB", 94.0, 99.0), ("band: Huginn, published by CDB", 73.0, 92.0)];

/// What vllm-rlt reports: tokens per second and milliseconds per output token with 4 loops and with 3.
const VLLM_RLT: [(&str, [f64; 4]); 2] = [
    ("vllm-rlt, H100, 32-bit floats", [179.28, 212.99, 63.18, 49.25]),
    ("vllm-rlt, H20, 32-bit floats", [144.177, 167.121, 74.588, 59.380]),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [results, page, picture] = &arguments[..] else { return Err("expected results, page and picture".into()) };
    let read = |name: &str| Sweep::read(&Path::new(results).join(name));
    let [study, huginn] = [read("study")?, read("huginn")?];
    let [cdb, decode, rlt] = [read("cdb")?, read("decode")?, read("vllm-rlt")?];
    let mut text = std::fs::read_to_string(page)?;
    for (name, table) in [
        ("study", study_table(&study, &huginn)?),
        ("huginn", huginn_signals(&huginn)?),
        ("equal-quality", equal_quality(&study)?),
        ("cdb", cdb_table(&cdb, &decode)?),
        ("shapes", shapes(&cdb)?),
        ("vllm-rlt", rlt_table(&rlt)?),
    ] {
        text = fill(&text, name, &table)?;
    }
    std::fs::write(page, text)?;
    draw_shares(&cdb, &decode, Path::new(picture))
}

/// Which points to take the best of. All other settings are free.
struct Of<'a> {
    system: &'a str,
    batching: &'a str,
    exit: &'a str,
    max_batch: u32,
}

impl Sweep {
    /// The point of highest throughput: exits wait for the head as long as is best.
    fn best(&self, of: Of<'_>) -> Result<&Point> {
        let Of { system, batching, exit, max_batch } = of;
        let wanted = [("system", system), ("batching", batching), ("max_batch", &max_batch.to_string())];
        self.best_of(&wanted, |policy| policy == exit)
    }

    fn throughput(&self, system: &str, batching: &str, exit: &str, max_batch: u32) -> Result<f64> {
        Ok(number(self.best(Of { system, batching, exit, max_batch })?, THROUGHPUT))
    }

    /// Speed-up of exits over full depth under sequence-wise batching, and the share of the bound, 0 to 1.
    fn of_bound(&self, system: &str, batching: &str, max_batch: u32) -> Result<Shares> {
        let exits = self.best(Of { system, batching, exit: EXITS, max_batch })?;
        // Full depth runs its loops without a decision in between, so it has no overhead from one to the next.
        let without_overhead = system.replace("overhead", "cdb");
        let full_depth = self.throughput(&without_overhead, "sequence", "none", max_batch)?;
        let speedup = number(exits, THROUGHPUT) / full_depth;
        let (outside, loops) = if system.contains("Huginn") { (HUGINN, 16.0) } else { (OURO, 4.0) };
        let bound = (outside + loops) / (outside + number(exits, "mean_depth"));
        let wait = number(exits, "exit_wait") as u32;
        Ok(Shares { full_depth, speedup, bound, share: speedup / bound, wait })
    }
}

struct Shares {
    full_depth: f64,
    speedup: f64,
    bound: f64,
    share: f64,
    wait: u32,
}

/// Exits by a signal that needs no head, and by one that does.
const EXITS: &str = "confidence:gate:0.5";
const BY_KL: &str = "confidence:entropy:0.5";

/// Models of the study: name, name of their exits in the table, static depths.
const MODELS: [(&str, &str, [u32; 2]); 5] = [
    ("Ouro-1.4B", "2.5 of 4", [3, 2]),
    ("Ouro-2.6B", "2.5 of 4", [3, 2]),
    ("Nanbeige4.2-3B", "1.5 of 2", [1, 1]),
    ("Huginn 12.7", "12.7 of 32", [17, 13]),
    ("Huginn 16.2", "16.2 of 32", [17, 13]),
];
const GPUS: [&str; 3] = ["H100", "A100", "L40S"];

fn study_table(study: &Sweep, huginn: &Sweep) -> Result<String> {
    let mut table = "| GPU | model, mean loops of exits | batch limit | fit at once | full depth, sequence-wise | \
        full depth, vanilla batching | static depths | exits, sequence-wise | exits, depth-wise | \
        depth-wise over sequence-wise |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for gpu in GPUS {
        for (model, exits, depths) in MODELS {
            let name = model.split(' ').next().unwrap_or_default();
            let sweep = if name == "Huginn" { huginn } else { study };
            for batch in [64, 256] {
                let system = format!("{gpu} {model}");
                let of = |batching, exit| sweep.throughput(&system, batching, exit, batch);
                let fixed =
                    |kind: &str, batching| sweep.throughput(&format!("{gpu} {name} {kind}"), batching, "none", batch);
                let full = sweep.best(Of { system: &system, batching: "sequence", exit: "none", max_batch: batch })?;
                let (full_depth, fits) = (number(full, THROUGHPUT), number(full, "batch_fits"));
                let at = |depth: u32| -> Result<String> {
                    let speedup = fixed(&format!("static {depth}"), "sequence")? / full_depth;
                    Ok(format!("{depth}: {speedup:.2}x"))
                };
                let mut statics = depths.into_iter().map(at).collect::<Result<Vec<_>>>()?;
                statics.dedup();
                let (lockstep, depthwise) = (of("sequence", EXITS)?, of("depth", EXITS)?);
                writeln!(
                    table,
                    "| {gpu} | {name}, {exits} | {batch} | {fits:.0} | {full_depth:.0} tok/s | {:.2}x | {} | {:.2}x | **{:.2}x** | {:.2}x |",
                    fixed("vanilla", "vanilla")? / full_depth,
                    statics.join(", "),
                    lockstep / full_depth,
                    depthwise / full_depth,
                    depthwise / lockstep,
                )?;
            }
        }
    }
    Ok(table)
}

/// Huginn at batch limit 64: exits whose signal needs no head, and those by KL, which run coda and head in every loop.
fn huginn_signals(huginn: &Sweep) -> Result<String> {
    let mut table = "| GPU, mean loops | bound | exits by the hidden state, sequence-wise | depth-wise | exits wait | \
        exits by KL, sequence-wise | depth-wise |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for gpu in GPUS {
        for mean in ["12.7", "16.2"] {
            let system = format!("{gpu} Huginn {mean}");
            let full = huginn.throughput(&system, "sequence", "none", 64)?;
            let of = |batching, exit| huginn.best(Of { system: &system, batching, exit, max_batch: 64 });
            let speedup = |point| number(point, THROUGHPUT) / full;
            let depthwise = of("depth", EXITS)?;
            let bound = (HUGINN + 32.0) / (HUGINN + number(depthwise, "mean_depth"));
            writeln!(
                table,
                "| {gpu}, {mean} | {bound:.2}x | {:.2}x | **{:.2}x** | {} | {:.2}x | {:.2}x |",
                speedup(of("sequence", EXITS)?),
                speedup(depthwise),
                number(depthwise, "exit_wait"),
                speedup(of("sequence", BY_KL)?),
                speedup(of("depth", BY_KL)?),
            )?;
        }
    }
    Ok(table)
}

/// Ouro-1.4B: exits that keep an MMLU of 66, beside static depths that keep at least it.
fn equal_quality(study: &Sweep) -> Result<String> {
    let (two, three, gate) = MMLU;
    let share = (gate - two) / (three - two);
    let mut table = format!(
        "| GPU | batch limit | 4 loops (MMLU 67.45) | 3 loops ({three}) | {:.0}% of requests 3 loops, others 2 ({gate}) | \
         exits, sequence-wise ({gate}) | exits, depth-wise ({gate}) | depth-wise over the best other |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        100.0 * share
    );
    for gpu in GPUS {
        for batch in [32, 64, 128, 256] {
            let of = |model: &str, batching, exit| study.throughput(&format!("{gpu} {model}"), batching, exit, batch);
            let full = of("Ouro-1.4B", "sequence", "none")?;
            let fixed = |depth: u32| of(&format!("Ouro-1.4B static {depth}"), "sequence", "none");
            let (at_three, at_two) = (fixed(3)?, fixed(2)?);
            let coin = 1.0 / (share / at_three + (1.0 - share) / at_two);
            let (lockstep, depthwise) = (of("Ouro-1.4B", "sequence", EXITS)?, of("Ouro-1.4B", "depth", EXITS)?);
            let best = [full, at_three, coin, lockstep].into_iter().fold(0.0, f64::max);
            writeln!(
                table,
                "| {gpu} | {batch} | {full:.0} tok/s | {:.2}x | {:.2}x | {:.2}x | {:.2}x | **{:.2}x** |",
                at_three / full,
                coin / full,
                lockstep / full,
                depthwise / full,
                depthwise / best
            )?;
        }
    }
    Ok(table)
}

const BATCHES: [u32; 6] = [16, 32, 64, 128, 256, 512];

/// Systems of the sweeps beside CDB, and their names in the table.
const BESIDE_CDB: [(&str, &str); 4] = [
    ("Ouro-1.4B cdb", "Ouro-1.4B"),
    ("Ouro-1.4B overhead", "Ouro-1.4B, 100 us more for a pass with exits"),
    ("Huginn low", "Huginn, fewer exits"),
    ("Huginn high", "Huginn, more exits"),
];

fn cdb_table(cdb: &Sweep, decode: &Sweep) -> Result<String> {
    let mut table = "| exits | batch limit | full depth | bound | depth-wise | share of the bound | exits wait | \
        without prompts | sequence-wise, one read of the head |\n\
        | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for (system, name) in BESIDE_CDB {
        for batch in BATCHES {
            let Shares { full_depth, speedup, bound, share, wait } = cdb.of_bound(system, "depth", batch)?;
            let alone = match decode.of_bound(system, "depth", batch) {
                Ok(alone) => format!("{:.0}%", 100.0 * alone.share),
                Err(_) => String::new(),
            };
            let lockstep = cdb.of_bound(system, "sequence", batch)?;
            writeln!(
                table,
                "| {name} | {batch} | {full_depth:.0} tok/s | {bound:.2}x | {speedup:.2}x | **{:.0}%** | {wait} | {alone} | {:.2}x |",
                100.0 * share,
                lockstep.speedup
            )?;
        }
    }
    Ok(table)
}

/// Other distributions of the exits of Ouro-1.4B.
fn shapes(cdb: &Sweep) -> Result<String> {
    let mut table = "| loops of tokens | bound | depth-wise | share of the bound | sequence-wise |\n\
        | --- | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for (system, name) in [
        ("Ouro-1.4B shallow", "40%, 30%, 20%, 10% run 1, 2, 3, 4"),
        ("Ouro-1.4B narrow", "half 2, half 3"),
        ("Ouro-1.4B cdb", "2 to 4, mean 2.47"),
        ("Ouro-1.4B bimodal", "half 1, half 4"),
        ("Ouro-1.4B deep", "10%, 20%, 30%, 40% run 1, 2, 3, 4"),
    ] {
        let Shares { speedup, bound, share, .. } = cdb.of_bound(system, "depth", 64)?;
        let lockstep = cdb.of_bound(system, "sequence", 64)?.speedup;
        writeln!(table, "| {name} | {bound:.2}x | {speedup:.2}x | **{:.0}%** | {lockstep:.2}x |", 100.0 * share)?;
    }
    Ok(table)
}

fn rlt_table(rlt: &Sweep) -> Result<String> {
    let of = |exit| rlt.best(Of { system: "H100 Ouro-1.4B", batching: "sequence", exit, max_batch: 16 });
    let (four, three) = (of("none")?, of(EXITS)?);
    let mut table = "| | 4 loops | 3 loops | speed-up | time per output token, 4 loops | 3 loops | ratio |\n\
        | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    let mut line = |name: &str, [slow, fast, long, short]: [f64; 4]| {
        writeln!(
            table,
            "| {name} | {slow:.0} tok/s | {fast:.0} tok/s | {:.2}x | {long:.1} ms | {short:.1} ms | **{:.2}x** |",
            fast / slow,
            long / short
        )
    };
    let [slow, fast] = [four, three].map(|point| number(point, THROUGHPUT));
    let [long, short] = [four, three].map(|point| number(point, "tpot_mean_ms"));
    line("simulated, H100, 16-bit floats", [slow, fast, long, short])?;
    VLLM_RLT.into_iter().try_for_each(|(name, reported)| line(name, reported))?;
    Ok(table)
}

fn draw_shares(cdb: &Sweep, decode: &Sweep, picture: &Path) -> Result<()> {
    let simulated = |name: &str, sweep: &Sweep, system: &str, batching: &str| -> Result<SweepLine> {
        let point = |batch: u32| -> Result<SweepPoint> {
            let y = 100.0 * sweep.of_bound(system, batching, batch)?.share;
            Ok(SweepPoint { x: f64::from(batch), y, low: y, high: y })
        };
        Ok(SweepLine { name: name.to_owned(), points: BATCHES.into_iter().map(point).collect::<Result<_>>()? })
    };
    let mut lines: Vec<SweepLine> = PUBLISHED
        .into_iter()
        .map(|(name, low, high)| {
            let point = |batch: u32| SweepPoint { x: f64::from(batch), y: f64::midpoint(low, high), low, high };
            SweepLine { name: name.to_owned(), points: BATCHES.into_iter().map(point).collect() }
        })
        .collect();
    lines.push(simulated("Ouro-1.4B, depth-wise", cdb, "Ouro-1.4B cdb", "depth")?);
    lines.push(simulated("the same without prompts", decode, "Ouro-1.4B cdb", "depth")?);
    lines.push(simulated("Ouro-1.4B, sequence-wise", cdb, "Ouro-1.4B cdb", "sequence")?);
    lines.push(simulated("Huginn, fewer exits, depth-wise", cdb, "Huginn low", "depth")?);
    lines.push(simulated("Huginn, more exits, depth-wise", cdb, "Huginn high", "depth")?);
    let titles = [
        "How much of the bound do exits reach?",
        "Ouro-1.4B and Huginn in bfloat16; published ranges as bands",
        "one H100",
    ];
    draw(picture, titles, "speed-up over full depth, % of the bound", &lines)
}

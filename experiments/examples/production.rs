//! Tables and figures of `docs/notebook/production.md`, from the sweeps of `configs/production/study.sh`.
//!
//! ```text
//! cargo run --release -p experiments --example production -- results/production TRACES docs/notebook/production.md docs/figures
//! ```
//!
//! A table replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the page.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

use latency::{LatencyModel, PassAccount};
use plots::{Figure, HeatMap, Origin};
use traces::{ChunkWork, LatencyProfile, PassWork, Request, RequestTrace};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const TRAFFIC: &str = include_str!("../../configs/production/traffic.txt");
const PROFILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/production/profiles");
/// Rows of a pass, and so the longest chunk of a prompt under sequence-wise batching: `token_budget` of the sweeps.
const BUDGET: u32 = 2048;
const BATCHES: [u32; 3] = [8, 32, 128];
const HISTORIES: [u32; 4] = [256, 1024, 4096, 16_384];
const HISTORY_BATCHES: [u32; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const PROMPTS: [u32; 4] = [64, 512, 4096, 16_384];
const OUTPUTS: [u32; 4] = [32, 128, 512, 2048];
/// A gain worth the trouble.
const PAYS: f64 = 1.05;
/// The system that is looked at from several sides.
const USUAL: System<'_> = System { gpu: "h100", model: "qwen3-8b", loops: 4, mean: 2.5 };

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [results, requests, page, figures] = &arguments[..] else {
        return Err("expected results, folder of request traces, page and folder of figures".into());
    };
    let results = Path::new(results);
    let study = Study::read(results, Path::new(requests))?;
    let mut text = std::fs::read_to_string(page)?;
    let (rule, checks) = study.rule()?;
    for (name, table) in [
        ("traffic", study.traffic_table()?),
        ("models", study.models()?),
        ("gpus", study.gpus()?),
        ("means", study.means()?),
        ("equal-passes", study.equal_passes()?),
        ("chunks", chunks(results)?),
        ("prompts", study.prompts(results)?),
        ("capacity", capacity(results)?),
        ("machines", machines(results)?),
        ("rule", rule),
        ("extremes", extremes(&checks)),
    ] {
        text = fill(&text, name, &table)?;
    }
    std::fs::write(page, text)?;
    draw(results, &study, Path::new(figures))
}

/// A model on a GPU whose tokens run so many loops on average.
#[derive(Clone, Copy, Debug, PartialEq)]
struct System<'a> {
    gpu: &'a str,
    model: &'a str,
    loops: u32,
    mean: f64,
}

/// Tokens per second of a system under every combination, at one batch limit.
#[derive(Clone, Debug, Default)]
struct Point {
    /// Sequence-wise batching: without exits, with exits, and with two static depths of the same mean.
    lockstep: [f64; 3],
    /// The same depth-wise.
    depthwise: [f64; 3],
    /// Sequences that ran at once, on average, sequence-wise and without exits.
    running: f64,
    /// Share of prompt tokens that were found in the cache.
    hit_rate: f64,
    /// Mean loops of a generated token, as simulated.
    mean: f64,
}

const NONE: usize = 0;
const EXITS: usize = 1;
const MIX: usize = 2;

/// Which of these an exit policy is.
fn exit_of(policy: &str) -> usize {
    match policy {
        "none" => NONE,
        mix if mix.starts_with("mix:") => MIX,
        _ => EXITS,
    }
}

impl Point {
    /// Throughput of exits, depth-wise, over that of full depth, sequence-wise.
    fn total(&self) -> f64 {
        self.depthwise[EXITS] / self.lockstep[NONE]
    }

    /// The exits' part of it: sequence-wise.
    fn exits(&self) -> f64 {
        self.lockstep[EXITS] / self.lockstep[NONE]
    }

    /// The batching's part of it: with exits, over sequence-wise.
    fn batching(&self) -> f64 {
        self.depthwise[EXITS] / self.lockstep[EXITS]
    }
}

/// The lines of a CSV file, by the names of their columns.
fn lines(path: &Path) -> Result<Vec<BTreeMap<String, String>>> {
    let mut reader = csv::Reader::from_path(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(reader.deserialize().collect::<std::result::Result<_, _>>()?)
}

/// The points of a pair of sweeps, one sequence-wise and one depth-wise: by system and batch limit.
#[derive(Default)]
struct Sweep(BTreeMap<(String, u32), Point>);

impl Sweep {
    fn read(results: &Path, name: &str) -> Result<Self> {
        let mut points: BTreeMap<(String, u32), Point> = BTreeMap::new();
        for batching in ["sequence", "depth"] {
            let path = results.join(format!("{name}-{batching}")).join("sweep-summary.csv");
            for line in lines(&path)? {
                let number = |column: &str| line[column].parse().unwrap_or(f64::NAN);
                let point = points.entry((line["system"].clone(), number("max_batch") as u32)).or_default();
                let exit = exit_of(&line["exit_policy"]);
                let throughput = number("throughput_tok_s");
                if batching == "depth" {
                    point.depthwise[exit] = throughput;
                } else {
                    point.lockstep[exit] = throughput;
                }
                if (batching, exit) == ("sequence", NONE) {
                    point.running = number("mean_running");
                    point.hit_rate = Some(number("prefix_hit_rate")).filter(|rate| rate.is_finite()).unwrap_or(0.0);
                }
                if (batching, exit) == ("depth", EXITS) {
                    point.mean = number("mean_depth");
                }
            }
        }
        Ok(Self(points))
    }

    fn at(&self, system: System<'_>, batch: u32) -> Result<&Point> {
        let System { gpu, model, loops, mean } = system;
        let name = format!("{gpu} {model} {loops} {mean}");
        self.0.get(&(name.clone(), batch)).ok_or_else(|| format!("no point of {name} at batch limit {batch}").into())
    }
}

/// The requests of a trace.
struct Traffic {
    name: &'static str,
    requests: Vec<Request>,
    points: Sweep,
}

impl Traffic {
    /// Mean tokens of prompts and of outputs.
    fn lengths(&self) -> (f64, f64) {
        let mean = |of: fn(&Request) -> u32| {
            self.requests.iter().map(|request| f64::from(of(request))).sum::<f64>() / self.requests.len() as f64
        };
        (mean(|request| request.prompt_tokens), mean(|request| request.output_tokens))
    }

    /// Mean tokens before a generated token.
    fn history(&self) -> f64 {
        let of = |request: &Request| {
            let output = f64::from(request.output_tokens);
            (output * (f64::from(request.prompt_tokens) + output / 2.0), output)
        };
        let (sum, tokens) = self.requests.iter().map(of).fold((0.0, 0.0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        sum / tokens
    }
}

struct Study(Vec<Traffic>);

impl Study {
    fn read(results: &Path, requests: &Path) -> Result<Self> {
        let traffic = TRAFFIC.lines().map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let [name, file, first, _] = words[..] else { return Err(format!("traffic.txt: {line}").into()) };
            let trace = RequestTrace::read(requests.join(file))?.first(first.parse()?);
            Ok(Traffic { name, requests: trace.requests, points: Sweep::read(results, name)? })
        });
        Ok(Self(traffic.collect::<Result<_>>()?))
    }

    fn traffic_table(&self) -> Result<String> {
        let mut table =
            "| traffic | requests | prompt tokens, mean | output tokens, mean | tokens before a generated token | \
            found in the cache | time of prompts at full depth |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
                .to_owned();
        for traffic in &self.0 {
            let (prompt, output) = traffic.lengths();
            let point = traffic.points.at(USUAL, 32)?;
            let times = Times::new(USUAL, point, traffic)?;
            writeln!(
                table,
                "| {} | {} | {prompt:.0} | {output:.0} | {:.0} | {:.0}% | {:.0}% |",
                traffic.name,
                traffic.requests.len(),
                traffic.history(),
                100.0 * point.hit_rate,
                100.0 * times.prompt_share()
            )?;
        }
        Ok(table)
    }

    /// A line for each of `rows`, with the gains of every traffic.
    fn gains(&self, head: &str, rows: &[(String, System<'_>, u32)]) -> Result<String> {
        let mut table = format!("| {head} |");
        self.0.iter().try_for_each(|traffic| write!(table, " {} |", traffic.name))?;
        write!(table, "\n| --- |{}\n", " ---: |".repeat(self.0.len()))?;
        for (name, system, batch) in rows {
            write!(table, "| {name} |")?;
            for traffic in &self.0 {
                let point = traffic.points.at(*system, *batch)?;
                write!(table, " **{:.2}x** = {:.2} x {:.2} |", point.total(), point.exits(), point.batching())?;
            }
            table.push('\n');
        }
        Ok(table)
    }

    fn models(&self) -> Result<String> {
        let rows = MODELS.map(|(name, model, loops, mean)| {
            (format!("{name}, {mean} of {loops}"), System { gpu: "h100", model, loops, mean }, 32)
        });
        self.gains("model, mean loops", &rows)
    }

    fn gpus(&self) -> Result<String> {
        let of = |gpu: &'static str| BATCHES.map(|batch| (format!("{gpu}, {batch}"), System { gpu, ..USUAL }, batch));
        self.gains("GPU, batch limit", &["h100", "a100", "l40s"].map(of).concat())
    }

    fn means(&self) -> Result<String> {
        let of = |(name, model): (&str, &'static str)| {
            [1.5, 2.5, 3.25].map(|mean| (format!("{name}, {mean} of 4"), System { model, mean, ..USUAL }, 32))
        };
        self.gains("model, mean loops", &[("Qwen3 8B", "qwen3-8b"), ("Ouro-1.4B", "ouro-1.4b")].map(of).concat())
    }

    /// Depth-wise exits over two static depths of the same mean, sequence-wise.
    fn equal_passes(&self) -> Result<String> {
        let mut table = "| batch limit |".to_owned();
        self.0.iter().try_for_each(|traffic| write!(table, " {} |", traffic.name))?;
        write!(table, "\n| ---: |{}\n", " ---: |".repeat(self.0.len()))?;
        for batch in BATCHES {
            write!(table, "| {batch} |")?;
            for traffic in &self.0 {
                let ratios = looped().filter_map(|system| {
                    let point = traffic.points.at(system, batch).ok()?;
                    Some(point.depthwise[EXITS] / point.lockstep[MIX])
                });
                let Spread { least, median, most } = spread(ratios);
                write!(table, " {median:.2} ({least:.2} to {most:.2}) |")?;
            }
            table.push('\n');
        }
        Ok(table)
    }

    /// Throughput over full depth, sequence-wise, where prompts run every depth and where they run two of four loops.
    fn prompts(&self, results: &Path) -> Result<String> {
        let mut table =
            "| traffic | model | two static depths, sequence-wise | exits, depth-wise | full depth, prompts of two \
            loops | exits, prompts of two loops, sequence-wise | depth-wise |\n\
            | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
                .to_owned();
        for traffic in self.0.iter().filter(|traffic| !traffic.name.ends_with("cached")) {
            let shallow = Sweep::read(results, &format!("prompts-{}", traffic.name))?;
            for (name, model) in [("Qwen3 8B", "qwen3-8b"), ("Ouro-1.4B", "ouro-1.4b")] {
                let system = System { model, ..USUAL };
                let (whole, shallow) = (traffic.points.at(system, 32)?, shallow.at(system, 32)?);
                let gains = [
                    whole.lockstep[MIX],
                    whole.depthwise[EXITS],
                    shallow.lockstep[NONE],
                    shallow.lockstep[EXITS],
                    shallow.depthwise[EXITS],
                ];
                let gains = gains.map(|throughput| format!("{:.2}x", throughput / whole.lockstep[NONE]));
                writeln!(table, "| {} | {name} | {} |", traffic.name, gains.join(" | "))?;
            }
        }
        Ok(table)
    }

    /// How far the rules are from what was simulated, over all points, and the checks.
    fn rule(&self) -> Result<(String, Vec<Check<'_>>)> {
        let mut checks = Vec::new();
        for traffic in &self.0 {
            for (system, batch) in looped().flat_map(|system| BATCHES.map(|batch| (system, batch))) {
                let Ok(point) = traffic.points.at(system, batch) else { continue };
                let times = Times::new(system, point, traffic)?;
                checks.push(Check {
                    traffic: traffic.name,
                    system,
                    batch,
                    point,
                    short: times.short(),
                    long: times.long(),
                });
            }
        }
        let mut table = format!(
            "| | points | error, median | 90% of points within | largest | says rightly whether the gain is {PAYS} |\n\
             | --- | ---: | ---: | ---: | ---: | ---: |\n"
        );
        type Part = (&'static str, fn(&Check<'_>) -> Gain, fn(&Gain) -> f64, fn(&Point) -> f64);
        let parts: [Part; 4] = [
            ("rule, total", |check| check.short, |gain| gain.total, Point::total),
            ("rule, batching's part", |check| check.short, |gain| gain.batching, Point::batching),
            ("sum of passes, total", |check| check.long, |gain| gain.total, Point::total),
            ("sum of passes, batching's part", |check| check.long, |gain| gain.batching, Point::batching),
        ];
        for (name, gain, of, simulated) in parts {
            let pair = |check: &Check<'_>| (of(&gain(check)), simulated(check.point));
            let errors = || checks.iter().map(|check| (pair(check).0 / pair(check).1 - 1.0).abs());
            let mut sorted: Vec<f64> = errors().collect();
            sorted.sort_by(f64::total_cmp);
            let at = |share: f64| 100.0 * sorted[((sorted.len() - 1) as f64 * share).round() as usize];
            let agrees = |check: &&Check<'_>| (pair(check).0 >= PAYS) == (pair(check).1 >= PAYS);
            let right = 100.0 * checks.iter().filter(agrees).count() as f64 / checks.len() as f64;
            writeln!(
                table,
                "| {name} | {} | {:.1}% | {:.1}% | {:.1}% | {right:.0}% |",
                sorted.len(),
                at(0.5),
                at(0.9),
                at(1.0)
            )?;
        }
        Ok((table, checks))
    }
}

/// Models of the first table: name, name of the profile, loops, mean.
const MODELS: [(&str, &str, u32, f64); 9] = [
    ("Qwen3 1.7B", "qwen3-1.7b", 2, 1.5),
    ("Qwen3 1.7B", "qwen3-1.7b", 4, 2.5),
    ("Qwen3 8B", "qwen3-8b", 2, 1.5),
    ("Qwen3 8B", "qwen3-8b", 4, 2.5),
    ("Qwen3 32B", "qwen3-32b", 2, 1.5),
    ("Qwen3 32B", "qwen3-32b", 4, 2.5),
    ("Ouro-1.4B", "ouro-1.4b", 4, 2.5),
    ("Ouro-2.6B", "ouro-2.6b", 4, 2.5),
    ("Nanbeige4.2-3B", "nanbeige4.2-3b", 2, 1.5),
];

/// Every looped system that may have been simulated.
fn looped() -> impl Iterator<Item = System<'static>> {
    let means = |loops: u32| if loops == 2 { [1.25, 1.5, 1.75] } else { [1.5, 2.5, 3.25] };
    ["h100", "a100", "l40s"].into_iter().flat_map(move |gpu| {
        MODELS
            .into_iter()
            .flat_map(move |(_, model, loops, _)| means(loops).map(move |mean| System { gpu, model, loops, mean }))
    })
}

/// Gains in throughput.
#[derive(Clone, Copy)]
struct Gain {
    total: f64,
    batching: f64,
}

/// What the rules say of a point.
struct Check<'a> {
    traffic: &'static str,
    system: System<'static>,
    batch: u32,
    point: &'a Point,
    short: Gain,
    long: Gain,
}

/// Times that a latency profile has for the mean request of a traffic, in nanoseconds.
struct Times {
    model: LatencyModel,
    loops: f64,
    mean: f64,
    /// Shares of tokens that run at least 1, 2, ... loops.
    survivors: Vec<f64>,
    running: f64,
    history: f64,
    /// Of a prompt at full depth.
    prompt: f64,
    output: f64,
}

impl Times {
    fn new(system: System<'_>, point: &Point, traffic: &Traffic) -> Result<Self> {
        let System { gpu, model, loops, mean } = system;
        let profile = LatencyProfile::read(Path::new(PROFILES).join(gpu).join(format!("{model}-{loops}")))?;
        let model = LatencyModel::new(&profile)?;
        let (prompt, output) = traffic.lengths();
        let computed = (prompt * (1.0 - point.hit_rate)).round() as u32;
        let cached = prompt as u32 - computed.min(prompt as u32);
        let chunks = (0..computed).step_by(BUDGET as usize).map(|start| {
            let tokens = BUDGET.min(computed - start);
            let chunks = vec![ChunkWork { tokens, history: cached + start }];
            model.pass_ns(&PassWork { rows: tokens, depths: 1, chunks, ..PassWork::default() })
        });
        let prompt = f64::from(loops) * chunks.sum::<f64>();
        let shares = traces::LoopShares::of_mean(loops as u8, 1, mean)?;
        let survivors = shares.survivors();
        let loops = f64::from(loops);
        Ok(Self { loops, mean, survivors, running: point.running, history: traffic.history(), prompt, output, model })
    }

    /// A pass of decode rows through the block, with this history each.
    fn block(&self, rows: f64, history: f64) -> f64 {
        let rows = rows.round().max(1.0);
        self.model.pass_ns(&PassWork {
            rows: rows as u32,
            decode_rows: rows as u32,
            decode_history: (rows * history) as u64,
            squared_decode_history: rows * history * history,
            longest_decode_history: history as u32,
            depths: 1,
            ..PassWork::default()
        })
    }

    /// A read of the head for rows that exit.
    fn head(&self, rows: f64) -> f64 {
        let work = PassWork { exit_head_rows: rows.round().max(1.0) as u32, ..PassWork::default() };
        self.model.exit_ns(&work, &mut PassAccount::default())
    }

    /// Time of the outputs of one request, of those that run at once: at full depth, with exits in lockstep, and depth-wise.
    fn decoding(&self) -> [f64; 3] {
        let full = self.loops * self.block(self.running, self.history) + self.head(self.running);
        let passes: f64 = self.survivors.iter().map(|share| self.block(share * self.running, self.history)).sum();
        let lockstep = passes + self.head(self.running);
        let exiting = self.running / self.mean;
        let depthwise = self.mean * (self.block(self.running, self.history) + self.head(exiting));
        [full, lockstep, depthwise].map(|time| self.output * time / self.running)
    }

    /// Share of the prompts in the time at full depth.
    fn prompt_share(&self) -> f64 {
        self.prompt / (self.prompt + self.decoding()[0])
    }

    /// The rule in the page: weights w, prompts p, loops L, mean m.
    fn short(&self) -> Gain {
        let weights = self.block(1.0, 0.0) / self.block(self.running, self.history);
        let prompts = self.prompt_share();
        let (saved, kept) = (self.mean / self.loops, 1.0 - prompts);
        let lockstep = weights + (1.0 - weights) * saved;
        let [with_lockstep, with_depthwise] = [lockstep, saved].map(|decoding| prompts + kept * decoding);
        Gain { total: 1.0 / with_depthwise, batching: with_lockstep / with_depthwise }
    }

    /// The same from the times of all passes.
    fn long(&self) -> Gain {
        let [full, lockstep, depthwise] = self.decoding().map(|decoding| self.prompt + decoding);
        Gain { total: full / depthwise, batching: lockstep / depthwise }
    }
}

/// Depth-wise batching by the longest chunk of a prompt, over chunks of the whole budget: throughput, and the 99th percentile
/// of the time between tokens.
fn chunks(results: &Path) -> Result<String> {
    type Key = (String, String, String, String);
    let mut values: BTreeMap<(Key, u32), (f64, f64)> = BTreeMap::new();
    for name in TRAFFIC.lines().filter_map(|line| line.split(' ').next()) {
        let path = results.join(format!("chunks-{name}-depth")).join("sweep-summary.csv");
        for line in lines(&path)? {
            let key = (name.to_owned(), line["system"].clone(), line["exit_policy"].clone(), line["max_batch"].clone());
            let number = |column: &str| line[column].parse::<f64>();
            values.insert((key, line["prefill_chunk"].parse()?), (number("throughput_tok_s")?, number("itl_p99_ms")?));
        }
    }
    let mut table = "| loops, exit | chunk | throughput, median (range) | p99 between tokens, median (range) |\n\
        | --- | ---: | ---: | ---: |\n"
        .to_owned();
    for (loops, exits, label) in [
        ("4", false, "4, none"),
        ("4", true, "4, 2.5 loops on average"),
        ("2", false, "2, none"),
        ("2", true, "2, 1.5 loops on average"),
    ] {
        for chunk in [256, 512, 1024] {
            let is_of = |key: &Key| {
                key.1.split(' ').nth(2) == Some(loops)
                    && key.2.starts_with("confidence") == exits
                    && (exits || key.2 == "none")
            };
            let ratios = |of: fn(&(f64, f64)) -> f64| {
                let points = values.iter().filter(|((key, found), _)| *found == chunk && is_of(key));
                spread(points.map(|((key, _), value)| of(value) / of(&values[&(key.clone(), BUDGET)])))
            };
            let cell = |Spread { least, median, most }| format!("{median:.2} ({least:.2} to {most:.2})");
            writeln!(table, "| {label} | {chunk} | {} | {} |", cell(ratios(|of| of.0)), cell(ratios(|of| of.1)))?;
        }
    }
    Ok(table)
}

/// Requests per second within the objectives.
fn capacity(results: &Path) -> Result<String> {
    let rates = |name: &str, batching: &str| -> Result<[Option<f64>; 3]> {
        let path = results.join(format!("{name}-{batching}")).join("capacity-summary.csv");
        let mut rates = [None; 3];
        for line in lines(&path)? {
            rates[exit_of(&line["exit_policy"])] = line["capacity_req_s"].parse().ok();
        }
        Ok(rates)
    };
    let mut table = "| traffic | full depth | two static depths | exits, sequence-wise | exits, depth-wise | \
        exits, depth-wise, prompts of two loops |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for name in TRAFFIC.lines().filter_map(|line| line.split(' ').next()).filter(|name| !name.ends_with("cached")) {
        let [lockstep, depthwise] = ["sequence", "depth"].map(|batching| rates(&format!("capacity-{name}"), batching));
        let (lockstep, depthwise) = (lockstep?, depthwise?);
        let shallow = rates(&format!("capacity-prompts-{name}"), "depth")?;
        let cells = [lockstep[NONE], lockstep[MIX], lockstep[EXITS], depthwise[EXITS], shallow[EXITS]];
        let cells = cells.map(|rate| rate.map_or("none".to_owned(), |rate| format!("{rate:.2}")));
        writeln!(table, "| {name} | {} |", cells.join(" | "))?;
    }
    Ok(table)
}

/// Traffic of the comparison of machines with roles, as `study.sh` names it.
const ON_FOUR: [&str; 3] = ["azure-conversation", "azure-code", "reasoning"];

/// Requests per second within the objectives, of four GPUs that serve whole requests, and of the best split into prompt and
/// decode machines.
fn machines(results: &Path) -> Result<String> {
    let mut table = "| traffic | TPOT at most | whole requests: full depth | two static depths | exits, depth-wise | \
        prompts apart: full depth | two static depths | exits, depth-wise |\n\
        | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for name in ON_FOUR {
        for tpot in [50, 15] {
            // By system and exit policy.
            let rates = |batching: &str| -> Result<BTreeMap<(String, usize), f64>> {
                let folder = results.join(format!("machines-{tpot}-ms-{name}-{batching}"));
                let path = folder.join("capacity-summary.csv");
                let mut rates = BTreeMap::new();
                for line in lines(&path)? {
                    let rate = line["capacity_req_s"].parse().unwrap_or(0.0);
                    rates.insert((line["system"].clone(), exit_of(&line["exit_policy"])), rate);
                }
                Ok(rates)
            };
            let (lockstep, depthwise) = (rates("sequence")?, rates("depth")?);
            let served = [(&lockstep, NONE), (&lockstep, MIX), (&depthwise, EXITS)];
            let cell = |rate: f64| if rate > 0.0 { format!("{rate:.1}") } else { "none".to_owned() };
            let whole = served.map(|(rates, exit)| cell(rates[&("4 whole".to_owned(), exit)]));
            let apart = served.map(|(rates, exit)| {
                let splits = rates.iter().filter(|((system, of), _)| *of == exit && system.contains("prompt"));
                let best = splits.max_by(|a, b| a.1.total_cmp(b.1));
                best.map_or(String::new(), |((system, _), rate)| {
                    let split = system.replace(" prompt", "").replace(" decode", "");
                    format!("{} ({split})", cell(*rate))
                })
            });
            writeln!(table, "| {name} | {tpot} ms | {} | {} |", whole.join(" | "), apart.join(" | "))?;
        }
    }
    Ok(table)
}

/// The points furthest from the rule, on both sides.
fn extremes(checks: &[Check<'_>]) -> String {
    let error = |check: &Check<'_>| check.short.total / check.point.total() - 1.0;
    let mut sorted: Vec<&Check<'_>> = checks.iter().collect();
    sorted.sort_by(|a, b| error(a).total_cmp(&error(b)));
    let mut table = "| point | rule | simulated | batching's part, rule | simulated |\n\
        | --- | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    let ends = sorted.iter().take(3).chain(sorted.iter().rev().take(3).rev());
    for Check { traffic, system, batch, point, short, .. } in ends {
        let System { gpu, model, loops, mean } = system;
        let _ = writeln!(
            table,
            "| {traffic}, {gpu}, {model}, {mean} of {loops}, batch limit {batch} | {:.2}x | {:.2}x | {:.2}x | {:.2}x |",
            short.total,
            point.total(),
            short.batching,
            point.batching()
        );
    }
    table
}

struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
    Spread { least: at(0), median: at(values.len() / 2), most: at(values.len().saturating_sub(1)) }
}

/// Replaces what stands between the marker of a table and the next end.
fn fill(page: &str, name: &str, table: &str) -> Result<String> {
    let missing = || format!("no <!-- {name} --> before an <!-- end --> in the page");
    let (before, rest) = page.split_once(&format!("<!-- {name} -->\n")).ok_or_else(missing)?;
    let (_, after) = rest.split_once("<!-- end -->").ok_or_else(missing)?;
    Ok(format!("{before}<!-- {name} -->\n{table}<!-- end -->{after}"))
}

fn draw(results: &Path, study: &Study, figures: &Path) -> Result<()> {
    let mut histories = Vec::new();
    for history in HISTORIES {
        let sweep = Sweep::read(results, &format!("history-{history}"))?;
        let cell = |batch: u32| {
            let point = sweep.at(USUAL, batch)?;
            // Where fewer sequences fit, the batch limit is no batch limit.
            Ok((point.running > 0.8 * f64::from(batch)).then(|| point.batching()))
        };
        histories.push(HISTORY_BATCHES.into_iter().map(cell).collect::<Result<Vec<_>>>()?);
    }
    let names = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>();
    save(
        figures,
        "production-histories",
        "Depth-wise over sequence-wise batching, both with exits",
        "without prompts",
        &HeatMap {
            columns: ("sequences at once".into(), names(&HISTORY_BATCHES)),
            rows: ("mean history (tokens)".into(), names(&HISTORIES)),
            cells: histories,
            pays: PAYS,
        },
    )?;
    let mut lengths = Vec::new();
    for prompt in PROMPTS {
        let cell = |output| {
            let sweep = Sweep::read(results, &format!("lengths-{prompt}-{output}"))?;
            Ok(Some(sweep.at(USUAL, 64)?.total()))
        };
        lengths.push(OUTPUTS.into_iter().map(cell).collect::<Result<Vec<_>>>()?);
    }
    save(
        figures,
        "production-lengths",
        "Depth-wise exits over full depth",
        "batch limit 64",
        &HeatMap {
            columns: ("output (tokens)".into(), names(&OUTPUTS)),
            rows: ("prompt (tokens)".into(), names(&PROMPTS)),
            cells: lengths,
            pays: PAYS,
        },
    )?;
    type Part = (&'static str, &'static str, fn(&Point) -> f64);
    let parts: [Part; 2] = [
        ("production-exits", "The exits' part: sequence-wise exits over full depth", Point::exits),
        ("production-batching", "The batching's part: depth-wise over sequence-wise exits", Point::batching),
    ];
    for (file, title, part) in parts {
        let mut cells = Vec::new();
        let mut rows = Vec::new();
        for traffic in &study.0 {
            for batch in BATCHES {
                rows.push(format!("{}, {batch}", traffic.name));
                let cell = |(_, model, loops, mean)| {
                    let point = traffic.points.at(System { gpu: "h100", model, loops, mean }, batch)?;
                    Ok(Some(part(point)))
                };
                cells.push(MODELS.into_iter().map(cell).collect::<Result<Vec<_>>>()?);
            }
        }
        // Labels that have room: the size, with the first letter of the name if it is not Qwen3.
        let short = |(_, model, loops, _): (&str, &str, u32, f64)| {
            let (name, size) = model.rsplit_once('-').unwrap_or(("", model));
            let name = if name == "qwen3" { "" } else { &name[..1] };
            format!("{}{}/{loops}", name.to_uppercase(), size.to_uppercase())
        };
        let columns = ("Qwen3, Ouro (O) and Nanbeige (N) / loops".into(), MODELS.map(short).to_vec());
        save(
            figures,
            file,
            title,
            "mean of 1.5 loops of 2, 2.5 of 4; rows: traffic and batch limit",
            &HeatMap { columns, rows: (String::new(), rows), cells, pays: PAYS },
        )?;
    }
    Ok(())
}

/// Draws a heat map of the usual system, or of models on its GPU, as PNG.
fn save(figures: &Path, name: &str, title: &str, setting: &str, map: &HeatMap) -> Result<()> {
    let scratch = figures.join(".production");
    let setting = match name.contains("histories") || name.contains("lengths") {
        true => format!("Qwen3 8B in 4 loops, 2.5 on average; {setting}"),
        false => setting.to_owned(),
    };
    let figure = Figure {
        folder: scratch.clone(),
        name: name.to_owned(),
        title: title.to_owned(),
        setting,
        device: "one H100".to_owned(),
        origin: Origin::Simulated,
    };
    plots::heat_map(&figure, map)?;
    std::fs::rename(scratch.join(name).with_extension("png"), figures.join(name).with_extension("png"))?;
    std::fs::remove_dir_all(scratch)?;
    Ok(())
}

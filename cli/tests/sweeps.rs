//! Sweeps and capacity searches as a user runs them, on a profile and an exit trace that are made up.

mod common;
#[path = "common/made_up.rs"]
mod made_up;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::Scene;
use experiments::results::MARKER;
use made_up::{exits, profile};
use traces::ExitTable;
use traces::hash::mix;

/// The folder holds a profile, an exit trace and a sweep.
impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        profile().write(scene.path("profile")).unwrap();
        exits().write(scene.path("exits"), ExitTable::Parquet).unwrap();
        scene.write("sweep.yaml", SWEEP);
        scene
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}

const SWEEP: &str = "schema_version: 1
title: made up
requests:
  generate:
    count: 60
    arrivals: {poisson: {rate_per_s: 100}}
    prompt_tokens: {uniform: {min: 4, max: 30}}
    output_tokens: {uniform: {min: 5, max: 40}}
serving:
  batching: [sequence, depth]
  exit: [none, oracle]
  max_batch: 8
  token_budget: 64
systems:
  - {name: 'one, two', profile: profile, exits: exits}
objectives: {ttft_ms: 20, tpot_ms: 5}
grid:
  thresholds: {top1: [0.5, 0.7]}
  kv_fill: [reuse, first]
  max_batch: [4, 8]
  device_memory: [3MB]
  rate_per_s: [200, 400]
  seed: [1, 2, 3]
";
/// Policies, fills, batch limits, rates and seeds.
const POINTS: usize = 2 * 4 * 2 * 2 * 2 * 3;

/// The same without fills and rates, which leaves less to draw.
fn small_sweep() -> String {
    SWEEP.replace("  kv_fill: [reuse, first]\n", "").replace("  rate_per_s: [200, 400]\n", "")
}
const SMALL_POINTS: usize = POINTS / 4;

fn lines(path: &Path) -> Vec<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_path(path).unwrap();
    reader.records().map(|record| record.unwrap().iter().map(str::to_owned).collect()).collect()
}

fn column<'a>(lines: &'a [Vec<String>], name: &str) -> Vec<&'a str> {
    let index = lines[0].iter().position(|column| column == name).unwrap_or_else(|| panic!("no column {name}"));
    lines[1..].iter().map(|line| line[index].as_str()).collect()
}

/// Every file below a folder, by its path from there, with its bytes.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let (path, name) = (entry.path(), PathBuf::from(entry.file_name()));
        match path.is_dir() {
            true => files.extend(contents(&path).into_iter().map(|(inner, bytes)| (name.join(inner), bytes))),
            false => files.push((name, fs::read(&path).unwrap())),
        }
    }
    files.sort();
    files
}

#[test]
fn a_sweep_leaves_a_line_for_every_combination_and_seed_and_their_means() {
    let scene = Scene::new();
    scene.succeed(&["sweep", "sweep.yaml"]);
    let sweep = lines(&scene.path("results/sweep/sweep.csv"));
    assert_eq!(sweep.len(), 1 + POINTS);
    assert!(column(&sweep, "point").iter().enumerate().all(|(index, point)| *point == index.to_string()));
    for (name, values) in [
        ("system", vec!["one, two"]),
        ("batching", vec!["sequence", "depth"]),
        ("exit_policy", vec!["none", "oracle", "confidence:top1:0.5", "confidence:top1:0.7"]),
        ("kv_fill", vec!["reuse", "first"]),
        ("max_batch", vec!["4", "8"]),
        ("exit_wait", vec!["0"]),
        ("device_memory", vec!["3000000"]),
        ("rate_per_s", vec!["200.0", "400.0"]),
        ("seed", vec!["1", "2", "3"]),
    ] {
        let cells = column(&sweep, name);
        for value in &values {
            let count = cells.iter().filter(|cell| *cell == value).count();
            assert_eq!(count, POINTS / values.len(), "{name} {value}");
        }
    }
    let blocks = |bytes: u64| ((2_700_000 - 1_000_000 - 64 * 100) / (16 * bytes)).to_string();
    for (fill, found) in column(&sweep, "kv_fill").into_iter().zip(column(&sweep, "kv_blocks")) {
        assert_eq!(found, blocks(if fill == "first" { 1_000 } else { 3_000 }));
    }

    let summary = lines(&scene.path("results/sweep/sweep-summary.csv"));
    assert_eq!(summary.len(), 1 + POINTS / 3);
    // What a run is of is kept, the rest is averaged.
    let of_run = summary[0].iter().take_while(|column| *column != "seeds").map(String::as_str).collect::<Vec<_>>();
    assert_eq!(
        of_run.join(" "),
        "system device rate_per_s device_memory memory_utilization source batching exit threshold exit_policy kv_fill \
         max_batch token_budget prefill_chunk prefill_depth block_tokens prefix_caching async_scheduling exit_wait exit_batch \
         replicas machines weight_bytes kv_bytes_per_token"
    );
    let number = |text: &str| text.parse::<f64>().unwrap();
    let throughputs: Vec<f64> = column(&sweep, "throughput_tok_s").into_iter().map(number).collect();
    let means: Vec<f64> = column(&summary, "throughput_tok_s").into_iter().map(number).collect();
    let half_widths: Vec<f64> = column(&summary, "throughput_tok_s_ci95").into_iter().map(number).collect();
    for ((runs, mean), half_width) in throughputs.chunks(3).zip(&means).zip(&half_widths) {
        assert!((runs.iter().sum::<f64>() / 3.0 - mean).abs() < 1e-9 * mean);
        let variance = runs.iter().map(|run| (run - mean).powi(2)).sum::<f64>() / 2.0;
        // Student's t of 2 degrees of freedom at 97.5%.
        let expected = 4.302_653 * (variance / 3.0).sqrt();
        assert!(expected > 0.0 && (expected - half_width).abs() < 1e-5 * expected);
    }
    let figures: Vec<String> = contents(&scene.path("results/sweep/figures"))
        .into_iter()
        .map(|(path, _)| path.display().to_string())
        .filter(|name| name.ends_with("png"))
        .collect();
    // Two of each fill, batch limit and rate; one of each fill and batch limit along the rates.
    assert_eq!(figures.len(), 2 * 8 + 4, "{figures:?}");

    let svg = "results/sweep/figures/pareto-agreement-kv-fill-first-batch-8-400-requests-s.svg";
    let earlier = scene.read(svg);
    assert!(earlier.contains("Pareto-efficient") && earlier.contains("means of 3 seeds"));
    fs::remove_dir_all(scene.path("results/sweep/figures")).unwrap();
    scene.succeed(&["plot", "results/sweep"]);
    assert_eq!(scene.read(svg), earlier);
}

#[test]
fn a_sweep_that_was_cut_short_ends_up_the_same_to_the_byte_on_any_number_of_threads() {
    let scene = Scene::new();
    scene.write("sweep.yaml", &small_sweep());
    let sweep = |out: &str, threads: &str| {
        let output =
            scene.command(&["sweep", "sweep.yaml", "--out", out]).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    sweep("whole", "1");
    let whole = contents(&scene.path("whole"));
    sweep("again", "4");
    assert!(contents(&scene.path("again")) == whole, "another number of threads");

    let path = scene.path("again/sweep.csv");
    let text = fs::read(&path).unwrap();
    for share in [0.0, 0.01, 0.4, 0.8] {
        fs::write(&path, &text[..(share * text.len() as f64) as usize]).unwrap();
        fs::remove_file(scene.path("again/sweep-summary.csv")).unwrap();
        sweep("again", "2");
        assert!(contents(&scene.path("again")) == whole, "cut off after {share}");
    }
    assert!(sweep("again", "2").contains(&format!("of which {SMALL_POINTS} were there already")));
}

#[cfg(unix)]
#[test]
fn an_interrupted_sweep_keeps_what_has_finished() {
    let scene = Scene::new();
    scene.write("long.yaml", &small_sweep().replace("count: 60", "count: 9000"));
    scene.succeed(&["sweep", "long.yaml", "--out", "whole"]);
    let child = scene.command(&["sweep", "long.yaml", "--out", "stopped"]).stderr(Stdio::piped()).spawn().unwrap();
    let kept = || fs::read_to_string(scene.path("stopped/sweep.csv")).map_or(0, |text| text.lines().count());
    while kept() < 10 {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "it ended before it was interrupted");
    assert!(String::from_utf8_lossy(&output.stderr).contains("what has finished is kept in stopped"));
    assert!((10..=SMALL_POINTS).contains(&kept()), "{} lines", kept());
    scene.succeed(&["sweep", "long.yaml", "--out", "stopped"]);
    assert!(contents(&scene.path("stopped")) == contents(&scene.path("whole")));
}

/// Simulates all shards of `small.yaml` into the folders `NAME-shards/K-of-N`, the last first, and gives their names.
fn shards(scene: &Scene, count: usize) -> Vec<String> {
    for number in (1..=count).rev() {
        scene.succeed(&["sweep", "small.yaml", "--shard", &format!("{number}/{count}")]);
    }
    (1..=count).map(|number| format!("results/small-shards/{number}-of-{count}")).collect()
}

fn merge<'a>(shards: &'a [String], out: &'a str) -> Vec<&'a str> {
    let folders = shards.iter().map(String::as_str);
    ["sweep", "small.yaml", "--out", out, "--merge"].into_iter().chain(folders).collect()
}

#[test]
fn merged_shards_are_one_run_to_the_byte_also_after_an_interruption() {
    let scene = Scene::new();
    scene.write("small.yaml", &small_sweep());
    scene.succeed(&["sweep", "small.yaml", "--out", "whole"]);
    let whole = contents(&scene.path("whole"));
    let shards = shards(&scene, 5);
    scene.succeed(&merge(&shards, "merged"));
    assert!(contents(&scene.path("merged")) == whole);

    // A shard that was cut short goes on.
    let (path, marker) = (scene.path(&shards[2]).join("sweep.csv"), scene.path(&shards[2]).join(MARKER));
    let (text, ended) = (fs::read(&path).unwrap(), fs::read_to_string(&marker).unwrap());
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    fs::write(&marker, ended.replace("\"complete\": true", "\"complete\": false")).unwrap();
    let error = scene.fail(&merge(&shards, "other"));
    assert!(error.contains("results/small-shards/3-of-5: shard 3/5 has not ended"), "{error}");
    let printed = scene.succeed(&["sweep", "small.yaml", "--shard", "3/5"]);
    assert!(printed.starts_with(&format!("{} simulations of shard 3/5, of which ", SMALL_POINTS.div_ceil(5))));
    assert!(fs::read(&path).unwrap() == text && fs::read_to_string(&marker).unwrap() == ended);
    // Neither the order of shards nor what is there already matters.
    let reversed: Vec<String> = shards.iter().rev().cloned().collect();
    scene.succeed(&merge(&reversed, "merged"));
    assert!(contents(&scene.path("merged")) == whole);
    assert!(!scene.path("other").exists());
}

#[test]
fn missing_doubled_and_foreign_shards_are_named() {
    let scene = Scene::new();
    scene.write("small.yaml", &small_sweep());
    let shards = shards(&scene, 4);
    let fails = |folders: &[String], expected: &str| {
        let error = scene.fail(&merge(folders, "out"));
        assert!(error.contains(expected) && error.contains("small.yaml"), "expected `{expected}` in: {error}");
        assert!(!scene.path("out").exists(), "something was left by: {error}");
    };
    let with = |other: &str| [&shards[..3], &[other.to_owned()]].concat();
    fails(&shards[1..3], "missing shards: 1/4, 4/4");
    let third = "results/small-shards/3-of-4";
    fails(&with(third), &format!("shard 3/4 is there twice: {third} and {third}"));
    fails(&with("profile"), "profile: found no depthwise-results.json, expected the folder of a shard");
    scene.succeed(&["sweep", "small.yaml"]);
    fails(&with("results/small"), "results/small: found results of `depthwise sweep`, expected the folder of a shard");
    scene.succeed(&["sweep", "small.yaml", "--shard", "4/5", "--out", "fifth"]);
    fails(&with("fifth"), &format!("fifth: found shard 4/5, expected one of 4 as in {}", shards[0]));

    // The same grid of another configuration, version, input or machine.
    scene.write("small.yaml", &small_sweep().replace("count: 60", "count: 61"));
    scene.succeed(&["sweep", "small.yaml", "--shard", "4/4", "--out", "foreign"]);
    scene.write("small.yaml", &small_sweep());
    fails(&with("foreign"), "foreign: shard 4/4 is of another configuration");
    let changed = |file: &str, from: &str, to: &str| {
        scene.succeed(&["sweep", "small.yaml", "--shard", "4/4", "--out", "changed", "--restart"]);
        let text = scene.read(&format!("changed/{file}"));
        assert!(text.contains(from), "{text}");
        scene.write(&format!("changed/{file}"), &text.replacen(from, to, 1));
    };
    changed("inputs.yaml", "program: depthwise ", "program: depthwise 0.0.1-");
    fails(&with("changed"), "changed: shard 4/4 is written by depthwise 0.0.1-");
    changed("inputs.yaml", "profile/latency.csv: ", "profile/latency.csv: 0");
    fails(&with("changed"), "changed: shard 4/4 is of another profile/latency.csv");
    changed("sweep.csv", "\n3,\"one, two\"", "\n3,other");
    fails(&with("changed"), "changed/sweep.csv: found another line of point 3 than this program computes");

    let error = scene.fail(&["sweep", "small.yaml", "--shard", "2/4", "--out", third]);
    assert!(error.contains("are of shard 3/4, this is 2/4: choose another --out"), "{error}");
    let error = scene.fail(&["sweep", "small.yaml", "--shard", "1/500", "--out", "out"]);
    assert!(error.contains(&format!("shard 1/500: found {SMALL_POINTS} points")), "{error}");
    assert!(!scene.path("out").exists());
    for wrong in ["5/4", "0/4", "4"] {
        let output = scene.run(&["sweep", "small.yaml", "--shard", wrong]);
        assert!(String::from_utf8_lossy(&output.stderr).contains(&format!("found `{wrong}`, expected shard K of N")));
    }
}

#[test]
fn a_damaged_file_of_finished_points_is_refused_by_name_or_completed() {
    let scene = Scene::new();
    scene.write("small.yaml", &small_sweep());
    let sweep = ["sweep", "small.yaml", "--out", "out"];
    scene.succeed(&sweep);
    let (path, points) = (scene.path("out/sweep.csv"), column(&lines(&scene.path("out/sweep.csv")), "point").len());
    let whole = fs::read(&path).unwrap();
    let (mut refused, mut completed) = (0, 0);
    for seed in 0..32 {
        let mut bytes = whole.clone();
        let at = (mix(seed) % whole.len() as u64) as usize;
        match seed % 4 {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << (mix(seed + 100) % 8),
            2 => drop(bytes.splice(at..at, *b"\xff\n")),
            _ => drop(bytes.drain(at..whole.len().min(at + 40))),
        }
        fs::write(&path, &bytes).unwrap();
        let output = scene.run(&sweep);
        let error = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => {
                let found = lines(&path);
                let expected: Vec<String> = (0..points).map(|point| point.to_string()).collect();
                assert_eq!(column(&found, "point"), expected, "damage {seed}");
                completed += 1;
            }
            Some(1) => {
                assert!(error.contains("sweep.csv"), "damage {seed}: {error}");
                assert_eq!(fs::read(&path).unwrap(), bytes, "damage {seed}: what was there is kept");
                refused += 1;
            }
            other => panic!("damage {seed}: {other:?}, {error}"),
        }
    }
    assert!(refused > 0 && completed > 0, "{refused} refused, {completed} completed");
}

#[test]
fn a_summary_without_lines_or_columns_is_named_and_figures_stay() {
    let scene = Scene::new();
    scene.write("sweep.yaml", &small_sweep());
    scene.succeed(&["sweep", "sweep.yaml", "--out", "out"]);
    let figures = contents(&scene.path("out/figures"));
    for (text, expected) in [("", "found no line"), ("a,b\n1,2\n", "found no column `throughput_tok_s`")] {
        scene.write("out/sweep-summary.csv", text);
        let error = scene.fail(&["plot", "out"]);
        assert!(error.contains("out/sweep-summary.csv: ") && error.contains(expected), "{error}");
        assert_eq!(contents(&scene.path("out/figures")), figures);
    }
}

#[test]
fn a_sweep_without_a_kv_fill_has_that_which_the_model_is_made_for() {
    let scene = Scene::new();
    scene.write("small.yaml", &small_sweep());
    scene.succeed(&["sweep", "small.yaml", "--out", "out"]);
    assert!(column(&lines(&scene.path("out/sweep.csv")), "kv_fill").iter().all(|fill| *fill == "reuse"));
    let mut profile = profile();
    profile.meta.kv_fill = Some("first".into());
    profile.write(scene.path("profile")).unwrap();
    scene.succeed(&["sweep", "small.yaml", "--out", "shared"]);
    let fills = lines(&scene.path("shared/sweep.csv"));
    let fills = column(&fills, "kv_fill");
    assert!(fills.len() == SMALL_POINTS && fills.iter().all(|fill| *fill == "first"), "{fills:?}");
}

#[test]
fn machines_with_a_price_give_the_price_of_tokens() {
    let scene = Scene::new();
    let priced = small_sweep().replace("exits: exits}", "exits: exits, price_per_hour: 4.5}");
    scene.write("priced.yaml", &priced.replace("objectives:", "replicas: 3\nobjectives:"));
    scene.succeed(&["sweep", "priced.yaml", "--out", "out"]);
    let found = lines(&scene.path("out/sweep.csv"));
    let number = |name| column(&found, name).into_iter().map(|text| text.parse::<f64>().unwrap());
    for (throughput, price) in number("throughput_tok_s").zip(number("price_per_million_tokens")) {
        let hours = 1e6 / throughput / 3600.0;
        assert!((price / (3.0 * 4.5 * hours) - 1.0).abs() < 1e-9, "{price} at {throughput} tokens/s");
    }
    scene.write("free.yaml", &priced.replace("4.5", "0"));
    let error = scene.fail(&["sweep", "free.yaml", "--out", "free"]);
    assert!(error.contains("price_per_hour is 0: expected a number above 0"), "{error}");
    scene.write("unpriced.yaml", &small_sweep());
    scene.succeed(&["sweep", "unpriced.yaml", "--out", "unpriced"]);
    let found = lines(&scene.path("unpriced/sweep.csv"));
    assert!(column(&found, "price_per_million_tokens").iter().all(|price| price.is_empty()));
}

#[test]
fn results_of_other_inputs_are_not_mixed() {
    let scene = Scene::new();
    scene.write("sweep.yaml", &small_sweep());
    scene.succeed(&["sweep", "sweep.yaml", "--out", "out"]);
    let before = contents(&scene.path("out"));
    scene.write("sweep.yaml", &small_sweep().replace("title: made up", "title: retitled # and commented"));
    scene.succeed(&["sweep", "sweep.yaml", "--out", "out"]);

    scene.write("sweep.yaml", &small_sweep().replace("count: 60", "count: 61"));
    assert!(scene.fail(&["sweep", "sweep.yaml", "--out", "out"]).contains("out are of another configuration"));
    scene.write("sweep.yaml", &small_sweep());
    let latency = scene.read("profile/latency.csv");
    scene.write("profile/latency.csv", &latency.replacen("500", "501", 1));
    assert!(scene.fail(&["sweep", "sweep.yaml", "--out", "out"]).contains("of another profile/latency.csv"));
    scene.succeed(&["sweep", "sweep.yaml", "--out", "out", "--restart"]);
    assert!(contents(&scene.path("out")) != before);
    scene.write("profile/latency.csv", &latency);
    scene.succeed(&["sweep", "sweep.yaml", "--out", "out", "--restart"]);
    assert!(contents(&scene.path("out")) == before);

    scene.write("out/sweep.csv", &scene.read("out/sweep.csv").replacen("\n3,", "\nthree,", 1));
    assert!(scene.fail(&["sweep", "sweep.yaml", "--out", "out"]).contains("out/sweep.csv:5: found `three`"));
    fs::create_dir(scene.path("foreign")).unwrap();
    scene.write("foreign/thesis.tex", "dear to somebody");
    assert!(scene.fail(&["sweep", "sweep.yaml", "--out", "foreign"]).contains("choose another --out"));
}

#[test]
fn bad_sweeps_get_one_error_that_names_key_and_line_before_anything_runs() {
    let scene = Scene::new();
    let seeds: Vec<String> = (0..1000).map(|seed| seed.to_string()).collect();
    let rates: Vec<String> = (1..=200).map(|rate| rate.to_string()).collect();
    let absurd = SWEEP
        .replace("[1, 2, 3]", &format!("[{}]", seeds.join(", ")))
        .replace("[200, 400]", &format!("[{}]", rates.join(", ")));
    for (text, expected) in [
        (
            SWEEP.replace("max_batch: [4, 8]", "max_batch: [4, 0]"),
            "grid.max_batch: found 0, expected a whole number of at least 1 at line 20",
        ),
        (SWEEP.replace("max_batch: [4, 8]", "max_batch: [4, 4]"), "grid.max_batch: found 4 twice"),
        (SWEEP.replace("max_batch: [4, 8]", "max_batch: []"), "grid.max_batch: found an empty list"),
        (
            SWEEP.replace("max_batch: [4, 8]", "max_batch: 4"),
            "grid.max_batch: invalid type: integer `4`, expected a list",
        ),
        (
            SWEEP.replace("max_batch: [4, 8]", "max_batch: [4, 80]"),
            "grid.max_batch: 80 is more than serving.token_budget, 64",
        ),
        (
            SWEEP.replace("seed: [1, 2, 3]", "token_budget: [64, 6]"),
            "grid.max_batch: 8 is more than grid.token_budget, 6",
        ),
        (
            SWEEP.replace("rate_per_s: [200, 400]", "rate_per_s: [-1]"),
            "grid.rate_per_s: found -1, expected a number above 0 at line 22",
        ),
        (
            SWEEP.replace("top1: [0.5, 0.7]", "top1: [.nan]"),
            "grid.thresholds.top1: found NaN, expected a finite number at line 18",
        ),
        (SWEEP.replace("top1:", "top9:"), "grid.thresholds: unknown variant `top9`"),
        (SWEEP.replace("[reuse, first]", "[reuse, latest]"), "cycle:SLOTS with at least 2 slots at line 19"),
        (SWEEP.replace("[3MB]", "[3 parrots]"), "grid.device_memory"),
        (SWEEP.replace("[3MB]", "[1MB]"), "sequence, none: not one KV block fits"),
        (SWEEP.replace("  seed:", "  seeds:"), "grid: unknown field `seeds`"),
        (
            SWEEP.replace("exit: [none, oracle]", "exit: [none, none]"),
            "serving.exit and grid.thresholds: none is there twice",
        ),
        (SWEEP.replace("exit: [none, oracle]", "exit: [none, 'confidence:0.5']"), "confidence:top1:0.5 is there twice"),
        (SWEEP.replace("exit: [none, oracle]", "exit: ['static:3']"), "static exit depth 3 is outside"),
        (
            SWEEP.replace("{poisson: {rate_per_s: 100}}", "all_at_once"),
            "grid.rate_per_s of requests that arrive all at once",
        ),
        (SWEEP.replace("exits: exits", "exits: nowhere"), "nowhere"),
        (SWEEP.replace("systems:", "systems: []\nrest:"), "unknown field `rest`"),
        (SWEEP.replace("max: 40}", "max: 4000}"), "the cache holds"),
        (
            absurd,
            "the grid has 6400000 points (8 of systems and policies x 2 of kv_fill x 2 of max_batch x 1 of \
                  token_budget x 1 of prefill_chunk x 1 of exit_wait x 1 of device_memory x 200 of rate_per_s x 1000 of seed): expected at most 100000",
        ),
    ] {
        scene.write("bad.yaml", &text);
        let error = scene.fail(&["sweep", "bad.yaml"]);
        assert!(error.contains(expected) && error.contains("bad.yaml"), "expected `{expected}` in: {error}");
        assert!(!scene.path("results").exists(), "something was left by: {error}");
    }
}

/// Names of the figures of a sweep.
fn figures(scene: &Scene) -> Vec<String> {
    let files = contents(&scene.path("results/sweep/figures"));
    files.into_iter().map(|(name, _)| name.to_string_lossy().into_owned()).collect()
}

#[test]
fn budgets_and_chunks_vary_and_get_figures_of_their_own() {
    let scene = Scene::new();
    let grid = "  token_budget: [32, 64]\n  prefill_chunk: [8, 16]\n";
    let sweep = small_sweep().replace("  seed: [1, 2, 3]\n", grid);
    scene.write("sweep.yaml", &sweep);
    scene.succeed(&["sweep", "sweep.yaml"]);
    let summary = lines(&scene.path("results/sweep/sweep-summary.csv"));
    let pairs: Vec<_> = column(&summary, "token_budget").into_iter().zip(column(&summary, "prefill_chunk")).collect();
    for (budget, chunk) in [("32", "8"), ("32", "16"), ("64", "8"), ("64", "16")] {
        let of_pair = pairs.iter().filter(|pair| **pair == (budget, chunk)).count();
        assert_eq!(of_pair, pairs.len() / 4, "{budget}, {chunk}");
        let name = format!("-token-budget-{budget}-chunk-{chunk}.png");
        let drawn = figures(&scene);
        assert!(drawn.iter().any(|file| file.ends_with(&name)), "{name} in {drawn:?}");
    }
    // A chunk that only follows from the policy is no setting of its own.
    scene.write("sweep.yaml", &sweep.replace("  prefill_chunk: [8, 16]\n", ""));
    scene.succeed(&["sweep", "sweep.yaml", "--restart"]);
    let drawn = figures(&scene);
    assert!(!drawn.is_empty() && !drawn.iter().any(|file| file.contains("chunk")), "{drawn:?}");
}

#[test]
fn systems_may_narrow_the_policies_and_traces_are_swept_over_rates() {
    let scene = Scene::new();
    let trace: String = (0..50).map(|id| format!("{id},{}.0,20,{}\n", id * 9_000, 5 + id % 30)).collect();
    scene.write("requests.csv", &format!("request,arrival_us,prompt_tokens,output_tokens\n{trace}"));
    let (before, rest) = SWEEP.split_once("requests:").unwrap();
    let (_, after) = rest.split_once("serving:").unwrap();
    let narrowed = "  - {name: narrow, profile: profile, exits: exits, batching: [vanilla], exit: [none]}\nobjectives";
    let text = format!("{before}requests: {{file: requests.csv}}\nserving:{after}").replace("objectives", narrowed);
    scene.write("sweep.yaml", &text);
    scene.succeed(&["sweep", "sweep.yaml"]);
    let sweep = lines(&scene.path("results/sweep/sweep.csv"));
    let of_narrow: Vec<(&str, &str)> = column(&sweep, "system")
        .into_iter()
        .zip(column(&sweep, "batching"))
        .filter(|(system, _)| *system == "narrow")
        .collect();
    assert!(of_narrow.len() == POINTS / 8 && of_narrow.iter().all(|(_, batching)| *batching == "vanilla"));
    let makespans = |rate: &str| -> f64 {
        let of_rate = column(&sweep, "rate_per_s").into_iter().zip(column(&sweep, "makespan_s"));
        of_rate.filter(|(of, _)| *of == rate).map(|(_, makespan)| makespan.parse::<f64>().unwrap()).fold(0.0, f64::max)
    };
    // 50 requests arrive within 49 gaps.
    assert!(makespans("200.0") > 49.0 / 200.0 && makespans("400.0") < makespans("200.0"));
}

#[test]
fn capacity_of_a_sweep_s_policies_comes_with_a_table_and_a_figure() {
    let scene = Scene::new();
    let without_rates = SWEEP.replace("  rate_per_s: [200, 400]\n", "");
    scene.write("capacity.yaml", &without_rates);
    let printed = scene.succeed(&["capacity", "capacity.yaml", "--out", "out", "--tolerance", "0.1"]);
    assert_eq!(printed.lines().filter(|line| line.contains("depth") && line.contains("oracle")).count(), 4);
    let capacities = lines(&scene.path("out/capacity.csv"));
    assert_eq!(capacities.len(), 1 + POINTS / 2);
    let number = |text: &&str| text.parse::<f64>().unwrap();
    assert!(column(&capacities, "capacity_req_s").iter().map(number).all(|rate| rate > 10.0));
    assert!(column(&capacities, "objectives_met").iter().map(number).all(|share| share >= 0.9));
    assert_eq!(lines(&scene.path("out/capacity-summary.csv")).len(), 1 + POINTS / 2 / 3);
    let figure = "out/figures/capacity-kv-fill-first-batch-8.svg";
    assert!(scene.read(figure).contains("90% of requests meet TTFT 20 ms, TPOT 5 ms"));
    let before = contents(&scene.path("out"));
    fs::write(
        scene.path("out/capacity.csv"),
        &before.iter().find(|file| file.0.ends_with("capacity.csv")).unwrap().1[..3000],
    )
    .unwrap();
    scene.succeed(&["capacity", "capacity.yaml", "--out", "out", "--tolerance", "0.1"]);
    assert!(contents(&scene.path("out")) == before, "a search that was cut short goes on");

    assert!(scene.fail(&["capacity", "capacity.yaml", "--out", "out"]).contains("of another configuration"));
    assert!(scene.fail(&["capacity", "sweep.yaml"]).contains("grid.rate_per_s: the rate is what is searched for"));
    scene.write("aimless.yaml", &without_rates.replace("objectives: {ttft_ms: 20, tpot_ms: 5}\n", ""));
    assert!(scene.fail(&["capacity", "aimless.yaml"]).contains("no objective"));
    let both = scene.run(&["capacity", "capacity.yaml", "--profile", "profile"]);
    assert!(String::from_utf8_lossy(&both.stderr).contains("cannot be used with '--profile <PROFILE>'"));
    let neither = scene.run(&["capacity", "--ttft-ms", "5"]);
    assert!(String::from_utf8_lossy(&neither.stderr).contains("expected a sweep's YAML file, or --requests"));
}

const SYSTEMS: &str = "schema_version: 1
title: made up
requests:
  generate:
    count: 40
    arrivals: all_at_once
    prompt_tokens: {fixed: 8}
    output_tokens: {fixed: 20}
serving:
  batching: [depth]
  exit: [none, 'top1:0.6']
  max_batch: 8
  token_budget: 64
systems:
  - {name: plain, profile: profile, exits: exits, batching: [sequence], exit: [none]}
  - {name: ours, profile: profile, exits: exits}
  - {name: bound, profile: profile, exits: exits, exit: [oracle], compared_with: ours}
sweeps:
  max_batch: [4, 8]
";

#[test]
fn an_experiment_with_objectives_reports_goodput_and_refuses_those_that_mean_nothing() {
    let scene = Scene::new();
    let with = |objectives: &str| SYSTEMS.replace("sweeps:", &format!("objectives: {objectives}\nsweeps:"));
    scene.write("timely.yaml", &with("{ttft_ms: 50, tpot_ms: 1e6}"));
    scene.succeed(&["run", "timely.yaml"]);
    let runs = lines(&scene.path("results/timely/summary.csv"));
    let number = |name: &str| -> Vec<f64> { column(&runs, name).iter().map(|cell| cell.parse().unwrap()).collect() };
    let (met, goodput, makespan) = (number("objectives_met"), number("goodput_req_s"), number("makespan_s"));
    for (run, met) in met.iter().enumerate() {
        let expected = met * 40.0 / makespan[run];
        assert!((goodput[run] - expected).abs() < 1e-9, "run {run}: {} instead of {expected}", goodput[run]);
    }
    assert!(met.iter().any(|&met| met > 0.0 && met < 1.0), "some of the queued requests wait for too long: {met:?}");
    for (objectives, expected) in [("{}", "no objective"), ("{ttft_ms: -1}", "ttft_ms is -1: expected 0 or more")] {
        scene.write("aimless.yaml", &with(objectives));
        let error = scene.fail(&["run", "aimless.yaml", "--out", "other"]);
        assert!(error.contains(expected) && error.contains("objectives"), "{error}");
    }
    assert!(!scene.path("other").exists());
}

#[test]
fn systems_are_compared_at_each_batch_limit_and_the_parts_of_a_token_add_up_to_its_time() {
    let scene = Scene::new();
    scene.write("systems.yaml", SYSTEMS);
    scene.succeed(&["run", "systems.yaml"]);
    let runs = lines(&scene.path("results/systems/summary.csv"));
    let number = |name: &str| -> Vec<f64> { column(&runs, name).iter().map(|cell| cell.parse().unwrap()).collect() };
    assert_eq!(column(&runs, "system"), ["plain", "plain", "ours", "ours", "ours", "ours", "bound", "bound"]);
    assert_eq!(number("max_batch"), [4.0, 8.0, 4.0, 4.0, 8.0, 8.0, 4.0, 8.0]);
    let (throughput, speedup) = (number("throughput_tok_s"), number("speedup"));
    for (run, baseline) in [0, 1, 0, 0, 1, 1, 2, 4].into_iter().enumerate() {
        let expected = throughput[run] / throughput[baseline];
        assert!((speedup[run] - expected).abs() < 1e-9, "run {run}: {} instead of {expected}", speedup[run]);
    }

    let parts = lines(&scene.path("results/systems/time_by_part.csv"));
    let times = column(&parts, "us_per_token");
    let (busy, makespan, tokens) = (number("busy"), number("makespan_s"), number("output_tokens"));
    let of_run = times.len() / busy.len();
    for (run, times) in times.chunks(of_run).enumerate() {
        let sum: f64 = times.iter().map(|time| time.parse::<f64>().unwrap()).sum();
        let expected = 1e6 * busy[run] * makespan[run] / tokens[run];
        assert!((sum / expected - 1.0).abs() < 1e-4, "run {run}: {sum} instead of {expected}");
    }
    assert!(scene.path("results/systems/figures/time-by-part-8.svg").exists());

    scene.write("systems.yaml", &SYSTEMS.replace("compared_with: ours", "compared_with: theirs"));
    let error = scene.fail(&["run", "systems.yaml", "--out", "other"]);
    assert!(error.contains("bound: compared_with is `theirs`, which is no system"), "{error}");
    assert!(!scene.path("other").exists());
}

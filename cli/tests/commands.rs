//! The commands as a user runs them, on a small model with random weights.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use engine::Tokenizer;
use engine::config::{ModelConfig, Sharing};
use engine::weights::{Stored, Weights};
use experiments::results::Marker;
use experiments::{Experiment, Reporter};
use traces::{ExitTable, ExitTrace};

use common::Scene;

const TEXT: &str = "In the beginning was the loop, and the loop was with the block, and the block was shared. ";

/// The folder holds a model, a text, a request trace and an experiment.
impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        let tokenizer = Tokenizer::train(TEXT, 272).unwrap();
        let config = ModelConfig {
            vocab_size: tokenizer.vocab_size(),
            hidden_size: 32,
            intermediate_size: 64,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 8,
            block_layers: 1,
            num_loops: 3,
            tie_embeddings: true,
            max_positions: 256,
            ..ModelConfig::default()
        };
        let model = scene.path("model");
        Weights::random(config, 1).unwrap().save(&model, Stored::F32).unwrap();
        tokenizer.save(&model.join("tokenizer.json")).unwrap();
        scene.write("prompts.txt", &TEXT.repeat(40));
        scene.write("experiment.yaml", &experiment("", 12));
        let lines: String = (0..40).map(|id| format!("{id},{}.0,{},{}\n", id * 500, 5 + id % 7, 3 + id % 11)).collect();
        scene.write("requests.csv", &format!("request,arrival_us,prompt_tokens,output_tokens\n{lines}"));
        scene
    }

    /// An ordinary transformer in the folder `ordinary`.
    fn ordinary_model(&self, layers: usize, hidden_size: usize) {
        let config = ModelConfig {
            vocab_size: 272,
            hidden_size,
            intermediate_size: 3 * hidden_size,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: hidden_size / 2,
            block_layers: layers,
            num_loops: 1,
            sharing: Sharing::Nothing,
            ..ModelConfig::default()
        };
        let folder = self.path("ordinary");
        Weights::random(config, 1).unwrap().save(&folder, Stored::F32).unwrap();
        fs::copy(self.path("model/tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    }

    /// A profile and an exit trace of the model.
    fn measured(&self) {
        self.succeed(&[
            "profile",
            "--model",
            "model",
            "--out",
            "profile",
            "--max-batch",
            "8",
            "--token-budget",
            "16",
            "--max-tokens",
            "32",
            "--prefill-chunk",
            "16",
            "--rounds",
            "1",
        ]);
        self.succeed(&[
            "record",
            "--model",
            "model",
            "--prompts",
            "prompts.txt",
            "--requests",
            "requests.csv",
            "--out",
            "exits",
        ]);
    }

    fn simulate<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        let common = [
            "simulate",
            "--requests",
            "requests.csv",
            "--profile",
            "profile",
            "--exits",
            "exits",
            "--max-batch",
            "8",
            "--token-budget",
            "16",
            "--seed",
            "1",
        ];
        common.into_iter().chain(more.iter().copied()).collect()
    }
}

fn experiment(more: &str, requests: u32) -> String {
    format!(
        "schema_version: 1
title: test
requests:
  generate:
    count: {requests}
    seed: 1
    arrivals: all_at_once
    prompt_tokens: {{uniform: {{min: 2, max: 12}}}}
    output_tokens: {{uniform: {{min: 2, max: 12}}}}
serving:
  batching: [vanilla, sequence, depth]
  exit: [none, oracle, 'confidence:top1:0.1']
  max_batch: 4
  token_budget: 16
engine: {{model: model, prompts: prompts.txt, repeats: 2, rounds: 2}}
sweeps: {{thresholds: {{top1: [0.05, 0.1], entropy: [1]}}, max_batch: [2, 4]}}
{more}"
    )
}

fn lines(path: &Path) -> Vec<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_path(path).unwrap();
    reader.records().map(|record| record.unwrap().iter().map(str::to_owned).collect()).collect()
}

fn column<'a>(lines: &'a [Vec<String>], name: &str) -> Vec<&'a str> {
    let index = lines[0].iter().position(|column| column == name).unwrap_or_else(|| panic!("no column {name}"));
    lines[1..].iter().map(|line| line[index].as_str()).collect()
}

#[test]
fn an_experiment_leaves_measured_and_simulated_runs_of_every_combination_with_figures() {
    let scene = Scene::new();
    scene.succeed(&["run", "experiment.yaml"]);
    let results = scene.path("results/experiment");
    let summary = lines(&results.join("summary.csv"));
    assert_eq!(summary.len(), 1 + 2 * 9);
    assert_eq!(column(&summary, "source"), [["measured"; 9], ["simulated"; 9]].concat());
    for name in ["batching", "exit", "threshold", "max_batch", "ttft_p50_ms", "tpot_p50_ms", "makespan_s"] {
        column(&summary, name);
    }
    let number = |text: &str| text.parse::<f64>().unwrap();
    let tokens = column(&summary, "output_tokens");
    assert!(tokens.iter().all(|&count| count == tokens[0]), "every run generates the same number of tokens");
    for (throughput, makespan) in column(&summary, "throughput_tok_s").iter().zip(column(&summary, "makespan_s")) {
        assert!((number(throughput) * number(makespan) / number(tokens[0]) - 1.0).abs() < 1e-9);
    }
    for ((exit, agreement), depth) in
        column(&summary, "exit").iter().zip(column(&summary, "token_agreement")).zip(column(&summary, "mean_depth"))
    {
        assert!((1.0..=3.0).contains(&number(depth)));
        assert!(*exit != "none" || (number(agreement), number(depth)) == (1.0, 3.0), "no exit is full depth");
    }
    for (source, (exit, agreement)) in
        column(&summary, "source").iter().zip(column(&summary, "exit").iter().zip(column(&summary, "token_agreement")))
    {
        // Of exits that are known before by their depths, the simulator knows no tokens.
        match (*source, *exit) {
            ("simulated", "oracle" | "confidence") => assert_eq!(agreement, ""),
            _ => assert!((0.0..=1.0).contains(&number(agreement)), "{agreement}"),
        }
    }
    let validation = lines(&results.join("validation.csv"));
    let repeats = lines(&results.join("repeats.csv"));
    assert_eq!(repeats.len() - 1, 2 * (validation.len() - 1), "two repeats of each");
    assert_eq!(column(&validation, "metric").iter().filter(|&&metric| metric == "throughput_tok_s").count(), 9);
    let errors = lines(&results.join("errors.csv"));
    assert_eq!(column(&errors, "combinations"), ["9"; 6]);
    let intervals =
        column(&errors, "mean_abs_error_low_pct").into_iter().zip(column(&errors, "mean_abs_error_high_pct"));
    assert!(intervals.into_iter().all(|(low, high)| 0.0 <= number(low) && number(low) <= number(high)));
    assert_eq!(of_metric(&validation, "mean_depth").len(), 9);
    for (predicted, measured) in of_metric(&validation, "mean_depth") {
        assert_eq!(predicted, measured, "exits are known before");
    }
    let predictions = lines(&results.join("predictions.csv"));
    assert_eq!(column(&predictions, "predicted"), column(&validation, "predicted"), "what was written is what counts");
    let figures = fs::read_dir(results.join("figures")).unwrap().count();
    assert!(figures >= 2 * 9, "{figures} figures");
    assert!(results.join("figures/frontier.png").exists());
    let quality = lines(&results.join("quality.csv"));
    assert_eq!(column(&quality, "metric").iter().filter(|&&metric| metric == "equal_share").count(), 9);
    for ((value, low), high) in
        column(&quality, "value").iter().zip(column(&quality, "low")).zip(column(&quality, "high"))
    {
        assert!(number(low) <= number(value) && number(value) <= number(high), "{low} <= {value} <= {high}");
    }

    let earlier = fs::read(results.join("figures/throughput.svg")).unwrap();
    fs::remove_dir_all(results.join("figures")).unwrap();
    scene.succeed(&["plot", "results/experiment"]);
    assert_eq!(fs::read(results.join("figures/throughput.svg")).unwrap(), earlier);
}

/// Predicted and measured values of a metric in a table of comparisons.
fn of_metric<'a>(lines: &'a [Vec<String>], metric: &str) -> Vec<(&'a str, &'a str)> {
    let values = column(lines, "predicted").into_iter().zip(column(lines, "measured"));
    let of_metric = column(lines, "metric").into_iter().zip(values).filter(|(found, _)| *found == metric);
    of_metric.map(|(_, values)| values).collect()
}

#[test]
fn a_validation_compares_every_threshold_beside_the_baseline_and_at_rates_of_its_own() {
    let scene = Scene::new();
    let policies = ["confidence:margin:0.001", "confidence:margin:0.9"];
    let model = ["validate", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv"];
    let limits = ["--max-batch", "4", "--token-budget", "16", "--repeats", "2", "--rounds", "2"];
    let exits = format!("none,{}", policies.join(","));
    let policy = ["--batching", "sequence", "--exit", &exits, "--kv-fill", "reuse,skip"];
    let rates = ["--rates", "0.5,1.2", "--ttft-ms", "1000000", "--out", "out"];
    let printed = scene.succeed(&[&model[..], &limits, &policy, &rates].concat());
    let table = |name: &str| lines(&scene.path(&format!("out/{name}.csv")));
    for name in
        ["predictions", "predictions_at_rates", "speedups", "absolute", "at_rates", "repeats", "passes", "summary"]
    {
        let lines = table(name);
        let found: Vec<_> = column(&lines, "exit_policy").into_iter().zip(column(&lines, "kv_fill")).collect();
        for combination in policies.iter().flat_map(|policy| [(*policy, "reuse"), (*policy, "skip")]) {
            assert!(found.contains(&combination), "{name}: {found:?}");
        }
    }
    let depths = table("absolute");
    let depths = of_metric(&depths, "mean_depth");
    assert!(depths.len() == 5 && depths.iter().all(|(predicted, measured)| predicted == measured), "{depths:?}");
    let ratios = table("speedups");
    assert_eq!(of_metric(&ratios, "throughput_tok_s").len(), 5);
    let of_equals = &of_metric(&ratios, "throughput_tok_s")[0];
    assert_eq!(of_equals.0, "1.0", "sequence-wise batching without exits beside itself");
    // Means leave out what is equal to the baseline.
    let errors = table("errors");
    let of_errors: Vec<_> = column(&errors, "table").into_iter().zip(column(&errors, "combinations")).collect();
    assert!(of_errors.contains(&("speedups", "4")) && of_errors.contains(&("absolute", "5")), "{of_errors:?}");
    let at_rates = table("at_rates");
    let loads: Vec<_> = column(&at_rates, "load").into_iter().zip(column(&at_rates, "metric")).collect();
    assert!(loads.contains(&("1.2", "throughput_tok_s")) && !loads.contains(&("0.5", "throughput_tok_s")), "{loads:?}");
    assert!(loads.contains(&("0.5", "goodput_req_s")), "{loads:?}");
    for heading in ["ratios to sequence-wise", "values in the closed loop", "own capacity", "mean absolute"] {
        assert!(printed.contains(heading), "{heading}: {printed}");
    }
    for figure in ["speedups", "absolute", "at-rates"] {
        assert!(scene.path(&format!("out/figures/{figure}.png")).exists(), "{figure}");
    }
}

/// Looks at the predictions when a message says that replays are being measured.
struct Watch {
    staging: PathBuf,
    /// What each file of predictions held first.
    seen: BTreeMap<&'static str, Vec<u8>>,
    notes: Vec<String>,
}

impl Reporter for Watch {
    fn message(&mut self, text: &str) {
        for (stage, file) in [("closed loop", "predictions.csv"), ("% load", "predictions_at_rates.csv")] {
            if text.contains(stage) {
                let found = fs::read(self.staging.join(file)).expect("predictions come before replays");
                assert_eq!(*self.seen.entry(file).or_insert_with(|| found.clone()), found, "{text}");
            }
        }
    }

    fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }
}

#[test]
fn predictions_are_written_before_the_first_replay_and_their_hash_is_kept() {
    let scene = Scene::new();
    let text =
        experiment("validation: {in_flight: 3, rates: [0.8]}", 12).replace("all_at_once", "{poisson: {rate_per_s: 9}}");
    let text = text.lines().filter(|line| !line.starts_with("sweeps")).collect::<Vec<_>>().join("\n");
    scene.write("validation.yaml", &text);
    let experiment = Experiment::load(&scene.path("validation.yaml")).unwrap();
    let results = scene.path("out");
    let staging = results.join(".depthwise-unfinished");
    let mut watch = Watch { staging, seen: BTreeMap::new(), notes: Vec::new() };
    let report = experiments::run(&experiment, scene.0.path(), &results, &mut watch).unwrap();
    assert!(matches!(report, experiments::run::Report::Validated(_)));
    let marker = Marker::read(&results).unwrap().unwrap();
    assert_eq!(watch.seen.keys().copied().collect::<Vec<_>>(), ["predictions.csv", "predictions_at_rates.csv"]);
    for (file, seen) in watch.seen {
        assert_eq!(fs::read(results.join(file)).unwrap(), seen, "{file}");
        let seal = &marker.sealed[file];
        assert!(
            watch.notes.iter().any(|note| note.contains(&seal.sha256) && note.contains(&seal.written_at)),
            "{file}"
        );
    }
    let summary = lines(&results.join("summary.csv"));
    assert_eq!(column(&summary, "requests"), ["12"; 18]);
}

#[test]
fn an_experiment_at_loads_serves_the_same_requests_at_each_share_of_the_capacity() {
    let scene = Scene::new();
    let at = |loads: &str| {
        format!(
            "{{schema_version: 1, title: test, requests: {{file: requests.csv}}, \
             serving: {{batching: [depth], exit: [none, oracle, 'top1:0.1'], max_batch: 4, token_budget: 16}}, \
             engine: {{model: model, prompts: prompts.txt, repeats: 2, rounds: 1, loads: {loads}}}}}"
        )
    };
    scene.write("loads.yaml", &at("[0.5, 0.25]"));
    let printed = scene.succeed(&["run", "loads.yaml", "--out", "out"]);
    assert!(printed.contains("at 50% of the capacity") && printed.contains("mean absolute"), "{printed}");
    let span = |load: &str| {
        let requests = lines(&scene.path(&format!("out/load-{load}/requests.csv")));
        let measured = lines(&scene.path(&format!("out/load-{load}/summary.csv")));
        assert_eq!(measured.len(), 1 + 2 * 3);
        let arrivals = column(&requests, "arrival_s").into_iter().map(|text| text.parse::<f64>().unwrap());
        arrivals.fold(0.0, f64::max)
    };
    // Arrivals are whole nanoseconds.
    assert!((span("0.25") / span("0.5") - 2.0).abs() < 1e-5, "half the rate is twice the time");
    let predictions = lines(&scene.path("out/predictions.csv"));
    assert_eq!(column(&predictions, "load").iter().filter(|load| **load == "0.25").count(), 3 * 6);
    for (loads, expected) in [("[0]", "engine.loads: 0 is no positive share"), ("[1, 1]", "a share is there twice")] {
        scene.write("wrong.yaml", &at(loads));
        let error = scene.fail(&["run", "wrong.yaml", "--out", "wrong"]);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_validation_of_what_cannot_be_is_refused_by_its_option() {
    let scene = Scene::new();
    let validate =
        ["validate", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv", "--out", "out"];
    for (more, expected) in [
        (["--rates", "0"], "--rates: 0 is no positive share of the capacity"),
        (["--in-flight", "0"], "--in-flight is 0: expected at least 1"),
        (["--rounds", "0"], "--rounds is 0: expected at least 1"),
    ] {
        let error = scene.fail(&[&validate[..], &more].concat());
        assert!(error.contains(expected), "{error}");
    }
    for (more, expected) in [
        ("validation: {rates: [0.5]}", "sweeps beside validation"),
        ("validation: {rate: [0.5]}", "unknown field `rate`"),
    ] {
        scene.write("wrong.yaml", &experiment(more, 12));
        let error = scene.fail(&["run", "wrong.yaml", "--out", "out"]);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_simulation_is_the_same_to_the_bit_on_any_number_of_threads() {
    let scene = Scene::new();
    scene.measured();
    let mut files = Vec::new();
    for (threads, out) in [("1", "one"), ("2", "two"), ("2", "again")] {
        let status =
            scene.command(&scene.simulate(&["--out", out])).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(status.status.success());
        files.push(["summary.csv", "requests.csv"].map(|name| fs::read(scene.path(out).join(name)).unwrap()));
    }
    assert!(files[0] == files[1] && files[1] == files[2]);
    let output = scene.command(&scene.simulate(&["--out", "other", "--seed", "2"])).output().unwrap();
    assert!(!output.status.success(), "an option given twice is refused");
}

#[test]
fn several_machines_report_goodput_and_leave_a_timeline() {
    let scene = Scene::new();
    scene.measured();
    let machines = ["--replicas", "2", "--routing", "least-loaded", "--spread", "--ttft-ms", "100000"];
    let one_policy = ["--batching", "depth", "--exit", "oracle"];
    let printed = scene.succeed(&scene.simulate(&[&machines[..], &one_policy, &["--out", "two"]].concat()));
    assert!(printed.contains("goodput req/s"), "{printed}");
    let summary = lines(&scene.path("two/summary.csv"));
    assert_eq!(column(&summary, "replicas"), ["2"]);
    assert_eq!(column(&summary, "objectives_met"), ["1.0"]);
    let timeline = |more: &[&'static str]| {
        let mut arguments = scene.simulate(&["--out", "timeline.json", "--replicas", "2"]);
        arguments[0] = "timeline";
        [&arguments[..], more].concat()
    };
    scene.succeed(&timeline(&one_policy));
    let written = fs::read_to_string(scene.path("timeline.json")).unwrap();
    for name in ["machine 0", "machine 1", "request 39", "rows by depth"] {
        assert!(written.contains(name), "{name}");
    }
    assert!(scene.fail(&timeline(&[])).contains("a timeline is of one"));
    assert!(scene.fail(&scene.simulate(&["--replicas", "0"])).contains("no replicas"));
    assert!(scene.fail(&scene.simulate(&["--ttft-ms", "NaN"])).contains("--ttft-ms"));
}

#[test]
fn kv_blocks_follow_from_memory_and_both_are_reported() {
    let scene = Scene::new();
    scene.measured();
    let profile = fs::read_to_string(scene.path("profile/profile.yaml")).unwrap();
    let figures = "memory: {device_bytes: 1000000, other_bytes: 100000, row_bytes: 1000, logits_bytes: 0}\n";
    scene.write("profile/profile.yaml", &(profile.clone() + figures));
    let number = |key: &str| -> u64 {
        let line = profile.lines().find(|line| line.starts_with(key)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let block = 16 * number("kv_bytes_per_token");
    let blocks = |usable: u64| (usable - number("weight_bytes") - 100_000 - 16 * 1000) / block;
    let simulated = |more: &[&'static str]| {
        let printed = scene.succeed(&scene.simulate(&[&["--exit", "none", "--out", "out"], more].concat()));
        let summary = lines(&scene.path("out/summary.csv"));
        let of = |name| column(&summary, name)[0].to_owned();
        assert!(printed.contains(&format!("memory: {} KV blocks of 16 tokens", of("kv_blocks"))), "{printed}");
        assert_eq!(of("weight_bytes"), number("weight_bytes").to_string());
        of("kv_blocks")
    };
    assert_eq!(simulated(&[]), blocks(900_000).to_string());
    assert_eq!(simulated(&["--memory-utilization", "0.5"]), blocks(500_000).to_string());
    assert_eq!(simulated(&["--device-memory", "2MB"]), blocks(1_800_000).to_string());
    assert_eq!(simulated(&["--num-blocks", "50"]), "50");
    assert!(scene.fail(&scene.simulate(&["--device-memory", "1kB"])).contains("not one KV block fits"));
}

#[test]
fn prompts_that_begin_alike_are_found_again() {
    let scene = Scene::new();
    scene.measured();
    let ids: Vec<u32> = (0..33).collect();
    let lines_of: String = (0..10)
        .map(|id| {
            let arrival = id * 1_000_000_000_u64;
            format!(
                "{{\"arrival_time_ns\": {arrival}, \"input_toks\": 33, \"output_toks\": 2, \"input_tok_ids\": {ids:?}}}\n"
            )
        })
        .collect();
    scene.write("alike.jsonl", &lines_of);
    let simulate = |more: &[&'static str]| {
        let mut arguments = scene.simulate(&["--exit", "none", "--batching", "sequence", "--out", "out"]);
        arguments[2] = "alike.jsonl";
        let output = scene.run(&[&arguments[..], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let hits = column(&lines(&scene.path("out/summary.csv")), "prefix_hit_rate")[0].to_owned();
        (hits, String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(simulate(&[]).0, "");
    // Blocks of 8: four of each prompt's 33 tokens are found by all but the first.
    let (hits, warning) = simulate(&["--prefix-caching", "--block-tokens", "8"]);
    assert_eq!(hits, (9.0 * 32.0 / 330.0).to_string());
    assert!(!warning.contains("prefix_caching"), "{warning}");
    // The engine's prompts begin alike as the trace says; its blocks are of 16 tokens.
    let replay = |more: &[&'static str]| {
        let files = ["--model", "model", "--prompts", "prompts.txt", "--requests", "alike.jsonl", "--out", "replayed"];
        let serving = ["--batching", "sequence", "--exit", "none", "--max-batch", "4", "--token-budget", "16"];
        let printed = scene.succeed(&[&["replay"], &files[..], &serving[..], more].concat());
        (column(&lines(&scene.path("replayed/summary.csv")), "prefix_hit_rate")[0].to_owned(), printed)
    };
    assert_eq!(replay(&[]).0, "");
    let (replayed, printed) = replay(&["--prefix-caching"]);
    assert_eq!(replayed, simulate(&["--prefix-caching"]).0);
    assert!(replayed.parse::<f64>().unwrap() > 0.5 && printed.contains("prefix hits"), "{replayed}: {printed}");
    let printed = scene.run(&scene.simulate(&["--exit", "none", "--prefix-caching", "--async-scheduling"]));
    assert!(String::from_utf8_lossy(&printed.stderr).contains("only preempted requests find"));
    assert!(String::from_utf8_lossy(&printed.stdout).contains("prefix hits"));
    assert!(
        scene.fail(&scene.simulate(&["--exit", "oracle", "--async-scheduling"])).contains("--async-scheduling with")
    );
    let both = scene.simulate(&["--exit", "none", "--async-scheduling", "--exit-wait", "2"]);
    assert!(scene.fail(&both).contains("--exit-wait is 2 with --async-scheduling"));
}

/// A profile of one loop that comes with the repository, and an exit trace of as many.
const PAPER: [&str; 2] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/paper/profiles/gemma-vanilla"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/paper/exits/vanilla"),
];

#[test]
fn without_an_exit_trace_every_token_runs_every_depth() {
    let scene = Scene::new();
    let [profile, exits] = PAPER;
    let simulate = ["simulate", "--requests", "requests.csv", "--profile", profile, "--out", "out"];
    let makespan = |more: &[&str]| {
        scene.succeed(&[&simulate[..], &["--batching", "sequence", "--exit", "none"], more].concat());
        column(&lines(&scene.path("out/summary.csv")), "makespan_s")[0].to_owned()
    };
    assert_eq!(makespan(&[]), makespan(&["--exits", exits]));
    assert!(scene.fail(&simulate).contains("exit policy baselines without an exit trace"));
}

#[test]
fn a_vllm_run_that_does_not_say_its_kv_blocks_has_those_that_fit() {
    let scene = Scene::new();
    fs::create_dir(scene.path("run")).unwrap();
    let requests = r#"{"request_id": "r-0", "input_toks": 20, "output_toks": 3, "arrival_time": 9.0, "queued_ts": 1.0, "first_token_ts": 2.0, "last_token_ts": 3.0}"#;
    scene.write("run/requests.jsonl", requests);
    scene.write("run/workload.jsonl", r#"{"input_toks": 20, "output_toks": 3, "arrival_time_ns": 0}"#);
    let vllm = |meta: &str| {
        let asked = r#""vllm_version": "0.19.0", "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64}"#;
        scene.write("run/meta.json", &format!("{{{asked}{meta}}}"));
        scene.run(&["vllm", "run", "--profile", PAPER[0]])
    };
    let printed = |meta| String::from_utf8(vllm(meta).stdout).unwrap();
    assert!(printed("").contains("16 KV blocks, room for every batch"), "{}", printed(""));
    // 9 GB, less the profile's weights of 5,008,576,000 bytes, by 16 tokens of 18,432 bytes.
    let memory = r#", "hardware": {"device_total_memory_bytes": 10000000000}"#;
    assert!(printed(memory).contains("13534 KV blocks, which 0.9 of the device's 10000000000 bytes hold"));
    assert!(!vllm(r#", "hardware": {"device_total_memory_bytes": 1000000000}"#).status.success());
}

#[test]
fn simulations_and_replays_take_any_kv_fill() {
    let scene = Scene::new();
    scene.measured();
    let mut kv_bytes = Vec::new();
    for fill in ["reuse", "first", "skip", "backfill"] {
        let printed = scene.succeed(&scene.simulate(&["--kv-fill", fill, "--out", "out"]));
        assert!(printed.contains("KV fill") && printed.contains(&format!(" {fill} ")), "{printed}");
        let summary = lines(&scene.path("out/summary.csv"));
        assert_eq!(column(&summary, "kv_fill"), [fill; 21]);
        let backfill: u64 = column(&summary, "backfill_rows").iter().map(|rows| rows.parse::<u64>().unwrap()).sum();
        assert_eq!(backfill > 0, fill == "backfill");
        let replay = ["replay", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv"];
        let measured = ["--kv-fill", fill, "--exit", "static:0", "--max-batch", "4", "--out", "measured"];
        scene.succeed(&[&replay[..], &measured].concat());
        let summary = lines(&scene.path("measured/summary.csv"));
        assert_eq!(column(&summary, "kv_fill"), [fill; 3]);
        kv_bytes.extend(column(&summary, "kv_bytes_per_token")[..1].iter().map(|bytes| bytes.parse::<u64>().unwrap()));
    }
    assert_eq!(kv_bytes[1] * 3, kv_bytes[0], "`first` keeps one depth");
    assert_eq!(kv_bytes, [kv_bytes[0], kv_bytes[1], kv_bytes[0], kv_bytes[0]]);
}

#[test]
fn prompts_that_run_some_depths_are_judged_by_full_depth_and_go_with_their_recordings() {
    let scene = Scene::new();
    scene.measured();
    let replay = ["replay", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv"];
    let limits = ["--batching", "sequence,depth", "--exit", "none", "--max-batch", "4", "--token-budget", "16"];
    let quality = |more: &[&'static str]| {
        scene.succeed(&[&replay[..], &limits, more, &["--out", "served"]].concat());
        let summary = lines(&scene.path("served/summary.csv"));
        let of = |name| column(&summary, name).into_iter().map(str::to_owned).collect::<Vec<_>>();
        (of("prefill_depth"), of("token_agreement"), of("equal_share"), of("nats_per_token_full_depth"))
    };
    let (given, agreement, equal, nats) = quality(&[]);
    assert_eq!(
        (given, agreement, equal),
        (vec![String::new(); 2], vec!["1.0".to_owned(); 2], vec!["1.0".to_owned(); 2])
    );
    let (given, agreement, equal, of_full_depth) = quality(&["--prefill-depth", "0"]);
    assert_eq!(given, ["0"; 2]);
    assert_eq!(nats, of_full_depth, "what it is compared with is full depth");
    for share in [&agreement, &equal] {
        assert!(share[0] == share[1] && share[0].parse::<f64>().unwrap() < 1.0, "{agreement:?}, {equal:?}");
    }

    let record = ["record", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv"];
    let under = ["--under", "margin:0.1", "--prefill-depth", "0", "--out", "recorded"];
    scene.succeed(&[&record[..], &under].concat());
    let simulate = |more: &[&'static str]| {
        let common = ["simulate", "--requests", "requests.csv", "--profile", "profile", "--exits", "recorded"];
        let serving = ["--batching", "depth", "--exit", "margin:0.1", "--max-batch", "4", "--token-budget", "16"];
        [&common[..], &serving, more, &["--out", "out"]].concat()
    };
    scene.succeed(&simulate(&["--prefill-depth", "0"]));
    let error = scene.fail(&simulate(&[]));
    assert!(error.contains("recorded with prompts that run up to depth 0, the settings have every depth"), "{error}");
    for (more, found) in [
        (&["--prefill-depth", "3"], "--prefill-depth 3 is outside the model's depths 0 to 2"),
        (&["--prefill-depth=1", "--kv-fill=skip"], "--prefill-depth 1 with --kv-fill skip: expected --kv-fill reuse"),
    ] as [(&[&str], &str); 2]
    {
        let error = scene.fail(&[&replay[..], &limits, more, &["--out", "refused"]].concat());
        assert!(error.contains(found), "{error}");
    }
}

#[test]
fn capacity_is_the_highest_rate_within_the_objectives() {
    let scene = Scene::new();
    scene.measured();
    // On any machine: 100 to 120 microseconds a pass, and nothing else.
    let points = "block,1,0,1,100,0,9\nblock,64,0,1,120,0,9\nembed,1,0,1,0,0,9\nembed,64,0,1,0,0,9\n\
                  head,1,0,1,0,0,9\nhead,64,0,1,0,0,9\n";
    scene.write("profile/latency.csv", &format!("component,rows,kv_tokens,depths,time_us,spread_us,repeats\n{points}"));
    let capacity = |more: &[&'static str]| {
        let mut arguments = scene.simulate(&["--exit", "none"]);
        arguments[0] = "capacity";
        [&arguments[..], more].concat()
    };
    let printed = scene.succeed(&capacity(&["--e2e-ms", "10"]));
    let rates: Vec<f64> =
        printed.lines().skip(1).map(|line| line.split_whitespace().nth(4).unwrap().parse().unwrap()).collect();
    // 8 places serve a request of 8 tokens in about 24 passes of 0.1 ms.
    assert!(rates.len() == 3 && rates.iter().all(|rate| (500.0..20_000.0).contains(rate)), "{printed}");
    let printed = scene.succeed(&capacity(&["--e2e-ms", "0.1"]));
    assert_eq!(printed.matches(" - ").count(), 6 * 3, "no rate is low enough: {printed}");
    assert!(scene.fail(&capacity(&["--e2e-ms", "100000"])).contains("met even at"));
    assert!(scene.fail(&capacity(&[])).contains("no objective"));
}

#[test]
fn replay_writes_what_it_measured() {
    let scene = Scene::new();
    scene.succeed(&[
        "replay",
        "--model",
        "model",
        "--prompts",
        "prompts.txt",
        "--requests",
        "requests.csv",
        "--batching",
        "sequence,depth",
        "--exit",
        "none,oracle",
        "--max-batch",
        "4",
        "--token-budget",
        "16",
        "--out",
        "replayed",
    ]);
    let summary = lines(&scene.path("replayed/summary.csv"));
    assert_eq!(column(&summary, "batching"), ["sequence", "sequence", "depth", "depth"]);
    let depths = column(&summary, "mean_depth");
    assert_eq!((depths[0], depths[1]), (depths[2], depths[3]), "exits do not depend on batching");
}

#[test]
fn profiles_that_ship_are_listed_copied_and_found_by_their_names() {
    const NAME: &str = "xeon-2-cores/chains";
    let scene = Scene::new();
    let listed = scene.succeed(&["profiles"]);
    assert!(listed.lines().any(|line| line.trim_start().starts_with(NAME)), "{listed}");
    scene.write("profiles.csv", &scene.succeed(&["profiles", "--csv"]));
    let table = lines(&scene.path("profiles.csv"));
    let place = column(&table, "name").iter().position(|name| *name == NAME).unwrap();
    assert_eq!(column(&table, "num_loops")[place], "6");
    assert!(scene.succeed(&["profiles", NAME]).contains("num_loops: 6"));
    scene.succeed(&["profiles", NAME, "--out", "copied"]);

    let simulated = |profile: &str| {
        let limits = ["--exit", "none", "--max-batch", "4", "--token-budget", "16", "--out", "out"];
        scene.succeed(&[&["simulate", "--requests", "requests.csv", "--profile", profile], &limits[..]].concat());
        fs::read_to_string(scene.path("out/summary.csv")).unwrap()
    };
    assert_eq!(simulated(NAME), simulated("copied"));
    // A file of machines in another folder; a sweep and an experiment.
    fs::create_dir_all(scene.path("specs")).unwrap();
    let machines = format!("[{{role: prompt, profile: {NAME}}}, {{role: decode}}]");
    scene.write("specs/machines.yaml", &format!("machines: {machines}\ntransfer: {{gigabytes_per_s: 50}}\n"));
    let by_roles = ["simulate", "--requests", "requests.csv", "--profile", NAME, "--machines", "specs/machines.yaml"];
    scene.succeed(&[&by_roles[..], &["--batching", "sequence", "--exit", "none"]].concat());
    let common = "schema_version: 1\ntitle: t\nrequests: {file: ../requests.csv}\n\
                  serving: {batching: [depth], exit: [none], max_batch: 4, token_budget: 16}\n";
    let sweep = |name: &str| format!("{common}systems: [{{name: a, profile: {name}}}]\ngrid: {{max_batch: [2, 4]}}\n");
    scene.write("specs/sweep.yaml", &sweep(NAME));
    scene.succeed(&["sweep", "specs/sweep.yaml", "--out", "swept"]);
    let inputs = fs::read_to_string(scene.path("swept/inputs.yaml")).unwrap();
    assert!(inputs.contains(&format!("{NAME}/latency.csv: ")), "its bytes are among what the results are of: {inputs}");

    // A folder of the name is what is meant.
    fs::create_dir_all(scene.path(NAME)).unwrap();
    let error = scene.fail(&["simulate", "--requests", "requests.csv", "--profile", NAME, "--exit", "none"]);
    assert!(error.contains(&format!("{NAME}/profile.yaml")), "{error}");
    fs::remove_dir_all(scene.path("xeon-2-cores")).unwrap();
    scene.write("specs/sweep.yaml", &sweep("xeon-2-core/chain"));
    for refused in [
        scene.fail(&["simulate", "--requests", "requests.csv", "--profile", "xeon-2-core/chain", "--exit", "none"]),
        scene.fail(&["sweep", "specs/sweep.yaml", "--out", "refused"]),
        scene.fail(&["profiles", "xeon-2-core/chain"]),
    ] {
        let expected = format!(
            "xeon-2-core/chain: no such folder, and no latency profile of this name ships; the nearest are {NAME}"
        );
        assert!(refused.contains(&expected), "{refused}");
    }
    assert!(scene.fail(&["profiles", "copied"]).contains("a folder, expected the name of a profile that ships"));
}

#[test]
fn a_model_of_random_weights_follows_the_exits_of_another_one_as_it_is_simulated() {
    let scene = Scene::new();
    scene.measured();
    let config = fs::read_to_string(scene.path("model/config.json")).unwrap();
    scene.write("shape.json", &config.replace("\"hidden_size\": 32", "\"hidden_size\": 48"));
    let shape = ["--model", "random:shape.json", "--requests", "requests.csv"];
    let limits = ["--batching", "sequence,depth", "--max-batch", "4", "--token-budget", "16"];
    let replay = |exits: &'static str, exit: &'static str, seed: &'static str| {
        let more = ["--exits", exits, "--exit", exit, "--seed", seed, "--out", "replayed"];
        scene.succeed(&[&["replay"], &shape[..], &limits, &more].concat())
    };
    let rows = |folder: &str| {
        let summary = lines(&scene.path(folder).join("summary.csv"));
        ["exit_policy", "mean_depth"]
            .map(|name| column(&summary, name).into_iter().map(str::to_owned).collect::<Vec<_>>())
    };
    let simulate = |exits: &'static str, exit: &'static str, seed: &'static str| {
        let more = ["--exits", exits, "--exit", exit, "--seed", seed, "--out", "simulated"];
        let profile = ["simulate", "--requests", "requests.csv", "--profile", "any"];
        scene.succeed(&[&profile[..], &limits, &more].concat());
    };
    // A profile of another model is no profile of this one.
    fs::create_dir(scene.path("any")).unwrap();
    for file in ["profile.yaml", "latency.csv"] {
        let text = fs::read_to_string(scene.path("profile").join(file)).unwrap();
        let any = text.lines().map(|line| if line.starts_with("fingerprint") { "fingerprint: any" } else { line });
        scene.write(&format!("any/{file}"), &any.map(|line| format!("{line}\n")).collect::<String>());
    }
    scene.succeed(&["trace", "script-exits", "exits", "--out", "signals"]);
    scene.succeed(&["trace", "script-exits", "exits", "--exit", "margin:0.002", "--out", "depths"]);
    scene.succeed(&["trace", "draw-exits", "--loops", "3", "--mean", "1.6", "--tokens", "6", "--out", "drawn"]);
    for (exits, exit) in [("signals", "none,margin:0.002,stable:2"), ("depths", "oracle,top1:0.5"), ("drawn", "oracle")]
    {
        for seed in ["1", "2"] {
            replay(exits, exit, seed);
            simulate(exits, exit, seed);
            let [measured, simulated] = ["replayed", "simulated"].map(rows);
            assert_eq!(measured, simulated, "{exits}, seed {seed}");
            assert!(measured[1].iter().any(|depth| depth.parse::<f64>().unwrap() < 3.0), "{exits}: {measured:?}");
            let summary = lines(&scene.path("replayed/summary.csv"));
            assert!(column(&summary, "token_agreement").iter().all(|share| share.is_empty()), "there is no quality");
        }
    }
    let [of_margin, of_depths] = [("signals", "margin:0.002"), ("depths", "oracle:recorded")].map(|(exits, exit)| {
        replay(exits, exit, "1");
        rows("replayed")[1].clone()
    });
    assert_eq!(of_margin, of_depths, "a policy's exits are those that the script was made with");
    scene.succeed(&["trace", "draw-exits", "--shares", "1,2", "--out", "two"]);
    let mut of_another = ExitTrace::read(scene.path("exits")).unwrap();
    of_another.meta.fingerprint = "0123456789abcdef".to_owned();
    of_another.write(scene.path("others"), ExitTable::Parquet).unwrap();
    let of_model = ["--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv"];
    let error = scene.fail(&[&["replay"], &of_model[..], &["--exits", "others", "--out", "refused"]].concat());
    assert!(error.contains("recorded of model 0123456789abcdef") && error.contains("trace script-exits"), "{error}");
    for (more, expected) in [
        (&["--exits", "exits"][..], "--prompts is missing"),
        (&[], "--prompts is missing"),
        (&["--exits", "drawn", "--exit", "speculate:margin:0.1:2"], "speculate:margin:0.1:2: full depth decides"),
        (&["--exits", "two"], "exits of a model with 2 loops: expected 3"),
    ] {
        let error = scene.fail(&[&["replay"], &shape[..], &limits, more, &["--out", "refused"]].concat());
        assert!(error.contains(expected), "{more:?}: {error}");
    }
}

#[test]
fn an_experiment_measures_a_model_of_random_weights_under_exits_of_any_model() {
    let scene = Scene::new();
    fs::copy(scene.path("model/config.json"), scene.path("shape.json")).unwrap();
    scene.succeed(&["trace", "draw-exits", "--loops", "3", "--mean", "1.6", "--tokens", "6", "--out", "drawn"]);
    let text =
        experiment("", 12).replace("model: model, prompts: prompts.txt", "model: random:shape.json, exits: drawn");
    scene.write("scripted.yaml", &text);
    scene.succeed(&["run", "scripted.yaml", "--out", "measured"]);
    let summary = lines(&scene.path("measured/summary.csv"));
    let cells = |name| column(&summary, name);
    for (place, source) in cells("source").iter().enumerate().filter(|(_, source)| **source == "measured") {
        let is_same = |other: &usize| {
            *other != place && ["batching", "exit_policy"].iter().all(|name| cells(name)[*other] == cells(name)[place])
        };
        let simulated = (0..cells("source").len()).find(is_same).expect("each run is simulated");
        assert_eq!(cells("mean_depth")[simulated], cells("mean_depth")[place], "{source}");
        assert_eq!([cells("token_agreement")[simulated], cells("token_agreement")[place]], ["", ""]);
    }
    assert!(cells("mean_depth").iter().any(|depth| depth.parse::<f64>().unwrap() < 2.0));
    scene.write(
        "scripted.yaml",
        &format!("{text}\nvalidation: {{rates: []}}\n")
            .replace("sweeps: {thresholds: {top1: [0.05, 0.1], entropy: [1]}, max_batch: [2, 4]}", ""),
    );
    scene.succeed(&["run", "scripted.yaml", "--out", "validated"]);
    assert!(scene.path("validated/speedups.csv").exists());
    scene.write("scripted.yaml", &text.replace(", exits: drawn", ""));
    assert!(scene.fail(&["run", "scripted.yaml", "--out", "refused"]).contains("no engine.prompts: expected"));
}

const QUESTIONS: &str = "{\"query\": \"In the\", \"choices\": [\"beginning\", \"loop\", \"block\"], \"gold\": 0}
{\"target\": \"1\", \"arguments\": {\"gen_args_0\": {\"arg_0\": \"the loop was\", \"arg_1\": \" shared\"},
\"gen_args_1\": {\"arg_0\": \"the loop was\", \"arg_1\": \" with the block\"}}}
";

#[test]
fn an_evaluation_leaves_figures_of_text_signals_and_questions_by_loop() {
    let scene = Scene::new();
    scene.write("text.txt", &TEXT.repeat(8));
    scene.write("questions.jsonl", &QUESTIONS.replace("}},\n", "}}, ").replace("},\n", "}, "));
    let of_text = ["evaluate", "model", "--text", "text.txt", "--seq", "32"];
    let of_questions = ["--questions", "questions.jsonl", "--examples", "questions.jsonl", "--shots", "1"];
    let printed = scene.succeed(&[&of_text[..], &of_questions, &["--out", "evaluated"]].concat());
    for expected in ["perplexity", "bits/byte", "mean oracle depth", "AUROC", "2 questions", "acc_norm"] {
        assert!(printed.contains(expected), "{expected} in {printed}");
    }
    let table = |name: &str| lines(&scene.path("evaluated").join(name));
    assert_eq!(column(&table("loops.csv"), "passes"), ["1", "2", "3"]);
    assert_eq!(column(&table("loops.csv"), "agreement_with_last")[2], "1.0");
    let signals = table("signals.csv");
    let of_depths = ["top1", "top1", "margin", "margin", "entropy", "entropy", "similarity", "difference", "kl", "kl"];
    assert_eq!(column(&signals, "measure"), of_depths);
    assert_eq!(column(&signals, "depth"), ["0", "1", "0", "1", "0", "1", "1", "1", "0", "1"]);
    assert_eq!(table("reliability.csv").len(), 1 + of_depths.len() * 15);
    let measures = table("exit_curves.csv");
    assert!(["top1", "margin", "entropy", "similarity"].iter().all(|name| column(&measures, "measure").contains(name)));
    assert_eq!(column(&table("accuracy.csv"), "questions"), ["2"; 3]);
    assert_eq!(table("answers.csv").len(), 1 + 3 * (3 + 2));
    for name in ["bits-per-byte", "exit-depths", "exit-curves", "reliability", "accuracy"] {
        assert!(scene.path("evaluated/figures").join(name).with_extension("png").exists(), "{name}");
    }
    let of_window = |text: &str| text.lines().find(|line| line.contains("margin")).map(str::to_owned);
    scene.measured();
    let of_trace = scene.succeed(&["evaluate", "--exits", "exits"]);
    assert!(of_window(&of_trace).is_some() && of_window(&of_trace) != of_window(&printed), "{of_trace}");
}

#[test]
fn prompts_with_answers_are_graded_by_depth_and_as_they_are_served() {
    let scene = Scene::new();
    // All tokens are equally likely, so the first of the vocabulary, `!`, is generated at every depth.
    let weights = Weights::load(&scene.path("model")).unwrap();
    let zeros = weights.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.zeros_like().unwrap())).collect();
    let folder = scene.path("constant");
    Weights::from_tensors(weights.config().clone(), zeros, "test").unwrap().save(&folder, Stored::F32).unwrap();
    fs::copy(scene.path("model/tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let prompts = [
        r#"{"prompt": "1+1", "answer": "!!", "class": "2"}"#,
        r#"{"prompt": "22+22", "answer": "x", "class": "10"}"#,
        r#"{"prompt": "333"}"#,
    ];
    scene.write("prompts.jsonl", &prompts.join("\n"));

    let printed = scene.succeed(&["evaluate", "constant", "--prompts", "prompts.jsonl", "--out", "evaluated"]);
    assert!(printed.contains("exact-match accuracy") && printed.contains("3 passes"), "{printed}");
    let exact = lines(&scene.path("evaluated/exact_match.csv"));
    assert_eq!(column(&exact, "class"), [["all"; 3], ["2"; 3], ["10"; 3]].concat());
    assert_eq!(column(&exact, "passes"), ["1", "2", "3"].repeat(3));
    assert_eq!(column(&exact, "exact_match"), [["0.5"; 3], ["1.0"; 3], ["0.0"; 3]].concat());
    assert!(scene.path("evaluated/figures/exact-match.png").exists());

    let replay = ["replay", "--model", "constant", "--prompts", "prompts.jsonl", "--requests", "requests.csv"];
    let policies = ["--batching", "depth", "--exit", "baselines", "--max-batch", "4", "--token-budget", "16"];
    let printed = scene.succeed(&[&replay[..], &policies, &["--out", "served"]].concat());
    let summary = lines(&scene.path("served/summary.csv"));
    let policies = ["none", "static:0", "static:1", "mix:0:1:0.5", "mix:1:2:0.5"];
    assert_eq!(column(&summary, "exit_policy"), policies);
    assert_eq!(
        (column(&summary, "token_agreement"), column(&summary, "equal_share")),
        (vec!["1.0"; 5], vec!["1.0"; 5])
    );
    for name in ["nats_per_token", "nats_per_token_full_depth"] {
        let nats = column(&summary, name).into_iter().map(|nats| nats.parse::<f64>().unwrap());
        assert!(nats.into_iter().all(|nats| (nats - 272_f64.ln()).abs() < 1e-6), "{name}");
    }
    // Of 40 requests, 14 have the first prompt, 13 the second and 13 the third.
    let accuracy = column(&summary, "exact_match").into_iter().map(|share| share.parse::<f64>().unwrap());
    assert!(accuracy.into_iter().all(|share| (share - 14.0 / 27.0).abs() < 1e-12));
    let quality = lines(&scene.path("served/quality.csv"));
    let graded = quality[1..].iter().filter(|line| line[3] == "exact_match" && line[1] == "static:1");
    let graded: Vec<_> = graded.map(|line| (line[4].as_str(), line[5].as_str())).collect();
    assert_eq!(graded, [("all", "27"), ("2", "14"), ("10", "13")]);
    let requests = lines(&scene.path("served/requests.csv"));
    assert_eq!(column(&requests, "prompt_tokens")[..4], ["3", "5", "3", "3"], "lengths are those of the prompts");
    let headline =
        "at the quality of full depth less 1 point (exact-match accuracy of at least 0.509), the best baseline is";
    assert!(printed.contains(headline), "{printed}");

    assert!(scene.fail(&["evaluate", "constant", "--prompts", "prompts.txt"]).contains("expected JSON lines"));
    scene.write("none.jsonl", prompts[2]);
    assert!(scene.fail(&["evaluate", "constant", "--prompts", "none.jsonl"]).contains("no prompt has an `answer`"));
    scene.write("odd.jsonl", r#"{"prompt": "a", "target": "b"}"#);
    let error = scene.fail(&[&replay[..3], &["--prompts", "odd.jsonl", "--requests", "requests.csv"]].concat());
    assert!(error.contains("odd.jsonl:1: the object: unknown field `target`"), "{error}");
}

#[test]
fn a_calibrated_threshold_is_an_exit_policy_that_the_simulator_takes() {
    let scene = Scene::new();
    scene.measured();
    let calibrate = ["calibrate", "--exits", "exits", "--measure", "margin", "--tolerance", "0.5"];
    let printed = scene.succeed(&[&calibrate[..], &["--held-out", "exits", "--out", "calibrated"]].concat());
    let exit = printed.lines().last().unwrap().strip_prefix("--exit ").unwrap();
    let summary = scene.succeed(&scene.simulate(&["--exit", exit]));
    assert!(summary.contains(exit), "{summary}");

    let tried = lines(&scene.path("calibrated/calibration.csv"));
    let keeps = column(&tried, "keeps_tolerance");
    let chosen = keeps.iter().filter(|&&keeps| keeps == "true").count();
    assert!(keeps[..chosen].iter().all(|&keeps| keeps == "true"), "once one fails, the laxer ones do");
    let threshold: f64 = exit.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(column(&tried, "threshold")[chosen - 1].parse::<f64>().unwrap(), threshold);
    let held_out = lines(&scene.path("calibrated/held_out.csv"));
    for name in ["threshold", "risk", "agreement", "mean_depth"] {
        assert_eq!(column(&held_out, name), column(&tried, name), "the same trace held out");
    }
    assert!(scene.path("calibrated/calibration.png").exists());
}

#[test]
fn a_recording_is_parquet_or_csv_with_the_same_rows_and_replaces_only_recordings() {
    let scene = Scene::new();
    scene.measured();
    let record = ["record", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv"];
    let recorded = ExitTrace::read(scene.path("exits")).unwrap();
    let names = || {
        let entries = fs::read_dir(scene.path("exits")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["depthwise-results.json", "exits.parquet", "exits.yaml"]);
    scene.succeed(&[&record[..], &["--out", "exits", "--csv"]].concat());
    assert_eq!(names(), ["depthwise-results.json", "exits.csv", "exits.yaml"]);
    assert_eq!(ExitTrace::read(scene.path("exits")).unwrap(), recorded);
    scene.write("long.csv", "request,arrival_us,prompt_tokens,output_tokens\n0,0,3,5\n1,0,1000,5\n");
    let error = scene.fail(&[&record[..5], &["--requests", "long.csv", "--out", "exits"]].concat());
    assert!(error.contains("request 1"), "{error}");
    assert_eq!(
        names(),
        ["depthwise-results.json", "exits.csv", "exits.yaml"],
        "a recording that fails leaves the one before"
    );
    let error = scene.fail(&[&record[..], &["--out", "profile"]].concat());
    assert!(error.contains("profile is there already"), "{error}");
}

#[test]
fn a_recording_under_policies_is_simulated_and_calibrated_under_its_kv_fill() {
    let scene = Scene::new();
    scene.measured();
    let record =
        ["record", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv", "--out", "exits"];
    let printed = scene.succeed(&[&record[..], &["--under", "top1:0.1,random:0.5", "--kv-fill", "skip"]].concat());
    assert!(printed.contains("realised agreement") && printed.contains("random:0.5"), "{printed}");
    let recording = ExitTrace::read(scene.path("exits")).unwrap().meta.recording.unwrap();
    assert_eq!(recording.policies, ["confidence:top1:0.1", "random:0.5"]);
    assert_eq!((recording.kv_fill.as_str(), recording.seed), ("skip", 1));
    let simulate = |fill| scene.simulate(&["--batching", "depth", "--exit", "top1:0.1", "--kv-fill", fill]);
    assert!(scene.succeed(&simulate("skip")).contains("confidence:top1:0.1"));
    let error = scene.fail(&simulate("reuse"));
    assert!(error.contains("recorded under KV fill skip, the settings have reuse"), "{error}");
    let error = scene.fail(&["calibrate", "--exits", "exits", "--measure", "margin"]);
    assert!(error.contains("no request was recorded under a threshold of margin"), "{error}");
    let refused = scene.run(&[&record[..], &["--under", "random:2"]].concat());
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("a probability P from 0 to 1"), "{error}");
}

#[test]
fn evaluations_and_calibrations_that_cannot_be_say_why_and_leave_nothing() {
    let scene = Scene::new();
    scene.measured();
    scene.write("questions.jsonl", "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 2}\n");
    let calibrate = ["calibrate", "--exits", "exits", "--measure", "top1", "--out", "out"];
    let cases: [(&[&str], &[&str], &str); 8] = [
        (&["calibrate", "--exits", "exits", "--out", "out"], &["--measure", "gate"], "exits: the model has no gates"),
        (&calibrate, &["--tolerance", "0"], "--tolerance 0: expected a share between 0 and 1"),
        (&calibrate, &["--confidence", "1"], "--confidence 1: expected a share"),
        (&calibrate, &["--held-out", "nowhere"], "nowhere/exits.yaml"),
        (
            &["evaluate", "model", "--out", "out"],
            &["--questions", "questions.jsonl"],
            "questions.jsonl:1: gold: found 2",
        ),
        (
            &["evaluate", "model", "--out", "out"],
            &["--text", "prompts.txt", "--seq", "257"],
            "--seq 257: expected 2 to",
        ),
        (&["evaluate", "model", "--out", "out"], &["--text", "nowhere.txt"], "nowhere.txt"),
        (&["evaluate", "--exits", "nowhere", "--out", "out"], &[], "nowhere/exits.yaml"),
    ];
    for (command, more, expected) in cases {
        let error = scene.fail(&[command, more].concat());
        assert!(error.contains(expected), "expected `{expected}` in: {error}");
        assert!(!scene.path("out").exists(), "something was left by: {error}");
    }
    let error = scene.fail(&[&calibrate[..], &["--tolerance", "0.001"]].concat());
    assert!(error.contains("no threshold of top1 was shown to keep the tolerance: 40 requests, expected at least"));
    let fingerprint = fs::read_to_string(scene.path("exits/exits.yaml")).unwrap();
    fs::create_dir(scene.path("other")).unwrap();
    fs::copy(scene.path("exits/exits.parquet"), scene.path("other/exits.parquet")).unwrap();
    scene.write("other/exits.yaml", &fingerprint.replace("fingerprint: ", "fingerprint: f"));
    let error = scene.fail(&[&calibrate[..5], &["--held-out", "other"]].concat());
    assert!(error.contains("other: found an exit trace of `model`"), "{error}");
}

#[test]
fn bad_experiments_get_one_clear_error_and_leave_nothing() {
    let scene = Scene::new();
    let longer = experiment("", 12).replace("token_budget: 16", "token_budget: 16\n  num_blocks: 1");
    let cases = [
        (experiment("speed: 11", 12), "unknown field `speed`"),
        (experiment("", 12).replace("batching:", "bathing:"), "bathing"),
        (experiment("", 12).replace("vanilla", "vanila"), "vanilla, sequence or depth"),
        (experiment("", 12).replace("schema_version: 1", "schema_version: 7"), "schema_version is 7, expected 1"),
        (experiment("", 12).replace("0.1'", "NaN'"), "not a finite number"),
        (experiment("", 12).replace("token_budget: 16", "token_budget: 2"), "less than max_batch"),
        (
            experiment("", 12).replace("token_budget: 16", "token_budget: 16\n  prefix_caching: true\n  kv_fill: last"),
            "prefix_caching with kv_fill last",
        ),
        (
            experiment("", 12)
                .replace("token_budget: 16", "token_budget: 16\n  prefix_caching: true\n  block_tokens: 8"),
            "a KV block of 8 tokens",
        ),
        (experiment("", 12).replace("count: 12", "count: -3"), "-3"),
        (
            experiment("", 12).replace("max_batch: 4", "kv_fill: copy\n  max_batch: 4"),
            "reuse, first, skip, backfill, last, or cycle:SLOTS",
        ),
        (experiment("", 12).replace("model: model", "model: nowhere"), "nowhere"),
        (experiment("", 12).replace("repeats: 2", "repeats: 0"), "engine.repeats is 0"),
        (longer, "the cache holds 16"),
        (String::new(), "schema_version"),
        (experiment("", 12)[..60].to_owned(), "bad.yaml"),
    ];
    for (text, expected) in cases {
        scene.write("bad.yaml", &text);
        let error = scene.fail(&["run", "bad.yaml"]);
        assert!(error.contains(expected) && error.contains("bad.yaml"), "expected `{expected}` in: {error}");
        let results = fs::read_dir(scene.path("results")).map(Iterator::count).unwrap_or(0);
        assert_eq!(results, 0, "something was left by: {error}");
    }
}

#[test]
fn bad_traces_and_profiles_get_one_clear_error() {
    let scene = Scene::new();
    scene.measured();
    ExitTrace::read(scene.path("exits")).unwrap().write(scene.path("exits"), ExitTable::Csv).unwrap();
    let read = |name: &str| fs::read_to_string(scene.path(name)).unwrap();
    let (requests, latency, tokens) = (read("requests.csv"), read("profile/latency.csv"), read("exits/exits.csv"));
    let profile = read("profile/profile.yaml");
    let other_model = profile.lines().map(|line| match line.starts_with("fingerprint") {
        true => "fingerprint: 0123456789abcdef\n".to_owned(),
        false => format!("{line}\n"),
    });
    let cases: [(&str, String, &str); 10] = [
        ("requests.csv", String::new(), "requests.csv"),
        ("requests.csv", requests.replace("\n3,", "\n3,-"), "requests.csv:5"),
        ("requests.csv", requests.replace("\n3,1500.0", "\n3,NaN"), "requests.csv:5"),
        ("requests.csv", requests[..requests.len() / 2].to_owned(), "requests.csv"),
        ("requests.csv", requests.replace("prompt_tokens", "prompt"), "prompt"),
        ("profile/latency.csv", latency[..latency.len() / 2].to_owned(), "latency.csv"),
        ("profile/latency.csv", latency.replacen("block,1,", "block,one,", 1), "one"),
        ("profile/profile.yaml", other_model.collect(), "0123456789abcdef"),
        ("exits/exits.csv", tokens.lines().take(2).collect::<Vec<_>>().join("\n") + "\n", "exits.csv"),
        ("exits/exits.csv", tokens.replacen("0,0,0,", "0,0,0,-", 1), "exits.csv:2"),
    ];
    for (file, text, expected) in cases {
        let intact = read(file);
        scene.write(file, &text);
        let error = scene.fail(&scene.simulate(&["--out", "out"]));
        assert!(error.contains(expected), "expected `{expected}` in: {error}");
        assert!(!scene.path("out").exists());
        scene.write(file, &intact);
    }
    let error = scene.fail(&scene.simulate(&["--num-blocks", "1"]));
    assert!(error.contains("request 12 needs") || error.contains("the cache holds 16"), "{error}");
}

#[test]
fn a_converted_model_is_recursive_and_says_what_its_adapters_keep() {
    let scene = Scene::new();
    scene.ordinary_model(4, 16);
    let convert = |more: &[&'static str]| [&["convert", "ordinary", "--out", "recursive"], more].concat();
    for (more, expected) in [
        (["--loops", "3"], "4 layers to share do not divide into 3 loops, expected one of 1, 2, 4"),
        (["--loops=2", "--prelude=4"], "leave none of 4 layers"),
        (["--loops=2", "--rank=gate=2,gate=3"], "`gate` twice"),
        (["--loops=2", "--init=meen"], "expected one of `stepwise`, `average`, `lower`, `random`"),
    ] {
        let output = scene.run(&convert(&more));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(expected), "{stderr}");
        assert!(!scene.path("recursive").exists());
    }

    let printed = scene.succeed(&convert(&["--loops", "2", "--rank", "full"]));
    assert!(printed.contains("4 layers, now 2 loops of 2"), "{printed}");
    let gate = printed.lines().find(|line| line.contains("mlp.gate_proj")).unwrap();
    let cells: Vec<&str> = gate.split_whitespace().collect();
    assert_eq!((cells[1], *cells.last().unwrap()), ("16", "100.0%"), "{printed}");
    let config = Weights::load(&scene.path("recursive")).unwrap().config().clone();
    assert_eq!((config.num_loops, config.block_layers, config.sharing), (2, 2, Sharing::Matrices));
    assert_eq!(config.lora.unwrap().ranks.gate, 16);
    for (file, text) in [("tokenizer.json", "vocab"), ("conversion.yaml", "source: ordinary")] {
        assert!(fs::read_to_string(scene.path("recursive").join(file)).unwrap().contains(text), "{file}");
    }

    let refusal = scene.fail(&convert(&["--loops", "2"]));
    assert!(refusal.contains("recursive is there already and not empty"), "{refusal}");

    scene.succeed(&["export", "recursive", "--out", "exported"]);
    let exported = fs::read_to_string(scene.path("exported/config.json")).unwrap();
    assert!(exported.contains("LlamaForCausalLM") && exported.contains("\"num_hidden_layers\": 4"), "{exported}");
    scene.succeed(&["convert", "exported", "--loops", "4", "--out", "again"]);
    assert_eq!(Weights::load(&scene.path("again")).unwrap().config().num_loops, 4);
    assert!(scene.path("again/tokenizer.json").exists());
    assert!(scene.fail(&["export", "recursive", "--out", "exported"]).contains("not empty"));
    let refusal = scene.fail(&["convert", "recursive", "--loops", "1", "--out", "refused"]);
    assert!(refusal.contains("`num_loops` 2, expected 1"), "{refusal}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let scene = Scene::new();
    scene.ordinary_model(8, 384);
    let arguments = ["convert", "ordinary", "--loops", "2", "--rank", "full", "--out", "out/recursive"];
    let mut child = scene.command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !scene.path("out").exists() {
        std::thread::sleep(Duration::from_millis(5));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(fs::read_dir(scene.path("out")).unwrap().count(), 0);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_ends_at_once_and_leaves_nothing() {
    let scene = Scene::new();
    scene.write("long.yaml", &experiment("", 5000));
    let mut child = scene.command(&["run", "long.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let results = scene.path("results");
    while !results.exists() {
        std::thread::sleep(Duration::from_millis(5));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(fs::read_dir(results).unwrap().count(), 0);
}

const TRAINING: &str = "
model:
  vocab_size: 272
  hidden_size: 16
  intermediate_size: 24
  num_heads: 2
  num_kv_heads: 1
  head_dim: 8
  block_layers: 1
  num_loops: 2
data: {text: [../prompts.txt], held_out: [../prompts.txt], held_out_tokens: 200}
objective: {exits: 'aggressive:0.3', self_distillation: 1}
optimizer: {warmup_steps: 1, schedule: 'trapezoid:2'}
steps: 4
batch: 2
seq: 16
evaluation_steps: 2
";

#[test]
fn a_run_is_described_by_a_file_and_flags_and_another_goes_on_from_its_model() {
    let scene = Scene::new();
    fs::create_dir(scene.path("configs")).unwrap();
    scene.write("configs/small.yaml", TRAINING);
    scene.succeed(&["train", "--config", "configs/small.yaml", "--out", "a", "--batch", "3"]);
    let described = fs::read_to_string(scene.path("a/training.yaml")).unwrap();
    assert!(described.contains("batch: 3\n") && described.contains("schedule: trapezoid:2\n"), "{described}");
    let curve = lines(&scene.path("a/loss.csv"));
    assert_eq!(column(&curve, "tokens"), ["48", "96", "144", "192"]);
    assert_eq!(column(&curve, "held_out_nats_per_token").iter().filter(|look| !look.is_empty()).count(), 2);
    assert_eq!(column(&lines(&scene.path("a/eval.csv")), "passes"), ["1", "2"]);
    for file in ["a/model.safetensors", "a/tokenizer.json", "a/figures/loss.png", "results/tokens"] {
        assert!(scene.path(file).exists(), "{file}");
    }

    scene.succeed(&["train", "--resume", "a", "--steps", "5"]);
    assert_eq!(lines(&scene.path("a/loss.csv")).len(), 1 + 5);

    let gates = ["--from", "a", "--gate", "--gate-weight", "1", "--cross-entropy", "0", "--train", "gate"];
    let common = ["train", "--config", "configs/small.yaml", "--exits", "last", "--self-distillation", "0"];
    scene.succeed(&[&common[..], &gates, &["--teacher", "a", "--out", "b"]].concat());
    assert!(column(&lines(&scene.path("b/loss.csv")), "gate_nats_per_token").iter().all(|loss| !loss.is_empty()));
    scene.succeed(&["plot", "a", "b", "--out", "both"]);
    let figure = fs::read_to_string(scene.path("both/loss.svg")).unwrap();
    assert!(figure.contains("a, train") && figure.contains("b, validation"));
}

#[test]
fn bad_training_runs_get_one_clear_error_and_leave_nothing() {
    let scene = Scene::new();
    scene.write("small.yaml", &TRAINING.replace("../", ""));
    let refused = |more: &[&'static str]| {
        let error = scene.fail(&[&["train", "--config", "small.yaml", "--out", "a"], more].concat());
        assert!(!scene.path("a").exists(), "{error}");
        error
    };
    assert!(refused(&["--text", "no.txt"]).contains("no.txt: No such file"));
    let bare = scene.fail(&["train", "--text", "prompts.txt", "--out", "a"]);
    assert!(
        bare.contains("--held-out (`data.held_out` of the run): found empty, expected at least one file"),
        "{bare}"
    );
    assert!(refused(&["--from", "prompts.txt"]).contains("prompts.txt: not a supported GGUF file"));
    assert!(refused(&["--temperature", "2"]).contains("need a --teacher"));
    assert!(refused(&["--num-heads", "3", "--num-kv-heads", "2"]).contains("`num_kv_heads` is 2"));
    assert!(refused(&["--gate-weight", "1"]).contains("--gate-weight (`objective.gate` of the run): found given"));
    scene.write("lines.jsonl", "{\"text\": \"good\"}\n{\"body\": \"bad\"}\n");
    assert!(refused(&["--text", "lines.jsonl"]).contains("lines.jsonl:2: found no `text`"));
    scene.write("small.yaml", &TRAINING.replace("schedule: 'trapezoid:2'", "schedule: flat"));
    assert!(refused(&[]).contains("small.yaml: optimizer: unknown schedule `flat`"));
    scene.write("small.yaml", &format!("{TRAINING}stops: 3"));
    assert!(refused(&[]).contains("small.yaml: unknown field `stops`"));
}

//! Machines with roles as a user simulates them, on a profile and an exit trace that are made up.

mod common;
#[path = "common/made_up.rs"]
mod made_up;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use common::Scene;
use made_up::{exits, profile};
use traces::{Component, ExitTable};

/// The folder holds a profile, one of a slower device, an exit trace, requests, machines and a sweep.
impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        profile().write(scene.path("profile")).unwrap();
        let mut slow = profile();
        slow.points
            .iter_mut()
            .filter(|point| point.component == Component::Block)
            .for_each(|point| point.time_us *= 3.0);
        slow.write(scene.path("slow")).unwrap();
        exits().write(scene.path("exits"), ExitTable::Parquet).unwrap();
        scene.write("requests.yaml", REQUESTS);
        scene.write("machines.yaml", MACHINES);
        scene.write("sweep.yaml", &sweep());
        scene
    }

    /// What a command says that fails with other machines.
    fn fail_with_machines(&self, machines: &str) -> String {
        self.write("machines.yaml", machines);
        self.fail(&SIMULATE)
    }
}

const REQUESTS: &str = "generate:
  count: 60
  arrivals: {poisson: {rate_per_s: 300}}
  prompt_tokens: {uniform: {min: 4, max: 30}}
  output_tokens: {uniform: {min: 5, max: 40}}
";

const MACHINES: &str = "machines:
  - {role: prompt, batching: sequence}
  - {role: decode, replicas: 2, max_batch: 12, num_blocks: 40}
transfer: {gigabytes_per_s: 0.1, latency_us: 20}
";

fn sweep() -> String {
    let requests: String = REQUESTS.lines().map(|line| format!("  {line}\n")).collect();
    format!(
        "schema_version: 1
title: made up
requests:
{requests}serving:
  batching: [sequence, depth]
  exit: [none, 'top1:0.6']
  max_batch: 8
  token_budget: 64
  transfer: {{gigabytes_per_s: 0.1, latency_us: 20}}
systems:
  - {{name: together, profile: profile, exits: exits}}
  - name: apart
    profile: profile
    exits: exits
    machines: [{{role: prompt, batching: sequence}}, {{role: decode, replicas: 2}}]
  - name: apart, slow
    profile: profile
    exits: exits
    machines: [{{role: prompt, batching: sequence}}, {{role: decode, replicas: 2, batching: depth, profile: slow}}]
replicas: 3
objectives: {{ttft_ms: 20, tpot_ms: 5}}
"
    )
}

const SIMULATE: [&str; 17] = [
    "simulate",
    "--requests",
    "requests.yaml",
    "--profile",
    "profile",
    "--exits",
    "exits",
    "--batching",
    "depth",
    "--exit",
    "none,top1:0.6",
    "--max-batch",
    "8",
    "--token-budget",
    "64",
    "--machines",
    "machines.yaml",
];

/// The lines of a table, by column.
fn lines(path: &Path) -> Vec<HashMap<String, String>> {
    csv::Reader::from_path(path).unwrap().deserialize().map(|line| line.unwrap()).collect()
}

#[test]
fn simulate_writes_the_system_and_each_group_of_its_machines() {
    let scene = Scene::new();
    let printed = scene.succeed(&[&SIMULATE[..], &["--out", "results"]].concat());
    assert!(printed.contains("1 prompt sequence + 2 decode depth"), "{printed}");
    let summary = lines(&scene.path("results/summary.csv"));
    assert_eq!(summary.len(), 2);
    for line in &summary {
        assert_eq!(line["machines"], "1 prompt sequence + 2 decode depth");
        assert_eq!((&line["replicas"][..], &line["batching"][..], &line["max_batch"][..]), ("3", "depth", "12"));
        assert_eq!((&line["kv_blocks"][..], &line["requests"][..], &line["transfers"][..]), ("40", "60", "60"));
        let number = |column: &str| line[column].parse::<f64>().unwrap();
        // 3,000 bytes a token at 0.1 GB/s, and the latency.
        let of_bytes = number("transfer_bytes") / 60.0 / 0.1e9 * 1e3;
        assert!((number("transfer_mean_ms") - of_bytes - 0.02).abs() < 1e-6);
    }
    let groups = lines(&scene.path("results/machines.csv"));
    let named: Vec<_> =
        groups.iter().map(|line| (&line["role"][..], &line["replicas"][..], &line["max_batch"][..])).collect();
    assert_eq!(named, [("prompt", "1", "8"), ("decode", "2", "12"), ("prompt", "1", "8"), ("decode", "2", "12")]);
    assert_eq!(groups[0]["group_batching"], "sequence");
    assert_eq!(lines(&scene.path("results/requests.csv")).len(), 2 * 60);
    scene
        .succeed(&[&["timeline"], &SIMULATE[1..9], &SIMULATE[11..], &["--exit", "none", "--out", "run.json"]].concat());
    let timeline = fs::read_to_string(scene.path("run.json")).unwrap();
    assert!(timeline.contains("machine 2"), "three machines");
}

#[test]
fn a_sweep_compares_machines_with_roles_with_machines_that_serve_whole_requests() {
    let scene = Scene::new();
    scene.succeed(&["sweep", "sweep.yaml"]);
    let sweep = lines(&scene.path("results/sweep/sweep.csv"));
    let of = |name: &str| sweep.iter().filter(|line| line["system"] == name).collect::<Vec<_>>();
    let named = |name: &str| {
        of(name)
            .iter()
            .map(|line| format!("{}, {}, {}", line["batching"], line["exit"], line["machines"]))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        named("together"),
        ["sequence, none, ", "sequence, confidence, ", "depth, none, ", "depth, confidence, "]
    );
    assert_eq!(
        named("apart"),
        ["sequence", "depth"]
            .map(|batching| {
                ["none", "confidence"]
                    .map(|exit| format!("{batching}, {exit}, 1 prompt sequence + 2 decode {batching}"))
            })
            .concat()
    );
    // Where every group has its own batching, the list makes no further runs.
    assert_eq!(
        named("apart, slow"),
        ["none", "confidence"].map(|exit| format!("depth, {exit}, 1 prompt sequence + 2 decode depth"))
    );
    assert!(sweep.iter().all(|line| line["replicas"] == "3" && line["requests"] == "60"));
    let tpot = |line: &HashMap<String, String>| line["tpot_mean_ms"].parse::<f64>().unwrap();
    assert!(tpot(of("apart, slow")[0]) > 1.5 * tpot(of("apart")[2]), "decode machines have their own profile");
    let printed = scene.succeed(&["capacity", "sweep.yaml", "--tolerance", "0.2"]);
    assert!(printed.contains("apart, slow"), "{printed}");
    let options = ["capacity", "--ttft-ms", "20", "--tolerance", "0.2"];
    let printed = scene.succeed(&[&options[..], &SIMULATE[1..]].concat());
    assert!(printed.contains("depth"), "{printed}");

    // Another profile of a machine is another sweep.
    let mut slower = profile();
    slower.meta.overhead_us = 9.0;
    slower.write(scene.path("slow")).unwrap();
    let error = scene.fail(&["sweep", "sweep.yaml"]);
    assert!(error.contains("of another slow/"), "{error}");
}

#[test]
fn an_experiment_simulates_systems_of_machines_with_roles() {
    let scene = Scene::new();
    let (common, _) =
        sweep().split_once("replicas: 3").map(|(common, rest)| (common.to_owned(), rest.to_owned())).unwrap();
    scene.write("run.yaml", &common);
    scene.succeed(&["run", "run.yaml", "--out", "results"]);
    let summary = lines(&scene.path("results/summary.csv"));
    let machines: Vec<&str> =
        summary.iter().filter(|line| line["system"] == "apart").map(|line| &line["machines"][..]).collect();
    assert_eq!(machines.len(), 4);
    assert!(machines.iter().all(|machines| machines.starts_with("1 prompt sequence + 2 decode")));
}

#[test]
fn machines_that_make_no_system_are_refused_before_anything_is_written() {
    let scene = Scene::new();
    let transfer = "transfer: {gigabytes_per_s: 1}";
    let both = "{role: prompt}, {role: decode}";
    for (machines, expected) in [
        (
            format!("machines: [{{role: prefill}}]\n{transfer}"),
            "unknown variant `prefill`, expected one of `both`, `prompt`, `decode`",
        ),
        (
            format!("machines: [{{role: decode}}]\n{transfer}"),
            "decode machines, but no prompt machines: expected at least one",
        ),
        (
            format!("machines: [{{role: prompt}}]\n{transfer}"),
            "prompt machines, but no decode machines: expected at least one",
        ),
        (format!("machines: []\n{transfer}"), "machines is empty: expected at least one group"),
        (
            format!("machines: [{both}]"),
            "without a link for keys and values: expected its bandwidth and latency (transfer)",
        ),
        (format!("machines: [{both}]\ntransfer: {{gigabytes_per_s: 0}}"), "gigabytes_per_s is 0, expected more than 0"),
        (format!("machines: [{both}]\ntransfer: {{latency_us: 3}}"), "missing field `gigabytes_per_s`"),
        (
            format!("machines: [{{role: prompt, replicas: 0}}, {{role: decode}}]\n{transfer}"),
            "machines[0] (prompt): replicas is 0",
        ),
        (
            format!("machines: [{{role: prompt, num_blocks: 3, device_memory: 1GB}}, {{role: decode}}]\n{transfer}"),
            "machines[0] (prompt): num_blocks beside device_memory",
        ),
        (format!("machines: [{{role: prompt, batch: 3}}, {{role: decode}}]\n{transfer}"), "unknown field `batch`"),
        (
            format!("machines: [{{role: prompt, batching: vanilla}}, {{role: decode}}]\n{transfer}"),
            "vanilla batching on prompt machines",
        ),
        (format!("machines: [{{role: prompt}}, {{role: decode, profile: nowhere}}]\n{transfer}"), "nowhere"),
        (
            format!("machines: [{{role: prompt, num_blocks: 1}}, {{role: decode}}]\n{transfer}"),
            "but the cache holds 16 (1 blocks of 16)",
        ),
        (
            format!("machines: [{{role: prompt, replicas: 70000}}, {{role: decode}}]\n{transfer}"),
            "replicas is 70000: expected at most 65536",
        ),
    ] {
        let error = scene.fail_with_machines(&machines);
        assert!(error.contains(expected), "{machines}: {error}");
    }
    let without = sweep().replace("  transfer: {gigabytes_per_s: 0.1, latency_us: 20}\n", "");
    scene.write("sweep.yaml", &without);
    let error = scene.fail(&["sweep", "sweep.yaml"]);
    assert!(error.contains("apart") && error.contains("without a link for keys and values"), "{error}");
    let unused = sweep().lines().filter(|line| !line.contains("role: ")).collect::<Vec<_>>().join("\n");
    scene.write("sweep.yaml", &unused);
    let error = scene.fail(&["sweep", "sweep.yaml"]);
    assert!(error.contains("serving.transfer without machines"), "{error}");
    scene.write("machines.yaml", MACHINES);
    let output = scene.run(&[&SIMULATE[..], &["--replicas", "2"]].concat());
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("cannot be used with"));
    assert!(!scene.path("results").exists());
}

#[test]
fn the_engine_refuses_machines_with_roles() {
    let scene = Scene::new();
    let sweep = sweep();
    let (common, _) = sweep.split_once("systems:").unwrap();
    let engine = "engine: {model: nowhere, prompts: nowhere, repeats: 1}\n";
    let machines = "  machines: [{role: prompt}, {role: decode}]\n  transfer:";
    scene.write("run.yaml", &format!("{}{engine}", common.replace("  transfer:", machines)));
    let error = scene.fail(&["run", "run.yaml", "--out", "results"]);
    assert!(error.contains("serving: machines are for simulations alone"), "{error}");
    scene.write("run.yaml", &format!("{common}{engine}"));
    let error = scene.fail(&["run", "run.yaml", "--out", "results"]);
    assert!(error.contains("serving: transfer is for simulations alone"), "{error}");
    assert!(!scene.path("results").exists());
}

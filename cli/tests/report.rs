//! Reports of folders that commands write: what is in the page, that it is one safe file, and what is refused.
//!
//! How the page looks and works in a browser is checked by `scripts/report-browser.mjs`.

mod common;
#[path = "common/made_up.rs"]
mod made_up;

use std::fs;
use std::path::Path;

use common::Scene;
use experiments::report::MOST_BYTES;
use made_up::{exits, profile};
use serde_json::Value;
use traces::ExitTable;

const REQUESTS: &str = "{generate: {count: 9, arrivals: {poisson: {rate_per_s: 200}}, prompt_tokens: {fixed: 5}, \
                        output_tokens: {uniform: {min: 2, max: 6}}}}";
/// A name that ends a script and starts an element, if it is not escaped.
const HOSTILE: &str = "</script><img src=x onerror=alert(1)>&";

impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        profile().write(scene.path("profile")).unwrap();
        exits().write(scene.path("exits"), ExitTable::Parquet).unwrap();
        let system = "systems: [{name: made up, profile: profile, exits: exits}]";
        let serving = "serving: {batching: [depth], exit: [none, 'top1:0.6', oracle], max_batch: 4, token_budget: 8}";
        scene.write(
            "sweep.yaml",
            &format!(
                "schema_version: 1\ntitle: '{HOSTILE}'\nrequests: {REQUESTS}\n{serving}\n{system}\ngrid: {{max_batch: [2, 4], seed: [1, 2]}}\n"
            ),
        );
        scene
    }

    fn sweep(&self) {
        self.succeed(&["sweep", "sweep.yaml", "--out", "swept"]);
    }

    fn simulate(&self) {
        self.write("requests.yaml", REQUESTS);
        let what = ["--requests", "requests.yaml", "--profile", "profile", "--exits", "exits"];
        let how = ["--batching", "depth", "--exit", "none,oracle,top1:0.6", "--out", "simulated"];
        self.succeed(&[&["simulate"], &what[..], &how].concat());
    }

    /// A measured run and a training run of the shipped model.
    fn measure(&self) {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").canonicalize().unwrap();
        let chains = models.join("chains").display().to_string();
        let serving =
            "{batching: [sequence, depth], exit: [none, 'static:1', 'gate:0.9'], max_batch: 2, token_budget: 8}";
        let engine = format!("{{model: {chains}, prompts: {chains}/prompts.jsonl, repeats: 2, rounds: 1}}");
        self.write(
            "run.yaml",
            &format!(
                "schema_version: 1\ntitle: measured\nrequests: {REQUESTS}\nserving: {serving}\nengine: {engine}\n"
            ),
        );
        self.succeed(&["run", "run.yaml", "--out", "measured"]);
        let prompts = models.join("kjv/prompts.txt");
        self.write("text.txt", &fs::read_to_string(&prompts).unwrap()[..2000]);
        let sizes =
            ["--hidden-size", "16", "--num-heads", "1", "--num-kv-heads", "1", "--head-dim", "16", "--seq", "16"];
        let steps = ["--steps", "4", "--warmup-steps", "1", "--block-layers", "1", "--vocab-size", "257"];
        let train = [
            "train",
            "--text",
            &prompts.display().to_string(),
            "--held-out",
            "text.txt",
            "--out",
            "trained",
            "--cache",
            "cache",
        ];
        self.succeed(&[&train[..], &sizes, &steps].concat());
    }

    fn page(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}

/// The data in a page, as a browser reads them.
fn data(page: &str) -> Value {
    let (_, rest) = page.split_once(r#"<script type="application/json" id="data">"#).unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

fn column<'d>(table: &'d Value, name: &str) -> &'d Value {
    table["columns"].as_array().unwrap().iter().find(|column| column["name"] == name).unwrap()
}

fn length(value: &Value) -> usize {
    value.as_array().unwrap().len()
}

#[test]
fn measured_runs_and_training_are_shown_side_by_side() {
    let scene = Scene::new();
    scene.measure();
    let said = scene.succeed(&["report", "measured", "trained", "--out", "report.html"]);
    assert!(said.contains("report.html: 0.") && said.contains("MB"), "{said}");
    let page = scene.page("report.html");
    assert!(page.len() < MOST_BYTES);
    let data = data(&page);
    let [measured, trained] = [0, 1].map(|place| &data["folders"][place]);
    assert_eq!((measured["name"].as_str(), measured["kind"].as_str()), (Some("measured"), Some("run")));

    let runs = &measured["runs"];
    assert_eq!(runs["lines"], 12, "six combinations, measured and simulated");
    assert_eq!(column(runs, "policy")["each"][2], "sequence-wise, gate 0.9");
    assert_eq!(column(runs, "series")["each"][1], "sequence-wise, baselines");
    assert_eq!(column(runs, "role")["each"][2], "adaptive");
    let [value, low, high] =
        ["token_agreement", "token_agreement_low", "token_agreement_high"].map(|name| &column(runs, name)["each"]);
    assert!(low[2].as_f64().unwrap() <= value[2].as_f64().unwrap() && value[2].as_f64() <= high[2].as_f64());
    let [value, low, high] =
        ["throughput_tok_s", "throughput_tok_s_low", "throughput_tok_s_high"].map(|name| &column(runs, name)["each"]);
    assert!(low[0].as_f64() < high[0].as_f64() && low[0].as_f64() <= value[0].as_f64(), "{low} {value} {high}");
    assert!(measured["headlines"][0].as_str().unwrap().contains("best baseline"), "{}", measured["headlines"]);

    assert_eq!(length(&measured["latencies"]), 12);
    assert_eq!(length(&measured["latencies"][0]["ttft_ms"]), 9, "a value for each request");
    assert_eq!(length(&measured["rows_by_depth"]), 12);
    assert_eq!(length(&measured["rows_by_depth"][0]["rows"]), 6, "the model's loops");
    assert_eq!(length(&measured["timeline"]), 6);
    let timeline = &measured["timeline"][0];
    let passes = length(&timeline["start_us"]);
    assert!(passes > 20 && timeline["passes"] == passes && length(&timeline["rows"][0]) == passes);
    let policies: Vec<&str> =
        measured["exits"]["policies"].as_array().unwrap().iter().map(|of| of["policy"].as_str().unwrap()).collect();
    assert_eq!(policies, ["oracle", "gate 0.9"]);
    assert_eq!(measured["comparisons"][0]["name"], "validation");
    assert!(column(&measured["profile"], "time_us")["each"].is_array());
    let tables: Vec<&str> =
        measured["tables"].as_array().unwrap().iter().map(|table| table["name"].as_str().unwrap()).collect();
    assert_eq!(tables, ["errors", "passes", "predictions", "quality", "repeats"]);
    let facts = measured["facts"].to_string();
    for fact in [
        "\"device\"",
        "\"model\",\"chains",
        "\"commit\"",
        "predictions.csv\",\"sealed before the measurement: written at",
    ] {
        assert!(facts.contains(fact), "{fact}: {facts}");
    }
    assert!(measured["documents"][0][1].as_str().unwrap().contains("title: measured"));
    assert!(measured["reproduce"].to_string().contains("depthwise run config.yaml"));

    assert_eq!((trained["kind"].as_str(), trained["runs"].is_null()), (Some("train"), true));
    assert_eq!(trained["loss"]["lines"], 4);
    assert_eq!(trained["tables"][0]["name"], "eval");
    assert_eq!(trained["documents"][0][0], "training.yaml");
}

#[test]
fn a_report_is_one_file_that_loads_nothing_and_has_the_same_bytes_every_time() {
    let scene = Scene::new();
    scene.sweep();
    scene.simulate();
    scene.succeed(&["report", "swept", "simulated", "--out", "once.html"]);
    scene.succeed(&["report", "swept", "simulated", "--out", "twice.html"]);
    let page = scene.page("once.html");
    assert!(page == scene.page("twice.html"));
    let (markup, _) = page.split_once(r#"<script type="application/json""#).unwrap();
    for loads in ["<link", "src=", "@import", "url(", "<iframe"] {
        assert!(!markup.contains(loads), "{loads}");
    }
    assert!(
        markup.contains("Content-Security-Policy\" content=\"default-src 'none';"),
        "the browser loads nothing either"
    );
    let data = data(&page);
    let [swept, simulated] = [0, 1].map(|place| &data["folders"][place]);
    assert_eq!(swept["runs"]["lines"], 6, "a line for each point, over two seeds");
    assert_eq!(column(&swept["runs"], "seeds")["same"], 2);
    assert!(length(&swept["latencies"]) == 0 && swept["exits"].is_null());
    assert_eq!(length(&simulated["latencies"]), 3);
    assert!(simulated["reproduce"].to_string().contains("depthwise simulate"));
}

#[test]
fn names_and_texts_of_others_become_no_markup() {
    let scene = Scene::new();
    scene.sweep();
    let hostile = HOSTILE.replace('/', "-");
    fs::rename(scene.path("swept"), scene.path(&hostile)).unwrap();
    scene.succeed(&["report", &hostile, "--out", "report.html"]);
    let page = scene.page("report.html");
    assert!(!page.contains("<img"), "neither the folder's name nor the title is an element");
    assert_eq!(page.matches("</script>").count(), 4, "the scripts of the page, and no more");
    let data = data(&page);
    assert_eq!(
        (data["folders"][0]["name"].as_str(), data["folders"][0]["title"].as_str()),
        (Some(&*hostile), Some(HOSTILE))
    );
}

#[test]
fn what_is_no_folder_of_results_is_refused_by_name_and_nothing_is_written() {
    let scene = Scene::new();
    scene.sweep();
    fs::create_dir(scene.path("notes")).unwrap();
    let refused = |arguments: &[&str], expected: &[&str]| {
        let error = scene.fail(&[&["report"], arguments].concat());
        expected.iter().for_each(|part| assert!(error.contains(part), "{error}"));
        assert!(!scene.path("report.html").exists());
    };
    refused(&["notes"], &["notes: found a folder without it, expected a folder with depthwise-results.json"]);
    refused(&["swept", "absent"], &["absent: found no such folder"]);
    refused(&["swept", "./swept"], &["./swept is given twice"]);
    let summary = scene.page("swept/sweep-summary.csv");
    scene.write("swept/sweep-summary.csv", &summary.replacen(",depth,", ",deep,", 1));
    refused(&["swept"], &["swept/sweep-summary.csv", "deep"]);
    scene.write("swept/sweep-summary.csv", &summary[..summary.len() - 30]);
    refused(&["swept"], &["swept/sweep-summary.csv", "line: 7"]);
    scene.write("swept/sweep-summary.csv", &summary);
    scene.write("notes.html", "dear to somebody");
    let error = scene.fail(&["report", "swept", "--out", "notes.html"]);
    assert!(error.contains("notes.html is there already"), "{error}");
    assert_eq!(scene.page("notes.html"), "dear to somebody");
}

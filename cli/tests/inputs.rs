//! Files as others publish them, from the command line.

mod common;

use std::fs;
use std::io::Write;

use common::Scene;

/// A profile of one loop that comes with the repository, and a small model.
const PROFILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/paper/profiles/gemma-vanilla");
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv");
const PROMPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv/prompts.txt");

const BAILIAN: &str = r#"{"chat_id": 11, "parent_chat_id": -1, "timestamp": 0.21, "input_length": 12, "output_length": 3, "type": "text", "turn": 1, "hash_ids": [5]}
{"chat_id": 12, "parent_chat_id": 11, "timestamp": 61.5, "input_length": 45, "output_length": 2, "type": "text", "turn": 2, "hash_ids": [5, 8, 9]}
{"chat_id": 13, "parent_chat_id": -1, "timestamp": 3600.25, "input_length": 30, "output_length": 1, "type": "file", "turn": 1, "hash_ids": [21, 22]}
"#;

fn scene() -> Scene {
    Scene(tempfile::tempdir().unwrap())
}

/// Simulates a file; arrivals in seconds as they are written, and what was said beside the results.
fn arrivals(scene: &Scene, file: &str, more: &[&str]) -> (Vec<String>, String) {
    let arguments = ["simulate", "--requests", file, "--profile", PROFILE, "--exit", "none", "--batching", "sequence"];
    let output = scene.run(&[&arguments[..], &["--out", "out"], more].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let requests = fs::read_to_string(scene.path("out/requests.csv")).unwrap();
    let mut lines = requests.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let place = lines.next().unwrap().iter().position(|column| column == "arrival_s").unwrap();
    (lines.map(|mut line| line.swap_remove(place)).collect(), said)
}

fn fails(scene: &Scene, file: &str) -> String {
    scene.fail(&["simulate", "--requests", file, "--profile", PROFILE])
}

#[test]
fn bailian_traces_are_simulated_in_seconds_with_or_without_hashes() {
    let scene = scene();
    scene.write("hashed.jsonl", BAILIAN);
    let bare: String =
        BAILIAN.lines().map(|line| format!("{}}}\n", line.split(", \"hash_ids\"").next().unwrap())).collect();
    scene.write("bare.jsonl", &bare);
    for file in ["hashed.jsonl", "bare.jsonl"] {
        let (arrivals, said) = arrivals(&scene, file, &[]);
        assert_eq!(arrivals, ["0.21", "61.5", "3600.25"], "{file}");
        assert!(!said.contains("not replayed"), "{said}");
    }
    let (windowed, _) = arrivals(&scene, "bare.jsonl", &["--window-s", "0", "61.29"]);
    assert_eq!(windowed, ["0.0"], "windows count from the first arrival");
}

#[test]
fn a_unit_that_the_file_does_not_tell_is_asked_for() {
    let scene = scene();
    let line = |time: &str| format!("{{\"timestamp\": {time}, \"input_length\": 9, \"output_length\": 2}}\n");
    scene.write("bare.jsonl", &(line("2") + &line("5")));
    let error = fails(&scene, "bare.jsonl");
    assert!(error.contains("bare.jsonl: found a file without hash_ids whose timestamp may be seconds or"), "{error}");
    assert!(error.contains("`--time-unit s`"), "{error}");
    assert_eq!(arrivals(&scene, "bare.jsonl", &["--time-unit", "s"]).0, ["2.0", "5.0"]);
    assert_eq!(arrivals(&scene, "bare.jsonl", &["--time-unit", "ms"]).0, ["0.002", "0.005"]);
    scene.write("bare.yaml", "{file: bare.jsonl, time_unit: s}");
    assert_eq!(arrivals(&scene, "bare.yaml", &[]).0, ["2.0", "5.0"]);
}

#[test]
fn compressed_traces_are_unpacked_and_other_files_named() {
    let scene = scene();
    let azure = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.071000,1,1200,3\n\
        2024-10-15 00:00:00.350000,0,220,5\n2024-10-15 00:00:02.000001,3,400,2\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(azure.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    fs::write(scene.path("azure.csv.gz"), &gzip).unwrap();
    let (found, said) = arrivals(&scene, "azure.csv.gz", &[]);
    assert_eq!(found, ["0.0", "0.279", "1.929001"]);
    assert!(said.contains("warning: azure: not used: `NumImages`"), "{said}");
    fs::write(scene.path("cut.csv.gz"), &gzip[..gzip.len() - 9]).unwrap();
    assert!(fails(&scene, "cut.csv.gz").contains("its gzip data is cut off"));
    scene.write("pointer.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n");
    assert!(fails(&scene, "pointer.csv").contains("run `git lfs pull`"));
}

#[test]
fn rows_without_tokens_are_counted_or_refused() {
    let scene = scene();
    scene.write(
        "azure.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00,12,0\n2024-10-15 00:00:01,9,2\n",
    );
    let (found, said) = arrivals(&scene, "azure.csv", &[]);
    assert_eq!(found, ["0.0"]);
    assert!(said.contains("warning: azure: requests left out: 1 without output tokens"), "{said}");
    let error = scene.fail(&["simulate", "--requests", "azure.csv", "--profile", PROFILE, "--zero-tokens", "refuse"]);
    assert!(error.contains("azure.csv:2: GeneratedTokens: found `0`"), "{error}");
}

#[test]
fn a_timeline_keeps_what_follows_the_first_arrival() {
    let scene = scene();
    scene.write(
        "late.csv",
        "request,arrival_us,prompt_tokens,output_tokens\n0,3600000000,12,2\n1,3601000000,9,2\n2,3700000000,9,2\n",
    );
    let arguments =
        ["timeline", "--requests", "late.csv", "--profile", PROFILE, "--exit", "none", "--batching", "sequence"];
    scene.succeed(&[&arguments[..], &["--keep-s", "0", "10", "--out", "late.json"]].concat());
    let events = fs::read_to_string(scene.path("late.json")).unwrap();
    let count = |request: u32| events.matches(&format!("\"request\":{request}")).count();
    assert!(count(0) > 0 && count(1) > 0, "{events}");
    assert_eq!(count(2), 0, "a hundred seconds after the first: {events}");
}

#[test]
fn a_configuration_may_begin_with_a_byte_order_mark() {
    let scene = scene();
    scene.write(
        "requests.yaml",
        "\u{feff}generate:\n  count: 4\n  arrivals: all_at_once\n  prompt_tokens: {fixed: 8}\n  output_tokens: {fixed: 4}\n\
         max_output_tokens: 3\n",
    );
    assert_eq!(arrivals(&scene, "requests.yaml", &[]).0, ["0.0"; 4]);
}

#[test]
fn a_text_that_is_only_a_pointer_is_named() {
    let scene = scene();
    scene.write("text.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n");
    let error = scene.fail(&["evaluate", MODEL, "--text", "text.txt"]);
    assert!(error.contains("text.txt: found a Git LFS pointer") && error.contains("run `git lfs pull`"), "{error}");
}

#[test]
fn logs_of_the_evaluation_harness_are_scored() {
    let scene = scene();
    let target = r#"{"doc_id": 0, "target": "True", "arguments": {"gen_args_0": {"arg_0": "A man sings. True, False, or Neither?", "arg_1": " True"}, "gen_args_1": {"arg_0": "A man sings. True, False, or Neither?", "arg_1": " Neither"}}, "acc": 1.0}"#;
    let empty = r#"{"doc_id": 0, "target": "0", "arguments": {"gen_args_0": {"arg_0": "", "arg_1": "The cat sleeps."}, "gen_args_1": {"arg_0": "", "arg_1": "The cat sleep."}}}"#;
    let common = r#"{"doc_id": 0, "doc": {"answer": "2"}, "target": "was too big.", "arguments": {"gen_args_0": {"arg_0": "It would not fit because the oven", "arg_1": " was too big."}, "gen_args_1": {"arg_0": "It would not fit because the pot", "arg_1": " was too big."}}, "acc": 1.0}"#;
    for (name, sample, gold) in [("target", target, "0"), ("empty", empty, "0"), ("common", common, "1")] {
        scene.write("questions.jsonl", sample);
        scene.succeed(&["evaluate", MODEL, "--questions", "questions.jsonl", "--out", name]);
        let answers = fs::read_to_string(scene.path(name).join("answers.csv")).unwrap();
        let mut lines = answers.lines().map(|line| line.split(',').collect::<Vec<_>>());
        assert_eq!(lines.next().unwrap()[2..5], ["choice", "is_gold", "log_likelihood_nats"]);
        for line in lines {
            assert_eq!(line[3], (line[2] == gold).to_string(), "{name}: {line:?}");
            assert!(line[4].parse::<f64>().unwrap() < 0.0, "{name}: {line:?}");
        }
    }
    scene.write(
        "questions.jsonl",
        r#"{"doc_id": 0, "target": "4", "arguments": {"gen_args_0": {"arg_0": "2+2=", "arg_1": {"until": ["."]}}}}"#,
    );
    let error = scene.fail(&["evaluate", MODEL, "--questions", "questions.jsonl"]);
    assert!(error.contains("found a request of the type generate_until"), "{error}");
}

#[test]
fn an_evaluation_of_tokens_that_all_agree_is_written_whatever_their_number() {
    let scene = scene();
    for tokens in [1, 9, 11, 18, 20] {
        let folder = scene.path("exits");
        fs::create_dir_all(&folder).unwrap();
        fs::write(
            folder.join("exits.yaml"),
            "schema_version: 1\nmodel: 千问\nfingerprint: f\nnum_loops: 2\nsource: a test\n",
        )
        .unwrap();
        let row = |token: usize| format!("0,{token},0,7,0.5,0.25,1,0\n0,{token},1,7,0.75,0.5,0.5,0.9\n");
        let rows: String = (0..tokens).map(row).collect();
        let header = "generation,token,depth,prediction,top1,margin,entropy,similarity\n";
        fs::write(folder.join("exits.csv"), format!("{header}{rows}")).unwrap();
        let out = format!("of-{tokens}");
        let output = scene.run(&["evaluate", "--exits", "exits", "--out", &out]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{tokens} tokens: {said}");
        assert!(said.contains("the embedded font lacks"), "{said}");
        for file in ["config.yaml", "signals.csv", "figures/exit-depths.png", "figures/reliability.svg"] {
            assert!(scene.path(&out).join(file).exists(), "{file} of {tokens} tokens");
        }
    }
}

/// An agent of three requests with two tools, and a request beside it.
const AGENT: &str = "{\"session_id\": \"a\", \"arrival_time_ns\": 0, \"sub_requests\": [\
    {\"input_toks\": 64, \"output_toks\": 2, \"tool_duration_ns\": 5000000000}, \
    {\"input_toks\": 80, \"output_toks\": 2, \"tool_duration_ns\": 1000000000}, {\"input_toks\": 96, \"output_toks\": 3}]}\n\
    {\"arrival_time_ns\": 500000000, \"input_toks\": 32, \"output_toks\": 4}\n";

/// A column of the requests of the last simulation, as numbers.
fn column(scene: &Scene, name: &str) -> Vec<f64> {
    column_of(scene, "out", name)
}

fn column_of(scene: &Scene, folder: &str, name: &str) -> Vec<f64> {
    let requests = fs::read_to_string(scene.path(folder).join("requests.csv")).unwrap();
    let mut lines = requests.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let place = lines.next().unwrap().iter().position(|column| column == name).unwrap();
    lines.map(|line| line[place].parse().unwrap()).collect()
}

#[test]
fn agents_wait_for_their_tools_unless_sessions_are_ignored() {
    let scene = scene();
    scene.write("agent.jsonl", AGENT);
    arrivals(&scene, "agent.jsonl", &[]);
    let (begins, ends) = (column(&scene, "arrival_s"), column(&scene, "finished_s"));
    assert_eq!(begins[..2], [0.0, 0.5]);
    assert!(
        (begins[2] - ends[0] - 5.0).abs() < 1e-9 && (begins[3] - ends[2] - 1.0).abs() < 1e-9,
        "{begins:?} {ends:?}"
    );
    let error = scene.fail(&["simulate", "--requests", "agent.jsonl", "--profile", PROFILE, "--sessions", "ignore"]);
    assert!(error.contains("--sessions: found ignore, and 2 requests of agent without an arrival time"), "{error}");
    // The engine follows them too, on the wall clock with idle time skipped.
    let model = ["--model", MODEL, "--prompts", PROMPTS, "--requests", "agent.jsonl"];
    scene.succeed(&[&["replay"], &model[..], &["--batching", "depth", "--exit", "none", "--out", "served"]].concat());
    let (begins, ends) = (column_of(&scene, "served", "arrival_s"), column_of(&scene, "served", "finished_s"));
    assert_eq!(begins[..2], [0.0, 0.5]);
    assert!(
        (begins[2] - ends[0] - 5.0).abs() < 1e-6 && (begins[3] - ends[2] - 1.0).abs() < 1e-6,
        "{begins:?} {ends:?}"
    );
    scene.succeed(&[&["record"], &model[..], &["--out", "exits"]].concat());
    let error = scene.fail(&[&["validate"], &model[..], &["--exit", "none", "--out", "validated"]].concat());
    assert!(error.contains("2 requests have no arrival time but follow the answer"), "{error}");
}

/// Three users: three requests at 0, and the others each this long after an answer.
fn sent_after_answers(scene: &Scene, folder: &str, think_s: f64) {
    let (mut begins, ends) = (column_of(scene, folder, "arrival_s"), column_of(scene, folder, "finished_s"));
    let mut answers: Vec<f64> = ends.iter().map(|end| end + think_s).collect();
    answers.sort_by(f64::total_cmp);
    begins.sort_by(f64::total_cmp);
    assert_eq!(begins[..3], [0.0; 3]);
    assert!(begins[3..].iter().zip(&answers).all(|(begin, answer)| (begin - answer).abs() < 1e-6), "{begins:?}");
}

#[test]
fn users_send_requests_when_they_have_answers() {
    let scene = scene();
    let lines: String = (0..50).map(|id| format!("{id},{}.0,20,3\n", id * 1000)).collect();
    scene.write("trace.csv", &format!("request,arrival_us,prompt_tokens,output_tokens\n{lines}"));
    arrivals(&scene, "trace.csv", &["--users", "3", "--think-time-s", "0.25", "--max-batch", "4"]);
    sent_after_answers(&scene, "out", 0.25);
    let model = ["--model", MODEL, "--prompts", PROMPTS, "--requests", "trace.csv", "--exit", "none"];
    let users = ["--batching", "sequence", "--users", "3", "--think-time-s", "0.25", "--out", "served"];
    scene.succeed(&[&["replay"], &model[..], &users].concat());
    sent_after_answers(&scene, "served", 0.25);
    let error = scene.fail(&[&["validate"], &model[..], &["--users", "3", "--out", "validated"]].concat());
    assert!(error.contains("--users: found it in a validation"), "{error}");
    let error =
        scene.fail(&["simulate", "--requests", "trace.csv", "--profile", PROFILE, "--users", "3", "--rate-per-s", "5"]);
    assert!(error.contains("--users: found it beside `rate_per_s`"), "{error}");
    let capacity = ["capacity", "--requests", "trace.csv", "--profile", PROFILE, "--exit", "none", "--ttft-ms", "50"];
    let error = scene.fail(&[&capacity[..], &["--users", "3"]].concat());
    assert!(error.contains("users send requests when they have answers"), "{error}");
}

#[test]
fn a_trace_is_described_converted_cut_and_merged() {
    let scene = scene();
    scene.write("agent.jsonl", AGENT);
    scene.write("bailian.jsonl", BAILIAN);
    let said = scene.succeed(&["trace", "info", "agent.jsonl", "bailian.jsonl"]);
    for line in [
        "agent.jsonl",
        "  sessions     1 with 3 requests, 3 on average, at most 3",
        "  think times  of 2 requests: median 1 s, mean 3 s",
        "  arrivals     2 requests have none of their own and follow an answer",
        "  requests     3 in 3600 s: 0.0005555 requests/s",
        "  prefixes     0.0% of 3 blocks of 16 tokens are those of an earlier prompt, 0.0% of all prompt tokens",
        "  sessions     2 with 3 requests, 1.5 on average, at most 2",
        "    16-31  1  ########################################",
    ] {
        assert!(said.lines().any(|found| found == line), "expected `{line}` in\n{said}");
    }
    scene.succeed(&["trace", "convert", "bailian.jsonl", "--out", "bailian.csv"]);
    let ours = "request,arrival_us,prompt_tokens,output_tokens,session,think_time_us,hash_block_tokens,hash_ids\n\
        0,210000.000,12,3,0,,16,\n1,61500000.000,45,2,0,,16,5 8\n2,3600250000.000,30,1,1,,16,21\n";
    assert_eq!(fs::read_to_string(scene.path("bailian.csv")).unwrap(), ours);
    assert_eq!(arrivals(&scene, "bailian.csv", &[]).0, arrivals(&scene, "bailian.jsonl", &[]).0);

    let merge = ["trace", "convert", "agent.jsonl", "bailian.jsonl", "--out", "both.csv"];
    let error = scene.fail(&merge);
    assert!(error.contains("--without-hashes") && error.contains("agent without prefix hashes"), "{error}");
    scene.succeed(&[&merge[..], &["--without-hashes", "--first", "2"]].concat());
    let both = "request,arrival_us,prompt_tokens,output_tokens,session,think_time_us\n\
        0,0.000,64,2,0,\n1,210000.000,12,3,1,\n2,500000.000,32,4,,\n3,61500000.000,45,2,1,\n";
    assert_eq!(fs::read_to_string(scene.path("both.csv")).unwrap(), both);
    scene.write("notes.csv", "dear to somebody");
    let error = scene.fail(&["trace", "convert", "agent.jsonl", "--out", "notes.csv"]);
    assert!(error.contains("notes.csv is there already and is not such a file of ours"), "{error}");
}

#[test]
fn conversations_are_counted_by_the_tokenizer_of_a_model() {
    let scene = scene();
    let chat = "[{\"conversations\": [{\"from\": \"human\", \"value\": \"In the beginning God created the heaven\"}, \
        {\"from\": \"gpt\", \"value\": \"and the earth.\"}]}]";
    scene.write("chat.json", chat);
    let error = scene.fail(&["trace", "info", "chat.json"]);
    assert!(error.contains("chat.json: found conversations as texts, expected the tokenizer"), "{error}");
    let tokenizer = format!("{MODEL}/tokenizer.json");
    let said = scene.succeed(&["trace", "info", "chat.json", "--tokenizer", &tokenizer]);
    let encoder = engine::Tokenizer::load(std::path::Path::new(&tokenizer)).unwrap();
    let tokens = encoder.encode("In the beginning God created the heaven").unwrap().len();
    assert!(said.contains(&format!("  prompts      {tokens} tokens, mean {tokens};")), "{said}");
    let error = scene.fail(&["simulate", "--requests", "chat.json", "--tokenizer", &tokenizer, "--profile", PROFILE]);
    assert!(error.contains("users: found none, and 1 requests of chat without an arrival time"), "{error}");
    arrivals(&scene, "chat.json", &["--tokenizer", &tokenizer, "--users", "1"]);
    let error = scene.fail(&["trace", "info", "chat.json", "--tokenizer", "none.json"]);
    assert!(error.contains("--tokenizer: found none.json: cannot load the tokenizer"), "{error}");
}

#[test]
fn exits_of_other_engines_are_imported_and_written_again() {
    let scene = scene();
    let depths = r#"{"depths_by_request":{"0":[4,2,3],"1":[4,1]}}"#;
    scene.write("depths.json", depths);
    let said = scene.succeed(&["import", "exits", "depths.json", "--out", "exits"]);
    assert_eq!(said, "2 requests, 5 tokens, 4 loops: exits\n");
    let written = |exits: &str, policy: &str| {
        scene.succeed(&["trace", "depths", exits, "--exit", policy, "--out", "again.json"]);
        fs::read_to_string(scene.path("again.json")).unwrap()
    };
    assert_eq!(written("exits", "margin:0.5").trim_end(), depths);
    assert_eq!(written("exits", "entropy:0.5").trim_end(), depths);
    // What compares depths is not read at depth 0.
    assert_eq!(written("exits", "difference:0.5").trim_end(), r#"{"depths_by_request":{"0":[4,2,3],"1":[4,2]}}"#);
    // The first token, of the prompt, runs all loops there.
    assert_eq!(written("exits", "static:0").trim_end(), r#"{"depths_by_request":{"0":[4,1,1],"1":[4,1]}}"#);

    let too_deep = scene.fail(&["import", "exits", "depths.json", "--num-loops", "3", "--out", "other"]);
    assert!(too_deep.contains("depths.json: ") && too_deep.contains('4'), "{too_deep}");
    assert!(!scene.path("other").exists());
    let by_load = "load-adaptive:margin:0.5..0.1:4..16";
    let refused = scene.fail(&["trace", "depths", "exits", "--exit", by_load, "--out", "load.json"]);
    assert!(refused.contains("depend on the load, not on the trace alone"), "{refused}");
    assert!(!scene.path("load.json").exists());
}

#[test]
fn exits_are_drawn_with_a_mean_or_with_shares_and_go_with_any_profile() {
    let scene = scene();
    let draw = |more: &[&str]| scene.run(&[&["trace", "draw-exits", "--out", "exits"], more].concat());
    let drawn = |more: &[&str]| {
        let output = draw(more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        traces::ExitTrace::read(scene.path("exits")).unwrap()
    };
    let of_mean = drawn(&["--loops", "4", "--mean", "2.5"]);
    assert!((of_mean.mean_oracle_passes() - 2.5).abs() < 0.03, "{}", of_mean.mean_oracle_passes());
    let narrow = drawn(&["--shares", "0,1,1,0", "--generations", "20", "--tokens", "50", "--seed", "4"]);
    assert_eq!((narrow.num_generations(), narrow.num_tokens()), (20, 1000));
    assert!((0..1000).all(|token| [1, 2].contains(&narrow.oracle_depth(token))));
    drawn(&["--shares", "3,1"]);
    let two_loops = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/paper/profiles/gemma-2-loops-rank-0");
    scene.write("trace.csv", "request,arrival_us,prompt_tokens,output_tokens\n0,0.0,20,300\n");
    let simulate =
        ["simulate", "--requests", "trace.csv", "--profile", two_loops, "--exits", "exits", "--exit", "gate:0.5"];
    let said = scene.succeed(&[&simulate[..], &["--batching", "depth"]].concat());
    assert!(said.contains("gate:0.5"), "{said}");
    for (more, expected) in [
        (&["--loops", "4", "--mean", "4.5"][..], "--mean: found 4.5, expected 1 to 4 loops"),
        (&["--loops", "4", "--mean", "2", "--fewest", "5"], "--fewest: found 5 of 4"),
        (&["--shares", "0,0"], "--shares: found [0.0, 0.0]"),
        (&["--shares", "1,1", "--mean", "1.5", "--loops", "2"], "cannot be used with"),
        (&["--mean", "1.5"], "--loops <N>"),
        (&["--loops", "2"], "--mean <LOOPS>"),
        (&["--shares", "1", "--generations", "1000000", "--tokens", "1000000"], "expected at most 20000000"),
    ] {
        let output = draw(more);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "expected `{expected}` in {said}");
    }
}

#[test]
fn layer_tables_refuse_a_looped_model() {
    let scene = scene();
    let ouro = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/looped/ouro-1.4b.json");
    let refused = scene.fail(&["import", "layer-tables", "tables", "--model", ouro, "--out", "profile"]);
    assert!(refused.contains("ouro-1.4b.json: found model_type ouro, expected a vanilla model"), "{refused}");
}

//! Models from wherever they lie, through every command that takes one; and what they say.

mod common;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use engine::weights::{Stored, Weights};
use engine::{ModelConfig, Tokenizer};
use traces::LatencyProfile;

use common::Scene;

const TEXT: &str = "In the beginning was the loop, and the loop was with the block, and the block was shared. ";

/// The folder holds a recursive model of three loops of one layer, the same as a Hugging Face folder `plain`, a text and
/// a request trace.
fn scene() -> Scene {
    let scene = Scene(tempfile::tempdir().unwrap());
    let tokenizer = Tokenizer::train(TEXT, 272).unwrap();
    let config = ModelConfig {
        vocab_size: tokenizer.vocab_size(),
        hidden_size: 16,
        intermediate_size: 24,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 8,
        block_layers: 1,
        num_loops: 3,
        max_positions: 256,
        ..ModelConfig::default()
    };
    let model = scene.path("model");
    Weights::random(config, 1).unwrap().save(&model, Stored::F32).unwrap();
    tokenizer.save(&model.join("tokenizer.json")).unwrap();
    scene.write("text.txt", &TEXT.repeat(5));
    scene.write("requests.csv", "request,arrival_us,prompt_tokens,output_tokens\n0,0.0,5,4\n1,0.0,7,3\n");
    scene.succeed(&["export", "model", "--out", "plain"]);
    scene
}

fn same_file(scene: &Scene, name: &str) -> (String, String) {
    let read = |folder: &str| fs::read_to_string(scene.path(folder).join(name)).unwrap();
    (read("of-model"), read("of-plain"))
}

#[test]
fn an_exported_model_split_into_its_loops_is_evaluated_and_recorded_as_the_original() {
    let scene = scene();
    scene.succeed(&["evaluate", "model", "--text", "text.txt", "--out", "of-model"]);
    scene.succeed(&["evaluate", "plain", "--loops", "3", "--text", "text.txt", "--out", "of-plain"]);
    let (ours, plain) = same_file(&scene, "loops.csv");
    assert_eq!(ours.lines().count(), 1 + 3);
    assert_eq!(ours, plain);

    let record = ["record", "--prompts", "text.txt", "--requests", "requests.csv"];
    scene.succeed(&[&record[..], &["--model", "model", "--out", "exits-of-model"]].concat());
    scene.succeed(&[&record[..], &["--model", "plain", "--loops", "3", "--out", "exits-of-plain"]].concat());
    let evaluate = |exits: &'static str, out| scene.succeed(&["evaluate", "--exits", exits, "--out", out]);
    evaluate("exits-of-model", "of-model");
    evaluate("exits-of-plain", "of-plain");
    let (ours, plain) = same_file(&scene, "signals.csv");
    assert_eq!(ours, plain);
}

#[test]
fn a_hugging_face_folder_is_profiled_replayed_validated_and_trained() {
    let scene = scene();
    let limits = ["--max-batch", "2", "--token-budget", "8", "--prefill-chunk", "8"];
    let profile = ["profile", "--model", "plain", "--loops", "3", "--max-tokens", "16", "--rounds", "1"];
    scene.succeed(&[&profile[..], &limits, &["--out", "profile"]].concat());
    let source = LatencyProfile::read(scene.path("profile")).unwrap().meta.source;
    assert!(source.contains("passes under steady load over the sum of components"), "{source}");
    let served = ["--prompts", "text.txt", "--requests", "requests.csv", "--exit", "none,oracle"];
    let plain = ["--model", "plain", "--loops", "3", "--weights", "bf16"];
    scene.succeed(&[&["replay"], &plain[..], &served, &limits, &["--out", "replayed"]].concat());
    scene.succeed(
        &[
            &["validate"],
            &plain[..],
            &served,
            &limits,
            &["--repeats", "1", "--rounds", "1", "--rates", "0.9", "--out", "validated"],
        ]
        .concat(),
    );

    fs::create_dir(scene.path("configs")).unwrap();
    scene.write(
        "configs/run.yaml",
        "{schema_version: 1, title: test, requests: {file: ../requests.csv}, \
         serving: {batching: [depth], exit: [none], max_batch: 2, token_budget: 8}, \
         engine: {model: ../plain, loops: 3, prompts: ../text.txt, repeats: 1, rounds: 1}}",
    );
    scene.succeed(&["run", "configs/run.yaml", "--out", "results"]);
    let resolved = fs::read_to_string(scene.path("results/config.yaml")).unwrap();
    assert!(resolved.contains("loops: 3"), "{resolved}");

    let text = ["--text", "text.txt", "--held-out", "text.txt", "--steps", "1", "--batch", "1", "--seq", "16"];
    let models = ["--from", "plain", "--teacher", "plain", "--warmup-steps", "0", "--out", "trained"];
    scene.succeed(&[&["train"], &text[..], &models].concat());
    assert_eq!(Weights::load(&scene.path("trained")).unwrap().config().block_layers, 3);
}

#[test]
fn loops_that_do_not_divide_the_layers_are_refused_and_so_are_other_loops_than_a_recursive_models() {
    let scene = scene();
    let refused = |model: &'static str, loops: &'static str| {
        scene.fail(&["evaluate", model, "--loops", loops, "--text", "text.txt"])
    };
    assert!(refused("plain", "2").contains("3 layers, expected a multiple of 2 loops"));
    assert!(refused("model", "1").contains("model: a recursive model of 3 loops"));
    assert!(refused("nowhere", "1").contains("nowhere: no such file or folder"));
    scene.succeed(&["convert", "plain", "--loops", "1", "--out", "ordinary"]);
    scene.succeed(&["evaluate", "ordinary", "--loops", "3", "--text", "text.txt"]);
    assert!(refused("ordinary", "2").contains("3 layers, expected a multiple of 2 loops"));
    fs::remove_file(scene.path("plain/tokenizer.json")).unwrap();
    assert!(refused("plain", "3").contains("plain: the model has no tokenizer: expected a tokenizer.json beside"));
    scene.write("plain/tokenizer.model", "");
    let refused = refused("plain", "3");
    assert!(
        refused.contains("plain: the model has no tokenizer: it has one of another format; save it as"),
        "{refused}"
    );
}

#[test]
fn every_command_that_needs_a_tokenizer_says_where_it_is_expected() {
    let scene = scene();
    fs::remove_file(scene.path("model/tokenizer.json")).unwrap();
    for command in [
        "generate model --prompt In",
        "evaluate model --text text.txt",
        "record --model model --prompts text.txt --requests requests.csv --out out",
        "replay --model model --prompts text.txt --requests requests.csv --exit none",
        "validate --model model --prompts text.txt --requests requests.csv --exit none --out out",
    ] {
        let error = scene.fail(&command.split(' ').collect::<Vec<_>>());
        let expected = "model: the model has no tokenizer: expected a tokenizer.json beside its config.json";
        assert!(error.contains(expected), "{command}: {error}");
    }
}

#[test]
fn texts_may_be_shorter_than_a_window() {
    let scene = scene();
    scene.write("short.txt", "In the beginning was the loop");
    scene.succeed(&["evaluate", "model", "--text", "short.txt"]);
}

/// What `generate` prints of the repository's model: its text, and what it says of it.
fn generated(more: &[&str]) -> (String, String) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    let output = Command::new(env!("CARGO_BIN_EXE_depthwise")).arg("generate").arg(model).args(more).output().unwrap();
    let printed = |bytes| String::from_utf8(bytes).unwrap();
    let (text, notes) = (printed(output.stdout), printed(output.stderr));
    assert!(output.status.success(), "{notes}");
    (text, notes)
}

fn num_loops() -> usize {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv/config.json");
    ModelConfig::load(&model).unwrap().num_loops
}

/// The depths that are told of the texts, by text.
fn depths(notes: &str) -> Vec<Vec<usize>> {
    let lines = notes.lines().filter_map(|line| line.strip_prefix("depths "));
    lines.map(|line| line.split_whitespace().map(|depth| depth.parse().unwrap()).collect()).collect()
}

#[test]
fn a_text_goes_on_from_its_prompt_and_the_depth_of_each_token_is_told() {
    let prompt = "And God said unto";
    let common = ["--prompt", prompt, "--max-tokens", "24"];
    let (full, notes) = generated(&common);
    assert!(full.starts_with(prompt) && full.ends_with('\n') && full.len() > prompt.len() + 24, "{full}");
    assert_eq!(depths(&notes), [vec![num_loops() - 1; 24]]);
    assert!(
        notes.contains("24 tokens in ") && notes.contains(&format!("{0}.00 of {0} passes", num_loops())),
        "{notes}"
    );

    let (_, notes) = generated(&[&common[..], &["--exit", "static:1"]].concat());
    assert_eq!(depths(&notes), [vec![1; 24]]);
    let early = [&common[..], &["--exit", "top1:0.6"]].concat();
    let (text, notes) = generated(&early);
    let left = depths(&notes).remove(0);
    assert!(left.iter().min() < left.iter().max(), "{notes}");
    for batching in ["vanilla", "sequence"] {
        assert_eq!(generated(&[&early[..], &["--batching", batching]].concat()).0, text);
    }
}

#[test]
fn colours_tell_the_depths_and_change_no_text() {
    let common = ["--prompt", "And God said unto", "--max-tokens", "24", "--exit", "top1:0.6"];
    let (text, notes) = generated(&[&common[..], &["--color", "never"]].concat());
    assert!(!text.contains('\u{1b}') && depths(&notes).len() == 1);
    let (colored, notes) = generated(&[&common[..], &["--color", "always"]].concat());
    assert!(depths(&notes).is_empty() && notes.starts_with("depth \u{1b}[38;5;39m0\u{1b}[0m"), "{notes}");
    let mut parts = colored.split('\u{1b}');
    let first = parts.next().unwrap().to_owned();
    let plain = parts.fold(first, |text, part| text + part.split_once('m').unwrap().1);
    assert_eq!(plain, text);
    assert!(colored.contains("[38;5;39m") && colored.contains("[38;5;197m"), "{colored}");
}

#[test]
fn prompts_served_together_get_the_texts_that_they_get_alone() {
    let (first, second) = ("And God said unto", "In the days of");
    let common = ["--max-tokens", "16", "--temperature", "0.8", "--exit", "top1:0.6"];
    let seed = ["--seed", "3"];
    let (both, notes) = generated(&[&["--prompt", first, "--prompt", second], &common[..], &seed].concat());
    assert_eq!(depths(&notes).iter().map(Vec::len).collect::<Vec<_>>(), [16, 16]);
    let (alone, _) = generated(&[&["--prompt", first], &common[..], &seed].concat());
    let (one, other) = both.split_once(&format!("\n\n{second}")).unwrap();
    assert_eq!(one, alone.trim_end_matches('\n'));
    assert!(other.len() > 16, "{both}");
    let (other_seed, _) = generated(&[&["--prompt", first], &common[..], &["--seed", "4"]].concat());
    assert_ne!(other_seed, alone);
}

#[test]
fn what_cannot_be_generated_gets_one_clear_error() {
    let scene = scene();
    let refused = |more: &[&'static str]| scene.fail(&[&["generate", "model"], more].concat());
    assert!(refused(&["--prompt", ""]).contains("no token to begin with"));
    assert!(refused(&["--prompt", "a", "--exit", "oracle"]).contains("needs runs of the requests beforehand"));
    assert!(refused(&["--prompt", "a", "--exit", "gate:0.5"]).contains("the model has no gates"));
    assert!(refused(&["--prompt", "a", "--temperature=-1"]).contains("--temperature -1"));
    assert!(refused(&["--prompt", "a", "--max-tokens", "900"]).contains("needs 900 positions, the model has 256"));
}

#[cfg(unix)]
#[test]
fn an_interrupted_generation_ends_its_line_and_says_what_there_was() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    let mut child = Command::new(env!("CARGO_BIN_EXE_depthwise"))
        .arg("generate")
        .arg(model)
        .args(["--prompt", "And", "--prompt", "The", "--max-tokens", "1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut begun = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let (text, notes) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(text.ends_with('\n') && notes.contains(" tokens/s, "), "{notes}");
    assert!(depths(&notes).iter().map(Vec::len).sum::<usize>() < 2000);
}

/// Changes the tokenizer of a model.
fn change_tokenizer(scene: &Scene, model: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = scene.path(model).join("tokenizer.json");
    let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
}

#[test]
fn what_a_trainer_left_in_the_tokenizer_changes_neither_figures_nor_texts() {
    let scene = scene();
    let question = r#"{"query": "In the beginning was", "choices": ["the loop", "a block", "shared"], "gold": 0}"#;
    scene.write("questions.jsonl", question);
    let results = |out| {
        scene.succeed(&["evaluate", "plain", "--text", "text.txt", "--questions", "questions.jsonl", "--out", out]);
        let read = |name: &str| fs::read_to_string(scene.path(out).join(name)).unwrap();
        let text = scene.succeed(&["generate", "plain", "--prompt", "In the", "--max-tokens", "9"]);
        (read("loops.csv"), read("answers.csv"), text)
    };
    let expected = results("before");
    change_tokenizer(&scene, "plain", |json| {
        json["truncation"] =
            serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = serde_json::json!({
            "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "!",
        });
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "!", "type_id": 0}}],
            "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
        });
    });
    assert_eq!(results("after"), expected);
}

#[test]
fn a_tokenizer_whose_parts_do_not_fit_together_gets_one_clear_error() {
    let scene = scene();
    change_tokenizer(&scene, "model", |json| {
        let part = |kind: &str, id: &str| serde_json::json!({kind: {"id": id, "type_id": 0}});
        let single = [part("SpecialToken", "<s>"), part("Sequence", "A")];
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {},
        });
    });
    // The library panics.
    let error = scene.fail(&["generate", "model", "--prompt", "In"]);
    assert!(error.contains("whose parts do not fit together: "), "{error}");
}

#[test]
fn a_token_beyond_the_embedding_is_refused_before_work_starts() {
    let scene = scene();
    change_tokenizer(&scene, "plain", |json| {
        json["added_tokens"] = serde_json::json!([{
            "id": 272, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }]);
    });
    scene.write("padded.txt", &format!("{TEXT}<pad>{TEXT}"));
    let record = ["record", "--model", "plain", "--prompts", "padded.txt", "--requests", "requests.csv", "--out", "o"];
    let train = ["train", "--from", "plain", "--text", "text.txt", "--held-out", "text.txt", "--out", "trained"];
    for arguments in
        [&["generate", "plain", "--prompt", "In the<pad>"][..], &["evaluate", "plain", "--text", "padded.txt"], &record]
    {
        assert!(scene.run(arguments).stdout.is_empty());
        let message = scene.fail(arguments);
        assert!(message.contains("plain: token `<pad>` (272) of the tokenizer is beyond the embedding"), "{message}");
        assert!(message.contains("which has 272 rows: add rows to the embedding"), "{message}");
    }
    let message = scene.fail(&train);
    assert!(message.contains("tokenizer"), "{message}");
    // Texts without it are read, and a warning names it.
    let output = scene.run(&["generate", "plain", "--prompt", "In the", "--max-tokens", "2"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stderr.matches("warning: plain: tokens of the tokenizer from `<pad>` (272) on").count(), 1, "{stderr}");
}

#[test]
fn a_model_that_is_not_there_is_named_and_the_hub_is_asked_only_for_its_own_names() {
    let scene = scene();
    for name in ["no-such-folder", "./plan", "plan/model.gguf", "/no/such"] {
        let message = scene.fail(&["generate", name, "--prompt", "In"]);
        assert_eq!(message, format!("error: {name}: no such file or folder"));
    }
    let mut command = scene.command(&["generate", "owner/model", "--prompt", "In"]);
    let output = command.env("HF_HUB_OFFLINE", "1").env("HF_HUB_CACHE", scene.path("cache")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("owner/model: no such file or folder, config.json is not in the cache"), "{stderr}");
    assert!(stderr.contains("HF_HUB_OFFLINE forbids"), "{stderr}");
}

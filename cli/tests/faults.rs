//! Faults from the field: readers that go away, full disks, folders of others, kills at any time. Nothing of others is
//! lost, results are there whole or not at all, and no temporary name stays behind.

#![cfg(unix)]

mod common;
#[path = "../../import/tests/kernels/mod.rs"]
mod kernels;
#[cfg(target_os = "linux")]
#[path = "common/killed.rs"]
mod killed;
#[path = "common/made_up.rs"]
mod made_up;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::Scene;
use engine::weights::{Stored, Weights};
use engine::{ModelConfig, Tokenizer};
use parquet::basic::Compression;
use traces::ExitTable;

const MARKER: &str = "depthwise-results.json";
const TEXT: &str = "In the beginning was the loop, and the loop was with the block, and the block was shared. ";

/// The folder holds a model, a text, requests, a made-up profile and exit trace, an experiment, a sweep and a training
/// run.
impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        made_up::profile().write(scene.path("profile")).unwrap();
        made_up::exits().write(scene.path("exits"), ExitTable::Parquet).unwrap();
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
            tie_embeddings: true,
            max_positions: 256,
            ..ModelConfig::default()
        };
        Weights::random(config, 1).unwrap().save(&scene.path("model"), Stored::F32).unwrap();
        tokenizer.save(&scene.path("model/tokenizer.json")).unwrap();
        scene.write("prompts.txt", &TEXT.repeat(40));
        scene.write("requests.csv", &requests(40));
        scene.write("sweep.yaml", &SWEEP.replace("COUNT", "60"));
        scene.write("tiny.yaml", TINY);
        scene.write("train.yaml", TRAINING);
        scene
    }

    fn output(&self, arguments: &[&str], stdout: Stdio) -> Output {
        self.command(arguments).stdout(stdout).stderr(Stdio::piped()).output().unwrap()
    }

    /// A foreign project, as anyone may have one.
    fn foreign(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        fs::create_dir_all(self.path(name).join("src")).unwrap();
        for (file, text) in [
            ("config.yaml", "of another program"),
            ("exits.yaml", "of another program"),
            ("inputs.yaml", "of another program"),
            ("summary.csv", "a,b\n"),
            ("src/main.py", "print()\n"),
            ("model.bin", "\0\0"),
        ] {
            self.write(&format!("{name}/{file}"), text);
        }
        contents(&self.path(name))
    }
}

fn requests(count: u32) -> String {
    let lines = (0..count).map(|id| format!("{id},{}.0,{},{}\n", id * 500, 5 + id % 7, 3 + id % 11));
    format!("request,arrival_us,prompt_tokens,output_tokens\n{}", lines.collect::<String>())
}

const SWEEP: &str = "schema_version: 1
title: made up
requests:
  generate:
    count: COUNT
    arrivals: {poisson: {rate_per_s: 100}}
    prompt_tokens: {uniform: {min: 4, max: 30}}
    output_tokens: {uniform: {min: 5, max: 40}}
serving: {batching: [depth], exit: [none], max_batch: 8, token_budget: 64}
systems: [{name: one, profile: profile, exits: exits}]
grid: {seed: [1, 2, 3, 4, 5, 6, 7, 8]}
";

const TINY: &str = "schema_version: 1
title: tiny
requests:
  generate:
    count: 4
    arrivals: all_at_once
    prompt_tokens: {fixed: 4}
    output_tokens: {fixed: 4}
serving: {batching: [depth], exit: [none], max_batch: 4, token_budget: 16}
engine: {model: model, prompts: prompts.txt, repeats: 1, rounds: 1}
";

const TRAINING: &str = "
model: {vocab_size: 272, hidden_size: 16, intermediate_size: 24, num_heads: 2, num_kv_heads: 1, head_dim: 8}
data: {text: [prompts.txt], held_out: [prompts.txt], held_out_tokens: 200, cache: tokens}
optimizer: {warmup_steps: 1}
steps: 100000
batch: 2
seq: 16
checkpoint_steps: 2
";

const SIMULATE: [&str; 10] =
    ["simulate", "--requests", "requests.csv", "--profile", "profile", "--exits", "exits", "--max-batch", "8", "--out"];

/// Every file below a folder, by its path from there, with its bytes.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let (path, name) = (entry.path(), PathBuf::from(entry.file_name()));
        match path.is_dir() {
            true => files.extend(contents(&path).into_iter().map(|(inner, bytes)| (name.join(inner), bytes))),
            false => drop(files.insert(name, fs::read(&path).unwrap())),
        }
    }
    files
}

/// Names that a command gives to what is not finished.
fn temporary_names(folder: &Path) -> Vec<PathBuf> {
    let is_temporary = |path: &PathBuf| {
        let text = path.to_string_lossy();
        let is_hidden = path.components().any(|part| part.as_os_str().to_string_lossy().starts_with('.'));
        text.contains("partial") || text.contains(".part") || is_hidden
    };
    contents(folder).into_keys().filter(is_temporary).collect()
}

/// Whether a folder holds results, all of them.
fn is_whole(folder: &Path) -> bool {
    let Ok(marker) = fs::read_to_string(folder.join(MARKER)) else { return false };
    let marker: serde_json::Value = serde_json::from_str(&marker).expect("the marker is whole");
    let files = marker["files"].as_array().unwrap();
    marker["complete"] == true && files.iter().all(|file| folder.join(file.as_str().unwrap()).is_file())
}

/// Whether a folder says that its results are still coming.
fn is_incomplete(folder: &Path) -> bool {
    fs::read_to_string(folder.join(MARKER)).is_ok_and(|marker| marker.contains("\"complete\": false"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Every command that writes a folder, but for the folder itself, with what it needs in the scene.
fn writers(scene: &Scene) -> Vec<Vec<&'static str>> {
    scene.write("questions.jsonl", "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 1}\n");
    let ordinary = ModelConfig {
        num_loops: 1,
        block_layers: 2,
        sharing: engine::config::Sharing::Nothing,
        ..Weights::load(&scene.path("model")).unwrap().config().clone()
    };
    Weights::random(ordinary, 1).unwrap().save(&scene.path("ordinary"), Stored::F32).unwrap();
    fs::create_dir_all(scene.path("tables")).unwrap();
    for (file, text) in TABLES {
        scene.write(&format!("tables/{file}"), text);
    }
    fs::create_dir_all(scene.path("systems")).unwrap();
    kernels::write_kernels(&scene.path("systems"), Compression::UNCOMPRESSED, usize::MAX, |bytes| bytes);
    scene.write("swept.yaml", &SWEEP.replace("COUNT", "20"));
    scene.succeed(&["sweep", "swept.yaml", "--out", "swept"]);
    for (shard, out) in [("1/2", "first"), ("2/2", "second")] {
        scene.succeed(&["sweep", "swept.yaml", "--shard", shard, "--out", out]);
    }
    let commands = [
        "run tiny.yaml --out",
        "simulate --requests requests.csv --profile profile --exits exits --out",
        "sweep sweep.yaml --out",
        "sweep sweep.yaml --shard 1/2 --out",
        "sweep swept.yaml --merge first second --out",
        "capacity sweep.yaml --ttft-ms 50 --out",
        "profile --model model --max-batch 2 --token-budget 4 --max-tokens 16 --prefill-chunk 4 --rounds 1 --out",
        "record --model model --prompts prompts.txt --requests requests.csv --first 3 --out",
        "replay --model model --prompts prompts.txt --requests requests.csv --first 3 --exit none --out",
        "validate --model model --prompts prompts.txt --requests requests.csv --first 3 --exit none --repeats 1 --rounds 1 --rates 0.5 --out",
        "evaluate model --text prompts.txt --seq 32 --out",
        "evaluate model --questions questions.jsonl --out",
        "calibrate --exits exits --measure top1 --tolerance 0.9 --out",
        "convert ordinary --loops 2 --out",
        "export model --out",
        "train --config train.yaml --steps 2 --out",
        "import layer-tables tables --model tables/config.json --out",
        "import aiconfigurator systems --gpu g --version 1.0 --model tables/config.json --out",
        "plot swept --out",
    ];
    let split = |command: &'static str| command.split(' ').collect();
    commands.into_iter().map(split).collect()
}

/// Tables of a measured device, and the model that they are of.
const TABLES: [(&str, &str); 4] = [
    (
        "config.json",
        r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "dense.csv",
        "layer,tokens,time_us\nlayernorm,1,2\nqkv_proj,1,10\no_proj,1,5\ngate_up_proj,1,40\ndown_proj,1,20\n\
         embedding,1,4\nlayernorm,8,3\nqkv_proj,8,12\no_proj,8,6\ngate_up_proj,8,50\ndown_proj,8,25\nembedding,8,5\n",
    ),
    ("per_sequence.csv", "layer,sequences,time_us\nlm_head,1,100\nsampler,1,7\nlm_head,4,110\n"),
    ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9\n16,0,0,0,11\n"),
];

/// Every command that writes a single file, but for the file itself, with what it needs in the scene.
fn file_writers(scene: &Scene) -> [Vec<&'static str>; 3] {
    fs::create_dir_all(scene.path("measured")).unwrap();
    for (file, text) in [
        (
            "meta.json",
            r#"{"vllm_version": "0.19.0", "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
                "kv_cache": {"num_gpu_blocks": 101, "block_size": 16, "enable_prefix_caching": true}}"#,
        ),
        (
            "requests.jsonl",
            "{\"output_toks\": 3, \"arrival_time\": 1000.5, \"queued_ts\": 7.6, \"first_token_ts\": 8.0, \
             \"last_token_ts\": 8.4}\n",
        ),
        ("workload.jsonl", "{\"input_toks\": 17, \"output_toks\": 3, \"arrival_time_ns\": 1500000}\n"),
    ] {
        scene.write(&format!("measured/{file}"), text);
    }
    let mut one_loop = made_up::profile();
    one_loop.meta.num_loops = 1;
    one_loop.write(scene.path("one-loop")).unwrap();
    [
        "timeline --requests requests.csv --profile profile --exit none --batching depth --out",
        "vllm measured --profile one-loop --out",
        "trace convert requests.csv --out",
    ]
    .map(|command| command.split(' ').collect())
}

/// Kills of each command: `DEPTHWISE_FAULTS`, or a few.
fn kills() -> u32 {
    std::env::var("DEPTHWISE_FAULTS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(2)
}

/// Whether kills are to be tried that are left out where tests are to be quick.
fn takes_long() -> bool {
    std::env::var_os("DEPTHWISE_FAULTS").is_some()
}

#[test]
fn every_command_refuses_a_folder_of_others_and_marks_its_own() {
    let scene = Scene::new();
    let before = scene.foreign("proj");
    for (number, command) in writers(&scene).into_iter().enumerate() {
        let error = scene.fail(&[&command[..], &["proj"]].concat());
        assert!(error.contains("choose another --out"), "{error}");
        assert_eq!(contents(&scene.path("proj")), before, "{command:?}");

        let out = format!("out-{number}");
        scene.succeed(&[&command[..], &[&out]].concat());
        assert!(is_whole(&scene.path(&out)), "{command:?}");
        assert_eq!(temporary_names(&scene.path(&out)), Vec::<PathBuf>::new(), "{command:?}");
        let marker: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(scene.path(&out).join(MARKER)).unwrap()).unwrap();
        let kind = if command.contains(&"--shard") { "sweep --shard" } else { command[0] };
        assert_eq!((&marker["program"], &marker["kind"]), (&"depthwise".into(), &kind.into()));
        let listed: Vec<PathBuf> =
            marker["files"].as_array().unwrap().iter().map(|file| PathBuf::from(file.as_str().unwrap())).collect();
        let mut there: Vec<PathBuf> = contents(&scene.path(&out)).into_keys().collect();
        there.retain(|file| file != Path::new(MARKER));
        assert_eq!(there.len(), listed.len(), "{command:?}: {there:?} {listed:?}");
        // As any file of the user's: others may read them where they may read those.
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode();
        for file in there {
            assert_eq!(mode(scene.path(&out).join(&file)), mode(scene.path("prompts.txt")), "{command:?}: {file:?}");
        }
    }
    let leftovers: Vec<_> = fs::read_dir(scene.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(leftovers.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{leftovers:?}");
}

#[test]
fn every_command_keeps_its_results_where_nothing_can_be_printed() {
    let scene = Scene::new();
    let full = File::options().write(true).open("/dev/full").ok();
    let check = |command: &[&str], is_kept: &dyn Fn() -> bool| {
        // The reader is closed before the command starts, so that the command cannot finish first.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = scene.command(command).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(141), "{command:?}: {said}");
        assert!(!said.contains("panicked") && !said.contains("error: "), "{command:?}: {said}");
        assert!(is_kept(), "{command:?}");
        let Some(full) = &full else { return };
        if command.contains(&"train") || command[0] == "convert" || command[0] == "export" {
            // They do not write over what they wrote.
            fs::remove_dir_all(scene.path(command.last().unwrap())).unwrap();
        }
        let output = scene.output(command, full.try_clone().unwrap().into());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
        assert!(said.contains("error: cannot write to standard output: No space left"), "{command:?}: {said}");
        assert!(!said.contains("panicked") && is_kept(), "{command:?}: {said}");
    };
    for (number, command) in writers(&scene).into_iter().enumerate() {
        let out = format!("out-{number}");
        check(&[&command[..], &[&out]].concat(), &|| is_whole(&scene.path(&out)));
    }
    for (number, command) in file_writers(&scene).into_iter().enumerate() {
        let out = format!("file-{number}");
        check(&[&command[..], &[&out]].concat(), &|| scene.path(&out).is_file());
    }
    assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new());
}

/// Whether a folder holds nothing, or results that are whole or say that they are not.
fn is_sound(folder: &Path) -> bool {
    holds_only(folder, &[]) || is_whole(folder) || is_incomplete(folder)
}

/// What a kill may leave, for the next run to remove.
const TEMPORARY: [&str; 2] = [".depthwise-unfinished", "depthwise-results.json.partial"];

/// As [`is_sound`], or a folder has no more than temporary names, which the next run takes for nothing.
fn is_sound_after_a_kill(folder: &Path) -> bool {
    is_sound(folder) || holds_only(folder, &TEMPORARY)
}

/// Whether a folder is not there, or holds nothing of another name.
fn holds_only(folder: &Path, names: &[&str]) -> bool {
    let is_one = |entry: io::Result<fs::DirEntry>| names.contains(&entry.unwrap().file_name().to_str().unwrap());
    !folder.exists() || fs::read_dir(folder).unwrap().all(is_one)
}

#[test]
fn every_command_leaves_earlier_results_and_no_temporary_name_where_files_cannot_grow() {
    let scene = Scene::new();
    for (number, command) in writers(&scene).into_iter().enumerate() {
        let (out, new) = (format!("out-{number}"), format!("new-{number}"));
        scene.succeed(&[&command[..], &[&out]].concat());
        scene.write(&format!("{out}/notes.md"), "dear to somebody");
        let mut before = contents(&scene.path(&out));
        for bytes in [0, 600] {
            for target in [&new, &out] {
                let output = with_file_limit(&scene, &[&command[..], &[target]].concat(), bytes);
                let said = text(&output.stderr);
                if target == &out && said.contains("error: the results are complete") {
                    // Without their figures, which were too large.
                    scene.succeed(&[&command[..], &[&out]].concat());
                    before = contents(&scene.path(&out));
                }
                // Results may be small.
                let is_done = output.status.success() && bytes > 0 && is_whole(&scene.path(target));
                assert!(output.status.code() == Some(1) || is_done, "{command:?}, {bytes} bytes: {said}");
                if is_done && target == &out {
                    before = contents(&scene.path(&out));
                }
                assert!(!said.contains("panicked"), "{command:?}, {bytes} bytes: {said}");
                assert!(
                    is_sound(&scene.path(target)),
                    "{command:?}, {bytes} bytes: {:?}",
                    contents(&scene.path(target))
                );
            }
            assert!(contents(&scene.path(&out)) == before, "{command:?}, {bytes} bytes");
            assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new(), "{command:?}, {bytes} bytes");
        }
        scene.succeed(&[&command[..], &[&new]].concat());
        assert!(is_whole(&scene.path(&new)), "{command:?}");
    }
    for (number, command) in file_writers(&scene).into_iter().enumerate() {
        let out = format!("file-{number}");
        let arguments = [&command[..], &[&out]].concat();
        scene.succeed(&arguments);
        let before = fs::read(scene.path(&out)).unwrap();
        let output = with_file_limit(&scene, &arguments, 10);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {}", text(&output.stderr));
        assert!(fs::read(scene.path(&out)).unwrap() == before, "{command:?}");
        assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new(), "{command:?}");
    }
}

#[test]
fn every_command_says_that_a_disk_is_read_only() {
    let scene = Scene::new();
    let Some(disk) = SmallDisk::mount(scene.path("disk"), 4096) else {
        eprintln!("skipped: no disk can be mounted here");
        return;
    };
    scene.succeed(&[&SIMULATE[..], &["disk/sim"]].concat());
    let before = contents(&disk.0);
    let remount = ["-o", "remount,ro"];
    assert!(Command::new("mount").args(remount).arg(&disk.0).status().unwrap().success());
    for command in writers(&scene) {
        let error = scene.fail(&[&command[..], &["disk/new"]].concat());
        assert!(error.contains("disk/new") && error.contains("Read-only file system"), "{command:?}: {error}");
    }
    for command in file_writers(&scene) {
        let error = scene.fail(&[&command[..], &["disk/new"]].concat());
        assert!(error.contains("disk/new") && error.contains("Read-only file system"), "{command:?}: {error}");
    }
    let error = scene.fail(&[&SIMULATE[..], &["disk/sim"]].concat());
    assert!(error.contains("disk/sim") && error.contains("Read-only file system"), "{error}");
    assert_eq!(contents(&disk.0), before);
}

#[test]
fn every_command_interrupted_at_any_time_ends_with_130_and_leaves_no_temporary_name() {
    let scene = Scene::new();
    let commands = writers(&scene).into_iter().chain(file_writers(&scene));
    for (number, command) in commands.enumerate() {
        let out = |name: &str| [&command[..], &[name]].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
        let began = Instant::now();
        scene.succeed(&out(&format!("out-{number}")).iter().map(String::as_str).collect::<Vec<_>>());
        let takes = began.elapsed();
        for kill in 0..kills() {
            let target = format!("interrupted-{number}-{kill}");
            let arguments = out(&target);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut child = scene.command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(takes.mul_f64(1.0 - 0.7 * f64::from(kill) / f64::from(kills())));
            if child.try_wait().unwrap().is_none() {
                interrupt(&child);
            }
            let output = child.wait_with_output().unwrap();
            let (code, said) = (output.status.code(), text(&output.stderr));
            // A command may end before the signal, or get it before it can handle it.
            let is_ended = [Some(130), Some(0)].contains(&code) || output.status.signal() == Some(libc::SIGINT);
            assert!(is_ended && !said.contains("panicked"), "{command:?}: {code:?}: {said}");
            let path = scene.path(&target);
            assert!(path.is_file() || is_sound(&path), "{command:?}");
            assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new(), "{command:?}");
        }
    }
}

#[test]
fn every_command_killed_at_any_time_is_whole_or_absent_and_runs_again() {
    let scene = Scene::new();
    for (number, command) in writers(&scene).into_iter().enumerate() {
        let (whole, killed) = (format!("out-{number}"), format!("killed-{number}"));
        let began = Instant::now();
        scene.succeed(&[&command[..], &[&whole]].concat());
        let takes = began.elapsed();
        for kill in 0..kills() {
            // Results are put in their place at the end.
            let share = 1.05 - f64::from(kill).powi(2) / f64::from(kills()).powi(2);
            kill_after(&scene, &[&command[..], &[&killed]].concat(), takes.mul_f64(share));
            let folder = scene.path(&killed);
            assert!(is_sound_after_a_kill(&folder), "{command:?}, killed after {share}");
            if ["convert", "export"].contains(&command[0]) && is_whole(&folder) {
                fs::remove_dir_all(&folder).unwrap();
            }
        }
        let is_training = command[0] == "train" && scene.path(&killed).join("training-state.safetensors").exists();
        match is_training {
            true => scene.succeed(&["train", "--resume", &killed]),
            false => scene.succeed(&[&command[..], &[&killed]].concat()),
        };
        assert!(is_whole(&scene.path(&killed)), "{command:?}");
        assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new(), "{command:?}");
    }
    scene.write("requests.csv", &requests(2000));
    for (number, command) in file_writers(&scene).into_iter().enumerate() {
        let out = format!("file-{number}");
        let arguments = [&command[..], &[&out]].concat();
        let began = Instant::now();
        scene.succeed(&arguments);
        let takes = began.elapsed();
        let whole = fs::read(scene.path(&out)).unwrap();
        for kill in 0..kills() {
            kill_after(&scene, &arguments, takes.mul_f64(1.0 - 0.3 * f64::from(kill) / f64::from(kills())));
            assert!(fs::read(scene.path(&out)).unwrap() == whole, "{command:?}");
        }
        scene.succeed(&arguments);
        assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new(), "{command:?}");
    }
}

/// Kills a command before each of its changes to the file system in turn, where `earlier` has left results in `killed`.
#[cfg(target_os = "linux")]
fn check_kills_before_each_change(scene: &Scene, command: &[&str], earlier: &dyn Fn()) {
    let folder = scene.path("killed");
    let _ = fs::remove_dir_all(&folder);
    earlier();
    if folder.exists() {
        scene.write("killed/notes.md", "dear to somebody");
    }
    let placed = || {
        let mut files = if folder.exists() { contents(&folder) } else { BTreeMap::new() };
        files.retain(|file, _| !TEMPORARY.iter().any(|name| file.starts_with(name)));
        files
    };
    // Files below `.depthwise-unfinished` are not results yet. To kill the command before each change of them takes long,
    // so only a longer run does it.
    let is_counted = |path: &str| takes_long() || path.contains("killed") && !path.contains(".depthwise-unfinished/");
    let before = placed();
    scene.succeed(command);
    let after = placed();
    let mut continued = BTreeSet::new();
    for change in 1.. {
        let _ = fs::remove_dir_all(&folder);
        for (file, bytes) in &before {
            fs::create_dir_all(folder.join(file).parent().unwrap()).unwrap();
            fs::write(folder.join(file), bytes).unwrap();
        }
        let Some(end) = killed::killed_before(change, is_counted, &mut scene.command(command)) else {
            eprintln!("skipped: no process can be traced here");
            return;
        };
        let files = placed();
        let about = || format!("{command:?}, killed before change {change}: {:?}", files.keys());
        assert!(is_sound_after_a_kill(&folder), "{}", about());
        if !before.is_empty() {
            assert_eq!(files[Path::new("notes.md")], before[Path::new("notes.md")], "{}", about());
            assert!(is_incomplete(&folder) || files == before || files == after, "a mixture: {}", about());
        }
        let staged = [".depthwise-unfinished", &format!(".depthwise-unfinished/{MARKER}"), TEMPORARY[1]];
        let is_there = staged.map(|name| folder.join(name).exists());
        let is_new = continued.insert((
            files.keys().cloned().collect::<Vec<_>>(),
            files.get(Path::new(MARKER)).cloned(),
            is_there,
        ));
        if !is_new && end == killed::End::Killed {
            continue;
        }
        if command[0] == "train" && folder.join("training-state.safetensors").exists() {
            scene.succeed(&["train", "--resume", "killed"]);
        } else if !["convert", "export"].contains(&command[0]) || !is_whole(&folder) {
            scene.succeed(command);
        }
        assert!(is_whole(&folder), "{}", about());
        assert_eq!(placed().into_keys().collect::<Vec<_>>(), after.keys().cloned().collect::<Vec<_>>(), "{}", about());
        assert_eq!(temporary_names(&folder), Vec::<PathBuf>::new(), "{}", about());
        if end != killed::End::Killed {
            assert_eq!(end, killed::End::Exited(0), "{}", about());
            assert!(change > 5, "{}", about());
            return;
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn killed_before_any_change_to_the_file_system_new_results_are_whole_or_absent_and_runs_again() {
    let scene = Scene::new();
    scene.write("sweep.yaml", &SWEEP.replace("COUNT", "10").replace(", 3, 4, 5, 6, 7, 8]", "]"));
    let is_checked = |command: &Vec<&str>| takes_long() || command[0] == "train" || command.contains(&"--questions");
    for command in writers(&scene).into_iter().filter(is_checked) {
        check_kills_before_each_change(&scene, &[&command[..], &["killed"]].concat(), &|| {});
    }
}

#[cfg(target_os = "linux")]
#[test]
fn killed_before_any_change_to_the_file_system_earlier_results_are_replaced_whole_or_not() {
    let scene = Scene::new();
    scene.write("questions.jsonl", "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 1}\n");
    let questions = ["evaluate", "model", "--questions", "questions.jsonl", "--out", "killed"];
    let text = ["evaluate", "model", "--text", "prompts.txt", "--seq", "32", "--out", "killed"];
    check_kills_before_each_change(&scene, &questions, &|| drop(scene.succeed(&text)));
    scene.write("sweep.yaml", &SWEEP.replace("COUNT", "10").replace(", 3, 4, 5, 6, 7, 8]", "]"));
    let sweep = ["sweep", "sweep.yaml", "--out", "killed"];
    let restart = [&sweep[..], &["--restart"]].concat();
    check_kills_before_each_change(&scene, &restart, &|| drop(scene.succeed(&sweep)));
    if takes_long() {
        let simulate = [&SIMULATE[..], &["killed"]].concat();
        let other = [&simulate[..], &["--exit", "none"]].concat();
        check_kills_before_each_change(&scene, &simulate, &|| drop(scene.succeed(&other)));
        check_kills_before_each_change(&scene, &["plot", "killed"], &|| drop(scene.succeed(&sweep)));
    }
}

#[test]
fn results_that_cannot_be_put_in_their_place_wait_for_the_next_run() {
    let scene = Scene::new();
    let simulate = [&SIMULATE[..], &["sim"]].concat();
    scene.succeed(&[&simulate[..], &["--exit", "none"]].concat());
    // A file that something is mounted over can be neither replaced nor removed.
    let (file, over) = (scene.path("sim/summary.csv"), scene.path("prompts.txt"));
    let mount = Command::new("mount").arg("--bind").args([&over, &file]).stderr(Stdio::null()).status();
    if !mount.is_ok_and(|status| status.success()) {
        eprintln!("skipped: nothing can be mounted here");
        return;
    }
    let mounted = SmallDisk(file.clone());
    let error = scene.fail(&simulate);
    assert!(error.contains("sim/.depthwise-unfinished: the next run moves them into place"), "{error}");
    assert!(is_incomplete(&scene.path("sim")));
    drop(mounted);
    let waiting = fs::read(scene.path("sim/.depthwise-unfinished/summary.csv")).unwrap();
    // It has nothing to draw, but it holds the folder.
    scene.run(&["plot", "sim"]);
    assert_eq!(fs::read(&file).unwrap(), waiting);
    assert!(is_whole(&scene.path("sim")));
    assert_eq!(temporary_names(&scene.path("sim")), Vec::<PathBuf>::new());
}

#[test]
fn nested_results_and_notes_survive_and_parents_of_results_are_refused() {
    let scene = Scene::new();
    scene.succeed(&["sweep", "sweep.yaml"]);
    let nested = contents(&scene.path("results/sweep"));
    let error = scene.fail(&[&SIMULATE[..], &["results"]].concat());
    assert!(error.contains("results is there already") && error.contains("choose another --out"), "{error}");
    assert_eq!(contents(&scene.path("results/sweep")), nested);

    scene.write("results/sweep/notes.md", "dear to somebody");
    scene.succeed(&[&SIMULATE[..], &["results/sweep/nested"]].concat());
    let inner = contents(&scene.path("results/sweep/nested"));
    scene.succeed(&["sweep", "sweep.yaml", "--restart"]);
    assert_eq!(fs::read_to_string(scene.path("results/sweep/notes.md")).unwrap(), "dear to somebody");
    assert_eq!(contents(&scene.path("results/sweep/nested")), inner);
    assert!(is_whole(&scene.path("results/sweep")));

    scene.write("results/sweep/nested/notes.md", "dear to somebody");
    let fewer = [&SIMULATE[..], &["results/sweep/nested", "--exit", "none"]].concat();
    scene.succeed(&fewer);
    assert_eq!(fs::read_to_string(scene.path("results/sweep/nested/notes.md")).unwrap(), "dear to somebody");
    assert_ne!(
        contents(&scene.path("results/sweep/nested"))[Path::new("summary.csv")],
        inner[Path::new("summary.csv")]
    );
    let other = scene.fail(&[&SIMULATE[..], &["results/sweep"]].concat());
    assert!(other.contains("holds results of `depthwise sweep`: choose another --out"), "{other}");
}

#[test]
fn a_reader_that_goes_away_costs_no_results_and_no_panic() {
    let scene = Scene::new();
    for (command, out) in
        [(&["run", "tiny.yaml", "--out", "run"][..], "run"), (&[&SIMULATE[..], &["sim"]].concat(), "sim")]
    {
        let mut child = scene.command(command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(141), "{}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("panicked") && !text(&output.stderr).contains("error"));
        assert!(is_whole(&scene.path(out)));
        assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new());
    }
    let generate = ["generate", "model", "--prompt", "In", "--max-tokens", "200"];
    let mut child = scene.command(&generate).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));

    // Both are closed: no message can be written, and results are kept.
    let mut child = scene
        .command(&["run", "tiny.yaml", "--out", "both"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(141));
    assert!(is_whole(&scene.path("both")));
}

#[test]
fn a_full_standard_output_is_an_error_after_the_results_are_kept() {
    let scene = Scene::new();
    let Ok(full) = File::options().write(true).open("/dev/full") else {
        eprintln!("skipped: no /dev/full");
        return;
    };
    for (command, out) in [
        (&["run", "tiny.yaml", "--out", "run"][..], "run"),
        (&[&SIMULATE[..], &["sim"]].concat(), "sim"),
        (&["sweep", "sweep.yaml", "--out", "sweep"], "sweep"),
    ] {
        let output = scene.output(command, full.try_clone().unwrap().into());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("error: cannot write to standard output: No space left"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        assert!(is_whole(&scene.path(out)));
    }
}

/// Runs a command whose files are limited in size: as on a full disk, with another error.
fn with_file_limit(scene: &Scene, arguments: &[&str], bytes: u64) -> Output {
    let mut command = scene.command(arguments);
    // SAFETY: both functions may be called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
}

#[test]
fn where_files_cannot_grow_results_are_whole_or_absent() {
    let scene = Scene::new();
    scene.succeed(&[&SIMULATE[..], &["sim"]].concat());
    scene.succeed(&["sweep", "sweep.yaml", "--out", "sweep"]);
    scene.write("sim/notes.md", "dear to somebody");
    let (simulated, swept) = (contents(&scene.path("sim")), contents(&scene.path("sweep")));
    for bytes in [0, 100, 700, 3000] {
        let again = [&SIMULATE[..], &["sim"]].concat();
        let output = with_file_limit(&scene, &again, bytes);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{bytes} bytes: {said}");
        assert!(said.contains("too large") && !said.contains("panicked"), "{bytes} bytes: {said}");
        assert_eq!(contents(&scene.path("sim")), simulated, "{bytes} bytes: an earlier simulation stays as it was");
        for (command, out) in
            [(&["run", "tiny.yaml", "--out", "new"][..], "new"), (&[&SIMULATE[..], &["new"]].concat(), "new")]
        {
            let output = with_file_limit(&scene, command, bytes);
            assert_eq!(output.status.code(), Some(1), "{command:?}, {bytes} bytes: {}", text(&output.stderr));
            // Where only a figure is too large, the results are kept without it.
            assert!(!scene.path(out).exists() || is_whole(&scene.path(out)), "{command:?}, {bytes} bytes");
            let _ = fs::remove_dir_all(scene.path(out));
        }
        let output = with_file_limit(&scene, &["sweep", "sweep.yaml", "--out", "swept"], bytes);
        assert_eq!(output.status.code(), Some(1), "{bytes} bytes: {}", text(&output.stderr));
        assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new(), "{bytes} bytes");
    }
    scene.succeed(&["sweep", "sweep.yaml", "--out", "swept"]);
    assert!(contents(&scene.path("swept")) == swept, "it goes on where there was no room");
}

/// A disk of this size in kilobytes; none where it cannot be mounted.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(place: PathBuf, kilobytes: u32) -> Option<Self> {
        fs::create_dir(&place).unwrap();
        let options = ["-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"];
        let mounted = Command::new("mount").args(options).arg(&place).stderr(Stdio::null()).status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(place))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn on_a_full_disk_earlier_results_stay_and_no_temporary_name_does() {
    let scene = Scene::new();
    let Some(disk) = SmallDisk::mount(scene.path("disk"), 16384) else {
        eprintln!("skipped: no disk can be mounted here");
        return;
    };
    let (commands, files) = (writers(&scene), file_writers(&scene));
    for command in [&commands[..], &files].concat() {
        let _ = fs::remove_dir_all(scene.path("disk/out"));
        let _ = fs::remove_file(scene.path("disk/out"));
        scene.succeed(&[&command[..], &["disk/out"]].concat());
        let is_file = scene.path("disk/out").is_file();
        let before = if is_file { BTreeMap::new() } else { contents(&scene.path("disk/out")) };
        let bytes = if is_file { fs::read(scene.path("disk/out")).unwrap() } else { Vec::new() };
        for target in ["disk/new", "disk/out"] {
            fill(&disk.0);
            let output = scene.run(&[&command[..], &[target]].concat());
            let said = text(&output.stderr);
            fs::remove_file(disk.0.join("filler")).unwrap();
            assert_eq!(output.status.code(), Some(1), "{command:?} to {target}: {said}");
            // These do not write where something is.
            let is_refused = target == "disk/out" && ["convert", "export", "train"].contains(&command[0]);
            assert!(is_refused || said.contains("No space left"), "{command:?} to {target}: {said}");
            assert!(!said.contains("panicked"), "{command:?} to {target}: {said}");
            assert!(is_sound(&scene.path("disk/new")) || is_file, "{command:?}");
            assert!(!is_file || !scene.path("disk/new").exists(), "{command:?}");
            match is_file {
                true => assert!(fs::read(scene.path("disk/out")).unwrap() == bytes, "{command:?}"),
                false => assert!(contents(&scene.path("disk/out")) == before, "{command:?}"),
            }
            assert_eq!(temporary_names(&disk.0), Vec::<PathBuf>::new(), "{command:?} to {target}");
        }
        let _ = fs::remove_dir_all(scene.path("disk/new"));
    }
}

/// Fills a disk to the last byte, but for names that take none.
fn fill(disk: &Path) {
    let mut filler = File::create(disk.join("filler")).unwrap();
    for bytes in [1 << 16, 1 << 12, 1 << 8, 1] {
        while filler.write_all(&vec![0; bytes]).is_ok() {}
    }
}

#[test]
fn a_figure_of_values_that_cannot_be_drawn_is_left_out_with_a_warning() {
    let scene = Scene::new();
    scene.succeed(&["run", "tiny.yaml", "--out", "run"]);
    let validation = fs::read_to_string(scene.path("run/validation.csv")).unwrap();
    let mut lines = validation.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let predicted = header.iter().position(|name| name == "predicted").unwrap();
    let with = |value: &str| {
        let set = |mut line: Vec<String>| {
            line[predicted] = value.to_owned();
            format!("{}\n", line.join(","))
        };
        scene.write(
            "run/validation.csv",
            &format!("{}\n{}", header.join(","), lines.clone().map(set).collect::<String>()),
        );
        fs::remove_dir_all(scene.path("run/figures")).unwrap();
        let output = scene.run(&["plot", "run"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(scene.path("run/figures/latency.svg").exists());
        (text(&output.stderr), scene.path("run/figures/validation.svg").exists())
    };
    assert_eq!(with("0.0"), (String::new(), true));
    let (said, is_drawn) = with("-5");
    assert!(said.contains("warning: figure `validation`: predicted, value 0: found -5, expected"), "{said}");
    assert!(said.contains("the figure is left out") && !is_drawn, "{said}");
}

#[test]
fn folders_that_cannot_be_made_or_written_get_one_clear_error() {
    let scene = Scene::new();
    scene.write("file", "dear to somebody");
    for out in ["file", "file/out", "/proc/out"] {
        let error = scene.fail(&[&SIMULATE[..], &[out]].concat());
        assert!(error.contains(out), "{error}");
    }
    assert_eq!(fs::read_to_string(scene.path("file")).unwrap(), "dear to somebody");
}

/// Starts a command and kills it after a while, if it still runs.
fn kill_after(scene: &Scene, arguments: &[&str], pause: Duration) {
    let mut child = scene.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(pause);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(status.signal() == Some(libc::SIGKILL) || status.code().is_some());
}

#[test]
fn killed_at_any_time_a_simulation_is_whole_or_absent() {
    let scene = Scene::new();
    scene.write("requests.csv", &requests(2000));
    let simulate = [&SIMULATE[..], &["sim"]].concat();
    let began = Instant::now();
    scene.succeed(&simulate);
    let whole = contents(&scene.path("sim"));
    let takes = began.elapsed();
    scene.write("sim/notes.md", "dear to somebody");
    for share in [0.05, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0, 1.05] {
        kill_after(&scene, &simulate, takes.mul_f64(share));
        // A kill while results are put in their place leaves them marked as incomplete, for the next run to go on with.
        assert!(is_whole(&scene.path("sim")) || is_incomplete(&scene.path("sim")), "killed after {share}");
        assert_eq!(fs::read_to_string(scene.path("sim/notes.md")).unwrap(), "dear to somebody");
        let fresh = [&SIMULATE[..], &["fresh"]].concat();
        kill_after(&scene, &fresh, takes.mul_f64(share));
        assert!(is_sound_after_a_kill(&scene.path("fresh")), "killed after {share}");
        scene.succeed(&fresh);
        assert!(is_whole(&scene.path("fresh")), "killed after {share}");
        fs::remove_dir_all(scene.path("fresh")).unwrap();
    }
    scene.succeed(&simulate);
    fs::remove_file(scene.path("sim/notes.md")).unwrap();
    assert!(contents(&scene.path("sim")) == whole, "what a killed run left does not stay");
}

#[test]
fn killed_at_any_time_a_sweep_goes_on_and_ends_the_same() {
    let scene = Scene::new();
    scene.write("sweep.yaml", &SWEEP.replace("COUNT", "2000"));
    let began = Instant::now();
    scene.succeed(&["sweep", "sweep.yaml", "--out", "whole"]);
    let takes = began.elapsed();
    for share in [0.1, 0.4, 0.5, 0.6, 0.5] {
        kill_after(&scene, &["sweep", "sweep.yaml", "--out", "killed"], takes.mul_f64(share));
    }
    scene.succeed(&["sweep", "sweep.yaml", "--out", "killed"]);
    assert!(contents(&scene.path("killed")) == contents(&scene.path("whole")));
}

/// Waits until a file is there, while a command runs.
fn wait_for(path: &Path) {
    let began = Instant::now();
    while !path.exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn interrupt(child: &std::process::Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn training_is_refused_beside_another_run_survives_a_kill_and_ends_interrupted() {
    let scene = Scene::new();
    let train = ["train", "--config", "train.yaml", "--out", "run"];
    let start =
        |arguments: &[&str]| scene.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let state = scene.path("run/training-state.safetensors");
    let mut first = start(&train);
    wait_for(&state);
    for second in [&train[..], &["train", "--resume", "run"]] {
        let error = scene.fail(second);
        assert!(error.contains("run is being written by another run"), "{error}");
    }
    first.kill().unwrap();
    first.wait().unwrap();

    let steps = || fs::read_to_string(scene.path("run/loss.csv")).unwrap().lines().count() - 1;
    let killed = steps();
    let mut second = start(&["train", "--resume", "run"]);
    while steps() <= killed {
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(&second);
    assert_eq!(second.wait().unwrap().code(), Some(130));
    assert!(is_whole(&scene.path("run")), "what has been trained is kept, with its figure");
    assert!(!scene.path("run/eval.csv").exists(), "a run that is stopped does not evaluate the text first");
    assert_eq!(temporary_names(&scene.path("run")), Vec::<PathBuf>::new());
    let error = scene.fail(&train);
    assert!(error.contains("resume it or choose another folder"), "{error}");
}

#[test]
fn a_second_run_in_a_folder_is_refused_and_a_killed_one_holds_nothing() {
    let scene = Scene::new();
    scene.write("sweep.yaml", &SWEEP.replace("COUNT", "20000"));
    let sweep = ["sweep", "sweep.yaml", "--out", "out"];
    let mut first = scene.command(&sweep).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for(&scene.path("out/sweep.csv"));
    let error = scene.fail(&sweep);
    assert!(error.contains("out is being written by another run: wait for it, or choose another --out"), "{error}");
    first.kill().unwrap();
    first.wait().unwrap();
    let mut next = scene.command(&sweep).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&next);
    assert_eq!(next.wait().unwrap().code(), Some(130));
}

#[test]
fn numbers_that_size_something_are_refused_at_once_by_option_and_key() {
    let scene = Scene::new();
    let refused = |arguments: &[&str]| {
        let began = Instant::now();
        let output = scene.run(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(began.elapsed() < Duration::from_secs(10), "{arguments:?}");
        text(&output.stderr)
    };
    let simulate = ["simulate", "--requests", "requests.csv", "--profile", "profile", "--exit", "none"];
    for (option, value, expected) in [
        ("--max-batch", "4294967295", "expected at most 1048576"),
        ("--max-batch", "1000000000", "expected at most 1048576"),
        ("--token-budget", "4294967295", "expected at most 1048576"),
        ("--prefill-chunk", "4294967295", "expected at most 1048576"),
        ("--block-tokens", "4294967295", "expected at most 1048576"),
        ("--num-blocks", "4294967295", "expected at most 16777216"),
        ("--replicas", "4294967295", "expected at most 65536"),
        ("--device-memory", "16EB", "expected at most 16777216"),
    ] {
        let said = refused(&[&simulate[..], &[option, value]].concat());
        assert!(said.contains(expected), "{option} {value}: {said}");
    }
    let many = ["--replicas", "65536", "--max-batch", "1048576", "--token-budget", "1048576"];
    assert!(refused(&[&simulate[..], &many].concat()).contains("expected at most"));
    for (change, expected) in [
        (("max_batch: 8", "max_batch: 4294967295"), "max_batch is 4294967295: expected at most 1048576"),
        (("token_budget: 64", "token_budget: 4294967295"), "token_budget is 4294967295: expected at most"),
        (("grid:", "replicas: 4294967295\ngrid:"), "replicas is 4294967295: expected at most 65536"),
        (("max_batch: 8", "max_batch: 8, num_blocks: 4294967295"), "num_blocks is 4294967295: expected at most"),
    ] {
        scene.write("large.yaml", &SWEEP.replace("COUNT", "60").replace(change.0, change.1));
        let said = refused(&["sweep", "large.yaml"]);
        assert!(said.contains(expected), "{said}");
    }
    let seeds = (0..10_001).map(|seed| seed.to_string()).collect::<Vec<_>>().join(", ");
    scene.write("large.yaml", &SWEEP.replace("COUNT", "60").replace("[1, 2, 3, 4, 5, 6, 7, 8]", &format!("[{seeds}]")));
    let said = refused(&["sweep", "large.yaml"]);
    assert!(said.contains("grid.seed: found more than 10000 values"), "{said}");
    // Of requests nothing is kept, however many the machines.
    scene.write("many.csv", &requests(1000));
    let machines =
        ["--replicas", "65536", "--max-batch", "8", "--batching", "depth", "--num-blocks", "100", "--out", "kept"];
    let many = ["simulate", "--requests", "many.csv", "--profile", "profile", "--exit", "none"];
    scene.succeed(&[&many[..], &machines].concat());
    let profile = ["profile", "--model", "model", "--out", "large"];
    assert!(refused(&[&profile[..], &["--max-batch", "0"]].concat()).contains("--max-batch 0: expected at least 1"));
    let said = refused(&[&profile[..], &["--max-batch", "1048576", "--max-tokens", "1048576"]].concat());
    assert!(said.contains("expected at most this machine's memory"), "{said}");
    assert!(refused(&[&profile[..], &["--rounds", "4294967295"]].concat()).contains("expected at most 10000"));
    let replay =
        ["replay", "--model", "model", "--prompts", "prompts.txt", "--requests", "requests.csv", "--exit", "none"];
    let said = refused(&[&replay[..], &["--num-blocks", "16777216", "--block-tokens", "1048576"]].concat());
    assert!(said.contains("expected at most this machine's memory"), "{said}");
    assert!(refused(&["generate", "model", "--prompt", "a", "--max-tokens", "4294967295"]).contains("1..=1048576"));
    for (more, expected) in [
        (&["--batch", "1000000000000"][..], "at most 65536"),
        (&["--workers", "1000000000"], "at most 1024"),
        (&["--intermediate-size", "1000000000"], "numbers, expected at most 4294967296"),
        (&["--intermediate-size", "16777216", "--hidden-size", "1048576"], "numbers, expected at most 4294967296"),
    ] {
        let said = refused(&[&["train", "--config", "train.yaml", "--out", "large"], more].concat());
        assert!(said.contains(expected), "{said}");
    }
    assert!(!scene.path("large").exists() && !scene.path("results").exists());
}

#[test]
fn a_timeline_s_window_begins_with_the_first_arrival_and_replaces_only_timelines() {
    let scene = Scene::new();
    let late = requests(10).replace(".0,", "000000.0,");
    let shifted: String = late
        .lines()
        .enumerate()
        .map(|(index, line)| match index {
            0 => format!("{line}\n"),
            _ => {
                let mut cells: Vec<String> = line.split(',').map(str::to_owned).collect();
                cells[1] = (1e12 + cells[0].parse::<f64>().unwrap() * 1e5).to_string();
                format!("{}\n", cells.join(","))
            }
        })
        .collect();
    scene.write("late.csv", &shifted);
    let timeline =
        ["timeline", "--requests", "late.csv", "--profile", "profile", "--exit", "none", "--batching", "depth"];
    let events = |more: &[&str]| {
        scene.succeed(&[&timeline[..], &["--out", "t.json"], more].concat());
        let text = fs::read_to_string(scene.path("t.json")).unwrap();
        let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
        trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").count()
    };
    let (all, first, none) = (events(&[]), events(&["--keep-s", "0", "0.05"]), events(&["--keep-s", "500", "501"]));
    assert!(all > first && first > 0, "{all} events, {first} of the first 50 ms");
    assert_eq!(none, 0);
    for window in [["1", "1"], ["2", "1"], ["-1", "1"], ["0", "inf"]] {
        let given = format!("--keep-s={}", window[0]);
        let output = scene.run(&[&timeline[..], &["--out", "t.json", &given, window[1]]].concat());
        assert!(!output.status.success() && text(&output.stderr).contains("--keep-s"), "{}", text(&output.stderr));
    }
    scene.write("t.json", "{\"dear\": \"to somebody\"}");
    let error = scene.fail(&[&timeline[..], &["--out", "t.json"]].concat());
    assert!(error.contains("t.json is there already") && error.contains("choose another --out"), "{error}");
    assert_eq!(fs::read_to_string(scene.path("t.json")).unwrap(), "{\"dear\": \"to somebody\"}");
    assert_eq!(temporary_names(scene.0.path()), Vec::<PathBuf>::new());
}

#[test]
fn messages_about_requests_name_the_option_that_was_given() {
    let scene = Scene::new();
    let simulate = ["simulate", "--requests", "requests.csv", "--profile", "profile", "--exit", "none"];
    for (more, expected) in [
        (&["--rate-per-s=-1"][..], "--rate-per-s: found -1"),
        (&["--rate-factor", "0"], "--rate-factor: found 0"),
        (&["--window-s", "9", "1"], "--window-s: found [9, 1]"),
    ] {
        let said = text(&scene.run(&[&simulate[..], more].concat()).stderr);
        assert!(said.contains(expected), "{said}");
    }
    scene.write("requests.yaml", "{file: requests.csv, window_s: [9, 1]}");
    let error = scene.fail(&["simulate", "--requests", "requests.yaml", "--profile", "profile", "--exit", "none"]);
    assert!(error.contains("window_s: found [9, 1]") && !error.contains("--window-s"), "{error}");
}

//! `scripts/gpu.sh` on machines of every kind, which programs that say what is wanted stand for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

const SMOLLM2: &str = "models/fetched/SmolLM2-135M-Instruct.Q4_1.gguf";

const NVIDIA_SMI: &str = r#"
[ -z "${NO_DRIVER:-}" ] || exit 9
for argument in "$@"; do case $argument in --query-gpu=*) fields=${argument#--query-gpu=} ;; esac; done
[ -n "${fields:-}" ] || { echo "Driver Version: 580.65   CUDA Version: ${CUDA:-13.0}"; exit; }
IFS=,
for field in $fields; do
    case $field in
        name) value=A100 ;;
        compute_cap) value=${ARCHITECTURE:-8.0} ;;
        memory.free) value=${FREE:-80000} ;;
        utilization.gpu) value=${BUSY:-0} ;;
        *) value=1 ;;
    esac
    line+="${line:+, }$value"
done
echo "$line""#;

/// Fails for what `FAIL` names, says what a test without a GPU says for what `SKIP` names.
const CARGO: &str = r#"
case "$*" in *"${FAIL:-nothing}"*) echo "it does not compile"; exit 101 ;; esac
case "$*" in *"${SKIP:-nothing}"*) echo "SKIPPED: there is no GPU" ;; esac"#;

/// Notes how it was called; fails for what `FAIL` names, and never ends for what `HANG` names.
const DEPTHWISE: &str = r#"
echo "$*" >> "$CALLS"
case "$*" in *"${FAIL:-nothing}"*) echo "error: it is wrong" >&2; exit 1 ;; esac
case "$*" in *"${HANG:-nothing}"*) sleep 60 ;; esac"#;

/// A copy of the scripts, on a machine that has all it needs.
struct Machine {
    folder: TempDir,
}

/// What a run left.
struct Outcome {
    succeeded: bool,
    output: String,
    /// Lines of `steps.csv`: step and result.
    steps: Vec<(String, String)>,
    calls: String,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { folder: tempfile::tempdir().unwrap() };
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
        for script in ["gpu.sh", "cuda-build.sh", "cuda-env.sh", "fetch-models.sh"] {
            machine.write(&format!("scripts/{script}"), &fs::read_to_string(scripts.join(script)).unwrap());
        }
        for (program, text) in [
            ("bin/nvidia-smi", NVIDIA_SMI),
            ("bin/cargo", CARGO),
            ("bin/nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'"),
            ("bin/python3", "exit 1"),
            ("target/release/depthwise", DEPTHWISE),
        ] {
            machine.write(program, &format!("#!/usr/bin/env bash\n{text}\n"));
        }
        machine.write(SMOLLM2, "");
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).unwrap();
    }

    fn run(&self, variables: &[(&str, &str)]) -> Outcome {
        let (calls, system) = (self.path("calls"), std::env::var("PATH").unwrap());
        let output = Command::new(self.path("scripts/gpu.sh"))
            .arg(self.path("results"))
            .env("PATH", format!("{}:{system}", self.path("bin").display()))
            .env("CALLS", &calls)
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("CUDA_HOME")
            .env_remove("CUDA_VISIBLE_DEVICES")
            .env_remove("DEPTHWISE_MODELS")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let table = fs::read_to_string(self.path("results/steps.csv")).unwrap();
        let step = |line: &str| {
            let fields: Vec<&str> = line.split(',').collect();
            (fields[0].to_owned(), fields[1].to_owned())
        };
        Outcome {
            succeeded: output.status.success(),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            steps: table.lines().skip(1).map(step).collect(),
            calls: fs::read_to_string(calls).unwrap_or_default(),
        }
    }
}

impl Outcome {
    fn result(&self, step: &str) -> &str {
        let found = self.steps.iter().find(|(name, _)| name == step);
        found.map_or("missing", |(_, result)| result)
    }

    /// The steps that were not well.
    fn unwell(&self) -> Vec<&str> {
        self.steps.iter().filter(|(_, result)| result != "ok").map(|(step, _)| step.as_str()).collect()
    }
}

#[test]
fn a_machine_that_has_everything_does_every_step() {
    let machine = Machine::new();
    let outcome = machine.run(&[]);
    assert!(outcome.succeeded, "{}", outcome.output);
    assert_eq!(outcome.unwell(), [""; 0]);
    for call in ["profile --model models/kjv", "run configs/cuda/kjv.yaml", "run configs/cuda/smollm2.yaml"] {
        assert!(outcome.calls.contains(call), "{call} is not in\n{}", outcome.calls);
    }
    let table = fs::read_to_string(machine.path("results/machine.csv")).unwrap();
    assert_eq!(
        table.lines().map(|line| line.split(',').next().unwrap()).collect::<Vec<_>>(),
        ["when", "before", "after"]
    );
}

#[test]
fn what_a_machine_lacks_is_said_at_once_and_nothing_is_built() {
    let outcome = Machine::new().run(&[("ARCHITECTURE", "7.5"), ("FREE", "300"), ("CUDA", "12.4")]);
    assert!(!outcome.succeeded);
    assert_eq!(outcome.steps.len(), 1);
    for lacking in [
        "a GPU of architecture 8.0 or later (A100, RTX 30): A100 is of 7.5",
        "4000 MiB of free GPU memory: 300 MiB are free",
        "a driver for CUDA 13.0: driver 1 is for CUDA 12.4",
    ] {
        assert!(outcome.output.contains(&format!("missing: {lacking}")), "{}", outcome.output);
    }
    let outcome = Machine::new().run(&[("NO_DRIVER", "1")]);
    assert!(outcome.output.contains("missing: a driver that answers"), "{}", outcome.output);
}

#[test]
fn a_failed_test_loses_nothing_of_what_comes_after_it() {
    let outcome = Machine::new().run(&[("FAIL", "package engine")]);
    assert!(!outcome.succeeded);
    assert_eq!(outcome.unwell(), ["tests-engine"]);
    assert_eq!(outcome.result("tests-engine"), "failed: exit status 101");
    let outcome = Machine::new().run(&[("FAIL", "run configs/cuda/kjv.yaml")]);
    assert_eq!(outcome.unwell(), ["run-kjv"]);
    assert!(outcome.output.contains("error: it is wrong"), "{}", outcome.output);
}

#[test]
fn a_test_that_found_no_gpu_has_failed() {
    let outcome = Machine::new().run(&[("SKIP", "package training")]);
    assert_eq!(outcome.unwell(), ["tests-training"]);
}

#[test]
fn what_needs_a_failed_build_is_skipped() {
    let outcome = Machine::new().run(&[("FAIL", "package depthwise")]);
    assert!(!outcome.succeeded);
    assert_eq!(outcome.result("build"), "failed: exit status 101");
    assert_eq!(outcome.result("run-kjv"), "skipped: needs build");
    assert_eq!(outcome.calls, "");
}

#[test]
fn without_the_fetched_model_the_rest_is_run() {
    let machine = Machine::new();
    machine.remove(SMOLLM2);
    let outcome = machine.run(&[]);
    assert_eq!(outcome.unwell(), ["models", "profile-smollm2", "run-smollm2", "validate-smollm2"]);
    assert_eq!(outcome.result("run-smollm2"), "skipped: needs models");
}

#[test]
fn a_step_that_hangs_is_ended() {
    let outcome = Machine::new().run(&[("HANG", "profile --model models/kjv"), ("STEP_SECONDS", "1")]);
    assert_eq!(outcome.unwell(), ["profile-kjv"]);
    assert_eq!(outcome.result("profile-kjv"), "failed: hung");
}

#[test]
fn larger_models_are_profiled_in_as_many_loops_as_divide_their_layers() {
    let machine = Machine::new();
    machine.write("larger/model.gguf", "");
    machine.write("larger/folder/config.json", "");
    machine.write("larger/notes.txt", "");
    let larger = machine.path("larger").display().to_string();
    let outcome = machine.run(&[("DEPTHWISE_MODELS", &larger), ("FAIL", "model.gguf --loops 3")]);
    assert!(outcome.succeeded, "{}", outcome.output);
    assert_eq!([outcome.result("profile-model"), outcome.result("profile-folder")], ["ok", "ok"]);
    assert!(outcome.calls.contains("model.gguf --loops 2"), "{}", outcome.calls);
    assert!(!outcome.calls.contains("model.gguf --loops 1"), "{}", outcome.calls);
    assert_eq!(outcome.result("profile-notes.txt"), "missing");
}

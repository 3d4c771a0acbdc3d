//! `scripts/gpu.sh` on machines of every kind, which programs that say what is wanted stand for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Time for every step.
const NO_LIMIT: (&str, &str) = ("GPU_MINUTES", "0");

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

/// Notes how it was called; fails for what `FAIL` names, and never ends for what `HANG` names. A profile or a replay leaves
/// files, and a pass log of `BYTES` bytes.
const DEPTHWISE: &str = r#"
echo "$*" >> "$CALLS"
case "$*" in *"${FAIL:-nothing}"*) echo "error: it is wrong" >&2; exit 1 ;; esac
case "$*" in *"${HANG:-nothing}"*) sleep 60 ;; esac
for argument in "$@"; do [ "${before:-}" != --out ] || out=$argument; before=$argument; done
[ -n "${out:-}" ] || exit 0
mkdir -p "$out"
head -c "${BYTES:-100}" /dev/zero > "$out/passes.parquet"
[ "$1" != profile ] || for file in profile.yaml latency.csv device.yaml kernels.csv; do echo "$file" > "$out/$file"; done
[ "$1" != profile ] || echo "command: depthwise $*" > "$out/origin.yaml""#;

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
            .env_remove("DEVICE")
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
    let outcome = machine.run(&[NO_LIMIT]);
    assert!(outcome.succeeded, "{}", outcome.output);
    assert_eq!(outcome.unwell(), [""; 0]);
    for call in [
        "profile --model models/chains",
        "profile --model random:configs/cuda/gemma-2b-3-loops-rank-0.json",
        "--exits configs/gpu/exits/3-loops --batching sequence,depth --exit none,static:1,oracle:recorded",
        "run configs/cuda/gemma-2b.yaml",
        "profile --model models/kjv",
        "run configs/cuda/kjv.yaml",
        "run configs/cuda/smollm2.yaml",
    ] {
        assert!(outcome.calls.contains(call), "{call} is not in\n{}", outcome.calls);
    }
    let table = fs::read_to_string(machine.path("results/machine.csv")).unwrap();
    assert_eq!(
        table.lines().map(|line| line.split(',').next().unwrap()).collect::<Vec<_>>(),
        ["when", "before", "after"]
    );
}

#[test]
fn within_twelve_minutes_the_most_important_steps_fit_with_all_that_they_may_take() {
    let dry = Machine::new().run(&[("DRY_RUN", "1")]);
    assert!(dry.succeeded, "{}", dry.output);
    assert_eq!(dry.calls, "", "nothing is run");
    let important = dry.steps.iter().position(|(step, _)| step == "size").unwrap();
    assert!(dry.steps[..important].iter().all(|(_, result)| result == "ok"), "{}", dry.output);
    let later = dry.steps[important + 1..].iter().filter(|(step, _)| step != "models");
    assert!(
        later.clone().count() > 3 && later.clone().all(|(_, result)| result.starts_with("skipped: no time")),
        "{}",
        dry.output
    );
    let limits = dry.output.lines().filter_map(|line| line.split_once("at most")?.1.split_once(" s:"));
    let seconds: Vec<u32> = limits.map(|(seconds, _)| seconds.trim().parse().unwrap()).collect();
    assert_eq!(seconds.len(), important + 1);
    let outcome = Machine::new().run(&[]);
    assert!(outcome.succeeded, "what there is no time for is no failure: {}", outcome.output);
    assert_eq!(outcome.result("validate-gemma-2b-3-loops"), "ok");
    assert!(outcome.result("run-kjv").starts_with("skipped: no time: 900 s do not fit"), "{}", outcome.output);
    assert!(outcome.result("run-smollm2").starts_with("skipped: no time"), "{}", outcome.output);
    let outcome = Machine::new().run(&[("GPU_MINUTES", "1")]);
    assert_eq!(outcome.result("tests-kernels"), "ok");
    assert_eq!(outcome.result("replay-chains"), "ok", "{}", outcome.output);
    assert!(outcome.result("profile-gemma-2b-3-loops").starts_with("skipped: no time"), "{}", outcome.output);
}

#[test]
fn what_was_built_elsewhere_is_run_without_a_build() {
    let machine = Machine::new();
    machine.write("target/gpu/depthwise", &format!("#!/usr/bin/env bash\necho carried >> \"$CALLS\"\n{DEPTHWISE}\n"));
    machine.write("target/gpu/tests/cuda", "#!/usr/bin/env bash\necho \"test in $PWD: $*\" >> \"$CALLS\"\n");
    machine.write("engine/Cargo.toml", "");
    let outcome = machine.run(&[("FAIL", "package")]);
    assert!(outcome.succeeded, "{}", outcome.output);
    assert_eq!(outcome.result("build"), "ok");
    let tests = outcome.calls.lines().find(|line| line.starts_with("test in ")).unwrap();
    assert!(tests.contains("/engine: --nocapture --test-threads 1 --skip timing::"), "{tests}");
    let run = |line: &&str| line.starts_with("profile") || line.starts_with("run");
    assert!(outcome.calls.lines().filter(run).count() > 3);
    assert!(outcome.calls.matches("carried\n").count() > 3);
}

#[test]
fn what_is_worth_keeping_is_laid_out_as_profiles_ship_and_must_be_small() {
    let machine = Machine::new();
    let outcome = machine.run(&[]);
    let kept = |file: &str| machine.path(&format!("results/profiles/a100/{file}")).exists();
    for model in ["chains", "gemma-2b-3-loops", "gemma-2b-vanilla", "gemma-2b-3-loops-rank-0"] {
        for file in ["profile.yaml", "latency.csv", "origin.yaml", "device.yaml", "kernels.csv", "passes.parquet"] {
            assert!(kept(&format!("{model}/{file}")), "{model}/{file}: {}", outcome.output);
        }
        assert!(kept(&format!("{model}/replay.parquet")), "{model}");
    }
    assert!(kept("machine.csv"));
    let origin = fs::read_to_string(machine.path("results/profiles/a100/chains/origin.yaml")).unwrap();
    assert!(!origin.contains(&machine.path("").display().to_string()), "paths of the machine stay there: {origin}");
    let outcome = Machine::new().run(&[("BYTES", "600000")]);
    assert_eq!(outcome.result("size"), "failed: exit status 1");
    assert!(outcome.output.contains("expected at most 3000000; the largest files:"), "{}", outcome.output);
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
    let outcome = Machine::new().run(&[NO_LIMIT, ("FAIL", "package engine")]);
    assert!(!outcome.succeeded);
    assert_eq!(outcome.unwell(), ["tests-kernels", "tests-engine"]);
    assert_eq!(outcome.result("tests-engine"), "failed: exit status 101");
    let outcome = Machine::new().run(&[NO_LIMIT, ("FAIL", "run configs/cuda/kjv.yaml")]);
    assert_eq!(outcome.unwell(), ["run-kjv"]);
    assert!(outcome.output.contains("error: it is wrong"), "{}", outcome.output);
}

#[test]
fn a_test_that_found_no_gpu_has_failed() {
    let outcome = Machine::new().run(&[NO_LIMIT, ("SKIP", "package training")]);
    assert_eq!(outcome.unwell(), ["tests-training"]);
    let outcome = Machine::new().run(&[("SKIP", "package engine --test cuda")]);
    assert_eq!(outcome.result("tests-kernels"), "failed: exit status 1");
}

#[test]
fn what_needs_a_failed_build_is_skipped() {
    let outcome = Machine::new().run(&[NO_LIMIT, ("FAIL", "package depthwise")]);
    assert!(!outcome.succeeded);
    assert_eq!(outcome.result("build"), "failed: exit status 101");
    assert_eq!(outcome.result("run-kjv"), "skipped: needs build");
    assert_eq!(outcome.calls, "");
}

#[test]
fn without_the_fetched_model_the_rest_is_run() {
    let machine = Machine::new();
    machine.remove(SMOLLM2);
    let outcome = machine.run(&[NO_LIMIT]);
    assert_eq!(outcome.unwell(), ["models", "profile-smollm2", "run-smollm2", "validate-smollm2"]);
    assert_eq!(outcome.result("run-smollm2"), "skipped: needs models");
}

#[test]
fn a_step_that_hangs_is_ended() {
    let outcome = Machine::new().run(&[NO_LIMIT, ("HANG", "profile --model models/kjv"), ("STEP_SECONDS", "2")]);
    assert_eq!(outcome.unwell(), ["profile-kjv"]);
    assert_eq!(outcome.result("profile-kjv"), "failed: stopped after 2 s");
}

#[test]
fn larger_models_are_profiled_in_as_many_loops_as_divide_their_layers() {
    let machine = Machine::new();
    machine.write("larger/model.gguf", "");
    machine.write("larger/folder/config.json", "");
    machine.write("larger/notes.txt", "");
    let larger = machine.path("larger").display().to_string();
    let outcome = machine.run(&[NO_LIMIT, ("DEPTHWISE_MODELS", &larger), ("FAIL", "model.gguf --loops 3")]);
    assert!(outcome.succeeded, "{}", outcome.output);
    assert_eq!([outcome.result("profile-model"), outcome.result("profile-folder")], ["ok", "ok"]);
    assert!(outcome.calls.contains("model.gguf --loops 2"), "{}", outcome.calls);
    assert!(!outcome.calls.contains("model.gguf --loops 1"), "{}", outcome.calls);
    assert_eq!(outcome.result("profile-notes.txt"), "missing");
}

//! `scripts/gpu.sh` with the program itself: its steps on the CPU, on tiny models.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use experiments::profiles::{ORIGIN, Origin};
use traces::table::read_yaml;
use traces::{LatencyProfile, PassLog};

const MODELS: [(&str, u32); 4] =
    [("chains", 6), ("gemma-2b-3-loops", 3), ("gemma-2b-vanilla", 1), ("gemma-2b-3-loops-rank-0", 3)];

#[test]
fn the_steps_of_the_gpu_script_run_on_a_cpu_and_leave_profiles_as_they_ship() {
    let folder = tempfile::tempdir().unwrap();
    // Where the script looks for the program.
    let release = folder.path().join("target/release");
    fs::create_dir_all(&release).unwrap();
    symlink(env!("CARGO_BIN_EXE_depthwise"), release.join("depthwise")).unwrap();
    let results = folder.path().join("results");
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/gpu.sh"))
        .arg(&results)
        .env("CARGO_TARGET_DIR", folder.path().join("target"))
        .envs([("DEVICE", "cpu"), ("GPU_MINUTES", "0"), ("STEP_SECONDS", "1200")])
        .env_remove("DRY_RUN")
        .env_remove("GPU_NAME")
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    let steps = fs::read_to_string(results.join("steps.csv")).unwrap();
    assert!(steps.lines().skip(1).all(|line| line.contains(",ok,")), "{steps}");
    for step in ["profile-chains", "replay-gemma-2b-vanilla", "validate-chains", "validate-gemma-2b-3-loops", "size"] {
        assert!(steps.contains(&format!("{step},ok,")), "{step}: {steps}");
    }
    for (model, num_loops) in MODELS {
        let kept = results.join("profiles/cpu").join(model);
        let profile = LatencyProfile::read(&kept).unwrap();
        assert_eq!(profile.meta.num_loops, num_loops, "{model}");
        let replayed = PassLog::read(kept.join("replay.parquet")).unwrap();
        assert_eq!(replayed.meta.fingerprint, profile.meta.fingerprint, "{model}");
        assert!(replayed.runs.iter().all(|run| !run.passes.is_empty()), "{model}");
        assert!(kept.join("passes.parquet").exists(), "{model}");
        let Origin { command, .. } = read_yaml(&kept.join(ORIGIN)).unwrap();
        assert!(command.starts_with("depthwise profile --model "), "{command}");
        assert!(!command.contains(&folder.path().display().to_string()), "paths of the machine stay there: {command}");
    }
    assert!(results.join("profiles/cpu/chains/speedups.csv").exists());
}

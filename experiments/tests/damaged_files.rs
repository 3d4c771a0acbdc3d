//! Damaged configurations and results are refused or read, never a panic, with little memory and at once.
//! `PROPTEST_CASES` sets the number of cases.

#[path = "../../traces/tests/allocations/mod.rs"]
mod allocations;
#[path = "../../traces/tests/damage/mod.rs"]
mod damage;

use std::path::Path;

use allocations::Allocations;
use damage::{Damage, cases, damage, damaged};
use experiments::results::{MARKER, ResultsFolder};
use experiments::sweep::{Earlier, sweep};
use experiments::{Experiment, Quiet, SweepSpec};
use proptest::prelude::*;
use scheduler::KvFill;
use simulator::ModelMemory;
use traces::MemoryFigures;
use training::trainer::options::TrainingOptions;

#[global_allocator]
static ALLOCATIONS: Allocations = Allocations;

/// Limit of a single allocation.
const MEMORY: usize = 4 << 20;

const MODEL: ModelMemory = ModelMemory {
    num_loops: 4,
    weight_bytes: 1,
    kv_bytes_per_token: 1,
    figures: MemoryFigures { device_bytes: None, other_bytes: 0, row_bytes: 0, logits_bytes: 0 },
    kv_fill: KvFill::Reuse,
};

const EXPERIMENTS: [&str; 3] = [
    include_str!("../../configs/quickstart.yaml"),
    include_str!("../../configs/validation/azure-kjv.yaml"),
    include_str!("../../configs/paper/table.yaml"),
];
const SWEEPS: [&str; 2] = [include_str!("../../configs/sweep.yaml"), include_str!("../../configs/gpu/memory.yaml")];
const TRAINING: [&str; 3] = [
    include_str!("../../configs/train/kjv.yaml"),
    include_str!("../../configs/train/kjv-uptrain.yaml"),
    include_str!("../../configs/study/uptrain.yaml"),
];

/// A sweep of four points.
const SMALL: &str = "schema_version: 1
title: small
requests: {generate: {count: 5, arrivals: all_at_once, prompt_tokens: {fixed: 3}, output_tokens: {fixed: 4}}}
serving: {batching: [depth], exit: [none], max_batch: 4, token_budget: 16}
systems: [{name: one, profile: profile}]
grid: {max_batch: [2, 4], seed: [1, 2]}
";
const PROFILE: [(&str, &str); 2] = [
    (
        "profile.yaml",
        "schema_version: 1\nmodel: m\nfingerprint: f\nnum_loops: 2\ndevice: d\nsoftware: s\nsource: t\noverhead_us: 1.5\n\
         weight_bytes: 10\nkv_bytes_per_token: 2\n",
    ),
    (
        "latency.csv",
        "component,rows,kv_tokens,depths,time_us,spread_us,repeats\nblock,1,0,1,10.5,0.1,5\nembed,1,0,1,0.5,0,5\n\
         head,1,0,1,2,0,5\n",
    ),
];

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    prop::collection::vec(damage(), 1..4)
}

/// Writes a text that is damaged, if it stays a text.
fn write(folder: &Path, text: &str, damages: &[Damage]) -> std::path::PathBuf {
    let path = folder.join("config.yaml");
    std::fs::write(&path, damaged(text, damages)).unwrap();
    path
}

fn small_sweep(folder: &Path) -> anyhow::Result<()> {
    let spec = SweepSpec::load(&folder.join("small.yaml"))?;
    sweep(&spec, folder, &folder.join("out"), Earlier::Continue, &mut Quiet).map(|_| ())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_experiments(text in prop::sample::select(&EXPERIMENTS[..]), damages in damages()) {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), text, &damages);
        let (_, allocated) = ALLOCATIONS.largest(|| {
            let experiment = Experiment::load(&path)?;
            experiment.check()?;
            for settings in experiment.serving.all_settings(&MODEL, &[])? {
                settings.check()?;
            }
            anyhow::Ok(())
        });
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
    }

    #[test]
    fn damaged_sweeps(text in prop::sample::select(&SWEEPS[..]), damages in damages()) {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), text, &damages);
        let (points, allocated) = ALLOCATIONS.largest(|| {
            let spec = SweepSpec::load(&path)?;
            spec.check()?;
            anyhow::Ok(spec.points(|_| (4, KvFill::Reuse)).len())
        });
        prop_assert!(allocated <= 4 * MEMORY, "{allocated} bytes at once");
        if let Ok(points) = points {
            prop_assert!((1..=100_000).contains(&points));
        }
    }

    #[test]
    fn damaged_training_runs(text in prop::sample::select(&TRAINING[..]), damages in damages()) {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), text, &damages);
        let (_, allocated) = ALLOCATIONS.largest(|| {
            // Paths that are not there end the reading; the numbers are checked without them.
            let read = TrainingOptions::load(&path);
            let bare: Result<TrainingOptions, _> = serde_yaml::from_str(&std::fs::read_to_string(&path).unwrap_or_default());
            bare.ok().map(|options| (options.check(&engine::ModelConfig::default()).is_ok(), read.is_ok()))
        });
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
    }

    #[test]
    fn damaged_markers(damages in damages()) {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let mut results = ResultsFolder::create(&target, "test").unwrap();
        std::fs::write(results.path().unwrap().join("a"), "first").unwrap();
        results.finish().unwrap();
        std::fs::write(target.join("notes.md"), "dear to somebody").unwrap();
        let marker = std::fs::read(target.join(MARKER)).unwrap();
        std::fs::write(target.join(MARKER), damaged(marker, &damages)).unwrap();
        if let Ok(mut results) = ResultsFolder::create(&target, "test") {
            std::fs::write(results.path().unwrap().join("a"), "second").unwrap();
            let finished = results.finish();
            let new = if finished.is_ok() { target.join("a") } else { target.join("new-results-1/a") };
            prop_assert_eq!(std::fs::read_to_string(new).unwrap(), "second", "{:?}", finished);
        }
        prop_assert_eq!(std::fs::read_to_string(target.join("notes.md")).unwrap(), "dear to somebody");
    }
}

proptest! {
    // Each case runs two sweeps.
    #![proptest_config(ProptestConfig { cases: cases().cases / 40, ..cases() })]

    #[test]
    fn damaged_results_of_a_sweep_are_refused_or_completed(
        file in prop::sample::select(&["sweep.csv", "inputs.yaml", "config.yaml", MARKER][..]), damages in damages(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("small.yaml"), SMALL).unwrap();
        std::fs::create_dir(folder.path().join("profile")).unwrap();
        for (name, text) in PROFILE {
            std::fs::write(folder.path().join("profile").join(name), text).unwrap();
        }
        small_sweep(folder.path()).unwrap();
        let out = folder.path().join("out");
        let whole = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
        let bytes = std::fs::read(out.join(file)).unwrap();
        std::fs::write(out.join(file), damaged(bytes, &damages)).unwrap();
        if small_sweep(folder.path()).is_ok() {
            let again = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
            prop_assert_eq!(again.lines().count(), whole.lines().count());
            prop_assert_eq!(again.lines().next(), whole.lines().next());
        }
    }
}

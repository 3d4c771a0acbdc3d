//! Training and evaluation on the first GPU, compared with the CPU.

#![cfg(feature = "cuda")]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use engine::DeviceName;
use engine::config::{LoraConfig, LoraRanks};
use training::corpus::DataOptions;
use training::evaluation::Evaluation;
use training::objective::{ExitCoefficients, GateOptions, ObjectiveOptions};
use training::optimizer::AdamWOptions;
use training::trainer::options::{ModelOptions, TrainingOptions};
use training::trainer::{LossRow, Trainer};

const TEXT: &str =
    "And God said, Let there be light: and there was light. And the evening and the morning were one day.\n";

/// A run of a relaxed model with gates and self-distillation.
fn options(folder: &Path, device: DeviceName) -> TrainingOptions {
    let text = folder.join("text.txt");
    std::fs::write(&text, TEXT.repeat(40)).unwrap();
    let mut config: serde_yaml::Mapping = serde_yaml::from_str(
        "{vocab_size: 300, hidden_size: 64, intermediate_size: 96, num_heads: 4, num_kv_heads: 2, head_dim: 16, \
         block_layers: 2, num_loops: 3, max_positions: 64, sharing: matrices, head_lora_rank: 2, gate: true}",
    )
    .unwrap();
    let lora = LoraConfig { ranks: LoraRanks::all(4), scale: 1.0 };
    config.insert("lora".into(), serde_yaml::to_value(lora).unwrap());
    TrainingOptions {
        model: ModelOptions { config, ..ModelOptions::default() },
        data: DataOptions {
            text: vec![text.clone()],
            held_out: vec![text],
            held_out_tokens: Some(300),
            cache: folder.join("tokens"),
            ..DataOptions::default()
        },
        objective: ObjectiveOptions {
            exits: ExitCoefficients::Aggressive(0.1),
            self_distillation: 2.0,
            gate: Some(GateOptions { through: true, ..GateOptions::default() }),
            ..ObjectiveOptions::default()
        },
        optimizer: AdamWOptions { peak_learning_rate: 0.003, warmup_steps: 2, ..AdamWOptions::default() },
        steps: 20,
        batch: 4,
        seq: 48,
        device,
        workers: 1,
        evaluation_steps: 20,
        checkpoint_steps: 20,
        seed: 1,
        ..TrainingOptions::default()
    }
}

fn trained(device: DeviceName) -> (Vec<LossRow>, Evaluation) {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), device);
    let mut trainer = Trainer::start(options, &folder.path().join("run"), &mut |_| {}).unwrap();
    trainer.run(&AtomicBool::new(false), &mut |_| {}).unwrap();
    (trainer.curve().to_vec(), trainer.evaluate_saved().unwrap())
}

#[test]
fn a_run_on_a_gpu_lowers_the_loss_as_on_the_cpu() {
    if let Err(error) = DeviceName::Cuda(0).candle() {
        eprintln!("SKIPPED: nothing was trained on a GPU: {error}");
        return;
    }
    let ((expected, on_cpu), (found, on_gpu)) = (trained(DeviceName::Cpu), trained(DeviceName::Cuda(0)));
    let close = |found: f64, expected: f64| (found - expected).abs() < 1e-3 * (1.0 + expected.abs());
    for (found, expected) in found.iter().zip(&expected) {
        let losses = |row: &LossRow| [row.objective, row.loss_nats_per_token, row.gradient_norm];
        let same = losses(found).into_iter().zip(losses(expected)).all(|(found, expected)| close(found, expected));
        assert!(same, "{found:?} is not {expected:?}");
    }
    for (found, expected) in on_gpu.loops.iter().zip(&on_cpu.loops) {
        assert!(close(found.perplexity, expected.perplexity), "{found:?} is not {expected:?}");
    }
}

//! `depthwise train`: trains a recursive model with early exits from scratch on plain text.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use engine::config::ModelConfig;
use training::evaluation::Evaluation;
use training::objective::ObjectiveWeights;
use training::optimizer::AdamWOptions;
use training::trainer::{Event, Trainer, TrainingOptions};

const DEFAULT_STEPS: usize = 4000;
const BETWEEN_PROGRESS_LINES: Duration = Duration::from_secs(10);

/// Train a recursive model with early exits on plain text.
///
/// Every loop of the shared block learns to predict the text, and the earlier loops also learn
/// from the last one. Ctrl-C writes a checkpoint and stops; `--resume` goes on from it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on from the latest checkpoint in this folder, with the options it was started with;
    /// only --steps may be given anew
    #[arg(long, value_name = "DIR", conflicts_with_all = ["text", "held_out", "out", "ModelArgs", "RunArgs"])]
    resume: Option<PathBuf>,
    /// Plain text to train on; several files are joined
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "resume")]
    text: Vec<PathBuf>,
    /// Plain text to evaluate on, never trained on
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    held_out: Option<PathBuf>,
    /// Folder for the model, the loss curve and the checkpoint
    #[arg(long, value_name = "DIR", required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Steps of the whole run [default: 4000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
struct ModelArgs {
    /// Tokens of the byte-level vocabulary, at least 256
    #[arg(long, default_value_t = 512)]
    vocab_size: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 192)]
    hidden_size: usize,
    /// Inner width of the MLP
    #[arg(long, default_value_t = 512)]
    intermediate_size: usize,
    /// Query heads
    #[arg(long, default_value_t = 6)]
    num_heads: usize,
    /// Key-value heads
    #[arg(long, default_value_t = 2)]
    num_kv_heads: usize,
    /// Width of a head
    #[arg(long, default_value_t = 32)]
    head_dim: usize,
    /// Layers of the shared block
    #[arg(long, default_value_t = 2)]
    block_layers: usize,
    /// Times the block is run
    #[arg(long, default_value_t = 4)]
    num_loops: usize,
    /// Longest sequence the model may be asked to run, in tokens
    #[arg(long, default_value_t = 1024)]
    max_positions: usize,
    /// Give the head weights of its own
    #[arg(long)]
    untied_head: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Training")]
struct RunArgs {
    /// Sequences per step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens per sequence
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Learning rate after warm-up; it then falls along a cosine
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 100)]
    warmup_steps: usize,
    /// AdamW's weight decay of matrices
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Gradient norm above which gradients are scaled down
    #[arg(long, default_value_t = 1.0)]
    clip_norm: f64,
    /// Weight of an earlier loop's cross-entropy; the last loop's is 1
    #[arg(long, default_value_t = 0.1)]
    intermediate_weight: f64,
    /// Weight of an earlier loop's divergence from the last loop
    #[arg(long, default_value_t = 0.2)]
    distillation_weight: f64,
    /// Threads that share a step
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 200)]
    checkpoint_steps: usize,
    /// Seed of the initial weights and the batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Trains, prints progress and checkpoints to standard error, and evaluates the saved model.
pub fn run(args: Args) -> anyhow::Result<()> {
    keep_candle_single_threaded();
    let folder = args.resume.clone().or_else(|| args.out.clone());
    let folder = folder.context("either --out or --resume is needed")?;
    let mut trainer = match args.resume {
        Some(folder) => Trainer::resume(&folder, args.steps)?,
        None => Trainer::start(options(&args)?, config(&args.model), &folder)?,
    };
    let parameters = trainer.weights().num_parameters();
    eprintln!("{parameters} parameters, from step {}", trainer.curve().len());
    let stop = Arc::new(AtomicBool::new(false));
    let stop_on_signal = stop.clone();
    ctrlc::set_handler(move || stop_on_signal.store(true, Ordering::Relaxed))?;

    let mut last_line = Instant::now();
    trainer.run(&stop, |event| match event {
        Event::Step { .. } if last_line.elapsed() < BETWEEN_PROGRESS_LINES => {}
        Event::Step { row, tokens_per_second, remaining } => {
            last_line = Instant::now();
            eprintln!(
                "step {:6}  loss {:.4}  divergence {:.4}  {tokens_per_second:.0} tokens/s  {} left",
                row.step,
                row.loss_nats_per_token,
                row.divergence_nats_per_token,
                indicatif::HumanDuration(remaining),
            );
        }
        Event::Checkpoint { step, held_out } => {
            eprintln!("checkpoint after {step} steps; start of the held-out text:");
            eprint!("{}", table(held_out));
        }
    })?;
    if !trainer.is_finished() {
        eprintln!("stopped; go on with: depthwise train --resume {}", folder.display());
    }
    let evaluation = trainer.evaluate_saved()?;
    let path = folder.join("eval.csv");
    evaluation.write_csv(&path)?;
    println!("held-out text, {} bytes, {} tokens:", evaluation.bytes, evaluation.tokens);
    print!("{}", table(&evaluation));
    println!("written to {}", path.display());
    Ok(())
}

/// A step is shared among workers; threads that candle adds inside of one spin for work and take
/// more than half of the processor from them.
fn keep_candle_single_threaded() {
    for variable in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        // SAFETY: the process has started no other thread yet.
        unsafe { std::env::set_var(variable, "1") };
    }
}

fn options(args: &Args) -> anyhow::Result<TrainingOptions> {
    let run = &args.run;
    Ok(TrainingOptions {
        text: args.text.clone(),
        held_out: args.held_out.clone().context("--held-out is needed")?,
        steps: args.steps.unwrap_or(DEFAULT_STEPS),
        batch: run.batch,
        seq: run.seq,
        workers: run.workers,
        checkpoint_steps: run.checkpoint_steps,
        seed: run.seed,
        objective: ObjectiveWeights { intermediate: run.intermediate_weight, distillation: run.distillation_weight },
        optimizer: AdamWOptions {
            peak_learning_rate: run.learning_rate,
            warmup_steps: run.warmup_steps,
            weight_decay: run.weight_decay,
            clip_norm: run.clip_norm,
        },
    })
}

fn config(args: &ModelArgs) -> ModelConfig {
    ModelConfig {
        vocab_size: args.vocab_size,
        hidden_size: args.hidden_size,
        intermediate_size: args.intermediate_size,
        num_heads: args.num_heads,
        num_kv_heads: args.num_kv_heads,
        head_dim: args.head_dim,
        block_layers: args.block_layers,
        num_loops: args.num_loops,
        tie_embeddings: !args.untied_head,
        max_positions: args.max_positions,
        ..ModelConfig::default()
    }
}

fn table(evaluation: &Evaluation) -> String {
    let mut lines = String::from("passes  nats/token  bits/byte  accuracy  agrees with last  oracle\n");
    for figures in &evaluation.loops {
        lines += &format!(
            "{:6}  {:10.4}  {:9.4}  {:7.1}%  {:15.1}%  {:5.1}%\n",
            figures.passes,
            figures.loss_nats_per_token,
            figures.bits_per_byte,
            100.0 * figures.accuracy,
            100.0 * figures.agreement_with_last,
            100.0 * figures.oracle_share,
        );
    }
    lines + &format!("mean oracle depth {:.3} passes\n", evaluation.mean_oracle_depth())
}

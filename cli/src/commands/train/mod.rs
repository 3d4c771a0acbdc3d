//! `depthwise train`: trains a model, fresh or at hand, whole or in part.

mod arguments;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use training::evaluation::Evaluation;
use training::trainer::{Event, RUN_FILES, Trainer};

use crate::interrupt::{self, Interrupted};
use crate::output::{note, say};
use arguments::{RunArgs, name_option};
use experiments::{ResultsFolder, loss_figure};

/// What a folder of a run is marked with.
const KIND: &str = "train";
/// What the saved model knows of the held-out text.
const EVALUATION_FILE: &str = "eval.csv";

const BETWEEN_PROGRESS_LINES: Duration = Duration::from_secs(10);

/// Train a model on text: a fresh or an existing one; the whole model, or its adapters, shared block or gates.
///
/// Each loop can be trained on the text, on a full-size teacher and on the last loop. A run is described by options, by
/// a YAML file, or by a file and options that override it. Ctrl-C writes a checkpoint and stops; `--resume` continues
/// from it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Continue from the latest checkpoint in this folder, with the options of its start; only --steps may be changed
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["out", "config", "ModelArgs", "DataArgs", "ObjectiveArgs", "StepArgs"],
    )]
    resume: Option<PathBuf>,
    /// Folder for the model, the loss curve and the checkpoint
    #[arg(long, value_name = "DIR", required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Steps of the whole run [default: 4000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    run: RunArgs,
}

/// Trains, prints progress and looks at the held-out text to standard error, and evaluates the saved model.
pub fn run(args: Args) -> Result<()> {
    let folder = args.resume.clone().or(args.out).context("either --out or --resume is needed")?;
    let report = &mut progress();
    let mut results = match args.resume {
        Some(_) => ResultsFolder::adopt(&folder, KIND, &RUN_FILES)?,
        None => ResultsFolder::open(&folder, KIND)?,
    };
    results.claim(&RUN_FILES)?;
    let mut trainer = match args.resume {
        Some(folder) => Trainer::resume(&folder, args.steps, report).map_err(name_option)?,
        None => {
            let mut options = args.run.options()?;
            options.steps = args.steps.unwrap_or(options.steps);
            Trainer::start(options, &folder, report).map_err(name_option)?
        }
    };
    results.mark()?;
    // Ctrl-C for the second time ends the process at once.
    interrupt::say(format!("go on from the latest checkpoint with: depthwise train --resume {}", folder.display()));
    let (trained, all) = (trainer.num_trained(), trainer.weights().num_parameters());
    note!("{trained} of {all} parameters trained, from step {}", trainer.curve().len());
    trainer.run(interrupt::flag(), report).map_err(name_option)?;
    if !trainer.is_finished() {
        note!("stopped; go on with: depthwise train --resume {}", folder.display());
        // The evaluation of a long text would keep someone waiting who wants to stop.
        finish(&folder, results, None)?;
        return Err(Interrupted.into());
    }
    finish(&folder, results, Some(trainer.evaluate_saved()?))
}

/// Draws the loss curve, and writes the evaluation of the saved model if there is one.
fn finish(folder: &Path, mut results: ResultsFolder, evaluation: Option<Evaluation>) -> Result<()> {
    let written = results.path()?;
    if let Some(evaluation) = &evaluation {
        evaluation.write_csv(&written.join(EVALUATION_FILE))?;
    }
    loss_figure::draw(&[folder], &written.join("figures"))?;
    results.finish()?;
    let Some(evaluation) = evaluation else { return Ok(()) };
    say!("held-out text, {} bytes, {} tokens:", evaluation.bytes, evaluation.tokens);
    say!("{}", table(&evaluation));
    say!("written to {}", folder.join(EVALUATION_FILE).display());
    Ok(())
}

/// Says on standard error what a run is doing, a line of steps every ten seconds.
fn progress() -> impl FnMut(Event) {
    let mut last_line = Instant::now();
    move |event| match event {
        Event::Tokenizing(path) => note!("tokenizing {}", path.display()),
        Event::Step { .. } if last_line.elapsed() < BETWEEN_PROGRESS_LINES => {}
        Event::Step { row, tokens_per_second, remaining } => {
            last_line = Instant::now();
            note!(
                "step {:6}  objective {:.4}  loss {:.4}  {tokens_per_second:.0} tokens/s  {} left",
                row.step + 1,
                row.objective,
                row.loss_nats_per_token,
                indicatif::HumanDuration(remaining),
            );
        }
        Event::HeldOut { step, evaluation } => {
            note!("start of the held-out text after {step} steps:");
            note!("{}", table(evaluation));
        }
        Event::Checkpoint { step } => note!("checkpoint after {step} steps"),
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
    lines + &format!("mean oracle depth {:.3} passes", evaluation.mean_oracle_depth())
}

//! `depthwise evaluate`: what a model knows at each loop, and what its exit signals are worth.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ArgGroup;
use engine::reference::Reference;
use engine::{Checkpoint, DeviceName, ModelConfig, PromptLine, Sampling, Tokenizer, WeightType};
use plots::{ExitCurve, Figure, Origin, Reliability, Scale, SweepLine, SweepPoint};
use serde::Serialize;
use simulator::write_csv;
use traces::{ExitSignal, ExitTrace, ExitTraceMeta, SignalSet};
use training::corpus::Corpus;
use training::evaluation::exits::{CurvePoint, exit_curve, shallowest};
use training::evaluation::multiple_choice::{
    self, Accuracy, Answer, Question, QuestionFile, accuracies, read_questions,
};
use training::evaluation::reliability::{ReliabilityBin, SignalQuality, reliability, signal_quality};
use training::evaluation::{Evaluation, Windows, evaluate_and_record};

use crate::output::{note, say};
use crate::progress::{Terminal, progress};
use crate::report::{print_loops, print_table};
use experiments::NamedEngine;
use experiments::exact_match::{ExactMatch, exact_match};
use experiments::figures::exit_depths;
use experiments::results::{CONFIG, ResultsFolder};

/// Agreements for which the shallowest exits are printed.
const AGREEMENTS: [f64; 3] = [0.99, 0.95, 0.9];

/// Evaluate a model: perplexity, agreement and accuracy by loop, and the quality of each exit signal
///
/// From a text, from an exit trace, from multiple-choice questions, or from prompts with answers. docs/explanation/evaluation.md has the formulas.
#[derive(Debug, Serialize, clap::Args)]
#[command(group = ArgGroup::new("evidence").required(true).multiple(true).args(["text", "exits", "questions", "prompts"]))]
pub struct Args {
    /// Model: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, or a name on the Hugging
    /// Face hub (OWNER/MODEL or OWNER/MODEL/FILE.gguf)
    #[arg(required_unless_present = "exits")]
    model: Option<PathBuf>,
    /// Split the layers of an ordinary transformer into N blocks, one for each depth; or run a looped model N times
    #[arg(long, value_name = "N", requires = "model")]
    loops: Option<usize>,
    /// Device: cpu, cuda or cuda:N
    #[arg(long, default_value_t, requires = "model")]
    device: DeviceName,
    /// Plain text to predict, token by token
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Folder of an exit trace, instead of a text
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    exits: Option<PathBuf>,
    /// Multiple-choice questions: JSON lines with `query`, `choices` and `gold`, or samples that the LM Evaluation
    /// Harness logged
    #[arg(long, value_name = "FILE", requires = "model")]
    questions: Option<PathBuf>,
    /// Questions to use as examples: the first of them precede each question, with their answers
    #[arg(long, value_name = "FILE", requires = "questions", requires = "shots")]
    examples: Option<PathBuf>,
    /// Number of examples
    #[arg(long, value_name = "N", requires = "examples")]
    shots: Option<usize>,
    /// Prompts with answers: JSON lines (.jsonl) with `prompt`, `answer` and, if wanted, `class`. The model completes
    /// each with every token exiting at one depth, for each depth in turn
    #[arg(long, value_name = "FILE", requires = "model")]
    prompts: Option<PathBuf>,
    /// Length of a window of the text. Windows overlap by half; after the first window, a token is predicted from at
    /// least half a window
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    seq: usize,
    /// Folder to write CSV files and figures to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let questions = args.questions.as_deref().map(|path| with_examples(path, &args)).transpose()?;
    let recorded = args.exits.as_deref().map(ExitTrace::read).transpose()?;
    let model = match &args.model {
        Some(model) if args.text.is_some() || args.questions.is_some() => {
            Some(LoadedModel::load(model, args.loops, args.device)?)
        }
        _ => None,
    };
    let mut folder = args.out.as_deref().map(|out| ResultsFolder::create(out, "evaluate")).transpose()?;
    let out = folder.as_mut().map(ResultsFolder::path).transpose()?;

    let of_text = match (&model, &args.text) {
        (Some(model), Some(text)) => Some(model.evaluate(text, args.seq)?),
        _ => None,
    };
    if let (Some((evaluation, _)), Some(text)) = (&of_text, &args.text) {
        print_text(evaluation, text);
        if let Some(out) = &out {
            evaluation.write_csv(&out.join("loops.csv"))?;
        }
    }
    let trace = recorded.as_ref().or(of_text.as_ref().map(|(_, exits)| exits));
    let signals = trace.filter(|trace| trace.num_loops() > 1).map(|trace| (trace, Signals::of(trace)));
    if let Some((_, signals)) = &signals {
        signals.print();
        if let Some(out) = &out {
            signals.write(out)?;
        }
    }
    let mut of_questions = None;
    if let (Some(model), Some(questions)) = (&model, &questions) {
        let answers = model.answer(questions)?;
        let accuracies = accuracies(&answers);
        print_accuracies(&accuracies, &answers);
        if let Some(out) = &out {
            write_csv(&out.join("accuracy.csv"), &accuracies)?;
            write_csv(&out.join("answers.csv"), answer_lines(&answers))?;
        }
        of_questions = Some((model, accuracies));
    }
    let mut of_prompts = None;
    if let (Some(model), Some(prompts)) = (&args.model, &args.prompts) {
        let exact = answer_prompts(&args, model, prompts)?;
        print_exact_match(&exact);
        if let Some(out) = &out {
            write_csv(&out.join("exact_match.csv"), &exact)?;
        }
        of_prompts = Some((file_name(model), exact));
    }
    let Some(mut folder) = folder else { return Ok(()) };
    std::fs::write(folder.path()?.join(CONFIG), serde_yaml::to_string(&args)?)?;
    let draw = |out: &Path| -> Result<()> {
        if let Some((evaluation, exits)) = &of_text {
            draw_loops(&figures(out, exits), evaluation)?;
        }
        if let Some((trace, signals)) = &signals {
            signals.draw(&figures(out, trace), trace)?;
        }
        of_prompts.iter().try_for_each(|(model, exact)| draw_exact_match(out, model, exact))?;
        of_questions.iter().try_for_each(|(model, accuracies)| model.draw_accuracies(out, accuracies))
    };
    let drawn = draw(&folder.path()?);
    folder.finish()?;
    drawn.context("the results are complete, the figures are not")
}

/// Reads questions, and puts examples before them if there are any.
fn with_examples(path: &Path, args: &Args) -> Result<Vec<Question>> {
    let read = |path: &Path, at_least| -> Result<Vec<Question>> {
        let QuestionFile { questions, warnings } = read_questions(path, at_least)?;
        warnings.iter().for_each(|warning| note!("warning: {}: {warning}", path.display()));
        Ok(questions)
    };
    let questions = read(path, 1)?;
    let (Some(examples), Some(shots)) = (&args.examples, args.shots) else { return Ok(questions) };
    let examples = read(examples, shots)?;
    Ok(questions.into_iter().map(|question| question.after_examples(&examples, shots)).collect())
}

struct LoadedModel {
    reference: Reference,
    tokenizer: Tokenizer,
    name: String,
    fingerprint: String,
}

impl LoadedModel {
    fn load(path: &Path, loops: Option<usize>, device: DeviceName) -> Result<Self> {
        let (weights, tokenizer) = Checkpoint::open(path, loops)?.with_tokenizer(path)?;
        Ok(Self {
            reference: Reference::new(&weights.to_device(&device.candle()?)?)?,
            tokenizer,
            name: file_name(path),
            fingerprint: weights.fingerprint()?,
        })
    }

    /// Evaluates the model on a text, and records the exit signals of its tokens: a window is a generation.
    fn evaluate(&self, path: &Path, seq: usize) -> Result<(Evaluation, ExitTrace)> {
        let max_positions = self.reference.config().max_positions;
        ensure!((2..=max_positions).contains(&seq), "--seq {seq}: expected 2 to the model's {max_positions} positions");
        let text = traces::input::read_text(path)?;
        let corpus = Corpus::new(&text, &self.tokenizer, 1, "evaluation")?;
        let begin = &self.tokenizer.begin()?;
        ensure!(2 * begin.len() < seq, "--seq {seq}: expected more than twice the {} that begin a window", begin.len());
        let &ModelConfig { num_loops, gate, .. } = self.reference.config();
        let exits = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: self.name.clone(),
            fingerprint: self.fingerprint.clone(),
            num_loops: num_loops as u32,
            source: format!("{} in windows of {seq} tokens", file_name(path)),
            recording: None,
        });
        let mut exits = ExitTrace { recorded: SignalSet::of_model(gate), ..exits };
        let bar = progress(corpus.tokens().len());
        let evaluation = evaluate_and_record(&self.reference, &corpus, Windows { seq, begin }, |rows| {
            exits.push_generation(rows);
            bar.inc((rows.len() / num_loops) as u64);
        })?;
        bar.finish_and_clear();
        Ok((evaluation, exits))
    }

    fn answer(&self, questions: &[Question]) -> Result<Vec<Answer>> {
        let bar = progress(questions.len());
        let answers = multiple_choice::answer(&self.reference, &self.tokenizer, questions, || bar.inc(1))?;
        bar.finish_and_clear();
        Ok(answers)
    }

    fn draw_accuracies(&self, out: &Path, accuracies: &[Accuracy]) -> Result<()> {
        let questions = accuracies.first().map_or(0, |accuracy| accuracy.questions);
        let line = |name: &str, value: fn(&Accuracy) -> (f64, f64)| {
            let point = |accuracy: &Accuracy| {
                let (share, stderr) = value(accuracy);
                let (y, error) = (100.0 * share, 100.0 * stderr);
                SweepPoint { x: accuracy.passes as f64, y, low: y - error, high: y + error }
            };
            SweepLine { name: name.to_owned(), points: accuracies.iter().map(point).collect() }
        };
        let lines = [
            line("acc", |accuracy| (accuracy.acc, accuracy.acc_stderr)),
            line("acc_norm", |accuracy| (accuracy.acc_norm, accuracy.acc_norm_stderr)),
        ];
        let title = "Accuracy by passes, with its standard error";
        let figure = figure(out, "accuracy", title, &format!("{questions} questions"), &self.name);
        Ok(plots::or_left_out(plots::sweep(&figure, "passes", Scale::Linear, "questions answered right (%)", &lines))?)
    }
}

/// The last part of a path.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn print_text(evaluation: &Evaluation, text: &Path) {
    say!("{}: {} bytes, {} tokens", text.display(), evaluation.bytes, evaluation.tokens);
    print_loops(evaluation);
    say!("");
}

/// Draws figures of one folder that have their origin in common.
fn figures(out: &Path, trace: &ExitTrace) -> impl Fn(&str, &str) -> Figure {
    let tokens = format!("{} tokens of {}", trace.num_tokens(), trace.meta.source);
    let (out, model) = (out.to_owned(), trace.meta.model.clone());
    move |name, title| figure(&out, name, title, &tokens, &model)
}

fn figure(out: &Path, name: &str, title: &str, measured_on: &str, model: &str) -> Figure {
    Figure {
        folder: out.join("figures"),
        name: name.to_owned(),
        title: title.to_owned(),
        setting: model.to_owned(),
        device: measured_on.to_owned(),
        origin: Origin::Measured,
    }
}

fn draw_loops(figure: &impl Fn(&str, &str) -> Figure, evaluation: &Evaluation) -> Result<()> {
    let point = |(passes, y): (usize, f64)| SweepPoint { x: passes as f64, y, low: y, high: y };
    let points = evaluation.loops.iter().map(|figures| (figures.passes, figures.bits_per_byte)).map(point).collect();
    let lines = [SweepLine { name: "bits per byte".to_owned(), points }];
    let figure = figure("bits-per-byte", "Bits per byte by passes");
    Ok(plots::or_left_out(plots::sweep(&figure, "passes", Scale::Linear, "bits per byte", &lines))?)
}

/// What the exit signals of a trace are worth.
struct Signals {
    /// Of each measure that has values before the last depth.
    curves: Vec<(ExitSignal, Vec<CurvePoint>)>,
    /// By measure and depth.
    bins: Vec<ReliabilityBin>,
    /// By measure and depth.
    qualities: Vec<SignalQuality>,
}

impl Signals {
    fn of(trace: &ExitTrace) -> Self {
        let curves = trace.recorded.iter().map(|measure| (measure, exit_curve(trace, measure)));
        let depths =
            |measure: ExitSignal| (measure.first_depth()..trace.num_loops() - 1).map(move |depth| (measure, depth));
        let read = || trace.recorded.iter().flat_map(depths);
        Self {
            curves: curves.filter(|(_, curve)| !curve.is_empty()).collect(),
            bins: read().flat_map(|(measure, depth)| reliability(trace, measure, depth)).collect(),
            qualities: read().map(|(measure, depth)| signal_quality(trace, measure, depth)).collect(),
        }
    }

    fn print(&self) {
        let at = |curve: &[CurvePoint], agreement| match shallowest(curve, agreement) {
            Some(point) => [format!("{:.4}", point.threshold), format!("{:.3}", point.mean_depth)],
            None => ["-".to_owned(), "-".to_owned()],
        };
        let lines = self.curves.iter().map(|(measure, curve)| {
            let points = AGREEMENTS.iter().flat_map(|&agreement| at(curve, agreement));
            std::iter::once(measure.to_string()).chain(points).collect()
        });
        let header = AGREEMENTS.map(|share| [format!("{}% at", 100.0 * share), "mean depth".to_owned()]);
        let header: Vec<&str> =
            std::iter::once("signal").chain(header.as_flattened().iter().map(String::as_str)).collect();
        print_table(&header, lines.collect());
        say!("");
        let line = |quality: &SignalQuality| {
            vec![
                quality.measure.to_string(),
                quality.depth.to_string(),
                format!("{:.1}%", 100.0 * quality.agreement),
                format!("{:.4}", quality.calibration_error),
                quality.auroc.map_or("-".to_owned(), |auroc| format!("{auroc:.4}")),
            ]
        };
        let lines = self.qualities.iter().map(line).collect();
        print_table(&["signal", "depth", "agreement", "calibration error", "AUROC"], lines);
    }

    fn write(&self, out: &Path) -> Result<()> {
        write_csv(&out.join("exit_curves.csv"), self.curves.iter().flat_map(|(_, curve)| curve))?;
        write_csv(&out.join("reliability.csv"), &self.bins)?;
        Ok(write_csv(&out.join("signals.csv"), &self.qualities)?)
    }

    fn draw(&self, figure: &impl Fn(&str, &str) -> Figure, trace: &ExitTrace) -> Result<()> {
        plots::or_left_out(plots::exit_depths(
            &figure("exit-depths", "Where tokens could exit"),
            &[exit_depths(trace)],
        ))?;
        let curve = |(measure, curve): &(ExitSignal, Vec<CurvePoint>)| ExitCurve {
            signal: measure.to_string(),
            points: curve.iter().map(|point| (point.mean_depth, point.agreement)).collect(),
        };
        let curves: Vec<_> = self.curves.iter().map(curve).collect();
        let fixed: Vec<_> = (0..trace.num_loops()).map(|depth| trace.agreement_at(depth)).collect();
        let title = "Agreement of exits, over exact keys and values, against mean depth";
        plots::or_left_out(plots::exit_curves(
            &figure("exit-curves", title),
            &curves,
            &fixed,
            trace.mean_oracle_passes(),
        ))?;
        let signals: Vec<_> = self.curves.iter().map(|&(measure, _)| self.reliability(measure)).collect();
        let title = "How often tokens agree with the last loop where a signal is so sure";
        Ok(plots::or_left_out(plots::reliability(&figure("reliability", title), &signals))?)
    }

    fn reliability(&self, measure: ExitSignal) -> Reliability {
        let qualities = self.qualities.iter().filter(|quality| quality.measure == measure);
        let errors: Vec<_> = qualities.map(|quality| format!("{:.3}", quality.calibration_error)).collect();
        let bins = self.bins.iter().filter(|bin| bin.measure == measure).collect::<Vec<_>>();
        let curve = |bins: &[&ReliabilityBin]| {
            (bins[0].depth, bins.iter().map(|bin| (bin.confidence, bin.agreement)).collect())
        };
        Reliability {
            signal: measure.to_string(),
            note: format!("calibration error by depth: {}", errors.join(", ")),
            curves: bins.chunk_by(|a, b| a.depth == b.depth).map(curve).collect(),
        }
    }
}

fn print_accuracies(accuracies: &[Accuracy], answers: &[Answer]) {
    let line = |accuracy: &Accuracy| {
        vec![
            accuracy.passes.to_string(),
            format!("{:.4}", accuracy.acc),
            format!("{:.4}", accuracy.acc_stderr),
            format!("{:.4}", accuracy.acc_norm),
            format!("{:.4}", accuracy.acc_norm_stderr),
        ]
    };
    say!("\n{} questions", answers.len());
    print_table(&["passes", "acc", "stderr", "acc_norm", "stderr"], accuracies.iter().map(line).collect());
    let truncated: usize = answers.iter().map(|answer| answer.truncated).sum();
    if truncated > 0 {
        note!("warning: the contexts of {truncated} choices were cut at their beginning to the model's positions");
    }
}

/// Completes the prompts of a file at each depth.
fn answer_prompts(args: &Args, model: &Path, prompts: &Path) -> Result<Vec<ExactMatch>> {
    ensure!(PromptLine::is_file(prompts), "--prompts {}: expected JSON lines, a file .jsonl", prompts.display());
    let sampling = Sampling::default();
    let named = NamedEngine::load(model, args.loops, WeightType::F32, args.device, prompts, sampling)?;
    exact_match(&named, &mut Terminal::default()).with_context(|| prompts.display().to_string())
}

/// Prints accuracies, a line for each class and a column for each number of passes.
fn print_exact_match(exact: &[ExactMatch]) {
    let classes: Vec<&[ExactMatch]> = exact.chunk_by(|a, b| a.class == b.class).collect();
    let line = |of_class: &&[ExactMatch]| {
        let shares = of_class.iter().map(|exact| format!("{:.1}%", 100.0 * exact.exact_match));
        [of_class[0].class.clone(), of_class[0].prompts.to_string()].into_iter().chain(shares).collect()
    };
    let passes = classes[0].iter().map(|exact| match exact.passes {
        1 => "1 pass".to_owned(),
        passes => format!("{passes} passes"),
    });
    let header: Vec<String> = ["class".to_owned(), "prompts".to_owned()].into_iter().chain(passes).collect();
    say!("\nexact-match accuracy by passes of every token of the answer");
    print_table(&header.iter().map(String::as_str).collect::<Vec<_>>(), classes.iter().map(line).collect());
}

fn draw_exact_match(out: &Path, model: &str, exact: &[ExactMatch]) -> Result<()> {
    let prompts = exact.first().map_or(0, |exact| exact.prompts);
    let point = |exact: &ExactMatch| {
        let [y, low, high] = [exact.exact_match, exact.low, exact.high].map(|share| 100.0 * share);
        // An interval ends at the share where all or none are right, up to rounding.
        SweepPoint { x: f64::from(exact.passes), y, low: low.min(y), high: high.max(y) }
    };
    let line = |of_class: &[ExactMatch]| SweepLine {
        name: of_class[0].class.clone(),
        points: of_class.iter().map(point).collect(),
    };
    let lines: Vec<SweepLine> = exact.chunk_by(|a, b| a.class == b.class).map(line).collect();
    let title = "Exact-match accuracy by passes and class, with 95% confidence intervals";
    let figure = figure(out, "exact-match", title, &format!("{prompts} prompts"), model);
    Ok(plots::or_left_out(plots::sweep(&figure, "passes", Scale::Linear, "prompts answered right (%)", &lines))?)
}

/// A choice of a question at a loop.
#[derive(Serialize)]
struct AnswerLine {
    question: usize,
    passes: usize,
    choice: usize,
    is_gold: bool,
    log_likelihood_nats: f64,
    characters: usize,
}

fn answer_lines(answers: &[Answer]) -> Vec<AnswerLine> {
    let mut lines = Vec::new();
    for (question, answer) in answers.iter().enumerate() {
        for (depth, log_likelihoods) in answer.log_likelihoods.iter().enumerate() {
            for (choice, &log_likelihood_nats) in log_likelihoods.iter().enumerate() {
                let (passes, is_gold, characters) =
                    (depth + 1, answer.gold.contains(&choice), answer.characters[choice]);
                lines.push(AnswerLine { question, passes, choice, is_gold, log_likelihood_nats, characters });
            }
        }
    }
    lines
}

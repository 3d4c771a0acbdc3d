//! Arguments of `depthwise train`: a YAML file, and flags that change what it says.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use engine::DeviceName;
use scheduler::KvFill;
use serde_yaml::Value;
use training::error::TrainingError;
use training::objective::{ExitCoefficients, ExitRule, FillOptions, GateOptions, GateTarget, TeacherOptions};
use training::optimizer::Schedule;
use training::trainer::options::{Part, TrainingOptions};

/// The run, as a file and as flags.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// YAML file that describes the run, as in configs/train; options override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    objective: ObjectiveArgs,
    #[command(flatten)]
    steps: StepArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
struct ModelArgs {
    /// Model to start from: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, or a name on
    /// the Hugging Face hub [default: a fresh model]
    #[arg(long, value_name = "MODEL")]
    from: Option<PathBuf>,
    /// Tokenizer of a fresh model [default: one trained on the text]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tokens of the vocabulary, at least 256 [default: 512]
    #[arg(long)]
    vocab_size: Option<usize>,
    /// Width of the residual stream [default: 192]
    #[arg(long)]
    hidden_size: Option<usize>,
    /// Inner width of the MLP [default: 512]
    #[arg(long)]
    intermediate_size: Option<usize>,
    /// Query heads [default: 6]
    #[arg(long)]
    num_heads: Option<usize>,
    /// Key-value heads [default: 2]
    #[arg(long)]
    num_kv_heads: Option<usize>,
    /// Width of a head [default: 32]
    #[arg(long)]
    head_dim: Option<usize>,
    /// Layers of a block [default: 2]
    #[arg(long)]
    block_layers: Option<usize>,
    /// Number of times that the block runs [default: 4]
    #[arg(long)]
    num_loops: Option<usize>,
    /// What the loops share: block, matrices or nothing [default: block]
    #[arg(long)]
    sharing: Option<String>,
    /// Maximum length of a sequence, in tokens [default: 1024]
    #[arg(long)]
    max_positions: Option<usize>,
    /// Give the head its own weights, not those of the embedding
    #[arg(long)]
    untied_head: bool,
    /// Give every loop except the last a learned gate
    #[arg(long)]
    gate: bool,
    /// Width of the gates' hidden layer; 0 for linear gates [default: 0]
    #[arg(long, value_name = "WIDTH")]
    gate_hidden: Option<usize>,
    /// Give every loop except the last an adapter of the head, of this rank
    #[arg(long, value_name = "RANK")]
    head_lora_rank: Option<usize>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Text")]
struct DataArgs {
    /// Files and folders to train on: plain text, or .jsonl with a document per line
    #[arg(long, value_name = "PATH", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Files and folders to evaluate on, never trained on
    #[arg(long, value_name = "PATH", num_args = 1..)]
    held_out: Vec<PathBuf>,
    /// Use only the first TOKENS tokens of the held-out text [default: all]
    #[arg(long, value_name = "TOKENS")]
    held_out_tokens: Option<usize>,
    /// Key of the text in a line of .jsonl [default: text]
    #[arg(long, value_name = "KEY")]
    field: Option<String>,
    /// Token of the tokenizer to put after each document
    #[arg(long, value_name = "TOKEN")]
    end_of_document: Option<String>,
    /// Folder in which token ids are cached for later runs on the same text [default: results/tokens]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Objective")]
struct ObjectiveArgs {
    /// Parts of the model to train, separated by commas: all, lora, shared, head-lora, gate [default: all]
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    train: Vec<Part>,
    /// Coefficients of the loops' losses: last, weighted or aggressive:COEFFICIENT [default: last]
    #[arg(long)]
    exits: Option<ExitCoefficients>,
    /// Weight of next-token cross-entropy [default: 1]
    #[arg(long, value_name = "WEIGHT")]
    cross_entropy: Option<f64>,
    /// Teacher to distil from; forms as for --from
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    /// Weight of the divergence from the teacher [default: 1]
    #[arg(long, value_name = "WEIGHT")]
    teacher_weight: Option<f64>,
    /// Temperature of the distillation from the teacher [default: 1]
    #[arg(long)]
    temperature: Option<f64>,
    /// Weight of an earlier loop's divergence from the last loop [default: 0]
    #[arg(long, value_name = "WEIGHT")]
    self_distillation: Option<f64>,
    /// Train the gates, with this weight
    #[arg(long, value_name = "WEIGHT")]
    gate_weight: Option<f64>,
    /// Let the loss of the gates also train what they read
    #[arg(long, requires = "gate_weight")]
    gate_through: bool,
    /// Loop whose token a gate judges: same, or next for exits that are decided a pass ahead [default: same]
    #[arg(long, requires = "gate_weight", value_name = "LOOP")]
    gate_target: Option<GateTarget>,
    /// Temperature at which the tokens that gates compare are sampled; 0: the most likely tokens [default: 0]
    #[arg(long, requires = "gate_weight", value_name = "T")]
    gate_temperature: Option<f64>,
    /// Let tokens exit, and others find at deeper loops what this KV fill leaves of them: reuse, first or skip
    #[arg(long, value_name = "FILL")]
    kv_fill: Option<KvFill>,
    /// Where tokens exit: uniform, geometric:PROBABILITY, SIGNAL:THRESHOLD or SIGNAL:LOWEST..HIGHEST, of top1, margin,
    /// entropy or gate [default: uniform]
    #[arg(long, requires = "kv_fill", value_name = "EXITS")]
    fill_exits: Option<ExitRule>,
    /// Largest share of a window that is a prompt, whose tokens do not exit [default: 0.5]
    #[arg(long, requires = "kv_fill", value_name = "SHARE")]
    fill_prompt: Option<f64>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Training")]
struct StepArgs {
    /// Sequences per step [default: 4]
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens per sequence [default: 256]
    #[arg(long)]
    seq: Option<usize>,
    /// Learning rate after warm-up [default: 0.002]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Steps over which the learning rate rises [default: 100]
    #[arg(long)]
    warmup_steps: Option<usize>,
    /// The learning rate's course after warm-up: cosine or trapezoid:COOLDOWN_STEPS [default: cosine]
    #[arg(long)]
    schedule: Option<Schedule>,
    /// AdamW's weight decay of matrices [default: 0.1]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Gradient norm above which gradients are scaled down [default: 1]
    #[arg(long)]
    clip_norm: Option<f64>,
    /// Device: cpu, cuda or cuda:N [default: cpu]
    #[arg(long)]
    device: Option<DeviceName>,
    /// Threads that share a step on the CPU [default: 2]
    #[arg(long)]
    workers: Option<usize>,
    /// Steps between evaluations on the start of the held-out text [default: 200]
    #[arg(long)]
    evaluation_steps: Option<usize>,
    /// Steps between checkpoints [default: 200]
    #[arg(long)]
    checkpoint_steps: Option<usize>,
    /// Write the model as 16-bit floats
    #[arg(long)]
    half_precision: bool,
    /// Seed of fresh weights and the batches [default: 0]
    #[arg(long)]
    seed: Option<u64>,
}

impl RunArgs {
    /// The run that the file and the flags describe.
    ///
    /// # Errors
    /// If the file does not read or a path is not there.
    pub fn options(self) -> Result<TrainingOptions> {
        let mut options = match &self.config {
            Some(path) => TrainingOptions::load(path)?,
            None => TrainingOptions::default(),
        };
        self.model.change(&mut options);
        self.data.change(&mut options);
        self.objective.change(&mut options)?;
        self.steps.change(&mut options);
        options.find_paths(Path::new(""))?;
        Ok(options)
    }
}

/// An error about a key of the run names the option that sets it too.
pub fn name_option(error: TrainingError) -> anyhow::Error {
    let TrainingError::Option { option: key, found, expected } = &error else { return error.into() };
    match option_of(key) {
        Some(option) => anyhow!("--{option} (`{key}` of the run): found {found}, expected {expected}"),
        None => error.into(),
    }
}

/// The option that sets a key of the run, if one does.
fn option_of(key: &str) -> Option<String> {
    let option = match key {
        "model" | "schema_version" => return None,
        "optimizer.peak_learning_rate" => "learning_rate",
        "objective.teacher.model" => "teacher",
        "objective.teacher.weight" => "teacher_weight",
        "objective.gate" | "objective.gate.weight" => "gate_weight",
        "objective.kv_fill.exits" => "fill_exits",
        "objective.kv_fill.fill" => "kv_fill",
        "objective.kv_fill.prompt" => "fill_prompt",
        _ => key.rsplit('.').next()?,
    };
    Some(option.replace('_', "-"))
}

fn set<T>(option: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *option = given;
    }
}

fn set_list<T>(option: &mut Vec<T>, given: Vec<T>) {
    set(option, Some(given).filter(|given| !given.is_empty()));
}

impl ModelArgs {
    fn change(self, options: &mut TrainingOptions) {
        let model = &mut options.model;
        model.from = self.from.or(model.from.take());
        model.tokenizer = self.tokenizer.or(model.tokenizer.take());
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("block_layers", self.block_layers),
            ("num_loops", self.num_loops),
            ("max_positions", self.max_positions),
            ("head_lora_rank", self.head_lora_rank),
            ("gate_hidden", self.gate_hidden),
        ] {
            if let Some(size) = size {
                model.config.insert(field.into(), size.into());
            }
        }
        let sharing = self.sharing.map(Value::from);
        let untied = self.untied_head.then(|| Value::from(false));
        let gate = self.gate.then(|| Value::from(true));
        for (field, value) in [("sharing", sharing), ("tie_embeddings", untied), ("gate", gate)] {
            if let Some(value) = value {
                model.config.insert(field.into(), value);
            }
        }
    }
}

impl DataArgs {
    fn change(self, options: &mut TrainingOptions) {
        let data = &mut options.data;
        set_list(&mut data.text, self.text);
        set_list(&mut data.held_out, self.held_out);
        data.held_out_tokens = self.held_out_tokens.or(data.held_out_tokens);
        set(&mut data.field, self.field);
        data.end_of_document = self.end_of_document.or(data.end_of_document.take());
        set(&mut data.cache, self.cache);
    }
}

impl ObjectiveArgs {
    fn change(self, options: &mut TrainingOptions) -> Result<()> {
        set_list(&mut options.train, self.train);
        let objective = &mut options.objective;
        set(&mut objective.exits, self.exits);
        set(&mut objective.cross_entropy, self.cross_entropy);
        set(&mut objective.self_distillation, self.self_distillation);
        if let Some(model) = self.teacher {
            objective.teacher = Some(TeacherOptions { model, weight: 1.0, temperature: 1.0 });
        }
        if self.teacher_weight.or(self.temperature).is_some() {
            let teacher = objective.teacher.as_mut().context("--teacher-weight and --temperature need a --teacher")?;
            set(&mut teacher.weight, self.teacher_weight);
            set(&mut teacher.temperature, self.temperature);
        }
        if let Some(weight) = self.gate_weight {
            let target = self.gate_target.unwrap_or_default();
            let temperature = self.gate_temperature.unwrap_or_default();
            objective.gate = Some(GateOptions { weight, through: self.gate_through, target, temperature });
        }
        if let Some(fill) = self.kv_fill {
            let kv_fill = objective.kv_fill.insert(FillOptions::new(fill));
            set(&mut kv_fill.exits, self.fill_exits);
            set(&mut kv_fill.prompt, self.fill_prompt);
        }
        Ok(())
    }
}

impl StepArgs {
    fn change(self, options: &mut TrainingOptions) {
        set(&mut options.batch, self.batch);
        set(&mut options.seq, self.seq);
        set(&mut options.optimizer.peak_learning_rate, self.learning_rate);
        set(&mut options.optimizer.warmup_steps, self.warmup_steps);
        set(&mut options.optimizer.schedule, self.schedule);
        set(&mut options.optimizer.weight_decay, self.weight_decay);
        set(&mut options.optimizer.clip_norm, self.clip_norm);
        set(&mut options.device, self.device);
        set(&mut options.workers, self.workers);
        set(&mut options.evaluation_steps, self.evaluation_steps);
        set(&mut options.checkpoint_steps, self.checkpoint_steps);
        options.half_precision |= self.half_precision;
        set(&mut options.seed, self.seed);
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    #[test]
    fn keys_of_errors_name_options_that_are_there() {
        let command = super::super::Args::augment_args(clap::Command::new("train"));
        for key in [
            "steps",
            "batch",
            "seq",
            "workers",
            "evaluation_steps",
            "checkpoint_steps",
            "train",
            "data.text",
            "data.held_out",
            "end_of_document",
            "model.from",
            "model.vocab_size",
            "optimizer.warmup_steps",
            "optimizer.peak_learning_rate",
            "optimizer.clip_norm",
            "optimizer.weight_decay",
            "objective.exits",
            "objective.cross_entropy",
            "objective.self_distillation",
            "objective.teacher.model",
            "objective.teacher.weight",
            "objective.teacher.temperature",
            "objective.gate",
            "objective.gate.weight",
            "objective.kv_fill.exits",
            "objective.kv_fill.fill",
            "objective.kv_fill.prompt",
        ] {
            let option = option_of(key).unwrap();
            assert!(command.get_arguments().any(|argument| argument.get_long() == Some(&option)), "{key}: --{option}");
        }
    }
}

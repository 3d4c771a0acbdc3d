//! `depthwise generate`: text from a model, with the depth that each token left at.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::ColorChoice;
use clap::builder::styling::{Ansi256Color, Style};
use engine::{Generated, Prompts, Sampling, TextStream, Tokenizer};
use scheduler::{Batching, ExitPolicy, KvFill, Settings, SignalRead};
use traces::{Nanos, Request};

use crate::arguments::{LoadArgs, check_temperature};
use crate::interrupt::{self, Interrupted};
use crate::output::{note, stream};
use experiments::NamedEngine;
use experiments::serving::{MOST_ROWS, Serving, longest};

/// Rows of a pass: a prompt of usual length is read in one or a few.
const TOKEN_BUDGET: u32 = 256;

/// Colours from the first depth to the last, of the terminal's 256: blue, green, yellow, red.
const COLORS: [u8; 6] = [39, 44, 77, 220, 208, 197];

/// Generate text, and show at which depth each token exited
///
/// On a terminal, the colour of a token shows its exit depth. The text goes to standard output. The legend, the depths
/// if there is no colour, and a summary line go to standard error. A text ends at the first special token of the
/// tokenizer, such as an end of text, or after --max-tokens. Ctrl-C ends all texts.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, or a name on the Hugging
    /// Face hub (OWNER/MODEL or OWNER/MODEL/FILE.gguf)
    model: PathBuf,
    /// Text to continue; repeat the option to serve several prompts in one batch
    #[arg(long, value_name = "TEXT", required = true)]
    prompt: Vec<String>,
    #[command(flatten)]
    load: LoadArgs,
    /// Maximum number of tokens to generate for each prompt
    #[arg(long, default_value_t = 128, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=MOST_ROWS.into()))]
    max_tokens: u32,
    /// Softmax temperature of sampling; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Seed of sampling
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Batching policy: vanilla, sequence, depth
    #[arg(long, default_value_t = Batching::Depth, value_name = "POLICY")]
    batching: Batching,
    /// Exit policy: none, static:DEPTH, confidence:THRESHOLD, MEASURE:THRESHOLD (top1, margin, entropy, similarity,
    /// difference, kl, gate), delayed:MEASURE:THRESHOLD, cumulative:gate:SHARE[:LOOPS], entropy-change:THRESHOLD, stable:DEPTHS
    #[arg(long, default_value_t = ExitPolicy::None, value_name = "POLICY")]
    exit: ExitPolicy,
    /// What later tokens find at the depths that an exited token did not run: reuse, first, skip, backfill, last,
    /// cycle:SLOTS [default: that which the model is made for]
    #[arg(long, value_name = "FILL")]
    kv_fill: Option<KvFill>,
    /// Last depth, from 0, that tokens of prompts run; others than that at which all tokens exit need the KV fill reuse
    /// [default: as deep as tokens can exit]
    #[arg(long, value_name = "DEPTH")]
    prefill_depth: Option<u8>,
    /// When to colour tokens
    #[arg(long, default_value_t = ColorChoice::Auto, value_name = "WHEN")]
    color: ColorChoice,
}

/// Generates, printing each token when it is there.
pub fn run(args: Args) -> Result<()> {
    let temperature = args.temperature;
    check_temperature(temperature)?;
    ensure!(
        args.exit.signal_read() != SignalRead::Oracle,
        "--exit {}: the oracle needs runs of the requests beforehand, expected another policy",
        args.exit
    );
    let sampling = Sampling { temperature, seed: args.seed };
    let LoadArgs { loops, weights, device } = args.load;
    let (mut named, tokenizer) = NamedEngine::with_tokenizer(&args.model, loops, weights, device, sampling)?;
    let requests = args.ask(&mut named, &tokenizer)?;
    let settings = args.settings(&named, &requests)?;

    let num_loops = settings.num_loops;
    let color = args.colors(&io::stdout());
    let mut printer = Printer::new(&args.prompt, &tokenizer, args.max_tokens, color.then_some(num_loops));
    let stop = interrupt::flag();
    if color {
        note!("{}\n", legend(num_loops));
    }
    let started = Instant::now();
    let mut written = printer.begin();
    if written.is_ok() {
        named.engine.generate(settings, &requests, |token| {
            written = printer.push(token);
            match written.is_err() || printer.is_done() || stop.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
    }
    let elapsed = started.elapsed();
    written?;
    printer.finish(elapsed, num_loops)?;
    match stop.load(Ordering::Relaxed) {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

impl Args {
    /// Gives the engine the prompts, and says which requests ask them.
    fn ask(&self, named: &mut NamedEngine, tokenizer: &Tokenizer) -> Result<Vec<Request>> {
        let (mut prompts, mut requests) = (HashMap::new(), Vec::new());
        for (id, prompt) in self.prompt.iter().enumerate() {
            let tokens = tokenizer.encode_prompt(prompt)?;
            ensure!(!tokens.is_empty(), "--prompt \"{prompt}\": no token to begin with, expected some text");
            let (id, prompt_tokens) = (id as u32, tokens.len() as u32);
            let request = Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens: self.max_tokens };
            let (needed, positions) = (request.context_tokens() as usize, named.engine.model.config().max_positions);
            ensure!(
                needed <= positions,
                "--max-tokens {} after a prompt of {prompt_tokens} tokens needs {needed} positions, the model has \
                 {positions}",
                self.max_tokens
            );
            prompts.insert(id, tokens);
            requests.push(request);
        }
        named.engine.prompts = Arc::new(Prompts::Given(prompts));
        Ok(requests)
    }

    /// One batch of all requests.
    fn settings(&self, named: &NamedEngine, requests: &[Request]) -> Result<Settings> {
        let max_batch = requests.len() as u32;
        let (batching, exit, token_budget) = (vec![self.batching], vec![self.exit], TOKEN_BUDGET.max(max_batch));
        let serving =
            Serving { prefill_depth: self.prefill_depth, ..Serving::new(batching, exit, max_batch, token_budget) };
        let memory = named.memory();
        let kv_fill = self.kv_fill.unwrap_or(memory.kv_fill);
        serving.settings(self.batching, self.exit, kv_fill, &memory, longest(requests))
    }

    fn colors(&self, output: &impl IsTerminal) -> bool {
        match self.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => output.is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        }
    }
}

/// The colour of a depth.
fn style(depth: u8, num_loops: u8) -> Style {
    let last = usize::from(num_loops - 1).max(1);
    let color = COLORS[(usize::from(depth) * (COLORS.len() - 1)).div_ceil(last)];
    Ansi256Color(color).on_default()
}

fn legend(num_loops: u8) -> String {
    let depth = |depth| format!(" {0}{depth}{0:#}", style(depth, num_loops));
    format!("depth{}", (0..num_loops).map(depth).collect::<String>())
}

/// Prints texts one after the other, each as far as it is there, though all grow at once.
struct Printer<'a> {
    prompts: &'a [String],
    texts: Vec<Text<'a>>,
    tokenizer: &'a Tokenizer,
    max_tokens: u32,
    /// The number of loops, if depths are told by colour.
    colored: Option<u8>,
    /// The first text that is not printed whole.
    current: usize,
}

/// A text that grows.
struct Text<'a> {
    stream: TextStream<'a>,
    /// What is not printed yet.
    unprinted: String,
    /// Of its tokens.
    depths: Vec<u8>,
    ended: bool,
}

impl<'a> Printer<'a> {
    fn new(prompts: &'a [String], tokenizer: &'a Tokenizer, max_tokens: u32, colored: Option<u8>) -> Self {
        let text = |_| Text { stream: tokenizer.stream(), unprinted: String::new(), depths: Vec::new(), ended: false };
        let texts = prompts.iter().map(text).collect();
        Self { prompts, texts, tokenizer, max_tokens, colored, current: 0 }
    }

    /// Prints the first prompt.
    fn begin(&mut self) -> Result<()> {
        for (text, prompt) in self.texts.iter_mut().zip(self.prompts) {
            // What a token adds to a text depends on those before it.
            for token in self.tokenizer.encode_prompt(prompt)? {
                text.stream.push(token)?;
            }
            text.unprinted += prompt;
        }
        self.print()
    }

    /// Takes a token, and prints what can be.
    fn push(&mut self, Generated { request, token, depth, .. }: Generated) -> Result<()> {
        let text = &mut self.texts[request as usize];
        if text.ended {
            return Ok(());
        }
        text.depths.push(depth);
        text.ended = text.depths.len() == self.max_tokens as usize || self.tokenizer.is_special(token);
        if !self.tokenizer.is_special(token)
            && let Some(part) = text.stream.push(token)?
        {
            text.unprinted += &match self.colored {
                Some(num_loops) => format!("{0}{part}{0:#}", style(depth, num_loops)),
                None => part,
            };
        }
        self.print()
    }

    fn print(&mut self) -> Result<()> {
        let mut printed = String::new();
        while let Some(text) = self.texts.get_mut(self.current) {
            printed += &std::mem::take(&mut text.unprinted);
            if !text.ended {
                break;
            }
            self.current += 1;
            printed += if self.current < self.texts.len() { "\n\n" } else { "\n" };
        }
        Ok(stream(&printed)?)
    }

    fn is_done(&self) -> bool {
        self.texts.iter().all(|text| text.ended)
    }

    /// Prints what the tokens took, after what is left of the texts if the run was ended before they were.
    fn finish(&mut self, elapsed: Duration, num_loops: u8) -> Result<()> {
        self.texts.iter_mut().for_each(|text| text.ended = true);
        self.print()?;
        if self.colored.is_none() {
            for Text { depths, .. } in &self.texts {
                let depths: Vec<String> = depths.iter().map(u8::to_string).collect();
                note!("depths {}", depths.join(" "));
            }
        }
        let tokens: usize = self.texts.iter().map(|text| text.depths.len()).sum();
        let passes: usize = self.texts.iter().flat_map(|text| &text.depths).map(|&depth| usize::from(depth) + 1).sum();
        let seconds = elapsed.as_secs_f64();
        note!(
            "{tokens} tokens in {seconds:.2} s, {:.1} tokens/s, {:.2} of {num_loops} passes per token",
            tokens as f64 / seconds,
            passes as f64 / tokens.max(1) as f64
        );
        Ok(())
    }
}

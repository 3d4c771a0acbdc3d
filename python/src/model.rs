//! The engine: a model that generates, is recorded and is profiled.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use engine::{CompletedToken, DeviceName, Exiting, Limits, Prompts, RecordedPolicy, Sampling, Tokenizer, WeightType};
use experiments::named_engine::read_prompts;
use experiments::results::ResultsFolder;
use experiments::serving::longest;
use experiments::{NamedEngine, Reporter, Serving};
use pyo3::prelude::*;
use scheduler::{Batching, ExitPolicy, KvFill, SignalRead};
use traces::{ExitTable, ExitTrace, Nanos, Request};

use crate::detached::{Ends, detached};
use crate::errors::raise;
use crate::files::{Exits, Passes, Profile, Requests};

/// Rows of a pass of `generate`: a prompt of usual length is read in one or a few.
const TOKEN_BUDGET: u32 = 256;

/// A generated token.
#[pyclass(module = "depthwise", frozen, get_all)]
pub struct Token {
    /// Its id.
    id: u32,
    /// What the text gains by it: nothing while its last character lacks bytes, which come with later tokens.
    text: String,
    /// The depth at which it exited, from 0.
    depth: u8,
}

#[pymethods]
impl Token {
    fn __repr__(&self) -> String {
        format!("Token(id={}, text={:?}, depth={})", self.id, self.text, self.depth)
    }
}

impl From<CompletedToken> for Token {
    fn from(CompletedToken { id, text, depth }: CompletedToken) -> Self {
        Self { id, text, depth }
    }
}

/// A model on a device.
#[pyclass(module = "depthwise", frozen)]
pub struct Engine(NamedEngine);

/// Reads a setting by its name on the command line.
fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(key: &str, text: &str) -> Result<T> {
    text.parse().map_err(|error| anyhow::anyhow!("{key}: {error}"))
}

#[pymethods]
impl Engine {
    /// Loads a model: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, or a name on the Hugging
    /// Face hub. `loops` splits an ordinary transformer into so many blocks, or runs a looped model so often. `weights` is
    /// `f32`, `bf16`, `q8_0` or `q4k` on a CPU, `f32`, `f16` or `bf16` on a GPU. `device` is `cpu`, `cuda` or `cuda:N`. A
    /// `temperature` of 0 takes the most likely token.
    #[staticmethod]
    #[pyo3(signature = (model, *, loops = None, weights = "f32", device = "cpu", temperature = 0.0, seed = 1))]
    fn load(
        py: Python<'_>,
        model: PathBuf,
        loops: Option<usize>,
        weights: &str,
        device: &str,
        temperature: f32,
        seed: u64,
    ) -> PyResult<Self> {
        let load = || {
            let (weights, device): (WeightType, DeviceName) = (parse("weights", weights)?, parse("device", device)?);
            ensure!(temperature.is_finite() && temperature >= 0.0, "temperature {temperature}: expected 0 or more");
            NamedEngine::load_without_prompts(&model, loops, weights, device, Sampling { temperature, seed }).map(Self)
        };
        py.detach(load).map_err(raise)
    }

    /// Name of the model's folder or file.
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    /// Loops of the model.
    #[getter]
    fn num_loops(&self) -> u8 {
        self.0.engine.num_loops()
    }

    /// Completes texts, all in one batch: for each prompt, its tokens with the depth at which each exited. A text ends after
    /// `max_tokens`, or before a special token such as an end of text. `exit` is any exit policy but the oracle, `kv_fill`
    /// by default that which the model is made for.
    #[pyo3(signature = (
        prompts, *, max_tokens = 128, exit = "none", batching = "depth", kv_fill = None, prefill_depth = None
    ))]
    #[allow(clippy::too_many_arguments, reason = "Python names them")]
    fn generate(
        &self,
        py: Python<'_>,
        prompts: Vec<String>,
        max_tokens: u32,
        exit: &str,
        batching: &str,
        kv_fill: Option<&str>,
        prefill_depth: Option<u8>,
    ) -> PyResult<Vec<Vec<Token>>> {
        let tokens = detached(py, None, Ends::ByFlag, |reporter| {
            let (batching, exit): (Batching, ExitPolicy) = (parse("batching", batching)?, parse("exit", exit)?);
            ensure!(!prompts.is_empty(), "prompts is empty: expected at least one");
            ensure!(
                exit.signal_read() != SignalRead::Oracle,
                "exit: the oracle needs runs of the requests beforehand, expected another policy"
            );
            let named = &self.0;
            let tokenizer = self.tokenizer()?;
            let (_, requests) = given(tokenizer, &prompts, max_tokens)?;
            let max_batch = requests.len() as u32;
            let serving = Serving::new(vec![batching], vec![exit], max_batch, TOKEN_BUDGET.max(max_batch));
            let serving = Serving { prefill_depth, ..serving };
            let memory = named.memory();
            let kv_fill: KvFill = kv_fill.map(|fill| parse("kv_fill", fill)).transpose()?.unwrap_or(memory.kv_fill);
            let settings = serving.settings(batching, exit, kv_fill, &memory, longest(&requests))?;
            let stop = reporter.stop().unwrap_or_default();
            let goes_on = || !stop.load(Ordering::Relaxed);
            Ok(named.engine.complete_while(tokenizer, &prompts, settings, max_tokens, goes_on)?)
        })?;
        Ok(tokens.into_iter().map(|text| text.into_iter().map(Token::from).collect()).collect())
    }

    /// Records the exit signals and predictions of every token at every depth. `prompts` is a list of texts, of which each is
    /// continued by `max_tokens` tokens, or the path of a file that the prompts of `requests` are taken from (see
    /// docs/reference/files.md). With `under`, a list of exit policies, tokens exit as in service. With `out`, the trace
    /// is also written to a folder.
    #[pyo3(signature = (
        prompts, *, max_tokens = 64, requests = None, under = None, kv_fill = None, prefill_depth = None, out = None,
        progress = None
    ))]
    #[allow(clippy::too_many_arguments, reason = "Python names them")]
    fn record(
        &self,
        py: Python<'_>,
        prompts: &Bound<'_, PyAny>,
        max_tokens: u32,
        requests: Option<&Bound<'_, Requests>>,
        under: Option<Vec<String>>,
        kv_fill: Option<&str>,
        prefill_depth: Option<u8>,
        out: Option<PathBuf>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Exits> {
        let source = Source::new(prompts, max_tokens, requests).map_err(raise)?;
        let recorded = detached(py, progress, Ends::AtSteps, |reporter| {
            let (prompts, mut requests) = source.read(self.tokenizer()?)?;
            prompts.set_lengths(&mut requests);
            let mut named = self.0.clone();
            named.engine.prompts = Arc::new(prompts);
            let kv_fill: KvFill =
                kv_fill.map(|fill| parse("kv_fill", fill)).transpose()?.unwrap_or(named.memory().kv_fill);
            let policies = |under: Vec<String>| under.iter().map(|policy| parse("under", policy)).collect();
            let policies: Option<Vec<RecordedPolicy>> = under.map(policies).transpose()?;
            let seed = named.engine.sampling.seed;
            let exiting = policies.map(|policies| Exiting { policies, kv_fill, prefill_depth, seed });
            record(&named, &requests, exiting.as_ref(), out.as_deref(), reporter)
        })?;
        Ok(Exits(recorded))
    }

    /// Measures a latency profile of the model on this machine, up to `max_batch` sequences, `token_budget` rows of a pass,
    /// `max_tokens` tokens of a sequence and `prefill_chunk` prompt tokens of a chunk. Each of the `rounds` measures every
    /// shape. Returns the profile, and the log of the passes that it was made from.
    #[pyo3(signature = (
        *, max_batch = 64, token_budget = 256, max_tokens = 512, prefill_chunk = 256, rounds = 3, progress = None
    ))]
    #[allow(clippy::too_many_arguments, reason = "Python names them")]
    fn profile(
        &self,
        py: Python<'_>,
        max_batch: u32,
        token_budget: u32,
        max_tokens: u32,
        prefill_chunk: u32,
        rounds: usize,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(Profile, Passes)> {
        let limits = Limits { rows: token_budget, decodes: max_batch, history: max_tokens, chunk: prefill_chunk };
        let (profile, passes) = detached(py, progress, Ends::AtSteps, |reporter| {
            let numbers = [max_batch, token_budget, max_tokens, prefill_chunk];
            ensure!(numbers.iter().all(|&number| number > 0), "a limit is 0: expected at least 1");
            experiments::profile(&self.0, limits, rounds, reporter)
        })?;
        Ok((Profile(profile), Passes(passes)))
    }

    fn __repr__(&self) -> String {
        format!("<depthwise.Engine {:?} of {} loops>", self.0.name, self.num_loops())
    }
}

impl Engine {
    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.0.tokenizer.as_ref().with_context(|| format!("{}: found no tokenizer, expected one", self.0.name))
    }
}

/// Where prompts and their requests come from.
enum Source {
    Texts(Vec<String>, u32),
    File(PathBuf, Vec<Request>),
}

impl Source {
    fn new(prompts: &Bound<'_, PyAny>, max_tokens: u32, requests: Option<&Bound<'_, Requests>>) -> Result<Self> {
        let Ok(path) = prompts.extract::<PathBuf>() else {
            ensure!(requests.is_none(), "requests beside a list of prompts: expected the path of a file of prompts");
            let texts = prompts.extract().ok().filter(|texts: &Vec<String>| !texts.is_empty());
            return Ok(Self::Texts(texts.context("prompts: expected a list of texts or a path")?, max_tokens));
        };
        match requests {
            Some(requests) => Ok(Self::File(path, requests.get().0.requests.clone())),
            None => bail!("prompts of a file without requests: expected a request trace"),
        }
    }

    fn read(&self, tokenizer: &Tokenizer) -> Result<(Prompts, Vec<Request>)> {
        match self {
            Self::Texts(texts, max_tokens) => given(tokenizer, texts, *max_tokens),
            Self::File(path, requests) => Ok((read_prompts(path, tokenizer)?, requests.clone())),
        }
    }
}

/// Prompts of these texts, and a request for each.
fn given(tokenizer: &Tokenizer, texts: &[String], output_tokens: u32) -> Result<(Prompts, Vec<Request>)> {
    ensure!(output_tokens > 0, "max_tokens 0: expected at least 1");
    let (mut prompts, mut requests) = (HashMap::new(), Vec::new());
    for (id, text) in (0..).zip(texts) {
        let tokens = tokenizer.encode_prompt(text)?;
        ensure!(!tokens.is_empty(), "prompt {text:?}: no token to begin with, expected some text");
        requests.push(Request { id, arrival: Nanos::ZERO, prompt_tokens: tokens.len() as u32, output_tokens });
        prompts.insert(id, tokens);
    }
    Ok((Prompts::Given(prompts), requests))
}

/// Records into the folder, or into a temporary one, and reads what was recorded.
fn record(
    named: &NamedEngine,
    requests: &[Request],
    exiting: Option<&Exiting>,
    out: Option<&Path>,
    reporter: &mut dyn Reporter,
) -> Result<ExitTrace> {
    let temporary = tempfile::tempdir()?;
    experiments::record(named, requests, exiting, temporary.path(), ExitTable::Parquet, reporter)?;
    let recorded = ExitTrace::read(temporary.path())?;
    if let Some(out) = out {
        let mut folder = ResultsFolder::create(out, "record")?;
        recorded.write(folder.path()?, ExitTable::Parquet)?;
        folder.finish()?;
    }
    Ok(recorded)
}

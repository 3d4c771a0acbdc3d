//! An OpenAI-compatible HTTP server on the engine.
//!
//! The scheduler of every run serves here too, unchanged: requests come through a [`Load`](scheduler::Load) that a channel
//! fills, and a request whose text is complete or whose client has gone ends between two passes.
//!
//! ```text
//! client ──HTTP──► handler ──Command──► worker: Serving, Scheduler, EngineExecutor
//!    ▲                │                   │
//!    └──text, SSE─────┴────────Event──────┴──► Recorder ──► requests.csv, exits-*.parquet, passes-*.parquet
//! ```
//!
//! [`serve`] runs until it is told to end:
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//!
//! use engine::{Checkpoint, DeviceName, Engine, WeightType};
//! use scheduler::{Batching, Settings};
//! use server::{Limits, Model, serve};
//!
//! let Checkpoint { weights, tokenizer } = Checkpoint::open("models/kjv".as_ref(), None)?;
//! let engine = Engine::new(DeviceName::Cpu.serve(&weights, WeightType::F32)?);
//! let settings = Settings::new(Batching::Depth, "margin:0.05".parse()?, engine.num_loops());
//! let model = Model {
//!     name: "kjv".to_owned(), engine, tokenizer: tokenizer.unwrap(), chat_template: None, temperature: 1.0,
//! };
//! let listener = std::net::TcpListener::bind("127.0.0.1:8000")?;
//! let stop = AtomicBool::new(false);
//! serve(listener, model, settings, Limits::default(), None, &stop)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `docs/reference/http.md` describes the interface.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod api;
pub mod chat;
mod handlers;
mod listen;
mod metrics;
mod record;
mod text;
mod worker;

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::available_parallelism;
use std::time::Duration;

use engine::{Engine, ReplayError, Tokenizer};
use scheduler::{Settings, SignalRead};
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub use chat::{ChatTemplate, TemplateError};
pub use record::{RecordError, Recording};

use crate::handlers::{App, router};
use crate::metrics::Metrics;
use crate::record::Recorder;
use crate::worker::{Command, Worker};

/// From one look at what the server waits for to the next.
const TICK: Duration = Duration::from_millis(20);
/// Time for answers on their way when everything has ended.
const LINGER: Duration = Duration::from_secs(2);

/// A model with what the server needs beside it.
pub struct Model {
    /// Name in requests and answers.
    pub name: String,
    /// The engine. Its own prompts and sampling are not used.
    pub engine: Engine,
    /// Of the model.
    pub tokenizer: Tokenizer,
    /// For chats; they are refused without one.
    pub chat_template: Option<ChatTemplate>,
    /// Temperature of requests that give none, at least 0.
    pub temperature: f32,
}

/// What the server takes on at once. More is answered with status 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most requests that run or wait.
    pub most_requests: u32,
    /// Most tokens of their prompts and of what they may generate.
    pub most_tokens: u64,
    /// How long requests may run on when the server ends.
    pub grace: Duration,
    /// Least time from one chunk of a stream to the next. Tokens that come meanwhile go along with the next one, and the
    /// last ones are sent at once.
    pub stream_interval: Duration,
}

impl Default for Limits {
    /// 2,048 requests, 16,777,216 tokens, 30 seconds, and a chunk for each token.
    fn default() -> Self {
        let grace = Duration::from_secs(30);
        Self { most_requests: 2048, most_tokens: 1 << 24, grace, stream_interval: Duration::ZERO }
    }
}

/// Why a server cannot start, or ends before it is told to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be used.
    #[error("cannot listen: {0}")]
    Listen(#[source] std::io::Error),
    /// The engine cannot run under the settings, or has failed.
    #[error(transparent)]
    Engine(Box<ReplayError>),
    /// The recording cannot begin.
    #[error(transparent)]
    Record(Box<RecordError>),
    /// A setting that a server does not have.
    #[error("{setting}: expected none, since {reason}")]
    Setting {
        /// The setting with its value.
        setting: String,
        /// Why.
        reason: &'static str,
    },
    /// The thread that runs passes has panicked.
    #[error("the thread that runs passes has panicked")]
    Panicked,
}

impl From<ReplayError> for ServerError {
    fn from(error: ReplayError) -> Self {
        Self::Engine(Box::new(error))
    }
}

impl From<RecordError> for ServerError {
    fn from(error: RecordError) -> Self {
        Self::Record(Box::new(error))
    }
}

/// Checks that a server can run under these settings.
fn check(settings: &Settings) -> Result<(), ServerError> {
    let refuse = |setting: String, reason| Err(ServerError::Setting { setting, reason });
    if settings.exit.signal_read() == SignalRead::Oracle {
        return refuse(format!("exit policy {}", settings.exit), "the oracle knows the requests beforehand");
    }
    if settings.exit_wait > 0 {
        let setting = format!("exit_wait {}", settings.exit_wait);
        return refuse(setting, "sampled tokens are chosen from logits of the last pass");
    }
    Ok(())
}

/// Serves a model on a listening socket until `stop` is set, and then what runs to its end, at most for the grace of the
/// limits. What is served is recorded if a recording is given.
///
/// # Errors
/// If the settings are not of the engine, the recording cannot begin, or the engine fails.
pub fn serve(
    listener: TcpListener,
    model: Model,
    settings: Settings,
    limits: Limits,
    recording: Option<Recording>,
    stop: &AtomicBool,
) -> Result<(), ServerError> {
    check(&settings)?;
    settings.check().map_err(ReplayError::from)?;
    model.engine.check_settings(&settings)?;
    let runtime = runtime().map_err(ServerError::Listen)?;
    let metrics = Arc::new(Metrics::new(&model.name, settings.num_loops));
    let (commands, received) = channel();
    let engine = model.engine.clone();
    let app = Arc::new(App::new(model, settings, limits, metrics.clone(), commands.clone()));
    let recorder = recording.map(|recording| Recorder::start(recording, &settings)).transpose()?;
    let worker = Worker::new(&engine, settings, app.special.clone(), received, metrics, recorder)?;
    let failing = app.clone();
    let worker = std::thread::spawn(move || {
        let done = worker.run();
        failing.has_failed.store(done.is_err(), Ordering::Relaxed);
        done
    });
    let (ending, ends) = watch::channel(false);
    runtime.block_on(async {
        listener.set_nonblocking(true).map_err(ServerError::Listen)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(ServerError::Listen)?;
        let accepting = tokio::spawn(listen::accept(listener, router(app.clone()), ends));
        while !stop.load(Ordering::Relaxed) && !worker.is_finished() {
            tokio::time::sleep(TICK).await;
        }
        app.is_ending.store(true, Ordering::Relaxed);
        let _ = ending.send(true);
        let _ = accepting.await;
        wait_until(limits.grace, || app.num_requests() == 0 || worker.is_finished()).await;
        // What still runs ends with the worker, and is answered with that.
        let _ = commands.send(Command::Stop);
        wait_until(LINGER, || worker.is_finished() && app.num_requests() == 0).await;
        Ok::<_, ServerError>(())
    })?;
    runtime.shutdown_timeout(LINGER);
    worker.join().map_err(|_| ServerError::Panicked)??;
    Ok(())
}

/// Passes take most of the processors: few threads are left to read and write.
fn runtime() -> std::io::Result<Runtime> {
    let threads = available_parallelism().map_or(1, |processors| (processors.get() / 4).clamp(1, 4));
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

async fn wait_until(most: Duration, mut is_so: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + most;
    while !is_so() && tokio::time::Instant::now() < end {
        tokio::time::sleep(TICK).await;
    }
}

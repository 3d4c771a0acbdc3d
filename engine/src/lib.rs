//! A recursive transformer: model, KV cache, kernels, an executor that runs them, and a profiler.
//!
//! # Tour
//! From a folder to text, with the depth at which each token exited:
//!
//! ```
//! use engine::{Checkpoint, DeviceName, Engine, WeightType};
//! use scheduler::{Batching, Settings};
//!
//! # let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
//! let Checkpoint { weights, tokenizer } = Checkpoint::open(&folder, None)?;
//! let engine = Engine::new(DeviceName::Cpu.serve(&weights, WeightType::F32)?);
//! let settings = Settings::new(Batching::Depth, "margin:0.3".parse()?, engine.num_loops());
//! let texts = engine.complete(&tokenizer.unwrap(), &["In the beginning"], settings, 12)?;
//! texts[0].iter().for_each(|token| print!("{}[{}]", token.text, token.depth));
//! # assert_eq!(texts[0].len(), 12);
//! # assert!(texts[0].iter().any(|token| token.depth == 0) && texts[0].iter().any(|token| token.depth > 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Checkpoint::open`] also reads Hugging Face folders, GGUF files and models of the hub, whose layers it splits into
//! loops. [`DeviceName::serve`] puts the weights on a device. An [`Engine`] then has one method for each thing to do:
//!
//! | to | call |
//! | --- | --- |
//! | complete texts | [`Engine::complete`] |
//! | generate token by token | [`Engine::generate`] |
//! | serve a request trace at its arrival times, and measure it | [`Engine::replay`] |
//! | record exit signals and predictions of every depth | [`Engine::record`] |
//! | compare served tokens with those of full depth | [`Engine::full_depth`], [`Engine::agreement`] |
//! | read prompts with answers, and grade texts | [`PromptLine`] |
//! | time the parts of a pass | [`Profiler`] |
//! | run passes under a [`scheduler::Server`] of your own | [`Engine::executor`] |
//!
//! # Inside
//! ```text
//! Checkpoint ─► Weights ─► ServedModel ─► Backend ◄─rows, heads─ EngineExecutor ◄─pass─ scheduler
//!                          (CPU or CUDA)  (KV cache, kernels)
//! ```
//!
//! Public modules are the configuration, and the kernels and layers that tests and benchmarks check one by one. Those change
//! without notice.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
pub mod cache;
pub mod checkpoint;
mod clock;
pub mod config;
pub mod cuda;
mod device;
pub mod differentiable;
mod executor;
mod generate;
pub mod kernels;
pub mod model;
mod parameters;
mod profile;
mod prompt_lines;
mod prompts;
mod record;
pub mod reference;
mod replay;
mod sampling;
mod script;
mod tensor_file;
mod tokenizer;
mod unroll;
pub mod weights;

pub use backend::ServedModel;
pub use checkpoint::{Checkpoint, CheckpointError, write_hugging_face};
pub use clock::{Idle, WallClock};
pub use config::{ConfigError, ModelConfig};
pub use device::DeviceName;
pub use executor::{Asked, EngineError, EngineExecutor, ExitDepths, Generation, Sampling, in_pool};
pub use generate::{CompletedToken, Generated};
pub use kernels::linear::WeightType;
pub use model::Model;
pub use profile::{Grid, Limits, Measured, Probe, Profiler, device_name};
pub use prompt_lines::{Answer, PromptLine};
pub use prompts::{PromptError, Prompts};
pub use record::{Exiting, RecordedGeneration, RecordedPolicy};
pub use replay::{Engine, FullDepth, ReplayError, SlicedReplay, oracle_depths};
pub use sampling::{Chosen, Decoding};
pub use script::ExitScript;
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
pub use weights::{Weights, WeightsError};

//! A recursive transformer: model, KV cache, kernels, profiler and an executor that runs them.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
pub mod cache;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod cuda;
pub mod device;
pub mod differentiable;
pub mod executor;
pub mod generate;
pub mod kernels;
pub mod model;
mod parameters;
pub mod profile;
pub mod prompts;
pub mod record;
pub mod reference;
pub mod replay;
mod tensor_file;
pub mod tokenizer;
mod unroll;
pub mod weights;

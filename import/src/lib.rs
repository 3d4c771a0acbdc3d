//! Latency profiles from published kernel measurements, and runs of other systems to compare simulations with.
//!
//! ```text
//! kernels by kind of layer (layer_tables) ──┐
//! kernels by size (kernel_tables) ──────────┼─► latency profile ─► simulator ─┐
//! model (HF config.json) ───────────────────┘                                 ├─► Comparison
//! measured vLLM run ──────── settings, requests ──────────────────────────────┤
//! mean times of many servers (samples) ──── settings, lengths ────────────────┘
//! exits of vllm-rlt or CDB (exits) ─► exit trace ─► simulator
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod all_reduce;
pub mod comparison;
mod curve;
pub mod error;
pub mod exits;
pub mod kernel_tables;
pub mod layer_tables;
pub mod looped;
pub mod lora;
pub mod memory;
pub mod model;
pub mod samples;
pub mod skew;
pub mod vllm;

pub use all_reduce::AllReduce;
pub use comparison::Comparison;
pub use error::ImportError;
pub use exits::{DepthsByRequest, ImportedExits, exit_depths};
pub use kernel_tables::KernelTables;
pub use layer_tables::LayerTables;
pub use looped::OutsideBlock;
pub use lora::DeviceRates;
pub use memory::memory_figures;
pub use model::{KvType, LinearType, ModelShape};
pub use samples::{Sample, read_samples};
pub use vllm::MeasuredRun;

//! Latency profiles from kernels that others measured, and runs of other systems to hold simulations against.
//!
//! ```text
//! tables by layer kind ─────┐
//! (layer_tables)            ├─► latency profile ─► simulator ─┐
//! model (HF config.json) ───┘                                 ├─► Comparison
//! measured vLLM run ──settings, requests──────────────────────┘
//! ```

pub mod error;
pub mod layer_tables;
pub mod lora;
pub mod memory;
pub mod model;
pub mod vllm;

pub use error::ImportError;
pub use layer_tables::LayerTables;
pub use lora::DeviceRates;
pub use memory::{KvPolicy, Memory};
pub use model::ModelShape;
pub use vllm::{Comparison, MeasuredRun};

//! Training of recursive language models with early exits.
//!
//! ```text
//! text ─► corpus (windows of tokens) ─► trainer ─► model folder + training state + loss.csv
//!                                         │
//!              reference model ─► objective ─► gradients ─► optimizer
//! ```

pub mod corpus;
pub mod error;
pub mod evaluation;
pub mod objective;
pub mod optimizer;
pub mod trainer;

//! Conversion, training and evaluation of recursive language models with early exits.
//!
//! ```text
//! ordinary model ─► convert ─► recursive model
//!
//! text ─► corpus (windows of tokens) ─► trainer ─► model folder + training state + loss.csv
//!                                         │
//!              reference model ─► objective ─► gradients ─► optimizer
//!
//! model + text ────────► evaluation ─► figures by loop, exit trace
//! model + questions ───► evaluation ─► accuracy by loop
//! exit trace ──────────► evaluation ─► exit curves, reliability of the signals
//! exit trace ──────────► calibration ─► a threshold with a guarantee
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod calibration;
pub mod convert;
pub mod corpus;
pub mod error;
pub mod evaluation;
pub mod objective;
pub mod optimizer;
pub mod trainer;

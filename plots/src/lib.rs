//! Figures of measured and simulated runs, each as SVG and PNG from one description.
//!
//! A function takes a [`Figure`] (name, folder and caption) and plain data, checks the data, and
//! writes `NAME.svg` and `NAME.png`:
//!
//! | question | function |
//! | --- | --- |
//! | how much faster is a policy than sequence-wise batching without exit? | [`speedup`] |
//! | how does throughput grow with the batch? | [`throughput_by_batch`] |
//! | which trade-off does an exit threshold give? | [`thresholds`] |
//! | what does throughput cost in agreement or latency, and which settings are Pareto-efficient? | [`pareto`] |
//! | which request rate can a system sustain? | [`capacities`] |
//! | how are time to first token and time per token distributed? | [`latency_cdfs`] |
//! | which depths fill the passes? | [`rows_by_depth`] |
//! | which components take the time of a token? | [`token_times`] |
//! | where could tokens exit, and would they be right? | [`exit_depths`] |
//! | how reliable is an exit signal? | [`reliability`] |
//! | which trade-off does an exit signal give? | [`exit_curves`] |
//! | which threshold keeps a tolerance? | [`calibration`] |
//! | does the simulator predict what was measured? | [`predictions`] |
//! | did training converge? | [`losses`] |
//! | how does any quantity depend on another? | [`sweep`] |
//! | how does a speed-up depend on two settings? | [`heat_map`] |
//!
//! ```
//! use plots::{Figure, Origin, Policy, PolicyLine};
//!
//! # let scratch = tempfile::tempdir()?;
//! # let folder = scratch.path().to_path_buf();
//! let figure = Figure {
//!     folder,
//!     name: "throughput".into(),
//!     title: "Throughput against batch size".into(),
//!     setting: "tiny model, 64 requests".into(),
//!     device: "one CPU core".into(),
//!     origin: Origin::Measured,
//! };
//! let line = PolicyLine {
//!     policy: Policy::new("depth-wise", "oracle"),
//!     points: vec![(1.0, 90.0), (2.0, 160.0), (4.0, 240.0)],
//! };
//! plots::throughput_by_batch(&figure, &[line])?;
//! # assert!(scratch.path().join("throughput.png").exists());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Colours are Okabe and Ito's; markers, dashes, hatches and lightness keep series distinct in greyscale. Text
//! is measured and, in the PNG, drawn with the embedded DejaVu Sans, so a bare machine will do. Characters that this font
//! lacks, such as Chinese ones, are drawn as codes (U+4E2D) in both files, with a warning.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod axis;
mod bars;
mod canvas;
mod capacity;
mod depths;
mod error;
mod evaluation;
mod figure;
mod heat_map;
mod latency;
mod legend;
mod page;
mod panel;
mod pareto;
mod parts;
mod speedup;
mod style;
mod sweep;
mod throughput;
mod training;
mod validation;

pub use axis::Scale;
pub use capacity::{PolicyCapacity, capacities};
pub use depths::{ExitDepths, PassRows, exit_depths, rows_by_depth};
pub use error::{Error, or_left_out};
pub use evaluation::{
    CalibratedThreshold, CalibrationLine, CalibrationPoint, ExitCurve, Reliability, calibration, exit_curves,
    reliability,
};
pub use figure::{Figure, Origin, Policy, PolicyLine};
pub use heat_map::{HeatMap, heat_map};
pub use latency::{PolicyLatencies, latency_cdfs};
pub use pareto::{Estimate, Quantity, TradeLine, TradeOff, TradePoint, frontier, pareto};
pub use parts::{TokenTime, token_times};
pub use speedup::{PolicyThroughput, speedup};
pub use style::PALETTE;
pub use sweep::{SweepLine, SweepPoint, sweep};
pub use throughput::{ThresholdLine, ThresholdPoint, thresholds, throughput_by_batch};
pub use training::{LossCurve, losses};
pub use validation::{Prediction, predictions};

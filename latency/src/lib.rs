//! Latency model: from the work of a pass to its time.
//!
//! A [`LatencyModel`] is made from a [latency profile](traces::LatencyProfile). Only this crate derives the time of a
//! pass from its [work](traces::PassWork). The simulator's executor, the comparison of logged passes with a profile,
//! and the fitting of a profile to steady load all call it.
//!
//! ```text
//! PassWork ──► LatencyModel ──► nanoseconds ──► PassAccount: time by component, uses beyond the measured grid
//!                  ▲
//!  LatencyProfile ─┘◄── SteadyFactors ◄── logged passes under steady load
//! ```
//!
//! ```
//! use latency::{LatencyModel, PassAccount};
//! use traces::{Component, LatencyProfile, PassWork, Point, ProfileMeta};
//!
//! // A block that takes 100 microseconds up to 8 rows and 120 at 16, and a head that takes 5 for each row.
//! let point = |component, rows, time_us| Point {
//!     component, rows, kv_tokens: 0, depths: 1, time_us, spread_us: 0.0, repeats: 1,
//! };
//! let profile = LatencyProfile {
//!     meta: ProfileMeta {
//!         schema_version: LatencyProfile::SCHEMA_VERSION,
//!         model: "toy".into(), fingerprint: LatencyProfile::ANY_MODEL.into(), num_loops: 2,
//!         device: "none".into(), software: "none".into(), source: "made up".into(),
//!         overhead_us: 0.0, weight_bytes: 0, kv_bytes_per_token: 0, memory: None, kv_fill: None, decode_q_len: None, heads_ahead_from: None,
//!     },
//!     points: vec![
//!         point(Component::Block, 8, 100.0), point(Component::Block, 16, 120.0),
//!         point(Component::Head, 1, 5.0), point(Component::Head, 16, 80.0),
//!     ],
//!     mixed_attention: None,
//! };
//! let model = LatencyModel::new(&profile)?;
//! let work = PassWork { rows: 12, decode_rows: 12, depths: 2, exit_head_rows: 4, ..PassWork::default() };
//! let mut account = PassAccount::default();
//! assert_eq!(model.run_ns(&work, &mut account), 110_000.0);
//! assert_eq!(model.exit_ns(&work, &mut account), 20_000.0);
//! assert_eq!(model.pass_ns(&work), 130_000.0);
//! # Ok::<(), latency::LatencyError>(())
//! ```
//!
//! Times of passes can also come from elsewhere: see [`CustomLatency`].
//!
//! Between measured points, time is linear in the rows, and for attention in rows and history. Below the smallest
//! measured point, time is constant. Above the largest one the last slope continues, and each such use is counted in
//! [`Extrapolations`]: a simulation reports where it went beyond the measured grid.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod account;
mod attention;
mod components;
mod curve;
mod extrapolation;
mod model;
mod steady;

pub use account::{PassAccount, TimeByComponent};
pub use extrapolation::{Extrapolation, Extrapolations};
pub use model::{CustomLatency, LatencyError, LatencyModel, nanos};
pub use steady::{SteadyFactors, TimedPass};

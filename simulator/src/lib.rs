//! Discrete-event simulation of serving, from latency profiles and exit traces.
//!
//! The simulator runs the engine's scheduler with another executor. That executor takes the time of a pass from a
//! latency profile and the exit signals of its rows from an exit trace:
//!
//! ```text
//! requests ──arrivals──► routing ──► scheduler ──pass──► ProfileExecutor ──► Observer (Metrics)
//!               ▲                        ▲                │    │
//!          event queue ◄──pass ends──────┴── elapsed ◄────┘    │
//!                                                 LatencyModel ┴ ExitModel
//! ```
//!
//! ```
//! use scheduler::Settings;
//! use latency::LatencyModel;
//! use simulator::{Draw, ExitModel, Metrics, Simulation, Source};
//! use traces::{Component, ExitTrace, ExitTraceMeta, LatencyProfile, Nanos, Point, ProfileMeta, Request, Signals};
//!
//! // A block that takes 100 microseconds up to 8 rows and 120 at 16, and nothing else.
//! let profile = LatencyProfile {
//!     meta: ProfileMeta {
//!         schema_version: LatencyProfile::SCHEMA_VERSION,
//!         model: "toy".into(), fingerprint: LatencyProfile::ANY_MODEL.into(), num_loops: 2,
//!         device: "none".into(), software: "none".into(), source: "made up".into(),
//!         overhead_us: 0.0, weight_bytes: 0, kv_bytes_per_token: 0, memory: None, kv_fill: None, decode_q_len: None, heads_ahead_from: None,
//!     },
//!     points: [(8, 100.0), (16, 120.0)]
//!         .map(|(rows, time_us)| Point {
//!             component: Component::Block, rows, kv_tokens: 0, depths: 1, time_us, spread_us: 0.0, repeats: 1,
//!         })
//!         .to_vec(),
//!     mixed_attention: None,
//! };
//! // A generation of two tokens: the first is confident after one loop, the second after two.
//! let mut trace = ExitTrace::new(ExitTraceMeta {
//!     schema_version: ExitTrace::SCHEMA_VERSION,
//!     model: "toy".into(), fingerprint: "toy".into(), num_loops: 2, source: "made up".into(),
//!     recording: None,
//! });
//! let row = |top1, token| (Signals { top1, ..Signals::default() }, token);
//! trace.push_generation(&[row(0.9, 7), row(0.99, 7), row(0.3, 5), row(0.8, 6)]);
//!
//! let latency = LatencyModel::new(&profile)?;
//! let exits = ExitModel::new(&trace, Draw::Seeded(1))?;
//! let settings = Settings {
//!     max_batch: 8, token_budget: 64, prefill_chunk: 64, num_blocks: 100,
//!     ..Settings::new("depth".parse()?, "confidence:0.5".parse()?, 2)
//! };
//! let mut metrics = Metrics::new(&settings);
//! let requests = [Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens: 2 }];
//! let outcome = Simulation::new(settings, &latency, &exits)?.run(requests, std::slice::from_mut(&mut metrics))?;
//! let summary = metrics.summary(Source::Simulated, Some(outcome.token_agreement()));
//! assert_eq!(summary.mean_depth, 1.5);
//! assert_eq!(metrics.makespan(), Nanos(300_000));
//! assert_eq!(summary.token_agreement, Some(1.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod capacity;
mod drafts;
pub mod executor;
pub mod exits;
pub mod memory;
pub mod metrics;
pub mod objectives;
pub mod roles;
pub mod routing;
pub mod shard;
pub mod simulation;
mod spread;
pub mod statistics;
pub mod sweep;
pub mod timeline;
pub mod transfers;

pub use capacity::{Capacity, CapacityError, CapacitySearch, capacity};
pub use executor::ProfileExecutor;
pub use exits::{Draw, ExitError, ExitModel};
pub use memory::{MemoryBudget, MemoryError, MemoryPlan, ModelMemory};
pub use metrics::{GroupSummary, Metrics, RequestLog, Source, Summary, write_csv};
pub use objectives::{ObjectiveError, Objectives};
pub use roles::{Link, MachineGroup, Role, RoleError};
pub use routing::Routing;
pub use shard::Shard;
pub use simulation::{Outcome, Simulation, SimulationError, SystemSummary, run_all};
pub use statistics::Interval;
pub use sweep::{Points, Table, columns};
pub use timeline::{TIMELINE_BEGINNING, Timeline, write_timeline};
pub use transfers::TransferTotals;

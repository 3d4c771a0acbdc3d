//! Request traces, exit traces and latency profiles: types, readers and writers.
//!
//! ```text
//! request trace   arrival and lengths of each request     -> the load of a run
//! exit trace      exit signals at each depth              -> the exits of rows
//! latency profile times of the components of a pass       -> the time of a pass
//! ```
//!
//! A request trace is read from a file in any known format ([`RequestFormat`]) and shaped by its methods, or described
//! by a configuration ([`RequestSpec`]), which can also generate random requests. Exit traces and latency profiles are
//! folders: a YAML file describes the origin, and a CSV or Parquet file contains the numbers. Files read back bit by
//! bit as written. `docs/reference/files.md` lists every file, column and unit.
//!
//! ```
//! use traces::*;
//!
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! // A request trace: four requests, scaled to two per second.
//! let csv = folder.join("chat.csv");
//! std::fs::write(&csv, "TIMESTAMP,ContextTokens,GeneratedTokens\n\
//!     2023-11-16 18:15:46,374,44\n2023-11-16 18:15:50,396,109\n\
//!     2023-11-16 18:15:51,879,55\n2023-11-16 18:15:52,91,16\n")?;
//! let requests = RequestTrace::read(&csv)?.scale_to_rate(2.0)?.clip_lengths(512, 64);
//! assert_eq!(requests.requests[3].arrival, Nanos::from_secs_f64(1.5));
//! assert_eq!(requests.requests[2].prompt_tokens, 512);
//!
//! // An exit trace: one generated token, with equal predictions at both depths.
//! let mut exits = ExitTrace::new(ExitTraceMeta {
//!     schema_version: ExitTrace::SCHEMA_VERSION,
//!     model: "two loops".into(),
//!     fingerprint: "5f0c".into(),
//!     num_loops: 2,
//!     source: "a tour".into(),
//!     recording: None,
//! });
//! let at = |top1| Signals { top1, margin: top1 - 0.1, entropy: 0.5, similarity: 0.9, ..Signals::default() };
//! exits.push_generation(&[(at(0.7), 42), (at(0.95), 42)]);
//! exits.write(folder.join("exits"), ExitTable::Parquet)?;
//! let exits = ExitTrace::read(folder.join("exits"))?;
//! assert_eq!(exits.oracle_depth(0), 0);
//!
//! // A latency profile.
//! let point = |component, time_us| Point {
//!     component, rows: 1, kv_tokens: 0, depths: 1, time_us, spread_us: 0.1, repeats: 5,
//! };
//! let profile = LatencyProfile {
//!     meta: ProfileMeta {
//!         schema_version: LatencyProfile::SCHEMA_VERSION,
//!         model: "two loops".into(),
//!         fingerprint: "5f0c".into(),
//!         num_loops: 2,
//!         device: "a CPU".into(),
//!         software: "f32".into(),
//!         source: "a tour".into(),
//!         overhead_us: 0.0,
//!         weight_bytes: 1 << 20,
//!         kv_bytes_per_token: 512,
//!         memory: None,
//!         kv_fill: None,
//!         decode_q_len: None,
//!         heads_ahead_from: None,
//!     },
//!     points: vec![point(Component::Block, 120.0), point(Component::Embed, 1.5), point(Component::Head, 30.0)],
//!     mixed_attention: None,
//! };
//! profile.write(folder.join("profile"))?;
//! let profile = LatencyProfile::read(folder.join("profile"))?;
//! check_same_model(&profile, &exits)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod closed_loop;
pub mod error;
pub mod exit_depths;
pub mod exit_file;
mod exit_parquet;
pub mod exit_trace;
mod formats;
pub mod generate;
pub mod hash;
pub mod input;
pub mod mixed_attention;
pub mod panics;
pub mod pass_log;
pub mod pass_work;
pub mod profile;
pub mod request;
pub mod request_file;
pub mod request_source;
pub mod request_spec;
pub mod sessions;
mod shared_file;
pub mod statistics;
pub mod table;
pub mod unfinished;
pub mod units;

pub use closed_loop::{ClosedLoop, ThinkTime, Users};
pub use error::TraceError;
pub use exit_depths::LoopShares;
pub use exit_file::{ExitTable, ExitTraceWriter};
pub use exit_parquet::catching_damage;
pub use exit_trace::{
    DepthTally, ExitSignal, ExitTrace, ExitTraceMeta, Recording, Served, ServedToken, SignalBound, SignalSet,
    SignalUnit, Signals,
};
pub use generate::{Arrivals, Generate, Length};
pub use mixed_attention::{MixedAttention, MixedPoint, PrefillAxis, SkewCell};
pub use panics::catch_panic;
pub use pass_log::{DepthRows, DevicePass, LoggedPass, PassLog, PassLogMeta, PassOrigin, PassRun};
pub use pass_work::{ChunkWork, PassBefore, PassWork};
pub use profile::{Component, LatencyProfile, MemoryFigures, Point, ProfileMeta, check_same_model, is_same_model};
pub use request::{PrefixHashes, Request, RequestTrace};
pub use request_file::{CountTokens, ReadOptions, RequestFormat, TimeUnit, ZeroTokens};
pub use request_source::{RequestSource, Requests};
pub use request_spec::{OpenTokenizer, RequestSpec, SessionUse};
pub use sessions::{Link, Sessions};
pub use shared_file::SharedFile;
pub use statistics::{LengthStatistics, TraceStatistics};
pub use units::{Nanos, unix_micros};

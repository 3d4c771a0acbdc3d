//! Experiments as a library: what the `depthwise` command does, without its arguments and its terminal.
//!
//! | to do | call | with |
//! | --- | --- | --- |
//! | measure the engine, simulate the same, compare, draw; or simulate systems at hand | [`run()`] | [`Experiment`] |
//! | test the simulator against the engine | [`validate()`] | [`Experiment`] with a [`ValidationSpec`](experiment::ValidationSpec) |
//! | simulate every combination of lists of values | [`sweep()`] | [`SweepSpec`] |
//! | find the highest request rate within latency objectives | [`capacity()`] | [`SweepSpec`] |
//! | measure a latency profile, record exits, replay a trace | [`profile()`], [`record()`], [`replay()`] | [`NamedEngine`] |
//! | grade prompts with answers by exit depth | [`exact_match()`] | [`NamedEngine`] |
//! | make an HTML page of folders of results | [`report()`] | their paths |
//! | read a latency profile, by its path or the name of one that ships | [`read_profile()`] | a path |
//! | simulate requests under some settings | [`run_simulations`] | [`Machines`] |
//!
//! An experiment is a value: read it from YAML with [`Experiment::load`] or [`SweepSpec::load`], or build it. Its
//! paths are relative to a folder `base`. Results go to a folder that appears whole or not at all; a [`Reporter`]
//! hears of progress and warnings. What comes back holds the figures that the command prints as tables.
//!
//! # A sweep in a temporary folder
//!
//! A machine on which a pass takes 20 microseconds and 5 for each row serves twenty requests, under two batch limits.
//!
//! ```
//! use experiments::sweep::Earlier;
//! use experiments::{Quiet, SweepSpec, sweep};
//! use traces::{Component, LatencyProfile, Point, ProfileMeta};
//!
//! let point = |component, rows: u32| Point {
//!     component,
//!     rows,
//!     kv_tokens: 0,
//!     depths: 1,
//!     time_us: if component == Component::Block { 20.0 + 5.0 * f64::from(rows) } else { 0.1 },
//!     spread_us: 0.0,
//!     repeats: 1,
//! };
//! let meta = ProfileMeta {
//!     schema_version: LatencyProfile::SCHEMA_VERSION,
//!     model: "an example".to_owned(),
//!     fingerprint: "none".to_owned(),
//!     num_loops: 2,
//!     device: "imagined".to_owned(),
//!     software: "none".to_owned(),
//!     source: "computed".to_owned(),
//!     overhead_us: 0.0,
//!     weight_bytes: 0,
//!     kv_bytes_per_token: 0,
//!     memory: None,
//!     kv_fill: None,
//!     decode_q_len: None,
//!     heads_ahead_from: None,
//! };
//! let folder = tempfile::tempdir()?;
//! let components = [Component::Block, Component::Embed, Component::Head];
//! let points = components.iter().flat_map(|&component| [point(component, 1), point(component, 64)]).collect();
//! LatencyProfile { meta, points, mixed_attention: None }.write(folder.path().join("profile"))?;
//!
//! std::fs::write(folder.path().join("small.yaml"), "
//! schema_version: 1
//! title: two batch limits
//! requests:
//!   generate:
//!     count: 20
//!     seed: 1
//!     arrivals: all_at_once
//!     prompt_tokens: {uniform: {min: 2, max: 12}}
//!     output_tokens: {uniform: {min: 2, max: 12}}
//! serving: {batching: [depth], exit: [none], max_batch: 8, token_budget: 16}
//! systems: [{name: imagined, profile: profile}]
//! grid: {max_batch: [2, 8]}
//! ")?;
//! let spec = SweepSpec::load(&folder.path().join("small.yaml"))?;
//! let results = folder.path().join("results");
//! let report = sweep(&spec, folder.path(), &results, Earlier::Continue, &mut Quiet)?;
//! let throughput: Vec<f64> = report.summary.column("throughput_tok_s").unwrap().map(|cell| cell.parse().unwrap()).collect();
//! assert!(throughput[1] > throughput[0], "larger batches give more tokens per second");
//! assert!(results.join("sweep.csv").exists());
//! # Ok::<(), anyhow::Error>(())
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod bootstrap;
pub mod capacity;
pub mod compare;
pub mod exact_match;
pub mod exit_choice;
pub mod experiment;
pub mod figures;
pub mod frontier;
pub mod input;
pub mod loss_figure;
pub mod machines;
pub mod measure;
pub mod named_engine;
pub mod oracle;
mod parts;
pub mod passes;
pub mod predict;
pub mod profile;
pub mod profiles;
pub mod quality;
pub mod record;
pub mod recording;
pub mod replay;
pub mod report;
pub mod reporter;
pub mod results;
pub mod run;
pub mod runs;
pub mod serving;
pub mod speedup;
pub mod sweep;
pub mod systems;
pub mod validate;
pub mod workload;

pub use capacity::capacity;
pub use exact_match::exact_match;
pub use exit_choice::ExitChoice;
pub use experiment::Experiment;
pub use named_engine::NamedEngine;
pub use profile::profile;
pub use profiles::read_profile;
pub use record::record;
pub use replay::replay;
pub use report::report;
pub use reporter::{Quiet, Reporter};
pub use results::ResultsFolder;
pub use run::{run, validate};
pub use runs::{Machines, Run, run_simulations};
pub use serving::Serving;
pub use sweep::spec::SweepSpec;
pub use sweep::sweep;
pub use workload::Workload;

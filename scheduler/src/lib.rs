//! Batching policies, exit policies, KV fills, KV-block accounting and the serving loop.
//!
//! One scheduler serves two executors. [`Scheduler`] decides which rows share the next pass of the block. An [`Executor`]
//! runs that pass, and returns its duration and the exit signals of its rows. The engine's executor runs the model; the
//! simulator's executor takes both from a latency profile and an exit trace. [`serve()`] is the loop around them.
//!
//! ```
//! use scheduler::{serve, Batching, Executor, Pass, Server, Settings, Slot, VirtualClock};
//! use traces::{Nanos, Request};
//!
//! /// A machine whose every pass takes a microsecond, and whose rows are confident after the second pass.
//! struct Constant;
//! impl Executor for Constant {
//!     type Error = std::convert::Infallible;
//!     fn admit(&mut self, _: Slot, _: &Request, _: u32) -> Result<(), Self::Error> { Ok(()) }
//!     fn release(&mut self, _: Slot) {}
//!     fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
//!         for (segment, signal) in pass.segments.iter().zip(signals) {
//!             *signal = if segment.depth >= 1 { 1.0 } else { 0.0 };
//!         }
//!         Ok(Nanos(1000))
//!     }
//!     fn emit(&mut self, _: &Pass<'_>, _: &[u32]) -> Result<Nanos, Self::Error> { Ok(Nanos::ZERO) }
//! }
//!
//! let settings = Settings {
//!     max_batch: 8, token_budget: 64, prefill_chunk: 16, num_blocks: 100,
//!     ..Settings::new(Batching::Depth, "confidence:0.9".parse().unwrap(), 4)
//! };
//! let mut server = Server::new(settings, Constant).unwrap();
//! let requests = [Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 3, output_tokens: 5 }];
//! let mut clock = VirtualClock::default();
//! serve(&mut server, requests, &mut clock, &mut ()).unwrap();
//! // Five tokens, two passes each.
//! assert_eq!(scheduler::Clock::now(&mut clock), Nanos(10_000));
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod ahead;
mod backfill;
pub mod blocks;
pub mod custom;
mod decide;
pub mod executor;
mod exit_wait;
pub mod load;
mod mix;
pub mod observe;
pub mod pass;
pub mod pass_log;
pub mod policy;
mod prefixes;
mod reach;
pub mod scheduler;
pub mod serve;
pub mod speculation;
pub mod steady;
mod work;

pub use blocks::{BlockId, BlockTables};
pub use custom::{CustomExit, CustomPolicy, ExitRow, Memory};
pub use executor::Executor;
pub use load::{Answered, ClosedLoad, Load, OpenLoad, Unordered};
pub use mix::DepthMix;
pub use observe::{Observer, PassRecord, PrefixUse, Token, Verified};
pub use pass::{Pass, RowKind, Segment, Slot};
pub use pass_log::PassRecorder;
pub use policy::{Batching, ExitPolicy, KvFill, LoadThreshold, SignalRead, SignalReads};
pub use scheduler::{Handover, Reservation, ScheduleError, Scheduler, Settings, Terms};
pub use serve::{Clock, ServeError, Server, Serving, VirtualClock, serve};
pub use speculation::{DraftExit, DraftLimit, Speculation};
pub use steady::{Lengths, SteadyLoad, SteadyServer};
pub use work::pass_work;

//! Request traces, exit traces and latency profiles: types, readers and writers.
//!
//! ```text
//! request trace   who asks when, for how many tokens      -> what a run replays
//! exit trace      how sure the model was at each depth    -> when rows leave
//! latency profile what the parts of a pass take           -> how long passes last
//! ```

pub mod exit_trace;
pub mod profile;
pub mod request;
pub mod units;

pub use exit_trace::{ExitTrace, ExitTraceMeta, Measure, Signals};
pub use profile::{Component, LatencyProfile, Point, ProfileMeta};
pub use request::Request;
pub use units::Nanos;

//! Batching policies, exit policies, KV-block accounting and the serving loop.
pub mod blocks;
pub mod executor;
pub mod observe;
pub mod pass;
pub mod policy;

pub use executor::Executor;
pub use observe::{Observer, PassRecord, Token};
pub use pass::{Pass, Segment, Slot};
pub use policy::{Batching, ExitPolicy, Look};

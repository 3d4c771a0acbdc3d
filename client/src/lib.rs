//! A load client: drives a server with OpenAI's API by a request trace, and measures what its users would see.
//!
//! ```text
//! request trace ─► load ──request──► client ──HTTP──► server
//!                   ▲                  │
//!                   └──── answered ────┤ times of the tokens
//!                                      ▼
//!                                 measurement ─► summary.csv, requests.csv, failures.csv, client.csv
//! ```
//!
//! The load is the one that the engine and the simulator serve ([`scheduler::Load`]): requests at their arrivals, sessions,
//! users. The metrics are theirs too ([`simulator::Metrics`]), so a measured server and a simulated one compare line by
//! line. Latencies count from when a request was due, as in the simulator; how much later the client sent it is its lag.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//! use std::time::Duration;
//!
//! use client::*;
//! use scheduler::{Batching, ExitPolicy, KvFill, OpenLoad};
//! use traces::{Nanos, Request};
//!
//! let client = Client::connect(ApiOptions {
//!     url: "http://127.0.0.1:8000".to_owned(),
//!     endpoint: Endpoint::Completions,
//!     model: None,
//!     api_key: None,
//!     timeout: Duration::from_secs(600),
//!     retries: 0,
//!     extra_body: Default::default(),
//! })?;
//! let prompts = Prompts::new(PromptSource::vocabulary(client.vocabulary()?), None, 1);
//! let requests = (0..8).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 64, output_tokens: 16 });
//! let server = ServerPolicy { batching: Batching::Vanilla, exit: ExitPolicy::None, kv_fill: KvFill::Reuse, max_batch: 0 };
//! let mut measurement = Measurement::new(server, None);
//! client.send(&mut OpenLoad::new(requests), &prompts, &AtomicBool::new(false), |exchange| measurement.add(&exchange))?;
//! assert_eq!(measurement.summary().requests, 8);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod answer;
pub mod api;
pub mod failure;
pub mod load;
pub mod measurement;
pub mod prompts;
pub mod sse;

pub use answer::{Answer, Usage};
pub use api::{ApiError, ApiOptions, Endpoint};
pub use failure::{Failure, FailureKind};
pub use load::{Client, Exchange};
pub use measurement::{ClientAccount, FailureRow, Measurement, ServerPolicy};
pub use prompts::{Prompt, PromptSource, Prompts, WordTokens};
pub use sse::EventDecoder;

//! The requests of a simulation, and which of their prompts begin alike.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use traces::{PrefixHashes, Request, RequestSpec, RequestTrace};

use crate::reporter::Reporter;
use crate::serving::Serving;

/// What is served.
#[derive(Clone, Debug)]
pub struct Workload {
    /// In the order of their arrival.
    pub requests: Vec<Request>,
    /// Hashes of their prompts; none without prefix caching or where the trace has none.
    pub prefixes: Option<Arc<PrefixHashes>>,
}

impl Workload {
    /// Reads or makes requests, hashed for the blocks of `serving` if it caches prefixes.
    ///
    /// # Errors
    /// As [`load_requests`].
    pub fn load(spec: &RequestSpec, base: &Path, serving: &Serving, reporter: &mut dyn Reporter) -> Result<Self> {
        if !serving.prefix_caching {
            return Ok(Self { requests: load_requests(spec, base, reporter)?.requests, prefixes: None });
        }
        let of_file = spec.file.is_some().then_some(serving.block_tokens);
        let spec = RequestSpec { prefix_block_tokens: spec.prefix_block_tokens.or(of_file), ..spec.clone() };
        let RequestTrace { name, requests, prefix_hashes, .. } = load_requests(&spec, base, reporter)?;
        if prefix_hashes.is_none() {
            reporter.warning(&format!(
                "{name} says nothing of what prompts have in common: with prefix_caching, only preempted requests find \
                 keys and values again"
            ));
        }
        Ok(Self { requests, prefixes: prefix_hashes.map(Arc::new) })
    }
}

/// Reads or makes requests, and says what of their file is not among them.
///
/// # Errors
/// If the file does not read or the specification contradicts itself.
pub fn load_requests(spec: &RequestSpec, base: &Path, reporter: &mut dyn Reporter) -> Result<RequestTrace> {
    let trace = spec.load(base)?;
    for warning in &trace.warnings {
        reporter.warning(&format!("{}: {warning}", trace.name));
    }
    Ok(trace)
}

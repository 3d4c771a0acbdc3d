//! Which prompts begin alike, by the hashes of their blocks.

use std::collections::HashMap;
use std::sync::Arc;

use traces::PrefixHashes;

use crate::blocks::Contents;

/// Hashes of prompts: of all requests of a run beforehand, or of each when it comes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prefixes {
    /// Of a run.
    pub of_run: Option<Arc<PrefixHashes>>,
    /// By request, until it ends: a hash for each whole block of its prompt.
    pub of_requests: HashMap<u32, Vec<u64>>,
}

impl Prefixes {
    /// Contents of a full block of a request.
    pub fn contents(&self, request: u32, block: u32, block_tokens: u32) -> Contents {
        let own = Contents::Own { request, block };
        if let Some(hashes) = self.of_requests.get(&request) {
            return hashes.get(block as usize).map_or(own, |&hash| Contents::Prompt { hash, part: 0 });
        }
        let of_run = self.of_run.as_deref().and_then(|prefixes| {
            let parts = prefixes.block_tokens / block_tokens;
            let hash = *prefixes.of(request).get((block / parts) as usize)?;
            Some(Contents::Prompt { hash, part: block % parts })
        });
        of_run.unwrap_or(own)
    }
}

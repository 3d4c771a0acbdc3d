//! A request trace: who asks when, with how long a prompt, for how many tokens.

use crate::units::Nanos;

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Position in the trace, counted from 0; what the request is known by in every output.
    pub id: u32,
    /// When it arrives, since the start of the trace.
    pub arrival: Nanos,
    /// Length of the prompt in tokens, at least 1.
    pub prompt_tokens: u32,
    /// Tokens to generate, at least 1; generation ends there and nowhere else.
    pub output_tokens: u32,
}

impl Request {
    /// Keys and values the request holds when its last token leaves: that token itself is never read back.
    pub fn context_tokens(&self) -> u32 {
        self.prompt_tokens + self.output_tokens - 1
    }
}

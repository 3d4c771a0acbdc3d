//! Exit scripts: tokens exit by the signals of an exit trace, whatever the model computes.

use std::collections::HashMap;
use std::sync::Arc;

use scheduler::SignalRead;
use traces::{ExitTrace, ExitTraceMeta, Request};

/// The exit signals of an exit trace, in place of those of the model that runs. The text, the work and the times are the
/// model's, and the model reads every signal that an exit policy asks for; the exits are those of the trace.
///
/// A model with random weights has no exits of its own. With a script, its times can be measured under the exits of a
/// trained model.
#[derive(Clone, Debug, PartialEq)]
pub struct ExitScript {
    trace: Arc<ExitTrace>,
    tokens: HashMap<u32, Vec<usize>>,
}

impl ExitScript {
    /// A script in which each output token of a request has the signals of one token of `trace`: `tokens` has their
    /// indices in the trace, in order, by request.
    ///
    /// # Panics
    /// If the trace has no token of one of these indices.
    pub fn new(trace: Arc<ExitTrace>, tokens: HashMap<u32, Vec<usize>>) -> Self {
        let all = trace.num_tokens();
        assert!(tokens.values().flatten().all(|&token| token < all), "the trace has {all} tokens");
        Self { trace, tokens }
    }

    /// The trace that the exits are of.
    pub fn trace(&self) -> &ExitTrace {
        &self.trace
    }

    /// What is read of the output token of a request with this index, from 0, at a depth: the value of the signal, or 1
    /// or 0 for what is true or not. `None` if the script has no such token.
    pub(crate) fn read(&self, read: SignalRead, request: u32, token: usize, depth: usize) -> Option<f32> {
        let token = *self.tokens.get(&request)?.get(token)?;
        Some(match read {
            SignalRead::None => 0.0,
            SignalRead::Oracle => f32::from(u8::from(self.trace.agrees_with_last(token, depth))),
            SignalRead::Repeats => f32::from(u8::from(self.trace.repeats(token, depth))),
            SignalRead::Signal(signal) => self.trace.signals_at(token, depth).get(signal),
        })
    }

    /// The script as an exit trace of these requests: generation `i` is what request `i` of the list follows.
    ///
    /// # Panics
    /// If the script lacks a request.
    pub fn of_requests(&self, requests: &[Request]) -> ExitTrace {
        let (num_loops, meta) = (self.trace.num_loops(), &self.trace.meta);
        let source = format!("{} requests that follow: {}", requests.len(), meta.source);
        let mut trace = ExitTrace::new(ExitTraceMeta { source, ..meta.clone() });
        trace.recorded = self.trace.recorded;
        for request in requests {
            let rows = self.tokens[&request.id].iter().flat_map(|token| token * num_loops..(token + 1) * num_loops);
            let rows = rows.map(|row| (self.trace.signals[row], self.trace.predictions[row]));
            trace.push_generation(&rows.collect::<Vec<_>>());
        }
        trace
    }
}

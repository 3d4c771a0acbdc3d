//! The lines of `requests.csv` and `passes.csv`.

use scheduler::PassRecord;
use serde::{Deserialize, Serialize};
use traces::{Nanos, Request};

use super::depth_rows::PassRows;

/// One request as it was served: a line of `requests.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestRow {
    /// Id of the request in its trace.
    pub id: u32,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Number of generated tokens.
    pub output_tokens: u32,
    /// Number of preemptions.
    pub preemptions: u32,
    /// Passes of the generated tokens: exit depth plus one of each.
    pub passes: u64,
    /// When it arrived, in seconds since the start of the run.
    pub arrival_s: f64,
    /// When the request first got a slot.
    pub admitted_s: f64,
    /// When its first token was delivered.
    pub first_token_s: f64,
    /// When its last token was delivered.
    pub finished_s: f64,
    /// Time from arrival to first token.
    pub ttft_ms: f64,
    /// Time per token after the first; NaN with a single token.
    pub tpot_ms: f64,
    /// Time from arrival to last token.
    pub e2e_ms: f64,
}

/// The latencies of one finished request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestLatencies {
    pub ttft: Nanos,
    /// Time from the first token to the last.
    pub decode: Nanos,
    /// `None` with a single token.
    pub tpot: Option<Nanos>,
    pub end_to_end: Nanos,
}

impl RequestLatencies {
    pub fn new(now: Nanos, request: &Request, first_token: Nanos) -> Self {
        let decode = now.since(first_token);
        let gaps = u64::from(request.output_tokens - 1);
        Self {
            ttft: first_token.since(request.arrival),
            decode,
            tpot: decode.0.checked_div(gaps).map(Nanos),
            end_to_end: now.since(request.arrival),
        }
    }
}

/// The row of a request; rows are indexed by id.
#[inline(never)]
pub(super) fn row_of<'a>(rows: &'a mut Vec<RequestRow>, request: &Request) -> &'a mut RequestRow {
    let index = request.id as usize;
    while rows.len() <= index {
        rows.push(RequestRow::unseen(rows.len() as u32));
    }
    let row = &mut rows[index];
    if !row.is_seen() {
        *row = RequestRow::of(request);
    }
    row
}

/// Adds the requests that another machine served, or whose prompts it ran.
pub(super) fn merge_requests(rows: &mut Vec<RequestRow>, others: Vec<RequestRow>) {
    for other in others.into_iter().filter(RequestRow::is_seen) {
        let index = other.id as usize;
        while rows.len() <= index {
            rows.push(RequestRow::unseen(rows.len() as u32));
        }
        rows[index].merge(&other);
    }
}

impl RequestRow {
    pub(super) fn unseen(id: u32) -> Self {
        Self {
            id,
            prompt_tokens: 0,
            output_tokens: 0,
            preemptions: 0,
            passes: 0,
            arrival_s: 0.0,
            admitted_s: f64::NAN,
            first_token_s: f64::NAN,
            finished_s: f64::NAN,
            ttft_ms: f64::NAN,
            tpot_ms: f64::NAN,
            e2e_ms: f64::NAN,
        }
    }

    /// The row of a request of which nothing has been done.
    pub(super) fn of(request: &Request) -> Self {
        let &Request { id, arrival, prompt_tokens, output_tokens } = request;
        Self { prompt_tokens, output_tokens, arrival_s: arrival.as_secs_f64(), ..Self::unseen(id) }
    }

    fn is_seen(&self) -> bool {
        self.output_tokens > 0
    }

    /// Adds what another machine did of the request.
    pub(super) fn merge(&mut self, other: &Self) {
        if !self.is_seen() {
            *self = *other;
            return;
        }
        self.preemptions += other.preemptions;
        self.passes += other.passes;
        self.admitted_s = self.admitted_s.min(other.admitted_s);
        if other.is_finished() {
            let Self { first_token_s, finished_s, ttft_ms, tpot_ms, e2e_ms, .. } = *other;
            *self = Self { first_token_s, finished_s, ttft_ms, tpot_ms, e2e_ms, ..*self };
        }
    }

    pub(super) fn admitted(&mut self, now: Nanos) {
        if self.admitted_s.is_nan() {
            self.admitted_s = now.as_secs_f64();
        }
    }

    pub(super) fn finished(&mut self, now: Nanos, latencies: &RequestLatencies) {
        self.first_token_s = now.since(latencies.decode).as_secs_f64();
        self.finished_s = now.as_secs_f64();
        self.ttft_ms = latencies.ttft.as_millis_f64();
        self.tpot_ms = latencies.tpot.map_or(f64::NAN, Nanos::as_millis_f64);
        self.e2e_ms = latencies.end_to_end.as_millis_f64();
    }

    /// Whether the last token was delivered.
    pub fn is_finished(&self) -> bool {
        !self.finished_s.is_nan()
    }
}

/// One pass as it ran: a line of `passes.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PassRow {
    /// When the pass started, in seconds since the start of the run.
    pub start_s: f64,
    /// Duration of the pass, exit head included.
    pub time_us: f64,
    /// Decode rows.
    pub decode_rows: u32,
    /// Rows of prompt chunks.
    pub prefill_rows: u32,
    /// Rows of backfill.
    pub backfill_rows: u32,
    /// Distinct depths among the rows.
    pub depths: u32,
    /// Sequences with a slot.
    pub running: u32,
    /// Requests that waited for a slot.
    pub waiting: u32,
}

impl PassRow {
    pub(super) fn new(record: &PassRecord<'_>, rows: PassRows) -> Self {
        Self {
            start_s: record.start.as_secs_f64(),
            time_us: record.elapsed.as_micros_f64(),
            decode_rows: rows.decode,
            prefill_rows: rows.prefill,
            backfill_rows: rows.backfill,
            depths: rows.depths.count_ones(),
            running: record.running,
            waiting: record.waiting,
        }
    }
}

//! What a load came to: the metrics of the requests that were answered, and how the others failed.

use scheduler::{Batching, ExitPolicy, KvFill, Observer, Settings, Token};
use serde::{Deserialize, Serialize};
use simulator::metrics::Distribution;
use simulator::{Metrics, Objectives, Source, Summary};
use traces::{Nanos, Request};

use crate::answer::Answer;
use crate::failure::FailureKind;
use crate::load::Exchange;

/// What a server runs, for the columns of results. A client cannot see it: the user or the server says it.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct ServerPolicy {
    /// The batching policy.
    pub batching: Batching,
    /// The exit policy.
    pub exit: ExitPolicy,
    /// What later tokens find at depths that an exited token skipped.
    pub kv_fill: KvFill,
    /// Most sequences at once; 0 if it is not known.
    pub max_batch: u32,
}

/// A request without a whole answer: a line of `failures.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FailureRow {
    /// Id of the request in its trace.
    pub id: u32,
    /// The kind of failure.
    pub kind: FailureKind,
    /// When the request was due, in seconds since the start of the run.
    pub arrival_s: f64,
    /// When it was sent first.
    pub sent_s: f64,
    /// When it failed for the last time.
    pub failed_s: f64,
    /// How often it was sent again.
    pub retries: u32,
    /// What was found.
    pub message: String,
}

/// The client's own account of a run: the line of `client.csv`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ClientAccount {
    /// Requests that ended, answered or not.
    pub requests: u64,
    /// Requests with a whole answer, which the metrics are of.
    pub answered: u64,
    /// Requests without one.
    pub failed: u64,
    /// Requests that had not ended when the run was interrupted.
    pub interrupted: u64,
    /// Times that requests were sent again, as the server asked.
    pub retries: u64,
    /// Answers that do not say their numbers of tokens: pieces of text are counted as tokens.
    pub without_usage: u64,
    /// Answers that say another number of prompt tokens than the trace.
    pub other_prompt_lengths: u64,
    /// Answers with another number of tokens than the trace asks for.
    pub other_output_lengths: u64,
    /// Prompt tokens of the trace, of answered requests.
    pub prompt_tokens_asked: u64,
    /// Prompt tokens as the server counts them; where it does not, those of the trace.
    pub prompt_tokens: u64,
    /// Output tokens of the trace, of answered requests.
    pub output_tokens_asked: u64,
    /// Tokens that the server generated.
    pub output_tokens: u64,
    /// Time from when a request was due to when the client sent it, in milliseconds: mean.
    pub lag_mean_ms: f64,
    /// The same: median.
    pub lag_p50_ms: f64,
    /// The same: 99th percentile.
    pub lag_p99_ms: f64,
    /// The same: maximum.
    pub lag_max_ms: f64,
}

/// Collects the exchanges of a load.
#[derive(Clone, Debug)]
pub struct Measurement {
    metrics: Metrics,
    lag: Distribution,
    failures: Vec<FailureRow>,
    account: ClientAccount,
    /// Whether all answers say the exit depth of each token.
    has_depths: bool,
}

impl Measurement {
    /// Largest 99th percentile of the lag at which the client kept up, in milliseconds.
    pub const MOST_LAG_MS: f64 = 1.0;

    /// Of a load that has not begun.
    pub fn new(server: ServerPolicy, objectives: Option<Objectives>) -> Self {
        let ServerPolicy { batching, exit, kv_fill, max_batch } = server;
        // Of the cache, nothing is known; a block of no tokens would be divided by.
        let known = Settings { kv_fill, max_batch, ..Settings::new(batching, exit, 1) };
        let settings = Settings { token_budget: 0, prefill_chunk: 0, block_tokens: 1, num_blocks: 0, ..known };
        let metrics = Metrics::new(&settings).with_requests();
        Self {
            metrics: objectives.map_or(metrics.clone(), |objectives| metrics.with_objectives(objectives)),
            lag: Distribution::default(),
            failures: Vec::new(),
            account: ClientAccount::default(),
            has_depths: true,
        }
    }

    /// Adds an exchange that has ended.
    pub fn add(&mut self, exchange: &Exchange) {
        let &Exchange { request, sent, ended, retries, .. } = exchange;
        self.lag.record(sent.since(request.arrival));
        self.account.requests += 1;
        self.account.retries += u64::from(retries);
        match &exchange.outcome {
            Ok(answer) => self.add_answer(&request, sent, answer),
            Err(failure) => {
                self.account.failed += 1;
                self.failures.push(FailureRow {
                    id: request.id,
                    kind: failure.kind,
                    arrival_s: request.arrival.as_secs_f64(),
                    sent_s: sent.as_secs_f64(),
                    failed_s: ended.as_secs_f64(),
                    retries,
                    message: failure.message.clone(),
                });
            }
        }
    }

    fn add_answer(&mut self, asked: &Request, sent: Nanos, answer: &Answer) {
        let (&[first, ..], &[.., last]) = (&answer.pieces[..], &answer.pieces[..]) else { return };
        let prompt_tokens = answer.usage.map_or(asked.prompt_tokens, |usage| usage.prompt_tokens);
        let served = Request { prompt_tokens, output_tokens: answer.num_tokens(), ..*asked };
        let account = &mut self.account;
        account.answered += 1;
        account.without_usage += u64::from(answer.usage.is_none());
        account.other_prompt_lengths += u64::from(prompt_tokens != asked.prompt_tokens);
        account.other_output_lengths += u64::from(served.output_tokens != asked.output_tokens);
        account.prompt_tokens_asked += u64::from(asked.prompt_tokens);
        account.prompt_tokens += u64::from(prompt_tokens);
        account.output_tokens_asked += u64::from(asked.output_tokens);
        account.output_tokens += u64::from(served.output_tokens);
        self.has_depths &= answer.depths.len() == served.output_tokens as usize;
        self.metrics.admitted(sent, &served);
        let mut latest = None;
        for index in 0..served.output_tokens {
            let time = answer.pieces.get(index as usize).copied();
            // A token that came in one piece with another has no gap of its own.
            let previous = latest.filter(|_| time.is_some());
            let depth = answer.depths.get(index as usize).copied().unwrap_or(0);
            self.metrics.token(time.unwrap_or(last), &served, Token { index, depth, previous });
            latest = time.or(latest);
        }
        self.metrics.finished(last, &served, first);
    }

    /// The metrics of the answered requests. What a client cannot see of the server counts as nothing.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The requests that failed, as they did.
    pub fn failures(&self) -> &[FailureRow] {
        &self.failures
    }

    /// Number of failures of each kind that there is.
    pub fn failures_by_kind(&self) -> impl Iterator<Item = (FailureKind, usize)> {
        let count = |kind| self.failures.iter().filter(|row| row.kind == kind).count();
        FailureKind::ALL.into_iter().map(move |kind| (kind, count(kind))).filter(|(_, count)| *count > 0)
    }

    /// The client's account, when the load has ended with `interrupted` requests in flight.
    pub fn account(&self, interrupted: usize) -> ClientAccount {
        let [lag_p50_ms, lag_p99_ms, lag_max_ms] = self.lag.quantiles_ms([0.5, 0.99, 1.0]);
        ClientAccount {
            interrupted: interrupted as u64,
            lag_mean_ms: self.lag.mean_ms(),
            lag_p50_ms,
            lag_p99_ms,
            lag_max_ms,
            ..self.account
        }
    }

    /// The line of `summary.csv`. Columns that a client cannot see are NaN, empty or 0.
    pub fn summary(&self) -> Summary {
        let summary = self.metrics.summary(Source::Measured, None);
        Summary {
            block_tokens: 0,
            mean_depth: if self.has_depths { summary.mean_depth } else { f64::NAN },
            occupancy: f64::NAN,
            mean_rows: f64::NAN,
            mean_running: f64::NAN,
            kv_usage: f64::NAN,
            busy: f64::NAN,
            ..summary
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Usage;
    use crate::failure::Failure;

    fn ms(milliseconds: u64) -> Nanos {
        Nanos(milliseconds * 1_000_000)
    }

    fn exchange(id: u32, outcome: Result<Answer, Failure>) -> Exchange {
        let request = Request { id, arrival: ms(10), prompt_tokens: 5, output_tokens: 4 };
        Exchange { request, sent: ms(12), ended: ms(70), retries: 1, outcome }
    }

    fn measurement(objectives: Option<Objectives>) -> Measurement {
        let server =
            ServerPolicy { batching: Batching::Vanilla, exit: ExitPolicy::None, kv_fill: KvFill::Reuse, max_batch: 8 };
        Measurement::new(server, objectives)
    }

    #[test]
    fn latencies_count_from_when_a_request_was_due_and_gaps_between_pieces() {
        let mut measurement = measurement(Some(Objectives { ttft_ms: Some(20.0), ..Objectives::default() }));
        let usage = Some(Usage { prompt_tokens: 6, completion_tokens: 4 });
        measurement
            .add(&exchange(0, Ok(Answer { pieces: vec![ms(30), ms(40), ms(60)], usage, depths: vec![0, 3, 1, 1] })));
        let summary = measurement.summary();
        assert_eq!((summary.ttft_mean_ms, summary.e2e_mean_ms, summary.tpot_mean_ms), (20.0, 50.0, 10.0));
        assert_eq!((summary.itl_mean_ms, summary.output_tokens, summary.goodput_req_s), (15.0, 4, Some(1.0 / 0.05)));
        assert_eq!(summary.mean_depth, (1 + 4 + 2 + 2) as f64 / 4.0);
        let rows: Vec<_> = measurement.metrics().requests().collect();
        assert_eq!((rows[0].prompt_tokens, rows[0].output_tokens, rows[0].admitted_s), (6, 4, 0.012));
        let account = measurement.account(3);
        assert_eq!((account.lag_mean_ms, account.lag_max_ms, account.interrupted, account.retries), (2.0, 2.0, 3, 1));
    }

    #[test]
    fn a_failure_has_a_line_and_no_part_in_the_metrics() {
        let mut measurement = measurement(None);
        measurement.add(&exchange(3, Err(Failure::new(FailureKind::Cut, "found half of it"))));
        measurement.add(&exchange(4, Ok(Answer { pieces: vec![ms(20)], ..Answer::default() })));
        let row = &measurement.failures()[0];
        assert_eq!((row.id, row.kind, row.sent_s, row.failed_s), (3, FailureKind::Cut, 0.012, 0.07));
        let summary = measurement.summary();
        assert_eq!((summary.requests, summary.output_tokens, summary.makespan_s), (1, 1, 0.01));
        assert_eq!(measurement.account(0).without_usage, 1);
    }

    #[test]
    fn what_a_client_cannot_see_is_not_made_up() {
        let mut measurement = measurement(None);
        measurement.add(&exchange(0, Ok(Answer { pieces: vec![ms(20)], ..Answer::default() })));
        let Summary { max_batch, mean_depth, occupancy, busy, kv_blocks, block_tokens, kv_tokens, passes, .. } =
            measurement.summary();
        assert_eq!((max_batch, kv_blocks, block_tokens, kv_tokens, passes), (8, 0, 0, 0, 0));
        assert!([mean_depth, occupancy, busy].iter().all(|value| value.is_nan()));
    }
}

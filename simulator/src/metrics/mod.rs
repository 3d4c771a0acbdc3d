//! Metrics of a run: an observer for measured and simulated runs, and the files it writes.
//!
//! Latencies are defined as in vLLM. TTFT is the time from arrival to first token. TPOT is (last - first token) /
//! (tokens - 1) of a request with more than one token. ITL is each gap between tokens. End-to-end latency is the time
//! from arrival to last token.

mod depth_rows;
mod distribution;
mod groups;
mod records;
mod request_log;
mod summary;

pub use depth_rows::{DepthRows, DepthRowsRecord};
pub use distribution::Distribution;
pub use groups::GroupSummary;
pub(crate) use records::RequestLatencies;
pub use records::{PassRow, RequestRow};
pub use request_log::RequestLog;
pub use summary::{Source, Summary, write_csv};

use scheduler::{Observer, PrefixUse, Settings, Token, Verified};
use traces::{Nanos, Request};

use crate::objectives::Objectives;
use request_log::OpenRows;

/// Collects the metrics of one machine, or of several on one clock with [`merge`](Self::merge).
///
/// Memory does not grow with the length of the run unless rows are kept. Rows that go to a [`RequestLog`] are not.
#[derive(Clone, Debug)]
pub struct Metrics {
    settings: Settings,
    objectives: Option<Objectives>,
    machines: u32,
    ttft: Distribution,
    tpot: Distribution,
    itl: Distribution,
    end_to_end: Distribution,
    depth_rows: DepthRows,
    totals: Totals,
    requests: RequestRows,
    passes: Option<Vec<PassRow>>,
}

/// Rows of requests.
#[derive(Clone, Debug)]
enum RequestRows {
    Dropped,
    /// By id.
    Kept(Vec<RequestRow>),
    /// Passed on.
    Open(OpenRows),
}

/// Sums over a run; times in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    requests: u64,
    /// Finished requests that met the objectives.
    met: u64,
    tokens: u64,
    /// Passes of all tokens: exit depth plus one of each.
    token_passes: u64,
    preemptions: u64,
    drafts: DraftTotals,
    /// Tokens of contexts that were looked up in the prefix cache, and those of them that were found.
    looked_up: u64,
    found: u64,
    passes: u64,
    row_visits: u64,
    backfill_rows: u64,
    busy: u64,
    /// Rows, decode rows, running sequences and KV blocks in use, each weighted by the time of its pass.
    row_time: u128,
    decode_row_time: u128,
    running_time: u128,
    block_time: u128,
    /// Requests that wait for a slot, weighted as well.
    waiting_time: u128,
    /// Most KV blocks in use in a pass.
    peak_blocks: u32,
    /// KV blocks of finished requests at their last token: total, and largest.
    final_blocks: u64,
    longest_blocks: u32,
    first_arrival: Option<Nanos>,
    last_token: Nanos,
}

/// What full depth has said of drafts.
#[derive(Clone, Copy, Debug, Default)]
struct DraftTotals {
    accepted: u64,
    rejected: u64,
    wasted_rows: u64,
}

impl Metrics {
    /// Metrics of a run that has not started.
    pub fn new(settings: &Settings) -> Self {
        Self {
            settings: *settings,
            objectives: None,
            machines: 1,
            ttft: Distribution::default(),
            tpot: Distribution::default(),
            itl: Distribution::default(),
            end_to_end: Distribution::default(),
            depth_rows: DepthRows::new(settings.num_loops),
            totals: Totals::default(),
            requests: RequestRows::Dropped,
            passes: None,
        }
    }

    /// Counts the requests that meet objectives, for the goodput.
    pub fn with_objectives(self, objectives: Objectives) -> Self {
        Self { objectives: Some(objectives), ..self }
    }

    /// Keeps a row for each request, of 80 bytes.
    pub fn with_requests(self) -> Self {
        Self { requests: RequestRows::Kept(Vec::new()), ..self }
    }

    /// Passes on a row for each request when it has ended. Other machines of the run have the same log.
    pub fn with_request_log(self, log: RequestLog) -> Self {
        Self { requests: RequestRows::Open(OpenRows::new(log)), ..self }
    }

    /// Keeps a row for each pass, of 40 bytes.
    pub fn with_passes(self) -> Self {
        Self { passes: Some(Vec::new()), ..self }
    }

    /// The settings of the run.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Time from a request's arrival to its first token.
    pub fn ttft(&self) -> &Distribution {
        &self.ttft
    }

    /// Time per output token after the first, by request.
    pub fn tpot(&self) -> &Distribution {
        &self.tpot
    }

    /// Gaps between the tokens of a request.
    pub fn itl(&self) -> &Distribution {
        &self.itl
    }

    /// Time from a request's arrival to its last token.
    pub fn end_to_end(&self) -> &Distribution {
        &self.end_to_end
    }

    /// Rows by depth over time.
    pub fn depth_rows(&self) -> &DepthRows {
        &self.depth_rows
    }

    /// Finished requests in order of id; empty without [`with_requests`](Self::with_requests).
    pub fn requests(&self) -> impl Iterator<Item = &RequestRow> {
        let rows = match &self.requests {
            RequestRows::Kept(rows) => &rows[..],
            RequestRows::Dropped | RequestRows::Open(_) => &[],
        };
        rows.iter().filter(|row| row.is_finished())
    }

    /// Passes in order; empty without [`with_passes`](Self::with_passes).
    pub fn passes(&self) -> &[PassRow] {
        self.passes.as_deref().unwrap_or_default()
    }

    /// Number of row visits to the block: one for each row of each pass.
    pub fn row_visits(&self) -> u64 {
        self.totals.row_visits
    }

    /// Time from the first arrival to the last token.
    pub fn makespan(&self) -> Nanos {
        self.totals.last_token.since(self.totals.first_arrival.unwrap_or_default())
    }

    /// Adds the metrics of another machine on the same clock.
    pub fn merge(&mut self, other: Self) {
        self.machines += other.machines;
        self.ttft.merge(other.ttft);
        self.tpot.merge(other.tpot);
        self.itl.merge(other.itl);
        self.end_to_end.merge(other.end_to_end);
        self.depth_rows.merge(other.depth_rows);
        self.totals.merge(&other.totals);
        if let (RequestRows::Kept(rows), RequestRows::Kept(others)) = (&mut self.requests, other.requests) {
            records::merge_requests(rows, others);
        }
        if let (Some(rows), Some(others)) = (&mut self.passes, other.passes) {
            rows.extend(others);
            rows.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
        }
    }

    /// Combined metrics of all machines of one run; `None` without machines.
    pub fn merged(machines: Vec<Self>) -> Option<Self> {
        machines.into_iter().reduce(|mut all, one| {
            all.merge(one);
            all
        })
    }

    #[inline]
    fn request_row(&mut self, request: &Request) -> Option<&mut RequestRow> {
        match &mut self.requests {
            RequestRows::Dropped => None,
            RequestRows::Kept(rows) => Some(records::row_of(rows, request)),
            RequestRows::Open(rows) => Some(rows.row_of(request)),
        }
    }

    /// No more will come of a request on this machine.
    fn end_row(&mut self, request: &Request) {
        if let RequestRows::Open(rows) = &mut self.requests {
            rows.end(request);
        }
    }
}

impl Totals {
    fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.met += other.met;
        self.tokens += other.tokens;
        self.token_passes += other.token_passes;
        self.preemptions += other.preemptions;
        self.drafts.accepted += other.drafts.accepted;
        self.drafts.rejected += other.drafts.rejected;
        self.drafts.wasted_rows += other.drafts.wasted_rows;
        self.looked_up += other.looked_up;
        self.found += other.found;
        self.passes += other.passes;
        self.row_visits += other.row_visits;
        self.backfill_rows += other.backfill_rows;
        self.busy += other.busy;
        self.row_time += other.row_time;
        self.decode_row_time += other.decode_row_time;
        self.running_time += other.running_time;
        self.block_time += other.block_time;
        self.waiting_time += other.waiting_time;
        self.peak_blocks = self.peak_blocks.max(other.peak_blocks);
        self.final_blocks += other.final_blocks;
        self.longest_blocks = self.longest_blocks.max(other.longest_blocks);
        self.first_arrival = self.first_arrival.into_iter().chain(other.first_arrival).min();
        self.last_token = self.last_token.max(other.last_token);
    }
}

impl Observer for Metrics {
    fn looked_up(&mut self, _now: Nanos, _request: &Request, found: PrefixUse) {
        self.totals.looked_up += u64::from(found.looked_up);
        self.totals.found += u64::from(found.found);
    }

    fn admitted(&mut self, now: Nanos, request: &Request) {
        let first = self.totals.first_arrival.get_or_insert(request.arrival);
        *first = request.arrival.min(*first);
        if let Some(row) = self.request_row(request) {
            row.admitted(now);
        }
    }

    fn preempted(&mut self, _now: Nanos, request: &Request) {
        self.totals.preemptions += 1;
        if let Some(row) = self.request_row(request) {
            row.preemptions += 1;
        }
    }

    fn pass(&mut self, record: &scheduler::PassRecord<'_>) {
        let rows = self.depth_rows.record(record);
        let elapsed = u128::from(record.elapsed.0);
        let totals = &mut self.totals;
        totals.passes += 1;
        totals.row_visits += u64::from(rows.total());
        totals.backfill_rows += u64::from(rows.backfill);
        totals.busy += record.elapsed.0;
        totals.row_time += u128::from(rows.total()) * elapsed;
        totals.decode_row_time += u128::from(rows.decode) * elapsed;
        totals.running_time += u128::from(record.running) * elapsed;
        totals.waiting_time += u128::from(record.waiting) * elapsed;
        let blocks = record.pass.tables.num_blocks() - record.pass.tables.num_free();
        totals.block_time += u128::from(blocks) * elapsed;
        totals.peak_blocks = totals.peak_blocks.max(blocks);
        if let Some(passes) = &mut self.passes {
            passes.push(PassRow::new(record, rows));
        }
    }

    fn verified(&mut self, _now: Nanos, _request: &Request, verified: Verified) {
        let drafts = &mut self.totals.drafts;
        drafts.accepted += u64::from(verified.accepted);
        drafts.rejected += u64::from(verified.rejected);
        drafts.wasted_rows += u64::from(verified.wasted_rows);
    }

    #[inline]
    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        let passes = u64::from(token.depth) + 1;
        self.totals.tokens += 1;
        self.totals.token_passes += passes;
        if let Some(previous) = token.previous {
            // Tokens that exit in one pass at one depth mostly shared their previous pass too, so their gaps are equal.
            self.itl.record_by_key(now - previous, token.depth.into());
        }
        if let Some(row) = self.request_row(request) {
            row.passes += passes;
        }
    }

    fn finished(&mut self, now: Nanos, request: &Request, first_token: Nanos) {
        self.totals.requests += 1;
        let blocks = request.context_tokens().div_ceil(self.settings.block_tokens);
        self.totals.final_blocks += u64::from(blocks);
        self.totals.longest_blocks = self.totals.longest_blocks.max(blocks);
        self.totals.last_token = self.totals.last_token.max(now);
        let latencies = RequestLatencies::new(now, request, first_token);
        self.ttft.record(latencies.ttft);
        self.end_to_end.record(latencies.end_to_end);
        if let Some(tpot) = latencies.tpot {
            self.tpot.record(tpot);
        }
        self.totals.met += u64::from(self.objectives.is_some_and(|objectives| objectives.are_met(&latencies)));
        if let Some(row) = self.request_row(request) {
            row.finished(now, &latencies);
        }
        self.end_row(request);
    }

    fn handed_over(&mut self, _now: Nanos, request: &Request) {
        self.end_row(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::Batching;

    fn settings() -> Settings {
        Settings {
            max_batch: 2,
            token_budget: 8,
            prefill_chunk: 8,
            num_blocks: 16,
            ..Settings::new(Batching::Sequence, "confidence:margin:0.5".parse().unwrap(), 4)
        }
    }

    fn ms(milliseconds: u64) -> Nanos {
        Nanos(milliseconds * 1_000_000)
    }

    fn watched() -> Metrics {
        watch(Metrics::new(&settings()).with_requests())
    }

    /// Two requests. One arrives at 10 ms and gets tokens at 30, 40 and 60 ms; the other arrives at 20 ms and gets one
    /// at 50 ms.
    fn watch(mut metrics: Metrics) -> Metrics {
        let long = Request { id: 0, arrival: ms(10), prompt_tokens: 5, output_tokens: 3 };
        let short = Request { id: 1, arrival: ms(20), prompt_tokens: 5, output_tokens: 1 };
        let token = |index, depth, previous| Token { index, depth, previous };
        metrics.admitted(ms(15), &long);
        metrics.token(ms(30), &long, token(0, 3, None));
        metrics.admitted(ms(30), &short);
        metrics.preempted(ms(35), &short);
        metrics.token(ms(40), &long, token(1, 0, Some(ms(30))));
        metrics.admitted(ms(40), &short);
        metrics.token(ms(50), &short, token(0, 1, None));
        metrics.finished(ms(50), &short, ms(50));
        metrics.token(ms(60), &long, token(2, 0, Some(ms(40))));
        metrics.finished(ms(60), &long, ms(30));
        metrics
    }

    #[test]
    fn latencies_are_as_vllm_defines_them() {
        let summary = watched().summary(Source::Measured, None);
        assert_eq!(summary.ttft_mean_ms, 25.0);
        assert_eq!(summary.tpot_mean_ms, 15.0);
        assert_eq!(summary.itl_p50_ms, 15.0);
        assert_eq!(summary.e2e_mean_ms, 40.0);
        assert_eq!(summary.mean_depth, (4 + 1 + 1 + 2) as f64 / 4.0);
        assert_eq!((summary.requests, summary.output_tokens, summary.preemptions), (2, 4, 1));
        assert!((summary.throughput_tok_s - 4.0 / 0.05).abs() < 1e-9);
    }

    #[test]
    fn the_batch_that_fits_is_counted_in_whole_blocks_of_final_lengths() {
        let mut metrics = Metrics::new(&settings());
        // 15 and 40 final positions take 1 and 3 blocks of 16 positions; the cache has 16 blocks.
        for (id, output_tokens) in [(0, 10), (1, 35)] {
            metrics.finished(ms(9), &Request { id, arrival: ms(0), prompt_tokens: 6, output_tokens }, ms(1));
        }
        let summary = metrics.summary(Source::Simulated, None);
        assert_eq!((summary.kv_tokens, summary.batch_fits, summary.batch_fits_longest), (256, 8, 5));
    }

    #[test]
    fn goodput_counts_requests_within_every_objective() {
        let summary = |ttft_ms, tpot_ms| {
            let objectives = Objectives { ttft_ms, tpot_ms, e2e_ms: None };
            let metrics = watch(Metrics::new(&settings()).with_objectives(objectives));
            let summary = metrics.summary(Source::Measured, None);
            (summary.objectives_met.unwrap(), summary.goodput_req_s.unwrap())
        };
        // TTFT is 20 ms for the long request and 30 ms for the short one, which has no TPOT; the makespan is 50 ms.
        assert_eq!(summary(Some(30.0), Some(15.0)), (1.0, 2.0 / 0.05));
        assert_eq!(summary(Some(25.0), Some(15.0)), (0.5, 1.0 / 0.05));
        assert_eq!(summary(None, Some(14.9)), (0.5, 1.0 / 0.05));
        assert_eq!(summary(Some(1.0), None), (0.0, 0.0));
        assert_eq!(watched().summary(Source::Measured, None).goodput_req_s, None);
    }

    #[test]
    fn rows_of_requests_say_when_and_how_long() {
        let metrics = watched();
        let rows: Vec<_> = metrics.requests().collect();
        assert_eq!((rows[0].ttft_ms, rows[0].tpot_ms, rows[0].e2e_ms, rows[0].passes), (20.0, 15.0, 50.0, 6));
        assert_eq!((rows[1].ttft_ms, rows[1].e2e_ms, rows[1].preemptions), (30.0, 30.0, 1));
        assert!(rows[1].tpot_ms.is_nan());
        assert!((rows[1].admitted_s - 0.03).abs() < 1e-12);
    }

    #[test]
    fn a_summary_reads_back_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("summary.csv");
        let summary = watched().summary(Source::Measured, Some(0.75));
        // Without a pass the occupancy is NaN, which is not equal to itself.
        let summary = Summary { occupancy: 0.5, mean_rows: 1.0, mean_running: 1.0, kv_usage: 0.5, ..summary };
        write_csv(&path, [&summary]).unwrap();
        let read: Vec<Summary> =
            csv::Reader::from_path(&path).unwrap().deserialize().collect::<Result<_, _>>().unwrap();
        assert_eq!(read, [summary]);
        let text = std::fs::read_to_string(&path).unwrap();
        let columns = "source,batching,exit,threshold";
        assert!(
            text.starts_with(columns)
                && text.contains("measured,sequence,confidence,0.5,confidence:margin:0.5,reuse,2")
        );
    }

    #[test]
    fn an_unwritable_file_is_named() {
        let error = write_csv(std::path::Path::new("/nowhere/summary.csv"), [1]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/summary.csv"), "{error}");
    }
}

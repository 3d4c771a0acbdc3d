//! Under a policy that speculates, every request gets the text of full depth: whatever the drafts, the batching, the
//! memory and the requests that end early. Rows find the entries of their own history only, and no block is lost.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use scheduler::{
    Batching, Executor, ExitPolicy, KvFill, Observer, Pass, RowKind, ScheduleError, Segment, Server, Settings, Slot,
    Terms, Token, Verified,
};
use traces::hash::mix;
use traces::{Nanos, PrefixHashes, Request};

/// Requests whose ids are equal modulo [`FAMILIES`] have this many prompt tokens in common.
const SHARED_TOKENS: u32 = 13;
const FAMILIES: u32 = 3;

/// Hash of a prompt up to and with a position.
fn prompt_hash(request: u32, position: u32) -> u64 {
    let owner = if position < SHARED_TOKENS { request % FAMILIES } else { FAMILIES + request };
    mix(u64::from(owner) << 32 | u64::from(position))
}

/// What a model of one sequence after another would predict, by hash of all tokens before.
#[derive(Clone, Copy, Debug)]
struct Oracle {
    /// Drafts of 8 that full depth confirms, on average.
    right: u64,
}

impl Oracle {
    fn full_depth(self, history: u64) -> u32 {
        (mix(history ^ 1) >> 60) as u32
    }

    fn draft(self, history: u64, depth: u8) -> u32 {
        let is_right = mix(history ^ (2 + u64::from(depth))) % 8 < self.right;
        if is_right { self.full_depth(history) } else { self.full_depth(history) ^ 1 }
    }

    fn signal(self, history: u64, depth: u8) -> f32 {
        (mix(history ^ (100 + u64::from(depth))) % 4) as f32 / 4.0
    }
}

#[derive(Clone, Debug)]
struct Text {
    request: u32,
    prompt_tokens: u32,
    tokens: Vec<u32>,
    /// Tokens that are no drafts.
    certain: usize,
}

impl Text {
    /// Hash of all tokens up to and with a position.
    fn hash(&self, position: u32) -> u64 {
        match position.checked_sub(self.prompt_tokens) {
            None => prompt_hash(self.request, position),
            Some(last) => {
                let prompt = prompt_hash(self.request, self.prompt_tokens - 1);
                self.tokens[..=last as usize].iter().fold(prompt, |hash, &token| mix(hash ^ u64::from(token)))
            }
        }
    }
}

/// Runs nothing, and checks what it is asked to run.
struct Checker {
    settings: Settings,
    oracle: Oracle,
    by_slot: HashMap<Slot, Text>,
    /// Of requests that gave up their slot.
    texts: HashMap<u32, Text>,
    /// By block, offset and depth: the hash of the tokens up to the position whose entry is there.
    entries: HashMap<(u32, u32, u8), u64>,
    /// By slot and position: the next depth of a row in flight or of a draft, and the hash of its tokens.
    states: HashMap<(Slot, u32), (u8, u64)>,
    most_drafts: usize,
}

impl Checker {
    fn new(settings: Settings, oracle: Oracle) -> Self {
        let (by_slot, texts, entries, states) = Default::default();
        Self { settings, oracle, by_slot, texts, entries, states, most_drafts: 0 }
    }

    fn place(&self, pass: &Pass<'_>, slot: Slot, position: u32, depth: u8) -> (u32, u32, u8) {
        let block = pass.blocks(slot)[(position / self.settings.block_tokens) as usize];
        let depth = if self.settings.kv_fill == KvFill::First { 0 } else { depth };
        (block, position % self.settings.block_tokens, depth)
    }

    fn run_row(&mut self, pass: &Pass<'_>, segment: &Segment, position: u32) {
        let (slot, depth) = (segment.slot, segment.depth);
        let hash = self.by_slot[&slot].hash(position);
        if depth > 0 {
            assert_eq!(
                self.states.get(&(slot, position)),
                Some(&(depth, hash)),
                "a row skips a depth, or is another's"
            );
        }
        self.states.insert((slot, position), (depth + 1, hash));
        if depth == 0 || self.settings.kv_fill != KvFill::First {
            let place = self.place(pass, slot, position, depth);
            self.entries.insert(place, hash);
        }
    }

    fn verify(&mut self, segment: &Segment) -> f32 {
        let text = self.by_slot.get_mut(&segment.slot).unwrap();
        let mut accepted = 0;
        for position in segment.start..segment.start + segment.tokens {
            let token = (position + 1 - text.prompt_tokens) as usize;
            assert_eq!(text.certain, token, "a draft is decided out of order");
            let full_depth = self.oracle.full_depth(text.hash(position));
            text.certain = token + 1;
            if text.tokens[token] != full_depth {
                text.tokens.truncate(token);
                text.tokens.push(full_depth);
                self.states.retain(|&(slot, at), _| slot != segment.slot || at <= position);
                break;
            }
            accepted += 1;
        }
        accepted as f32
    }
}

impl Executor for Checker {
    type Error = std::convert::Infallible;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error> {
        let Request { id, prompt_tokens, .. } = *request;
        let new = Text { request: id, prompt_tokens, tokens: Vec::new(), certain: 0 };
        let text = self.texts.remove(&id).unwrap_or(new);
        assert_eq!(text.tokens.len(), generated as usize, "a preempted request goes on where it was");
        assert!(self.by_slot.insert(slot, text).is_none(), "slot {slot} is taken");
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        let mut text = self.by_slot.remove(&slot).expect("the slot is taken");
        text.tokens.truncate(text.certain);
        self.texts.insert(text.request, text);
        self.states.retain(|&(other, _), _| other != slot);
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
        assert!(pass.num_rows() <= self.settings.token_budget);
        if self.settings.batching.is_lockstep() {
            assert!(pass.segments.iter().all(|segment| segment.depth == pass.segments[0].depth));
            let has = |kind| pass.segments.iter().any(|segment| segment.kind == kind);
            assert!(!(has(RowKind::Decode) && has(RowKind::Verify)), "all verify in one iteration");
        }
        for segment in pass.segments {
            (segment.start..segment.start + segment.tokens).for_each(|at| self.run_row(pass, segment, at));
        }
        for segment in pass.segments {
            let text = &self.by_slot[&segment.slot];
            for position in 0..segment.start {
                let found = self.entries.get(&self.place(pass, segment.slot, position, segment.depth));
                assert_eq!(found, Some(&text.hash(position)), "a row finds what is not of its history");
            }
        }
        for (segment, signal) in pass.segments.iter().zip(signals) {
            let text = &self.by_slot[&segment.slot];
            let is_read = pass.reads_signal(segment);
            assert!(!is_read || segment.kind == RowKind::Decode, "no other row can leave a draft");
            *signal = match is_read {
                true => self.oracle.signal(text.hash(segment.start + segment.tokens - 1), segment.depth),
                false => f32::NAN,
            };
            if pass.verifies(segment) {
                *signal = self.verify(segment);
            }
        }
        Ok(Nanos(100 + u64::from(pass.num_rows())))
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error> {
        for &index in exiting {
            let segment = pass.exited(index as usize);
            let history = self.by_slot[&segment.slot].hash(segment.start + segment.tokens - 1);
            let text = self.by_slot.get_mut(&segment.slot).unwrap();
            if segment.depth + 1 < self.settings.num_loops {
                assert_eq!(segment.kind, RowKind::Decode);
                text.tokens.push(self.oracle.draft(history, segment.depth));
                self.most_drafts = self.most_drafts.max(text.tokens.len() - text.certain);
            } else {
                assert_eq!(text.certain, text.tokens.len(), "full depth decides of drafts in order");
                text.tokens.push(self.oracle.full_depth(history));
                text.certain = text.tokens.len();
            }
        }
        Ok(Nanos(10))
    }
}

/// What is delivered.
#[derive(Default)]
struct Log {
    delivered: HashMap<u32, u32>,
    finished: usize,
    preemptions: usize,
    verified: Verified,
    passes: u64,
    deepest: u8,
}

impl Observer for Log {
    fn preempted(&mut self, _: Nanos, _: &Request) {
        self.preemptions += 1;
    }

    fn pass(&mut self, _: &scheduler::PassRecord<'_>) {
        self.passes += 1;
    }

    fn verified(&mut self, _: Nanos, _: &Request, verified: Verified) {
        self.verified.accepted += verified.accepted;
        self.verified.rejected += verified.rejected;
        self.verified.dropped += verified.dropped;
        self.verified.wasted_rows += verified.wasted_rows;
    }

    fn token(&mut self, _: Nanos, request: &Request, token: Token) {
        assert_eq!(token.depth, self.deepest, "every token has run every depth");
        let delivered = self.delivered.entry(request.id).or_default();
        assert_eq!(*delivered, token.index, "a token is missing or came twice");
        *delivered += 1;
    }

    fn finished(&mut self, _: Nanos, _: &Request, _: Nanos) {
        self.finished += 1;
    }
}

fn prefix_hashes(requests: &[Request], block_tokens: u32) -> PrefixHashes {
    let mut hashes = PrefixHashes::new(block_tokens);
    for request in requests {
        let ends = (1..=request.prompt_tokens / block_tokens).map(|blocks| blocks * block_tokens - 1);
        hashes.push(ends.map(|end| prompt_hash(request.id, end)));
    }
    hashes
}

/// Serves requests, of which some end before given passes and some have exit policies of their own.
fn run(
    settings: Settings,
    oracle: Oracle,
    requests: &[Request],
    ends: &[(u64, u32)],
    exits: &[Option<ExitPolicy>],
) -> (Log, Checker) {
    let mut server = Server::new(settings, Checker::new(settings, oracle)).unwrap();
    server.share_prefixes(Arc::new(prefix_hashes(requests, settings.block_tokens))).unwrap();
    let mut log = Log { deepest: settings.num_loops - 1, ..Log::default() };
    let (mut now, mut next) = (Nanos::ZERO, requests.iter().peekable());
    loop {
        for &(_, request) in ends.iter().filter(|(pass, _)| *pass == log.passes) {
            server.end(request);
        }
        while let Some(&request) = next.next_if(|request| request.arrival <= now) {
            let exit = exits.get(request.id as usize % exits.len().max(1)).copied().flatten();
            server.submit_under(request, Terms { exit, priority: 0 }).unwrap();
        }
        match (server.start_pass(now, &mut log).unwrap(), next.peek()) {
            (Some(elapsed), _) => {
                now += elapsed;
                server.finish_pass(now, &mut log);
            }
            (None, Some(request)) => now = request.arrival,
            (None, None) => break,
        }
    }
    assert_eq!(server.scheduler().num_running() + server.scheduler().num_waiting(), 0);
    assert_eq!(server.scheduler().pass().tables.num_free(), settings.num_blocks, "blocks are still held at the end");
    (log, server.into_executor())
}

/// Every text is the beginning of that of full depth, and all of it unless the request was ended.
fn assert_full_depth(checker: &Checker, oracle: Oracle, requests: &[Request], ended: &[u32]) {
    for request in requests {
        let Some(text) = checker.texts.get(&request.id) else {
            assert!(ended.contains(&request.id), "request {} was never served", request.id);
            continue;
        };
        let whole = text.tokens.len() == request.output_tokens as usize;
        assert!(whole || ended.contains(&request.id), "request {} has a part of its text", request.id);
        for (token, &found) in (0..).zip(&text.tokens) {
            let expected = oracle.full_depth(text.hash(request.prompt_tokens + token - 1));
            assert_eq!(found, expected, "request {}, token {token}", request.id);
        }
    }
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    prop::collection::vec((0u64..3000, 1u32..40, 1u32..20), 1..24).prop_map(|lengths| {
        let mut arrival = Nanos::ZERO;
        let timed = lengths.into_iter().map(|(gap, prompt_tokens, output_tokens)| {
            arrival += Nanos(gap);
            (arrival, prompt_tokens, output_tokens)
        });
        let request =
            |(id, (arrival, prompt_tokens, output_tokens))| Request { id, arrival, prompt_tokens, output_tokens };
        (0..).zip(timed).map(request).collect()
    })
}

const POLICIES: [&str; 7] = [
    "speculate:static:0:1",
    "speculate:static:0:4",
    "speculate:static:1:3",
    "speculate:top1:0.5:1",
    "speculate:top1:0.5:6",
    "speculate:top1:0.25:5..0:2..7",
    "speculate:gate:0:255",
];

prop_compose! {
    fn settings()(
        exit in prop::sample::select(POLICIES.to_vec()), batching in prop::sample::select(Batching::ALL.to_vec()),
        num_loops in 2u8..5, max_batch in 1u32..9, slack in 0u32..40, prefill_chunk in 1u32..50, block_tokens in 1u32..9,
        spare_blocks in 0u32..40, prefix_caching in any::<bool>(), exit_wait in 0u32..5,
        kv_fill in prop::sample::select(vec![KvFill::Backfill, KvFill::First]),
    ) -> Settings {
        Settings {
            kv_fill, max_batch, token_budget: max_batch + slack, prefill_chunk, block_tokens, prefix_caching, exit_wait,
            exit_batch: if exit_wait == 0 { 0 } else { slack % 4 }, num_blocks: 60 / block_tokens + 1 + spare_blocks, ..Settings::new(batching, exit.parse().unwrap(), num_loops)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 200 } else { 2000 }))]

    #[test]
    fn every_request_gets_the_text_of_full_depth(
        settings in settings(), requests in requests(), right in 0u64..9,
        ends in prop::collection::vec((0u64..200, 0u32..24), 0..6), own in any::<bool>(),
    ) {
        let oracle = Oracle { right };
        let reads = settings.exit.threshold().is_some() && own;
        let exit = |text: &str| text.parse::<ExitPolicy>().ok().filter(|exit| {
            settings.check_terms(0, &Terms { exit: Some(*exit), priority: 0 }).is_ok()
        });
        let exits = [None, exit("none"), exit("static:0"), exit("top1:0.75")];
        let exits = if reads { &exits[..] } else { &[] };
        let (_, checker) = run(settings, oracle, &requests, &ends, exits);
        let ended: Vec<u32> = ends.iter().map(|(_, request)| *request).collect();
        assert_full_depth(&checker, oracle, &requests, &ended);
        let ExitPolicy::Speculate(speculation) = settings.exit else { unreachable!() };
        let limit = speculation.drafts.calm.max(speculation.drafts.busy);
        prop_assert!(checker.most_drafts <= usize::from(limit), "{} drafts", checker.most_drafts);
    }
}

fn requests_at_once(number: u32, prompt_tokens: u32, output_tokens: u32) -> Vec<Request> {
    (0..number).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens }).collect()
}

fn one_sequence(exit: &str, batching: Batching) -> Settings {
    let exit = exit.parse().unwrap();
    Settings { kv_fill: KvFill::Backfill, max_batch: 1, token_budget: 64, ..Settings::new(batching, exit, 4) }
}

#[test]
fn right_drafts_save_passes() {
    // A prompt of four passes predicts the first token. Then three drafts of one pass each, and a row of four passes that
    // verifies them: twice for eight tokens, and once for the last one alone.
    for batching in Batching::ALL {
        let settings = one_sequence("speculate:static:0:3", batching);
        let (log, _) = run(settings, Oracle { right: 8 }, &requests_at_once(1, 5, 10), &[], &[]);
        assert_eq!((log.passes, log.verified.accepted), (4 + 2 * (3 + 4) + 4, 6), "{batching}");
        assert_eq!((log.verified.rejected, log.verified.wasted_rows), (0, 0));
    }
}

#[test]
fn a_contradicted_draft_is_replaced_and_all_after_it_is_taken_back() {
    // Each verification contradicts the first of three drafts and gives one token in its place. The rows of three later
    // positions are lost: of two drafts at depth 0, to which the verification adds three depths, and its own four.
    for batching in Batching::ALL {
        let settings = one_sequence("speculate:static:0:3", batching);
        let (log, _) = run(settings, Oracle { right: 0 }, &requests_at_once(1, 5, 6), &[], &[]);
        let Verified { accepted, rejected, dropped, wasted_rows } = log.verified;
        // After tokens 1 and 2 there is room for three drafts, then for two, for one, and for none.
        assert_eq!((accepted, rejected, dropped), (0, 4, 2 + 2 + 1), "{batching}");
        assert_eq!(wasted_rows, 4 * (3 + 3 + 2 + 1), "{batching}");
        assert_eq!(log.passes, 4 + (3 + 4) + (3 + 4) + (2 + 4) + (1 + 4) + 4, "{batching}");
    }
}

#[test]
fn without_drafts_the_passes_are_those_of_full_depth() {
    for batching in Batching::ALL {
        let requests = requests_at_once(7, 20, 9);
        let passes = |exit: &str| {
            let settings = Settings { max_batch: 3, ..one_sequence(exit, batching) };
            let mut server = Server::new(settings, Checker::new(settings, Oracle { right: 8 })).unwrap();
            let (mut log, mut now) = (Log { deepest: 3, ..Log::default() }, Nanos::ZERO);
            requests.iter().for_each(|&request| server.submit(request).unwrap());
            while let Some(elapsed) = server.start_pass(now, &mut log).unwrap() {
                now += elapsed;
                server.finish_pass(now, &mut log);
            }
            (log.passes, now)
        };
        assert_eq!(passes("speculate:top1:0:0"), passes("none"), "{batching}");
        assert!(passes("speculate:top1:0:2").0 < passes("none").0, "{batching}");
    }
}

#[test]
fn preempted_requests_lose_their_drafts_only() {
    let settings = Settings {
        max_batch: 4,
        block_tokens: 2,
        num_blocks: 22,
        ..one_sequence("speculate:static:1:4", Batching::Depth)
    };
    let oracle = Oracle { right: 6 };
    let requests = requests_at_once(9, 12, 18);
    let (log, checker) = run(settings, oracle, &requests, &[], &[]);
    assert!(log.preemptions > 0 && log.verified.rejected > 0 && log.verified.accepted > 0);
    assert_full_depth(&checker, oracle, &requests, &[]);
}

#[test]
fn settings_under_which_drafts_cannot_be_verified_are_refused() {
    let settings = one_sequence("speculate:static:0:3", Batching::Depth);
    let refused = |settings: Settings| settings.check().unwrap_err().to_string();
    assert!(refused(Settings { kv_fill: KvFill::Reuse, ..settings }).ends_with("expected kv_fill backfill or first"));
    assert!(refused(Settings { async_scheduling: true, ..settings }).contains("async_scheduling"));
    let deep = Settings { exit: "speculate:static:4:3".parse().unwrap(), ..settings };
    assert_eq!(deep.check(), Err(ScheduleError::StaticDepth { depth: 4, num_loops: 4 }));
    assert_eq!(ExitPolicy::None.served_fill(KvFill::Reuse), KvFill::Reuse);
    for (asked, served) in
        [(KvFill::Reuse, KvFill::Backfill), (KvFill::Skip, KvFill::Backfill), (KvFill::First, KvFill::First)]
    {
        assert_eq!(settings.exit.served_fill(asked), served);
    }
}

//! Invariants of every run under every policy. Each row runs exactly once. Each row finds the keys and values of its
//! predecessors. Only one holder writes a KV block. Every request ends, and the queue is first come, first served.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use proptest::prelude::*;
use scheduler::{
    Batching, CustomExit, CustomPolicy, Executor, ExitPolicy, ExitRow, KvFill, Load, Memory, Observer, OpenLoad, Pass,
    PassRecord, RowKind, Segment, Server, Serving, Settings, SignalRead, Slot, Terms, Token, Unordered, VirtualClock,
    serve,
};
use traces::{ExitSignal, Nanos, PrefixHashes, Request};

/// The last depth that a request's token reaches, drawn once for all policies.
fn sure_depth(request: u32, token: u32, num_loops: u8) -> u8 {
    let mixed = (u64::from(request) << 32 | u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed >> 40) % u64::from(num_loops)) as u8
}

/// Length of the common prefix of prompts whose request ids are equal modulo [`FAMILIES`].
const SHARED_TOKENS: u32 = 13;
const FAMILIES: u32 = 3;

/// Identifies the keys and values at a position by all tokens up to it. Tokens past the common prefix are unique.
fn contents(request: u32, position: u32) -> (u32, u32) {
    if position < SHARED_TOKENS { (request % FAMILIES, position) } else { (FAMILIES + request, position) }
}

fn prefix_hashes(requests: &[Request], block_tokens: u32) -> PrefixHashes {
    let mut hashes = PrefixHashes::new(block_tokens);
    for request in requests {
        let ends = (1..=request.prompt_tokens / block_tokens).map(|blocks| blocks * block_tokens - 1);
        hashes.push(ends.map(|end| {
            let (owner, position) = contents(request.id, end);
            u64::from(owner) << 32 | u64::from(position)
        }));
    }
    hashes
}

#[derive(Clone, Debug, Default)]
struct Resident {
    request: u32,
    prompt_tokens: u32,
    generated: u32,
    /// Whether it has run a row since it was admitted.
    begun: bool,
}

/// An executor that runs nothing, and checks that the passes it gets are legal.
struct Checker {
    settings: Settings,
    residents: HashMap<Slot, Resident>,
    admitted: Vec<u32>,
    /// The depth at which each token exited, by request.
    exits: HashMap<u32, Vec<u8>>,
    /// The owner of each cache entry: by depth, block and offset in the block.
    cache: HashMap<(u8, u32, u32), (u32, u32)>,
    /// Rows that sequences have run since they were admitted: slot, position and depth.
    ran: HashSet<(Slot, u32, u8)>,
    /// Positions that were found in the cache and never run.
    found: u64,
    /// Number of passes so far.
    passes: u32,
    /// The last pass of each slot's decode row.
    last_pass: HashMap<Slot, u32>,
}

impl Checker {
    fn new(settings: Settings) -> Self {
        Self {
            settings,
            residents: HashMap::new(),
            admitted: Vec::new(),
            exits: HashMap::new(),
            cache: HashMap::new(),
            ran: HashSet::new(),
            found: 0,
            passes: 0,
            last_pass: HashMap::new(),
        }
    }

    fn check_blocks(&self, pass: &Pass<'_>) {
        let mut held = HashSet::new();
        for (&slot, resident) in &self.residents {
            let own: HashSet<_> = pass.blocks(slot).iter().collect();
            assert_eq!(own.len(), pass.blocks(slot).len(), "request {} holds a block twice", resident.request);
            for &block in pass.blocks(slot) {
                assert!(block < self.settings.num_blocks);
                let first = held.insert(block);
                assert!(first || self.settings.prefix_caching, "request {} holds another's block", resident.request);
            }
        }
        assert_eq!(held.len() as u32 + pass.tables.num_free(), self.settings.num_blocks, "a block has leaked");
    }

    fn place(&self, pass: &Pass<'_>, slot: Slot, depth: u8, position: u32) -> (u8, u32, u32) {
        let block = pass.blocks(slot)[(position / self.settings.block_tokens) as usize];
        let depth = if self.settings.kv_fill == KvFill::First { 0 } else { depth };
        (depth, block, position % self.settings.block_tokens)
    }

    /// The depth at which the row at a position exited; `None` if it belongs to a prompt or has not exited.
    fn exit_of(&self, slot: Slot, position: u32) -> Option<u8> {
        let resident = &self.residents[&slot];
        let token = (position + 1).checked_sub(resident.prompt_tokens).filter(|&token| token > 0)?;
        self.exits.get(&resident.request)?.get(token as usize).copied()
    }

    /// Whether rows at a depth attend to the keys and values of a position before them.
    fn is_attended(&self, slot: Slot, depth: u8, position: u32) -> bool {
        self.settings.kv_fill != KvFill::Skip || self.exit_of(slot, position).is_none_or(|exit| depth <= exit)
    }

    /// Whether a row keeps its keys and values at its depth.
    fn is_kept(&self, slot: Slot, depth: u8, position: u32) -> bool {
        match self.settings.kv_fill {
            KvFill::First => depth == 0,
            KvFill::Skip => self.is_attended(slot, depth, position),
            KvFill::Reuse | KvFill::Backfill => true,
            KvFill::Last | KvFill::Cycle(_) => unreachable!("checked by `Slots`"),
        }
    }

    /// Backfill is of exited tokens, at depths that they have not run. It takes only unused places, unless rows wait
    /// for it: then those rows are in this pass, or they stall and backfill takes the whole budget.
    fn check_backfill(&self, pass: &Pass<'_>) {
        let (mut decodes, mut backfill, mut idle) = (0, 0, 0);
        for segment in pass.segments {
            decodes += u32::from(segment.kind == RowKind::Decode);
            if segment.kind != RowKind::Backfill {
                continue;
            }
            assert_eq!(self.settings.kv_fill, KvFill::Backfill);
            assert!(!segment.predicts, "nothing is read of backfill");
            for position in segment.start..segment.start + segment.tokens {
                let exit = self.exit_of(segment.slot, position).expect("its token has exited");
                assert!(segment.depth > exit);
            }
            let awaits = |row: &&Segment| row.kind == RowKind::Decode && row.slot == segment.slot;
            let awaited = pass.segments.iter().find(awaits).is_some_and(|row| row.depth == segment.depth);
            backfill += segment.tokens;
            idle += if awaited { 0 } else { segment.tokens };
        }
        let fits = decodes + backfill <= self.settings.max_batch || pass.num_rows() == self.settings.token_budget;
        assert!(idle == 0 || fits, "{decodes} decode rows and {backfill} of backfill");
    }

    /// Whether a row of a prompt leaves copies of its entries, since it runs no deeper.
    fn ends_prompt(&self, segment: &Segment, position: u32) -> bool {
        let Resident { request, prompt_tokens, .. } = self.residents[&segment.slot];
        let exited = || self.exits.get(&request).is_some_and(|exits| exits[0] <= segment.depth);
        let is_last = position + 1 == prompt_tokens;
        segment.kind == RowKind::Prompt
            && self.settings.prefill_depth == Some(segment.depth)
            && (position + 1 < prompt_tokens || is_last && exited())
    }

    /// Writes the keys and values of a position at the depths below one, as copies.
    fn fill_deeper(&mut self, pass: &Pass<'_>, slot: Slot, depth: u8, position: u32) {
        for deeper in depth + 1..self.settings.num_loops {
            self.write(pass, slot, deeper, position);
        }
    }

    /// Writes the keys and values of one position and depth. Other holders of the block must expect them there.
    fn write(&mut self, pass: &Pass<'_>, slot: Slot, depth: u8, position: u32) {
        let place = self.place(pass, slot, depth, position);
        let written = contents(self.residents[&slot].request, position);
        for (&other, resident) in &self.residents {
            if let Some(block) = pass.blocks(other).iter().position(|&block| block == place.1) {
                let expected = contents(resident.request, block as u32 * self.settings.block_tokens + place.2);
                assert_eq!(expected, written, "a block is written that request {} needs otherwise", resident.request);
            }
        }
        self.cache.insert(place, written);
    }
}

impl Executor for Checker {
    type Error = std::convert::Infallible;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error> {
        let resident = Resident { request: request.id, prompt_tokens: request.prompt_tokens, generated, begun: false };
        if self.settings.batching == Batching::Vanilla {
            let begun = self.residents.values().any(|other| other.begun);
            assert!(!begun, "vanilla batching admits only into an idle machine");
        }
        assert!(self.residents.insert(slot, resident).is_none(), "slot {slot} is taken");
        self.ran.retain(|row| row.0 != slot);
        assert!(self.residents.len() as u32 <= self.settings.max_batch);
        if !self.admitted.contains(&request.id) {
            self.admitted.push(request.id);
        }
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        assert!(self.residents.remove(&slot).is_some(), "slot {slot} is free");
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
        assert!(!pass.segments.is_empty());
        assert!(pass.num_rows() <= self.settings.token_budget, "{} rows exceed the budget", pass.num_rows());
        if self.settings.batching.is_lockstep() {
            assert!(pass.segments.iter().all(|segment| segment.depth == pass.segments[0].depth));
        }
        let starting: u32 = pass
            .segments
            .iter()
            .filter(|row| row.kind == RowKind::Prompt && row.depth == 0)
            .map(|row| row.tokens)
            .sum();
        assert!(starting <= self.settings.prefill_chunk);
        self.check_blocks(pass);
        self.check_backfill(pass);
        // A row may read what rows of its depth write in the same pass, and rows of lower depths in earlier passes.
        for segment in pass.segments {
            let resident = self.residents.get_mut(&segment.slot).unwrap();
            if !resident.begun && segment.depth == 0 {
                resident.begun = true;
                self.found += u64::from(segment.start);
            }
            for position in segment.start..segment.start + segment.tokens {
                if let Some(shallower) = segment.depth.checked_sub(1) {
                    assert!(self.ran.contains(&(segment.slot, position, shallower)), "a depth was skipped");
                }
            }
        }
        self.passes += 1;
        let mut written = HashSet::new();
        for segment in pass.segments {
            if segment.kind == RowKind::Decode {
                self.last_pass.insert(segment.slot, self.passes);
            }
            for position in segment.start..segment.start + segment.tokens {
                assert!(self.ran.insert((segment.slot, position, segment.depth)), "a row runs twice");
                if self.is_kept(segment.slot, segment.depth, position) {
                    let place = self.place(pass, segment.slot, segment.depth, position);
                    assert!(written.insert(place), "a place is written twice in a pass");
                    self.write(pass, segment.slot, segment.depth, position);
                }
                if self.ends_prompt(segment, position) {
                    self.fill_deeper(pass, segment.slot, segment.depth, position);
                }
            }
        }
        for (segment, signal) in pass.segments.iter().zip(signals) {
            let resident = self.residents[&segment.slot].clone();
            for position in (0..segment.start).filter(|&at| self.is_attended(segment.slot, segment.depth, at)) {
                let found = self.cache.get(&self.place(pass, segment.slot, segment.depth, position));
                let expected = contents(resident.request, position);
                assert_eq!(found, Some(&expected), "a predecessor lacks its keys and values");
            }
            if segment.kind == RowKind::Prompt && segment.depth > self.settings.prompt_depth(resident.request) {
                let last = segment.predicts && segment.tokens == 1;
                let runs_again = self.settings.prefill_depth.is_some() && resident.generated > 0;
                let after_prompt = runs_again && segment.start + 1 >= resident.prompt_tokens;
                assert!(last || after_prompt, "nothing reads the other rows of a prompt");
            }
            if segment.kind == RowKind::Decode {
                assert_eq!(segment.start, resident.prompt_tokens + resident.generated - 1, "not the next token");
                assert!(segment.predicts && segment.tokens == 1);
            }
            if pass.reads_signal(segment) {
                let sure = sure_depth(resident.request, resident.generated, self.settings.num_loops);
                *signal = if segment.depth >= sure { 1.0 } else { 0.0 };
            } else {
                *signal = f32::NAN;
            }
        }
        Ok(Nanos(100 + u64::from(pass.num_rows())))
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error> {
        for late in pass.late {
            assert_eq!(late.kind, RowKind::Decode, "prompts never wait");
            let waited = self.passes - self.last_pass[&late.slot];
            assert!((1..=self.settings.exit_wait).contains(&waited), "a row waited {waited} passes for the head");
        }
        let all = (pass.segments.len() + pass.late.len()) as u32;
        let late: Vec<u32> = exiting.iter().copied().filter(|&index| index >= pass.segments.len() as u32).collect();
        assert_eq!(late, (pass.segments.len() as u32..all).collect::<Vec<_>>(), "all that waited exit");
        for &index in exiting {
            let segment = pass.exited(index as usize);
            let resident = self.residents.get_mut(&segment.slot).unwrap();
            resident.generated += 1;
            self.exits.entry(resident.request).or_default().push(segment.depth);
            let ends_prompt = self.settings.prefill_depth.is_some_and(|depth| segment.depth >= depth);
            if self.settings.kv_fill == KvFill::Reuse && (segment.kind == RowKind::Decode || ends_prompt) {
                self.fill_deeper(pass, segment.slot, segment.depth, segment.start + segment.tokens - 1);
            }
        }
        Ok(Nanos(10))
    }
}

/// A checker that has the next pass planned before it checks the current one.
struct Beside(Checker);

impl Executor for Beside {
    type Error = std::convert::Infallible;
    const RUNS_BESIDE: bool = true;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error> {
        self.0.admit(slot, request, generated)
    }

    fn release(&mut self, slot: Slot) {
        self.0.release(slot);
    }

    fn run(&mut self, _: &Pass<'_>, _: &mut [f32]) -> Result<Nanos, Self::Error> {
        unreachable!("passes are planned ahead")
    }

    fn run_beside(
        &mut self,
        pass: &Pass<'_>,
        exiting: &[u32],
        signals: &mut [f32],
        meanwhile: &mut (dyn FnMut() + Send),
    ) -> Result<Nanos, Self::Error> {
        meanwhile();
        let elapsed = self.0.run(pass, signals)?;
        Ok(if pass.emits(exiting) { elapsed + self.0.emit(pass, exiting)? } else { elapsed })
    }

    fn emit(&mut self, _: &Pass<'_>, _: &[u32]) -> Result<Nanos, Self::Error> {
        unreachable!("passes are planned ahead")
    }
}

/// All events of a run, in order.
#[derive(Default)]
struct Events(Vec<String>);

impl Observer for Events {
    fn admitted(&mut self, now: Nanos, request: &Request) {
        self.0.push(format!("{now:?} admitted {}", request.id));
    }

    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.0.push(format!("{now:?} preempted {}", request.id));
    }

    fn pass(&mut self, record: &PassRecord<'_>) {
        let PassRecord { start, elapsed, pass, exiting, running, waiting, .. } = record;
        self.0.push(format!("{start:?} {elapsed:?} {:?} {exiting:?} {running} {waiting}", pass.segments));
    }

    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.0.push(format!("{now:?} {} {token:?}", request.id));
    }

    fn finished(&mut self, now: Nanos, request: &Request, first_token: Nanos) {
        self.0.push(format!("{now:?} finished {} {first_token:?}", request.id));
    }
}

fn events<E: Executor<Error = std::convert::Infallible>>(
    settings: Settings,
    executor: E,
    requests: &[Request],
) -> Vec<String> {
    let mut server = Server::new(settings, executor).unwrap();
    server.share_prefixes(Arc::new(prefix_hashes(requests, settings.block_tokens))).unwrap();
    let mut events = Events::default();
    serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut events).unwrap();
    events.0
}

/// What the scheduler reports of a run.
#[derive(Debug, Default)]
struct Log {
    /// The depth of each token, by request.
    depths: HashMap<u32, Vec<u8>>,
    finished: HashSet<u32>,
    /// Requests that lost their slot and wait for another.
    displaced: HashSet<u32>,
    preemptions: usize,
    /// Rows other than backfill.
    rows: u64,
    /// Rows of backfill.
    backfill: u64,
    /// Positions that were found in the cache rather than run.
    found: u64,
    last_pass_end: Nanos,
}

impl Observer for Log {
    fn admitted(&mut self, _: Nanos, request: &Request) {
        self.displaced.remove(&request.id);
        let overtaken = self.displaced.iter().find(|&&displaced| displaced < request.id);
        assert_eq!(overtaken, None, "request {} overtakes one that was preempted", request.id);
    }

    fn preempted(&mut self, _: Nanos, request: &Request) {
        self.displaced.insert(request.id);
        self.preemptions += 1;
    }

    fn pass(&mut self, record: &PassRecord<'_>) {
        assert!(record.start >= self.last_pass_end, "two passes overlap");
        self.last_pass_end = record.start + record.elapsed;
        for segment in record.pass.segments {
            let rows = if segment.kind == RowKind::Backfill { &mut self.backfill } else { &mut self.rows };
            *rows += u64::from(segment.tokens);
        }
    }

    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        assert!(now > request.arrival);
        let depths = self.depths.entry(request.id).or_default();
        assert_eq!(depths.len(), token.index as usize, "a token is missing or came twice");
        assert_eq!(token.previous.is_some(), token.index > 0);
        assert!(token.previous.is_none_or(|previous| previous < now));
        depths.push(token.depth);
    }

    fn finished(&mut self, _: Nanos, request: &Request, _: Nanos) {
        assert!(self.finished.insert(request.id), "a request ended twice");
    }
}

fn run(settings: Settings, requests: &[Request]) -> Log {
    let mut server = Server::new(settings, Checker::new(settings)).unwrap();
    server.share_prefixes(Arc::new(prefix_hashes(requests, settings.block_tokens))).unwrap();
    let mut log = Log::default();
    serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut log).unwrap();
    assert_eq!(server.scheduler().num_running() + server.scheduler().num_waiting(), 0);
    let tables = server.scheduler().pass().tables;
    assert_eq!(tables.num_free(), tables.num_blocks(), "blocks are still held at the end");
    let arrived: Vec<u32> = requests.iter().map(|request| request.id).collect();
    assert_eq!(server.executor().admitted, arrived, "the line is first come first served");
    for request in requests {
        assert!(log.finished.contains(&request.id));
        assert_eq!(log.depths[&request.id].len(), request.output_tokens as usize);
    }
    log.found = server.executor().found;
    log
}

/// Requests of which some are cancelled before given steps, and some have exit policies of their own.
struct Impatient {
    requests: OpenLoad<std::vec::IntoIter<Request>>,
    /// Step and request.
    cancellations: Vec<(u32, u32)>,
    step: u32,
    /// By request modulo their number.
    exits: Vec<Option<ExitPolicy>>,
}

impl Load for Impatient {
    fn next_time(&self) -> Option<Nanos> {
        self.requests.next_time()
    }

    fn take_until(&mut self, now: Nanos) -> Result<Option<Request>, Unordered> {
        self.requests.take_until(now)
    }

    fn answered(&mut self, now: Nanos, request: u32) {
        self.requests.answered(now, request);
    }

    fn terms(&mut self, request: u32) -> Terms {
        Terms { exit: self.exits[request as usize % self.exits.len()], ..Terms::default() }
    }

    fn take_cancelled(&mut self) -> Option<u32> {
        let due = self.cancellations.iter().position(|&(step, _)| step <= self.step);
        self.step += u32::from(due.is_none());
        due.map(|place| self.cancellations.swap_remove(place).1)
    }
}

/// Serves requests of which some are cancelled.
fn run_impatient<E: Executor<Error = std::convert::Infallible>>(
    settings: Settings,
    executor: E,
    requests: &[Request],
    cancellations: &[(u32, u32)],
    exits: &[Option<ExitPolicy>],
) -> Log {
    let mut server = Server::new(settings, executor).unwrap();
    server.share_prefixes(Arc::new(prefix_hashes(requests, settings.block_tokens))).unwrap();
    let load = Impatient {
        requests: OpenLoad::new(requests.to_vec()),
        cancellations: cancellations.to_vec(),
        step: 0,
        exits: exits.to_vec(),
    };
    let mut serving = Serving::new(server, VirtualClock::default(), load);
    let mut log = Log::default();
    loop {
        let step = serving.load_mut().step;
        let cancelled = cancellations.iter().filter(|(before, _)| *before <= step);
        cancelled.for_each(|(_, request)| {
            log.displaced.remove(request);
        });
        if !serving.step(&mut log).unwrap() {
            break;
        }
    }
    let scheduler = serving.server().scheduler();
    assert_eq!(scheduler.num_running() + scheduler.num_waiting(), 0, "a request is still there at the end");
    assert_eq!(scheduler.pass().tables.num_free(), settings.num_blocks, "blocks are still held at the end");
    log
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    prop::collection::vec((0u64..3000, 1u32..40, 1u32..20), 1..24).prop_map(|lengths| {
        let mut arrival = Nanos::ZERO;
        (0..)
            .zip(lengths)
            .map(|(id, (gap, prompt_tokens, output_tokens))| {
                arrival += Nanos(gap);
                Request { id, arrival, prompt_tokens, output_tokens }
            })
            .collect()
    })
}

fn exits() -> impl Strategy<Value = ExitPolicy> {
    prop::sample::select(vec![
        "none",
        "static:0",
        "static:1",
        "mix:0:1:0.5",
        "oracle",
        "oracle:charged",
        "confidence:0.9",
        "load-adaptive:top1:0.9..0.1:2..9",
        "cumulative:gate:0.9:2",
        "delayed:top1:0.9",
    ])
    .prop_map(|text| text.parse().unwrap())
}

/// The depth at which a token exits under a policy that reads 1 from its sure depth on and 0 above.
fn exit_depth(exit: ExitPolicy, sure: u8, num_loops: u8) -> u8 {
    match exit {
        ExitPolicy::None | ExitPolicy::Static(_) => *exit.exit_depths(num_loops).end(),
        ExitPolicy::Delayed { .. } => (sure + 1).min(num_loops - 1),
        ExitPolicy::Cumulative { min_loops, .. } => sure.max(min_loops - 1),
        _ => sure,
    }
}

prop_compose! {
    fn settings()(
        exit in exits(), num_loops in 2u8..5, max_batch in 1u32..9, slack in 0u32..40,
        prefill_chunk in 1u32..50, block_tokens in 1u32..9, spare_blocks in 0u32..40,
        prefix_caching in any::<bool>(), ahead in any::<bool>(), exit_wait in 0u32..5,
        kv_fill in prop::sample::select(KvFill::KEEPING.to_vec()), prefill_depth in prop::option::of(0u8..4),
    ) -> Settings {
        let longest = 40 + 20;
        let async_scheduling = ahead && exit.is_known_ahead();
        Settings {
            kv_fill, max_batch, token_budget: max_batch + slack, prefill_chunk, block_tokens,
            prefill_depth: prefill_depth
                .filter(|_| kv_fill == KvFill::Reuse && !prefix_caching)
                .map(|depth| depth.min(num_loops - 1)),
            num_blocks: longest / block_tokens + 1 + spare_blocks, prefix_caching, async_scheduling,
            exit_wait: if async_scheduling { 0 } else { exit_wait },
            exit_batch: if async_scheduling || exit_wait == 0 { 0 } else { slack % 4 },
            ..Settings::new(Batching::Depth, exit, num_loops)
        }
    }
}

/// What a row attends to at each position before it and at its own: the depth whose entry it finds there.
type Attended = Vec<u8>;

/// An executor that keeps track of the entries under KV fills that overwrite them.
struct Slots {
    settings: Settings,
    /// By slot: request, prompt tokens, and the exit depth of each generated token.
    residents: HashMap<Slot, (u32, u32, Vec<u8>)>,
    /// By block, offset and slot of the fill: the depth whose entry is there.
    entries: HashMap<(u32, u32, u8), u8>,
    /// By request, position and depth of each row.
    attended: HashMap<(u32, u32, u8), Attended>,
    exits: HashMap<u32, Vec<u8>>,
}

impl Slots {
    fn new(settings: Settings) -> Self {
        let (residents, entries) = (HashMap::new(), HashMap::new());
        Self { settings, residents, entries, attended: HashMap::new(), exits: HashMap::new() }
    }

    fn place(&self, pass: &Pass<'_>, slot: Slot, position: u32, depth: u8) -> (u32, u32, u8) {
        let Settings { block_tokens, kv_fill, num_loops, .. } = self.settings;
        let block = pass.blocks(slot)[(position / block_tokens) as usize];
        (block, position % block_tokens, depth % kv_fill.cached_depths(num_loops))
    }
}

impl Executor for Slots {
    type Error = std::convert::Infallible;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error> {
        assert_eq!(generated, 0, "nothing is preempted");
        self.residents.insert(slot, (request.id, request.prompt_tokens, Vec::new()));
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        let (request, _, exits) = self.residents.remove(&slot).unwrap();
        assert!(self.exits.insert(request, exits).is_none(), "nothing is preempted");
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
        for segment in pass.segments {
            for position in segment.start..segment.start + segment.tokens {
                self.entries.insert(self.place(pass, segment.slot, position, segment.depth), segment.depth);
            }
        }
        for (segment, signal) in pass.segments.iter().zip(signals) {
            let &Segment { slot, depth, .. } = segment;
            let (request, _, exits) = &self.residents[&slot];
            for position in segment.start..segment.start + segment.tokens {
                let found = (0..=position).map(|at| self.entries[&self.place(pass, slot, at, depth)]).collect();
                assert!(self.attended.insert((*request, position, depth), found).is_none(), "a row runs twice");
            }
            let sure = sure_depth(*request, exits.len() as u32, self.settings.num_loops);
            *signal = f32::from(u8::from(depth >= sure));
        }
        Ok(Nanos(100))
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error> {
        for &index in exiting {
            let segment = pass.exited(index as usize);
            self.residents.get_mut(&segment.slot).unwrap().2.push(segment.depth);
            if segment.generated {
                let copied = self.settings.kv_fill.copied_depths(self.settings.num_loops);
                for deeper in segment.depth + 1..copied.max(segment.depth + 1) {
                    self.entries.insert(self.place(pass, segment.slot, segment.start, deeper), segment.depth);
                }
            }
        }
        Ok(Nanos(10))
    }
}

/// What a row attends to by definition: see [`KvFill::overwrites`].
fn attended_by_definition(settings: &Settings, prompt: u32, exits: &[u8], position: u32, depth: u8) -> Attended {
    let slots = settings.kv_fill.cached_depths(settings.num_loops);
    let deepest = |at: u32| match at.checked_sub(prompt) {
        None => settings.num_loops - 1,
        Some(generated) => exits[generated as usize + 1],
    };
    let found = |at: u32| match () {
        () if at == position || position < prompt => depth,
        () => {
            let alike = (0..=deepest(at)).rev().find(|other| other % slots == depth % slots);
            alike.unwrap_or_else(|| deepest(at))
        }
    };
    (0..=position).map(found).collect()
}

/// The rule of `confidence:0.9`. It checks that its memory stays with the sequence.
struct Sure;

impl CustomExit for Sure {
    fn name(&self) -> &str {
        "sure"
    }

    fn reads(&self) -> SignalRead {
        SignalRead::Signal(ExitSignal::Top1)
    }

    fn exits(&self, row: &ExitRow<'_>, memory: &mut Memory) -> bool {
        assert_eq!(row.signals.len(), usize::from(row.depth) + 1);
        assert!(row.running > 0 && row.position >= row.token);
        let [seen, ..] = memory;
        let token = row.token as f32;
        assert!(*seen == token || *seen == token + 1.0, "{seen} tokens were seen before token {token}");
        *seen = token + 1.0;
        row.signals.last() >= Some(&0.9)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_rows_find_in_overwritten_entries_is_as_defined_under_any_batching(
        settings in settings(), requests in requests(), slots in 1u8..5, batching in prop::sample::select(Batching::ALL.to_vec()),
    ) {
        let kv_fill = if slots == 1 { KvFill::Last } else { KvFill::Cycle(slots) };
        let Settings { max_batch, prefill_chunk, token_budget, .. } = settings;
        let settings = Settings {
            kv_fill, batching,
            // Every prompt fits, with nothing to spare at the least.
            prefill_chunk: 39 + prefill_chunk, token_budget: token_budget.max(39 + max_batch - 1),
            prefix_caching: false,
            prefill_depth: None,
            ..settings
        };
        prop_assume!(kv_fill.overwrites(settings.num_loops));
        let mut server = Server::new(settings, Slots::new(settings)).unwrap();
        let mut log = Log::default();
        serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut log).unwrap();
        prop_assert_eq!(log.preemptions, 0);
        let Slots { attended, exits, .. } = server.executor();
        let rows: u32 = requests.iter().map(|request| request.context_tokens()).sum();
        prop_assert!(attended.len() as u32 >= rows, "every position ran");
        for (&(request, position, depth), found) in attended {
            let (prompt, exits) = (requests[request as usize].prompt_tokens, &exits[&request]);
            let expected = attended_by_definition(&settings, prompt, exits, position, depth);
            prop_assert_eq!(found, &expected, "request {}, {} at {}", request, position, depth);
        }
    }

    #[test]
    fn every_run_is_legal_and_exits_do_not_depend_on_batching(settings in settings(), requests in requests()) {
        let logs = Batching::ALL.map(|batching| run(Settings { batching, ..settings }, &requests));
        for log in &logs {
            prop_assert_eq!(&log.depths, &logs[0].depths);
        }
        for (request, depths) in &logs[0].depths {
            for (&depth, token) in depths.iter().zip(0..) {
                let sure = match settings.exit {
                    ExitPolicy::Mix(mix) => mix.depth(*request),
                    _ => sure_depth(*request, token, settings.num_loops),
                };
                prop_assert_eq!(depth, exit_depth(settings.exit, sure, settings.num_loops));
            }
        }
    }

    #[test]
    fn requests_that_are_cancelled_at_any_time_free_what_they_hold_and_change_no_other(
        settings in settings(), requests in requests(),
        cancellations in prop::collection::vec((0u32..60, 0u32..24), 0..24),
        own in prop::sample::select(vec!["none", "static:0", "static:1", "confidence:0.5"]),
    ) {
        let own: ExitPolicy = own.parse().unwrap();
        let exits = match settings.check_terms(0, &Terms { exit: Some(own), ..Terms::default() }) {
            Ok(()) => vec![None, Some(own)],
            Err(_) => vec![None],
        };
        for batching in Batching::ALL {
            let settings = Settings { batching, ..settings };
            let log = match settings.async_scheduling {
                true => run_impatient(settings, Beside(Checker::new(settings)), &requests, &cancellations, &exits),
                false => run_impatient(settings, Checker::new(settings), &requests, &cancellations, &exits),
            };
            for request in &requests {
                let is_cancelled = cancellations.iter().any(|(_, cancelled)| *cancelled == request.id);
                prop_assert!(is_cancelled || log.finished.contains(&request.id));
                let exit = exits[request.id as usize % exits.len()].unwrap_or(settings.exit);
                for (&depth, token) in log.depths.get(&request.id).into_iter().flatten().zip(0..) {
                    let sure = match exit {
                        ExitPolicy::Mix(mix) => mix.depth(request.id),
                        _ => sure_depth(request.id, token, settings.num_loops),
                    };
                    prop_assert_eq!(depth, exit_depth(exit, sure, settings.num_loops));
                }
            }
        }
    }

    #[test]
    fn passes_planned_while_others_run_are_those_planned_after_them(
        settings in settings(), requests in requests(),
        exit in prop::sample::select(vec![
            "none", "static:0", "static:1", "mix:1:0:0.4", "delayed:top1:0.9", "delayed:gate:0.9",
        ]),
    ) {
        for batching in Batching::ALL {
            let settings = Settings { batching, exit: exit.parse().unwrap(), async_scheduling: true, exit_wait: 0, exit_batch: 0, ..settings };
            let after = events(settings, Checker::new(settings), &requests);
            let beside = events(settings, Beside(Checker::new(settings)), &requests);
            prop_assert_eq!(after, beside);
        }
    }

    #[test]
    fn a_custom_policy_of_a_built_in_rule_runs_what_that_runs(settings in settings(), requests in requests()) {
        for batching in Batching::ALL {
            let run = |exit| {
                let settings = Settings { batching, exit, async_scheduling: false, ..settings };
                events(settings, Checker::new(settings), &requests)
            };
            prop_assert_eq!(run(ExitPolicy::Custom(CustomPolicy::new(&Sure))), run("confidence:0.9".parse().unwrap()));
        }
    }

    #[test]
    fn without_preemption_every_policy_runs_the_same_rows(settings in settings(), requests in requests()) {
        let roomy = Settings { num_blocks: 10_000, prefix_caching: false, ..settings };
        let logs = [Batching::Vanilla, Batching::Sequence].map(|batching| run(Settings { batching, ..roomy }, &requests));
        prop_assert_eq!(logs[0].preemptions + logs[1].preemptions, 0);
        prop_assert_eq!(logs[0].rows, logs[1].rows);
        let prompts: u64 = requests.iter().map(|request| u64::from(request.prompt_tokens)).sum();
        let decodes: u64 = logs[0].depths.values().flat_map(|depths| &depths[1..]).map(|&depth| u64::from(depth) + 1).sum();
        // Where all depths share keys and values, only the row that predicts the first token runs deeper.
        let first_tokens: u64 = logs[0].depths.values().map(|depths| u64::from(depths[0])).sum();
        let deeper = |depth: u8| logs[0].depths.values().map(move |depths| u64::from(depths[0].saturating_sub(depth)));
        let of_prompts = match (settings.kv_fill, settings.exit) {
            (KvFill::First, _) => prompts + first_tokens,
            _ if let Some(depth) = settings.prefill_depth => prompts * (u64::from(depth) + 1) + deeper(depth).sum::<u64>(),
            // Nothing reads what a prompt computes deeper than its request's tokens exit.
            (_, ExitPolicy::Static(depth)) => prompts * (u64::from(depth) + 1),
            (_, ExitPolicy::Mix(mix)) => {
                let rows = |request: &Request| u64::from(request.prompt_tokens) * (u64::from(mix.depth(request.id)) + 1);
                requests.iter().map(rows).sum()
            }
            _ => prompts * u64::from(settings.num_loops),
        };
        prop_assert_eq!(logs[0].rows, of_prompts + decodes);
    }
}

/// A gate's value for a token at a depth, 0 to 1, mostly low: by request and index in the output.
fn gate(request: u32, token: u32, depth: u8) -> f32 {
    let key = u64::from(request) << 40 | u64::from(token) << 8 | u64::from(depth);
    let mixed = key.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let share = ((mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / (1u64 << 24) as f32;
    share * share
}

/// A checker whose signals are the values of [`gate`], and what it has read of each pass.
struct Gates(Checker);

impl Executor for Gates {
    type Error = std::convert::Infallible;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error> {
        self.0.admit(slot, request, generated)
    }

    fn release(&mut self, slot: Slot) {
        self.0.release(slot);
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
        let elapsed = self.0.run(pass, signals)?;
        for (segment, signal) in pass.segments.iter().zip(signals).filter(|(segment, _)| pass.reads_signal(segment)) {
            let Resident { request, generated, .. } = self.0.residents[&segment.slot];
            *signal = gate(request, generated, segment.depth);
        }
        Ok(elapsed)
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error> {
        self.0.emit(pass, exiting)
    }
}

#[test]
fn cumulative_gates_exit_where_their_product_says_whatever_is_preempted() {
    let (num_loops, share, min_loops) = (5, 0.6, 2);
    let settings = Settings {
        max_batch: 8,
        token_budget: 32,
        prefill_chunk: 8,
        block_tokens: 2,
        num_blocks: 20,
        ..Settings::new(Batching::Depth, ExitPolicy::Cumulative { share, min_loops }, num_loops)
    };
    let requests: Vec<Request> =
        (0..20).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 4, output_tokens: 30 }).collect();
    let expected = |request, token| {
        let exited = |depth: u8| 1.0 - (0..=depth).map(|depth| 1.0 - gate(request, token, depth)).product::<f32>();
        (min_loops - 1..num_loops - 1).find(|&depth| exited(depth) >= share).unwrap_or(num_loops - 1)
    };
    for (batching, kv_fill) in Batching::ALL.iter().flat_map(|batching| KvFill::KEEPING.map(|fill| (*batching, fill))) {
        let settings = Settings { batching, kv_fill, ..settings };
        let mut server = Server::new(settings, Gates(Checker::new(settings))).unwrap();
        let mut log = Log::default();
        serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut log).unwrap();
        assert!(log.preemptions > 0, "{batching}, {kv_fill}: nothing is preempted");
        for (&request, depths) in &log.depths {
            let expected: Vec<u8> = (0..30).map(|token| expected(request, token)).collect();
            assert_eq!(*depths, expected, "{batching}, {kv_fill}, request {request}");
        }
        let found: HashSet<u8> = log.depths.values().flatten().copied().collect();
        assert_eq!(found, HashSet::from([1, 2, 3, 4]), "tokens exit at every depth that may be one");
    }
}

#[test]
fn a_request_waits_behind_those_of_its_priority_and_a_cancelled_one_for_nothing() {
    let settings = Settings { max_batch: 1, ..Settings::new(Batching::Depth, "top1:0.5".parse().unwrap(), 3) };
    let mut server = Server::new(settings, Checker::new(settings)).unwrap();
    for (id, priority) in [(0, 0), (1, -1), (2, 0), (3, 5), (4, 5), (5, 0)] {
        let request = Request { id, arrival: Nanos::ZERO, prompt_tokens: 4, output_tokens: 2 };
        server.submit_under(request, Terms { priority, ..Terms::default() }).unwrap();
    }
    assert!(server.end(4) && !server.end(4) && !server.end(99));
    let mut now = Nanos::ZERO;
    while let Some(elapsed) = server.start_pass(now, &mut ()).unwrap() {
        now += elapsed;
        server.finish_pass(now, &mut ());
    }
    assert_eq!(server.executor().admitted, [3, 0, 2, 5, 1]);
}

#[test]
fn an_exit_policy_of_one_request_that_reads_what_is_not_reported_is_refused() {
    let terms = |exit: &str| Terms { exit: Some(exit.parse().unwrap()), ..Terms::default() };
    let check = |served: &str, asked: &str| {
        Settings::new(Batching::Depth, served.parse().unwrap(), 3)
            .check_terms(7, &terms(asked))
            .map_err(|e| e.to_string())
    };
    for (served, asked) in
        [("margin:0.5", "margin:0.1"), ("margin:0.5", "none"), ("stable:2", "static:1"), ("none", "none")]
    {
        check(served, asked).unwrap();
    }
    for (served, asked) in
        [("margin:0.5", "gate:0.1"), ("none", "static:1"), ("delayed:gate:0.5", "static:1"), ("margin:0.5", "oracle")]
    {
        let message = check(served, asked).unwrap_err();
        assert!(
            message.starts_with(&format!("request 7 asks for exit policy {}", asked.parse::<ExitPolicy>().unwrap())),
            "{message}"
        );
    }
    assert!(check("margin:0.5", "static:3").unwrap_err().contains("outside the model's depths"));
}

#[test]
fn a_threshold_follows_the_requests_that_run_and_wait() {
    let settings = Settings {
        max_batch: 2,
        token_budget: 16,
        prefill_chunk: 16,
        ..Settings::new(Batching::Depth, "load-adaptive:gate:1..0.25:1..4:0".parse().unwrap(), 3)
    };
    /// Reads 0.3 of every row, and keeps how many requests each pass has.
    #[derive(Default)]
    struct Loads(Vec<(u32, u8)>);
    impl Observer for Loads {
        fn pass(&mut self, record: &PassRecord<'_>) {
            for &index in record.exiting {
                let load = record.running + record.waiting;
                self.0.push((load, record.pass.segments[index as usize].depth));
            }
        }
    }
    struct Doubtful;
    impl Executor for Doubtful {
        type Error = std::convert::Infallible;
        fn admit(&mut self, _: Slot, _: &Request, _: u32) -> Result<(), Self::Error> {
            Ok(())
        }
        fn release(&mut self, _: Slot) {}
        fn run(&mut self, _: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
            signals.fill(0.3);
            Ok(Nanos(10))
        }
        fn emit(&mut self, _: &Pass<'_>, _: &[u32]) -> Result<Nanos, Self::Error> {
            Ok(Nanos::ZERO)
        }
    }
    let requests = (0..6).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens: 3 + id });
    let mut server = Server::new(settings, Doubtful).unwrap();
    let mut loads = Loads::default();
    serve(&mut server, requests, &mut VirtualClock::default(), &mut loads).unwrap();
    assert_eq!(loads.0.len(), 33);
    // 0.3 is enough from 4 requests on, where the threshold is 0.25; with 3 requests it is 0.5.
    assert!(loads.0.iter().all(|&(load, depth)| depth == if load >= 4 { 0 } else { 2 }), "{:?}", loads.0);
    assert!([1, 2, 3, 4, 5, 6].iter().all(|load| loads.0.iter().any(|(found, _)| found == load)), "{:?}", loads.0);
}

#[test]
fn a_tight_cache_preempts_and_still_ends() {
    let settings = Settings {
        max_batch: 8,
        token_budget: 32,
        prefill_chunk: 8,
        block_tokens: 2,
        num_blocks: 20,
        ..Settings::new(Batching::Depth, ExitPolicy::None, 3)
    };
    let requests: Vec<Request> =
        (0..20).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 4, output_tokens: 30 }).collect();
    for batching in Batching::ALL {
        let log = run(Settings { batching, ..settings }, &requests);
        assert!(log.preemptions > 0, "{batching} never ran out of blocks: the test tests nothing");
        let cached = run(Settings { batching, prefix_caching: true, ..settings }, &requests);
        assert!(cached.found > 0, "{batching} found nothing that a preempted request had computed");
        assert!(cached.rows < log.rows, "what is found is not run");
    }
}

#[test]
fn a_first_token_that_exits_early_is_followed_before_its_prompt_has_run_every_depth() {
    let settings = Settings {
        max_batch: 1,
        token_budget: 16,
        prefill_chunk: 16,
        block_tokens: 4,
        num_blocks: 8,
        ..Settings::new(Batching::Depth, "gate:0.0".parse().unwrap(), 4)
    };
    #[derive(Default)]
    struct Depths(Vec<Vec<u8>>);
    impl Observer for Depths {
        fn pass(&mut self, record: &PassRecord<'_>) {
            self.0.push(record.pass.segments.iter().map(|segment| segment.depth).collect());
        }
    }
    let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 8, output_tokens: 6 };
    let mut server = Server::new(settings, Checker::new(settings)).unwrap();
    let mut depths = Depths::default();
    serve(&mut server, [request], &mut VirtualClock::default(), &mut depths).unwrap();
    assert_eq!(depths.0, [vec![0], vec![1, 0], vec![2, 0], vec![3, 0], vec![0], vec![0]]);
}

/// What each pass ran: its deepest depth, whether it had rows of prompts, and rows of the head within or after it.
#[derive(Default)]
struct HeadReads(Vec<(u8, bool, u32)>);

impl Observer for HeadReads {
    fn pass(&mut self, record: &PassRecord<'_>) {
        let segments = record.pass.segments;
        let deepest = segments.iter().map(|segment| segment.depth).max().unwrap();
        let prompts = segments.iter().any(|segment| segment.kind == RowKind::Prompt);
        let work = record.pass.work;
        self.0.push((deepest, prompts, work.head_rows + work.exit_head_rows));
    }
}

#[test]
fn exits_that_wait_share_reads_of_the_head() {
    let requests: Vec<Request> =
        (0..6).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 4, output_tokens: 20 + id }).collect();
    let run = |batching, exit_wait| {
        let exit = "gate:0.9".parse().unwrap();
        let settings = Settings { max_batch: 6, token_budget: 64, exit_wait, ..Settings::new(batching, exit, 4) };
        let mut server = Server::new(settings, Checker::new(settings)).unwrap();
        let mut reads = HeadReads::default();
        serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut reads).unwrap();
        let rows: u32 = reads.0.iter().map(|(.., rows)| rows).sum();
        assert_eq!(rows, requests.iter().map(|request| request.output_tokens).sum::<u32>(), "a row for each token");
        reads.0
    };
    let reads = |passes: &[(u8, bool, u32)]| passes.iter().filter(|(.., rows)| *rows > 0).count();
    let at_once = run(Batching::Depth, 0);
    assert!(reads(&run(Batching::Depth, 1)) < reads(&at_once));
    assert!(3 * reads(&run(Batching::Depth, 3)) < 2 * reads(&at_once));
    let lockstep = run(Batching::Sequence, 3);
    assert_eq!(lockstep.len(), run(Batching::Sequence, 0).len(), "no pass is added");
    for pair in lockstep.windows(2).filter(|pair| !pair[0].1) {
        assert_eq!(pair[0].2 > 0, pair[1].0 == 0, "one read at the end of an iteration");
    }
}

#[test]
fn impossible_settings_and_requests_are_refused() {
    let settings = Settings {
        max_batch: 4,
        token_budget: 8,
        prefill_chunk: 8,
        block_tokens: 4,
        num_blocks: 4,
        ..Settings::new(Batching::Sequence, ExitPolicy::None, 2)
    };
    let refused = |settings: Settings| Server::new(settings, Checker::new(settings)).err().unwrap().to_string();
    assert!(refused(Settings { max_batch: 0, ..settings }).contains("max_batch is 0"));
    assert!(refused(Settings { token_budget: 3, ..settings }).contains("less than max_batch"));
    let absurd = Settings { token_budget: u32::MAX, ..settings };
    assert!(refused(Settings { max_batch: u32::MAX, ..absurd }).contains("expected at most 1048576"));
    assert!(refused(Settings { num_blocks: u32::MAX, ..absurd }).contains("expected at most 67108864"));
    assert!(refused(Settings { exit: ExitPolicy::Static(2), ..settings }).contains("depths 0 to 1"));
    assert!(refused(Settings { exit: "mix:2:0:0.5".parse().unwrap(), ..settings }).contains("depths 0 to 1"));
    let custom = ExitPolicy::Custom(CustomPolicy::new(&Sure));
    assert!(refused(Settings { exit: custom, async_scheduling: true, ..settings }).contains("with exit policy sure"));
    let refused_exit =
        |exit: &str, async_scheduling| refused(Settings { exit: exit.parse().unwrap(), async_scheduling, ..settings });
    let both = Settings { async_scheduling: true, exit_wait: 2, ..settings };
    assert_eq!(refused(both), "exit_wait is 2 with async_scheduling: expected one of the two");
    let batch = Settings { exit_batch: 3, ..settings };
    assert_eq!(refused(batch), "exit_batch is 3 with an exit_wait of 0: expected 0, or an exit_wait of at least 1");
    assert!(refused_exit("load-adaptive:gate:0.9..0.5:1..9", true).contains("expected none, static:DEPTH or delayed"));
    assert!(refused_exit("cumulative:gate:0.9:3", false).contains("at least 3 loops: the model has 2"));
    assert!(refused_exit("stable:3", false).contains("stable:3 has tokens run at least 3 loops: the model has 2"));
    assert!(refused(Settings { num_loops: 65, ..settings }).contains("num_loops is 65: expected at most 64"));
    let last = Settings { kv_fill: KvFill::Last, ..settings };
    let found = refused(Settings { prefix_caching: true, ..last });
    assert!(found.starts_with("prefix_caching with kv_fill last"), "{found}");
    let whole = Settings { prefix_caching: true, kv_fill: KvFill::Cycle(2), ..settings };
    assert!(Server::new(whole, Checker::new(whole)).is_ok(), "as many slots as loops overwrite nothing");

    let request = Request { id: 7, arrival: Nanos::ZERO, prompt_tokens: 10, output_tokens: 7 };
    assert!(settings.check_request(&request).is_ok(), "16 positions fit 16");
    let longer = Request { output_tokens: 8, ..request };
    assert!(settings.check_request(&longer).unwrap_err().to_string().contains("request 7 needs"));
    let fits = Request { prompt_tokens: 5, ..request };
    assert!(last.check_request(&fits).is_ok(), "a budget of 8 rows, of which 3 are other sequences'");
    let found = last.check_request(&Request { prompt_tokens: 6, ..request }).unwrap_err().to_string();
    assert!(
        found.contains("request 7 has 6 prompt tokens: under kv_fill last") && found.ends_with("allow 5"),
        "{found}"
    );
    let found = Settings { prefill_chunk: 4, ..last }.check_request(&fits).unwrap_err().to_string();
    assert!(found.ends_with("allow 4"), "{found}");
    assert!(whole.check_request(&request).is_ok());
    let empty = Request { prompt_tokens: 0, ..request };
    assert!(settings.check_request(&empty).unwrap_err().to_string().contains("request 7 has 0 prompt"));
}

/// Makes every token exit at a given depth, by request and token, and records the passes.
struct Scripted {
    exits: Vec<Vec<u8>>,
    /// By slot, the request and its tokens so far.
    sequences: HashMap<Slot, (u32, usize)>,
    passes: Vec<String>,
}

impl Executor for Scripted {
    type Error = std::convert::Infallible;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error> {
        self.sequences.insert(slot, (request.id, generated as usize));
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        self.sequences.remove(&slot);
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
        let mut rows = Vec::new();
        for (segment, signal) in pass.segments.iter().zip(signals) {
            let (request, token) = self.sequences[&segment.slot];
            let kind = match segment.kind {
                RowKind::Decode => "decode",
                RowKind::Prompt => "prompt",
                RowKind::Backfill => "backfill",
                RowKind::Verify => unreachable!("no policy here speculates"),
            };
            let positions = segment.start..segment.start + segment.tokens;
            rows.push(format!("{kind} {request}:{positions:?} at {}", segment.depth));
            *signal = if pass.reads_signal(segment) && segment.depth >= self.exits[request as usize][token] {
                1.0
            } else {
                0.0
            };
        }
        self.passes.push(rows.join(", "));
        Ok(Nanos(1))
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error> {
        for &index in exiting {
            self.sequences.get_mut(&pass.segments[index as usize].slot).unwrap().1 += 1;
        }
        Ok(Nanos::ZERO)
    }
}

/// The passes after those of the prompts, for one-token prompts with these exits, on a model of 3 loops.
fn backfill_passes(batching: Batching, max_batch: u32, token_budget: u32, exits: &[&[u8]]) -> Vec<String> {
    let settings = Settings {
        kv_fill: KvFill::Backfill,
        max_batch,
        token_budget,
        prefill_chunk: token_budget,
        num_blocks: 16,
        ..Settings::new(batching, ExitPolicy::Oracle { charged: false, recorded: true }, 3)
    };
    let requests = exits.iter().zip(0..).map(|(exits, id)| Request {
        id,
        arrival: Nanos::ZERO,
        prompt_tokens: 1,
        output_tokens: exits.len() as u32,
    });
    let exits = exits.iter().map(|exits| exits.to_vec()).collect();
    let mut server = Server::new(settings, Scripted { exits, sequences: HashMap::new(), passes: Vec::new() }).unwrap();
    serve(&mut server, requests, &mut VirtualClock::default(), &mut ()).unwrap();
    server.into_executor().passes.split_off(3)
}

#[test]
fn a_row_stalls_where_the_budget_is_short_of_the_backfill_that_it_waits_for() {
    for batching in Batching::ALL {
        let passes = backfill_passes(batching, 1, 3, &[&[2, 0, 0, 0, 0, 2]]);
        assert_eq!(
            passes,
            [
                "decode 0:1..2 at 0",
                "decode 0:2..3 at 0",
                "decode 0:3..4 at 0",
                "decode 0:4..5 at 0",
                "decode 0:5..6 at 0",
                "backfill 0:1..4 at 1",
                "backfill 0:4..5 at 1, decode 0:5..6 at 1",
                "backfill 0:1..4 at 2",
                "backfill 0:4..5 at 2, decode 0:5..6 at 2",
            ],
            "{batching}"
        );
    }
}

#[test]
fn in_lockstep_backfill_joins_later_tokens_and_idle_places_at_its_depth() {
    let passes = backfill_passes(Batching::Sequence, 2, 3, &[&[2, 0, 0, 1], &[2, 1, 1, 2]]);
    assert_eq!(
        passes,
        [
            "decode 0:1..2 at 0, decode 1:1..2 at 0",
            "decode 1:1..2 at 1",
            "decode 0:2..3 at 0, decode 1:2..3 at 0",
            "decode 1:2..3 at 1, backfill 0:1..2 at 1",
            "decode 0:3..4 at 0, decode 1:3..4 at 0",
            "backfill 0:2..3 at 1, decode 0:3..4 at 1, decode 1:3..4 at 1",
            "backfill 1:1..3 at 2, decode 1:3..4 at 2",
        ]
    );
}

#[test]
fn rows_of_an_iteration_that_are_further_wait_for_those_that_stall() {
    let passes = backfill_passes(Batching::Sequence, 2, 2, &[&[2, 2, 2], &[2, 0, 2]]);
    assert_eq!(
        passes,
        [
            "decode 0:1..2 at 0, decode 1:1..2 at 0",
            "decode 0:1..2 at 1",
            "decode 0:1..2 at 2",
            "decode 0:2..3 at 0, decode 1:2..3 at 0",
            "decode 0:2..3 at 1, backfill 1:1..2 at 1",
            "decode 1:2..3 at 1",
            "decode 0:2..3 at 2, backfill 1:1..2 at 2",
            "decode 1:2..3 at 2",
        ]
    );
}

#[test]
fn idle_places_take_backfill_of_the_oldest_sequence_first() {
    let passes = backfill_passes(Batching::Depth, 3, 9, &[&[2, 0, 0, 0, 0], &[2, 0, 0, 0, 0]]);
    assert_eq!(
        passes,
        [
            "decode 0:1..2 at 0, decode 1:1..2 at 0",
            "decode 0:2..3 at 0, decode 1:2..3 at 0, backfill 0:1..2 at 1",
            "decode 0:3..4 at 0, decode 1:3..4 at 0, backfill 0:2..3 at 1",
            "decode 0:4..5 at 0, decode 1:4..5 at 0, backfill 0:3..4 at 1",
        ]
    );
    let passes = backfill_passes(Batching::Depth, 5, 9, &[&[2, 0, 0, 0], &[2, 0, 0, 0]]);
    assert_eq!(
        passes,
        [
            "decode 0:1..2 at 0, decode 1:1..2 at 0",
            "decode 0:2..3 at 0, decode 1:2..3 at 0, backfill 0:1..2 at 1, backfill 1:1..2 at 1",
            "decode 0:3..4 at 0, decode 1:3..4 at 0, backfill 0:2..3 at 1, backfill 0:1..2 at 2, backfill 1:2..3 at 1",
        ]
    );
}

#[test]
fn tokens_that_wait_for_cancelled_rows_come_with_the_pass_before() {
    let settings = Settings {
        max_batch: 2,
        token_budget: 10,
        prefill_chunk: 10,
        prefill_depth: Some(0),
        block_tokens: 1,
        num_blocks: 61,
        async_scheduling: true,
        ..Settings::new(Batching::Sequence, "mix:0:1:0.5".parse().unwrap(), 2)
    };
    let request = |(id, arrival, prompt_tokens, output_tokens)| Request {
        id,
        arrival: Nanos(arrival),
        prompt_tokens,
        output_tokens,
    };
    let requests = [(0, 1, 8, 16), (1, 2, 1, 10), (2, 2, 10, 8), (3, 2, 10, 3)].map(request);
    // The log checks that each token comes after the one before.
    let log = run_impatient(settings, Beside(Checker::new(settings)), &requests, &[(38, 3)], &[None]);
    assert_eq!(log.finished, HashSet::from([0, 1, 2]), "request 3 is cancelled in the middle of an iteration");
}

//! Sequences that change machines: what each scheduler keeps, reserves and releases.

use scheduler::{
    BlockTables, Executor, KvFill, Observer, Pass, Reservation, RowKind, Scheduler, Server, Settings, Slot, Token,
};
use traces::{Nanos, Request};

const LOOPS: u8 = 3;
const NOW: Nanos = Nanos(7);

fn settings(batching: &str) -> Settings {
    Settings {
        max_batch: 4,
        token_budget: 64,
        prefill_chunk: 64,
        block_tokens: 4,
        num_blocks: 10,
        kv_fill: KvFill::Reuse,
        ..Settings::new(batching.parse().unwrap(), "top1:0.5".parse().unwrap(), LOOPS)
    }
}

fn request(id: u32, prompt_tokens: u32, output_tokens: u32) -> Request {
    Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens }
}

/// Tokens: request, index, depth.
#[derive(Default)]
struct Tokens(Vec<(u32, u32, u8)>);

impl Observer for Tokens {
    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        assert_eq!(now, NOW);
        self.0.push((request.id, token.index, token.depth));
    }
}

/// Runs a pass in which every row that predicts exits; returns whether there was one.
fn pass(scheduler: &mut Scheduler, tokens: &mut Tokens) -> bool {
    let any = scheduler.plan(NOW, tokens);
    if any {
        let signals = vec![1.0; scheduler.pass().segments.len()];
        scheduler.decide(&signals);
        scheduler.complete(NOW, tokens);
    }
    any
}

fn held(tables: &BlockTables) -> u32 {
    tables.num_blocks() - tables.num_free()
}

/// A scheduler that has run the prompts of some requests.
fn prompt_machine(settings: Settings, requests: &[Request]) -> Scheduler {
    let mut scheduler = Scheduler::new(settings).unwrap();
    scheduler.hand_over_after_prompts();
    requests.iter().for_each(|&request| scheduler.submit(request).unwrap());
    let mut tokens = Tokens::default();
    while pass(&mut scheduler, &mut tokens) {}
    assert!(tokens.0.is_empty(), "a first token is delivered by the machine that receives the sequence");
    scheduler
}

#[test]
fn a_sequence_is_handed_over_when_its_prompt_has_run_every_depth_though_its_first_token_exits_early() {
    for batching in ["sequence", "depth"] {
        let mut scheduler = Scheduler::new(settings(batching)).unwrap();
        scheduler.hand_over_after_prompts();
        scheduler.submit(request(0, 6, 5)).unwrap();
        for depth in 0..LOOPS {
            assert!(scheduler.take_handed_over().is_empty(), "{batching}, before depth {depth}");
            assert!(pass(&mut scheduler, &mut Tokens::default()));
        }
        let handed_over = scheduler.take_handed_over();
        assert_eq!(
            handed_over.iter().map(|handover| (handover.request.id, handover.depth)).collect::<Vec<_>>(),
            [(0, 0)]
        );
        assert!(scheduler.take_handed_over().is_empty(), "a sequence is handed over once");
        assert!(!pass(&mut scheduler, &mut Tokens::default()), "it generates nothing more here");
    }
}

#[test]
fn a_prompt_keeps_its_blocks_until_it_has_been_transferred_and_is_not_preempted() {
    for batching in ["sequence", "depth"] {
        let mut server = Server::new(settings(batching), Nothing).unwrap();
        server.hand_over_after_prompts();
        for (id, prompt_tokens) in [(0, 16), (1, 16), (2, 12)] {
            server.submit(request(id, prompt_tokens, 5)).unwrap();
        }
        let run = |server: &mut Server<Nothing>| {
            while server.start_pass(NOW, &mut ()).unwrap().is_some() {
                server.finish_pass(NOW, &mut ());
            }
            server.take_handed_over()
        };
        let first = run(&mut server);
        assert_eq!(first.len(), 2);
        // The third prompt does not fit beside those that wait for their transfer.
        let scheduler = server.scheduler();
        let blocks = held(scheduler.pass().tables);
        assert_eq!((blocks, scheduler.num_running(), scheduler.num_waiting()), (8, 2, 1));
        server.release_handed_over(first[0].slot);
        assert_eq!(held(server.scheduler().pass().tables), 4);
        let then = run(&mut server);
        assert_eq!((then[0].request.id, held(server.scheduler().pass().tables)), (2, 7));
    }
}

#[test]
fn a_reserved_sequence_holds_the_blocks_of_its_prompt_and_runs_when_it_is_received() {
    let mut source = prompt_machine(settings("sequence"), &[request(5, 9, 3)]);
    let handover = source.take_handed_over()[0];
    for batching in ["sequence", "depth"] {
        let mut scheduler = Scheduler::new(settings(batching)).unwrap();
        scheduler.submit_handed_over(&handover).unwrap();
        let mut tokens = Tokens::default();
        assert!(!pass(&mut scheduler, &mut tokens), "nothing runs before the keys and values are there");
        let reserved: Vec<Reservation> = scheduler.reserved().collect();
        assert_eq!(reserved, [Reservation { request: 5, slot: 0, tokens: 9 }]);
        assert_eq!(
            scheduler.admitted().map(|(slot, request, generated)| (slot, request.id, generated)).collect::<Vec<_>>(),
            [(0, 5, 1)]
        );
        assert_eq!((held(scheduler.pass().tables), scheduler.num_running()), (3, 1));
        assert!(!pass(&mut scheduler, &mut tokens));
        assert_eq!(scheduler.reserved().count(), 0, "what was reserved is told once");
        scheduler.receive(0, NOW, &mut tokens);
        assert_eq!(tokens.0, [(5, 0, handover.depth)]);
        assert!(scheduler.plan(NOW, &mut tokens));
        let segments = scheduler.pass().segments;
        assert_eq!((segments[0].kind, segments[0].start, segments[0].tokens), (RowKind::Decode, 9, 1));
        scheduler.decide(&[1.0]);
        scheduler.complete(NOW, &mut tokens);
        while pass(&mut scheduler, &mut tokens) {}
        assert_eq!(tokens.0[1..], [(5, 1, 0), (5, 2, 0)]);
        assert_eq!((held(scheduler.pass().tables), scheduler.num_running()), (0, 0));
    }
}

#[test]
fn a_reserved_sequence_is_not_preempted_and_needs_no_budget() {
    let mut source = prompt_machine(settings("sequence"), &[request(1, 16, 3)]);
    let handover = source.take_handed_over()[0];
    // Six blocks: a prompt of one, then four for the prompt that comes.
    let settings = Settings { num_blocks: 6, max_batch: 4, token_budget: 4, ..settings("sequence") };
    let mut scheduler = Scheduler::new(settings).unwrap();
    scheduler.submit(request(0, 4, 12)).unwrap();
    let mut tokens = Tokens::default();
    assert!((0..LOOPS).all(|_| pass(&mut scheduler, &mut tokens)));
    scheduler.submit_handed_over(&handover).unwrap();
    assert!(pass(&mut scheduler, &mut tokens));
    assert_eq!(scheduler.reserved().count(), 1);
    // The first request wants a third block while the transfer runs: it is newer than none, but the other one must stay.
    let before = tokens.0.len();
    while pass(&mut scheduler, &mut tokens) {}
    assert!(tokens.0.len() > before);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 1), "the one that runs is preempted");
    scheduler.receive(1, NOW, &mut tokens);
    while pass(&mut scheduler, &mut tokens) {}
    let of = |id| tokens.0.iter().filter(move |token| token.0 == id).map(|token| token.1);
    assert!(of(0).eq(0..12) && of(1).eq(0..3), "{:?}", tokens.0);
}

#[test]
fn a_request_that_does_not_fit_is_refused_where_it_would_not_fit() {
    let mut source = prompt_machine(settings("sequence"), &[request(0, 40, 30)]);
    let handover = source.take_handed_over()[0];
    let mut scheduler = Scheduler::new(settings("sequence")).unwrap();
    let error = scheduler.submit_handed_over(&handover).unwrap_err().to_string();
    assert!(error.contains("69 tokens, but the cache holds 40"), "{error}");
}

/// Runs nothing, in no time; every row exits.
struct Nothing;

impl Executor for Nothing {
    type Error = std::convert::Infallible;
    fn admit(&mut self, _: Slot, _: &Request, _: u32) -> Result<(), Self::Error> {
        Ok(())
    }
    fn release(&mut self, _: Slot) {}
    fn run(&mut self, _: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error> {
        signals.fill(1.0);
        Ok(Nanos::ZERO)
    }
    fn emit(&mut self, _: &Pass<'_>, _: &[u32]) -> Result<Nanos, Self::Error> {
        Ok(Nanos::ZERO)
    }
}

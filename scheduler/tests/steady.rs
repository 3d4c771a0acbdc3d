//! Passes of a steady load have few sequences or full batches, and do not depend on how long they take.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::rc::Rc;

use scheduler::{Executor, Lengths, Pass, RowKind, Segment, Slot, SteadyLoad, SteadyServer};
use traces::{Nanos, Request};

/// An executor that records the passes it gets.
struct Notes {
    elapsed: Nanos,
    passes: Rc<RefCell<Vec<Vec<Segment>>>>,
    requests: Rc<RefCell<Vec<Request>>>,
}

impl Executor for Notes {
    type Error = Infallible;
    fn admit(&mut self, _: Slot, request: &Request, generated: u32) -> Result<(), Infallible> {
        assert_eq!(generated, 0, "nothing is preempted");
        self.requests.borrow_mut().push(*request);
        Ok(())
    }
    fn release(&mut self, _: Slot) {}
    fn run(&mut self, pass: &Pass<'_>, _: &mut [f32]) -> Result<Nanos, Infallible> {
        self.passes.borrow_mut().push(pass.segments.to_vec());
        Ok(self.elapsed)
    }
    fn emit(&mut self, _: &Pass<'_>, _: &[u32]) -> Result<Nanos, Infallible> {
        Ok(Nanos::ZERO)
    }
}

fn served(load: SteadyLoad, elapsed: Nanos, count: usize) -> (Vec<Vec<Segment>>, Vec<Request>) {
    let (passes, requests) = (Rc::default(), Rc::default());
    let notes = Notes { elapsed, passes: Rc::clone(&passes), requests: Rc::clone(&requests) };
    let mut server = SteadyServer::new(load, notes).unwrap();
    for _ in 0..count {
        assert_eq!(server.pass(&mut ()).unwrap(), elapsed);
    }
    assert_eq!(server.passes(), count);
    (passes.take(), requests.take())
}

const LENGTHS: Lengths = Lengths { prompt: 20, output: 40, longest: 100 };

#[test]
fn passes_are_of_every_number_of_sequences_and_the_same_on_every_executor() {
    let load = SteadyLoad::new(3, 8, 32, 16, 16, LENGTHS);
    let (slow, _) = served(load, Nanos(1_000_000), 20_000);
    assert_eq!(served(load, Nanos(1), 20_000).0, slow);
    let mut of_sequences = [0usize; 9];
    for pass in &slow {
        assert!(!pass.is_empty(), "there is always somebody to go on with");
        of_sequences[pass.len()] += 1;
    }
    assert!(of_sequences[1..].iter().all(|&passes| passes > slow.len() / 100), "{of_sequences:?}");
    let depth = |(index, pass): (usize, &Vec<Segment>)| usize::from(pass[0].depth) == index % 3;
    assert!(slow.iter().enumerate().all(depth), "passes take turns through the depths");
}

#[test]
fn sequences_have_the_lengths_that_were_asked_for() {
    let (_, requests) = served(SteadyLoad::new(3, 8, 32, 16, 16, LENGTHS), Nanos(5), 20_000);
    assert!(requests.len() > 200);
    assert!(requests.iter().all(|request| request.prompt_tokens == 20));
    let outputs = || requests.iter().map(|request| request.output_tokens);
    assert_eq!((outputs().min(), outputs().max()), (Some(20), Some(60)));
    let mean = f64::from(outputs().sum::<u32>()) / requests.len() as f64;
    assert!((mean - 40.0).abs() < 1.0, "{mean}");
    assert!(outputs().collect::<HashSet<_>>().len() > 38, "sequences that begin together do not end together");

    let capped = Lengths { prompt: 64, output: 64, longest: 100 };
    let (_, requests) = served(SteadyLoad::new(3, 8, 32, 16, 16, capped), Nanos(5), 5_000);
    let longest = requests.iter().map(|request| request.prompt_tokens + request.output_tokens).max();
    assert_eq!(longest, Some(100));
}

#[test]
fn the_shortest_sequences_and_the_smallest_batch_can_be_served() {
    for lengths in [(0, 0, 0), (1, 1, 1), (1, 1, 2), (7, 1, 3)] {
        let (prompt, output, longest) = lengths;
        let load = SteadyLoad::new(1, 1, 1, 1, 16, Lengths { prompt, output, longest });
        assert!(served(load, Nanos(5), 100).0.iter().all(|pass| pass.len() == 1));
    }
}

#[test]
fn with_exits_tokens_exit_in_the_middle_and_passes_mix_depths() {
    let load = SteadyLoad::new(3, 8, 32, 16, 16, LENGTHS).with_exits();
    let (passes, _) = served(load, Nanos(5), 5_000);
    let of = |kind| passes.iter().flatten().filter(move |segment| segment.kind == kind);
    assert_eq!(of(RowKind::Decode).map(|segment| segment.depth).max(), Some(1));
    assert_eq!(of(RowKind::Prompt).map(|segment| segment.depth).max(), Some(2), "prompts run every depth");
    let mixed = |pass: &&Vec<Segment>| pass.iter().any(|segment| segment.depth != pass[0].depth);
    assert!(passes.iter().filter(mixed).count() > passes.len() / 2);
}

#[test]
fn depth_wise_at_full_depth_passes_mix_all_depths() {
    let load = SteadyLoad::new(3, 8, 32, 16, 16, LENGTHS);
    assert_eq!(load.depth_wise().settings().exit, load.settings().exit);
    let (passes, _) = served(load.depth_wise(), Nanos(5), 5_000);
    let depths = |pass: &Vec<Segment>| pass.iter().map(|segment| segment.depth).collect::<BTreeSet<_>>().len();
    let all = passes.iter().filter(|pass| depths(pass) == 3).count();
    assert!(all > passes.len() / 4, "{all} of {} passes", passes.len());
}

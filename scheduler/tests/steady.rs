//! A load that never ends keeps the batch full, and its passes do not depend on how long they take.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use scheduler::{Executor, Pass, Segment, Slot, SteadyLoad, SteadyServer};
use traces::{Nanos, Request};

/// Notes what it is asked to run.
struct Notes {
    elapsed: Nanos,
    passes: Rc<RefCell<Vec<Vec<Segment>>>>,
}

impl Executor for Notes {
    type Error = Infallible;
    fn admit(&mut self, _: Slot, request: &Request, generated: u32) -> Result<(), Infallible> {
        assert_eq!(generated, 0, "nothing is preempted");
        assert!(request.context_tokens() <= 128);
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

fn passes(load: SteadyLoad, elapsed: Nanos, count: usize) -> Vec<Vec<Segment>> {
    let passes = Rc::default();
    let mut server = SteadyServer::new(load, Notes { elapsed, passes: Rc::clone(&passes) }).unwrap();
    for _ in 0..count {
        assert_eq!(server.pass().unwrap(), elapsed);
    }
    assert_eq!(server.passes(), count);
    passes.take()
}

#[test]
fn the_batch_stays_full_and_passes_are_the_same_on_every_executor() {
    let load = SteadyLoad::new(3, 4, 32, 16, 16, 128);
    let slow = passes(load, Nanos(1_000_000), 5000);
    assert_eq!(passes(load, Nanos(1), 5000), slow);
    let rows = |pass: &Vec<Segment>| pass.iter().map(|segment| segment.tokens).sum::<u32>();
    let most = slow.iter().map(rows).max().unwrap();
    assert!((17..=19).contains(&most), "a chunk of 16 beside up to three decode rows, not {most} rows");
    let later = &slow[100..];
    assert!(later.iter().all(|pass| pass.len() <= 4 && rows(pass) >= 2), "there is always somebody to go on with");
    let mean = later.iter().map(|pass| pass.len()).sum::<usize>() as f64 / later.len() as f64;
    assert!(mean > 3.0, "{mean} segments in a pass");
    let depths: Vec<usize> = (0..3).map(|depth| later.iter().filter(|pass| pass[0].depth == depth).count()).collect();
    assert!(depths.iter().all(|&count| count.abs_diff(later.len() / 3) <= 1), "{depths:?}");
}

#[test]
fn the_shortest_sequences_and_the_smallest_batch_can_be_served() {
    assert!(passes(SteadyLoad::new(1, 1, 1, 1, 16, 1), Nanos(5), 100).iter().all(|pass| pass.len() == 1));
}

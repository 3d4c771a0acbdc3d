//! The scheduler on a machine of your own: `cargo run --release -p depthwise-examples --bin custom_executor`
//!
//! A pass of this machine takes 100 us for its weights and 2 us for each row. Every third token of a request needs all
//! four loops; the others are certain after the first.

use std::convert::Infallible;
use std::error::Error;

use scheduler::{Batching, Clock, Executor, Pass, Server, Settings, Slot, VirtualClock, serve};
use traces::{Nanos, Request};

/// The machine. It counts the tokens of the sequence in each slot.
struct Machine {
    tokens: [u32; 8],
}

impl Executor for Machine {
    type Error = Infallible;

    fn admit(&mut self, slot: Slot, _: &Request, generated: u32) -> Result<(), Infallible> {
        self.tokens[slot as usize] = generated;
        Ok(())
    }

    fn release(&mut self, _: Slot) {}

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Infallible> {
        for (segment, signal) in pass.segments.iter().zip(signals) {
            *signal = if self.tokens[segment.slot as usize].is_multiple_of(3) { 0.1 } else { 0.9 };
        }
        Ok(Nanos(100_000 + 2_000 * u64::from(pass.num_rows())))
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Infallible> {
        exiting.iter().for_each(|&index| self.tokens[pass.segments[index as usize].slot as usize] += 1);
        Ok(Nanos(20_000))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 16, output_tokens: 32 + 16 * (id % 7) };
    let requests: Vec<Request> = (0..64).map(request).collect();
    let tokens: u32 = requests.iter().map(|request| request.output_tokens).sum();
    println!("batching   tokens/s");
    for batching in [Batching::Sequence, Batching::Depth] {
        let settings = Settings { max_batch: 8, ..Settings::new(batching, "confidence:0.5".parse()?, 4) };
        let (mut server, mut clock) = (Server::new(settings, Machine { tokens: [0; 8] })?, VirtualClock::default());
        serve(&mut server, requests.iter().copied(), &mut clock, &mut ())?;
        println!("{:<8} {:>10.0}", batching.name(), f64::from(tokens) / clock.now().as_secs_f64());
    }
    Ok(())
}

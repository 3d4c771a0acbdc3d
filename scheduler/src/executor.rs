//! What the scheduler asks of whoever runs the passes.

use traces::{Nanos, Request};

use crate::pass::{Pass, Slot};

/// Runs passes: the engine on a model, the simulator on a latency profile and an exit trace.
///
/// The scheduler cannot tell which one it has. For each pass it calls [`run`](Self::run), decides from the
/// signals which rows leave, and calls [`emit`](Self::emit) for those:
///
/// ```text
/// admit(slot) -> [ run(pass) -> signals -> emit(rows that leave) ]* -> release(slot)
/// ```
///
/// A row's hidden state is kept from its depth to the next: that of a row that has left as well, under
/// [`KvFill::Backfill`](crate::KvFill::Backfill), since segments of kind [`Backfill`](crate::RowKind::Backfill) go on
/// from it.
pub trait Executor {
    /// What can go wrong in a run.
    type Error: std::error::Error + Send + Sync + 'static;

    /// A sequence takes a slot. `generated` is more than 0 if it was preempted after that many tokens:
    /// prompt and generated tokens then come again as one prompt.
    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error>;

    /// A sequence leaves its slot, finished or preempted; rows of it in flight are void.
    fn release(&mut self, slot: Slot);

    /// Runs the block over the rows of a pass, embedding those at depth 0, and returns how long it took.
    ///
    /// `signals[i]` must be set for each segment that the pass [looks at](Pass::reads_signal); the others are not read.
    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error>;

    /// Whether passes run beside the host, which may then plan the next one meanwhile, by
    /// [`run_beside`](Self::run_beside).
    const RUNS_BESIDE: bool = false;

    /// Runs a pass whose outcome is known beforehand: the last row of each segment `exiting` leaves the loop after it,
    /// as [`emit`](Self::emit) has it. Calls `meanwhile` once, while the pass runs if that can be. Returns how long
    /// it took.
    fn run_beside(
        &mut self,
        pass: &Pass<'_>,
        exiting: &[u32],
        meanwhile: &mut (dyn FnMut() + Send),
    ) -> Result<Nanos, Self::Error> {
        let mut elapsed = self.run(pass, &mut vec![0.0; pass.segments.len()])?;
        if !exiting.is_empty() {
            elapsed += self.emit(pass, exiting)?;
        }
        meanwhile();
        Ok(elapsed)
    }

    /// The last row of each segment `exiting` (indices into the pass just run) leaves the loop: its token is the
    /// sequence's next. Returns how long that took, the exit head included for rows that [had not run it](Pass::runs_head).
    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error>;
}

//! The interface between the scheduler and what runs its passes.

use traces::{DevicePass, Nanos, Request};

use crate::pass::{Pass, Slot};

/// Runs passes: the engine on a model, the simulator on a latency profile and an exit trace.
///
/// The scheduler does not know which executor it has. For each pass, the scheduler calls [`run`](Self::run), decides
/// from the signals which rows exit, and calls [`emit`](Self::emit) for those rows:
///
/// ```text
/// admit(slot) -> [ run(pass) -> signals -> emit(rows that exit) ]* -> release(slot)
/// ```
///
/// An executor keeps a row's hidden state from one depth to the next. Under
/// [`KvFill::Backfill`](crate::KvFill::Backfill) it also keeps the state of a row that has exited, since segments of
/// kind [`Backfill`](crate::RowKind::Backfill) continue from it.
pub trait Executor {
    /// Error of a pass.
    type Error: std::error::Error + Send + Sync + 'static;

    /// A sequence takes a slot. `generated` is above 0 if the sequence was preempted after that many tokens: its prompt
    /// and its generated tokens then run again as one prompt. It is 1 as well if the keys and values of the prompt come from
    /// another machine, which has generated the first token.
    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), Self::Error>;

    /// A sequence gives up its slot, because it has finished or was preempted. Its rows in flight are discarded.
    fn release(&mut self, slot: Slot);

    /// Runs the block over the rows of a pass, embeds rows at depth 0, and returns the time that took.
    ///
    /// `signals[i]` must be set for each segment whose signal the pass [reads](Pass::reads_signal), and for each that it
    /// [verifies](Pass::verifies); the others are not read. For the latter it is the number of drafts up to the first that
    /// full depth contradicts: as many as the segment has rows if it contradicts none. The executor replaces the
    /// contradicted draft by what full depth predicts, and forgets what it has of the sequence after that token, rows in
    /// flight included.
    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, Self::Error>;

    /// Whether passes run asynchronously to the host, which may then plan the next pass meanwhile; see
    /// [`run_beside`](Self::run_beside).
    const RUNS_BESIDE: bool = false;

    /// Runs a pass whose exits are known beforehand: the last row of each segment in `exiting` exits after it, as in
    /// [`emit`](Self::emit). Sets `signals` as in [`run`](Self::run). Calls `meanwhile` once, if possible while the pass
    /// runs. Returns the time that the pass took.
    fn run_beside(
        &mut self,
        pass: &Pass<'_>,
        exiting: &[u32],
        signals: &mut [f32],
        meanwhile: &mut (dyn FnMut() + Send),
    ) -> Result<Nanos, Self::Error> {
        let mut elapsed = self.run(pass, signals)?;
        if pass.emits(exiting) {
            elapsed += self.emit(pass, exiting)?;
        }
        meanwhile();
        Ok(elapsed)
    }

    /// Samples the sequence's next token from the last row of each segment in `exiting` (as in
    /// [`Pass::exited`]: rows that waited for the head are included). Returns the time that took, including the exit
    /// head for rows that [had not run it](Pass::runs_head), and for copies of keys and values.
    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, Self::Error>;

    /// How a GPU ran the last pass; `None` if no GPU ran it.
    fn device_pass(&self) -> Option<DevicePass> {
        None
    }
}

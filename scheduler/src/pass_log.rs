//! An observer that keeps the passes of a run, to be written as a pass log.

use traces::{DepthRows, LoggedPass, PassOrigin, PassRun};

use crate::observe::{Observer, PassRecord};
use crate::pass::RowKind;
use crate::scheduler::Settings;

/// Observes a run and keeps every pass with its work.
#[derive(Clone, Debug)]
pub struct PassRecorder {
    run: PassRun,
    num_loops: u8,
    wall_us: fn() -> u64,
}

impl PassRecorder {
    /// A recorder without passes, of a run under `settings`. `wall_us` returns the wall-clock time in microseconds
    /// since 1970: the scheduler has no clock of its own.
    pub fn new(settings: &Settings, origin: PassOrigin, wall_us: fn() -> u64) -> Self {
        Self { run: settings.pass_run(origin), num_loops: settings.num_loops, wall_us }
    }

    /// The passes so far, in order.
    pub fn passes(&self) -> &[LoggedPass] {
        &self.run.passes
    }

    /// The recorded run, once it is over.
    pub fn into_run(self) -> PassRun {
        self.run
    }
}

impl Observer for PassRecorder {
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.run.passes.push(record.logged(self.num_loops, (self.wall_us)()));
    }
}

impl Settings {
    /// A run under these settings, without passes.
    pub fn pass_run(&self, origin: PassOrigin) -> PassRun {
        PassRun {
            origin,
            batching: self.batching.to_string(),
            exit: self.exit.to_string(),
            kv_fill: self.kv_fill.to_string(),
            load: None,
            repeat: 0,
            passes: Vec::new(),
        }
    }
}

impl PassRecord<'_> {
    /// The pass as a pass log has it, in a model with `num_loops` loops, with the wall-clock time at its end.
    pub fn logged(&self, num_loops: u8, wall_us: u64) -> LoggedPass {
        let mut rows_by_depth = vec![DepthRows::default(); usize::from(num_loops)];
        for segment in self.pass.segments {
            let rows = &mut rows_by_depth[usize::from(segment.depth)];
            let of_kind = match segment.kind {
                RowKind::Decode | RowKind::Verify => &mut rows.decode,
                RowKind::Prompt => &mut rows.prompt,
                RowKind::Backfill => &mut rows.backfill,
            };
            *of_kind += segment.tokens;
        }
        let Self { start, elapsed, pass, device, .. } = *self;
        LoggedPass { start, elapsed, wall_us, work: pass.work.clone(), rows_by_depth, device }
    }
}

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
        let run = PassRun {
            origin,
            batching: settings.batching.to_string(),
            exit: settings.exit.to_string(),
            kv_fill: settings.kv_fill.to_string(),
            load: None,
            repeat: 0,
            passes: Vec::new(),
        };
        Self { run, num_loops: settings.num_loops, wall_us }
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
        let mut rows_by_depth = vec![DepthRows::default(); usize::from(self.num_loops)];
        for segment in record.pass.segments {
            let rows = &mut rows_by_depth[usize::from(segment.depth)];
            let of_kind = match segment.kind {
                RowKind::Decode => &mut rows.decode,
                RowKind::Prompt => &mut rows.prompt,
                RowKind::Backfill => &mut rows.backfill,
            };
            *of_kind += segment.tokens;
        }
        let PassRecord { start, elapsed, pass, .. } = *record;
        let work = pass.work.clone();
        self.run.passes.push(LoggedPass { start, elapsed, wall_us: (self.wall_us)(), work, rows_by_depth });
    }
}

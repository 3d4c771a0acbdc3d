//! Looking ahead: every row runs to the last depth when it starts, without any trace of it in what is served.
//!
//! All depths' signals of a token are then known over the history that service leaves to it, before the scheduler decides
//! where the token exits. A look-ahead writes keys and values at the positions of its own rows only, at deeper depths.
//! Nothing reads them before they are replaced: a row that goes on writes the same again, bit for bit, and the exit of a
//! row fills the depths that it skips, or leaves their entries out of what later rows attend to. Where depths share entries,
//! a look-ahead overwrites those of depth 0, which the row may be the last to write: it runs depth 0 again at the end. Chunks of a prompt look
//! ahead one after the other, so that the entries of earlier positions are there when a row starts.

use scheduler::{Pass, Segment};
use traces::hash::{mix, uniform};

use super::{Current, EngineError, EngineExecutor, Generation, Oracle, by_depth, positions};

impl EngineExecutor {
    /// Keeps the signals and predictions of every generated token at every depth, also at depths that the token skips.
    /// Under an exit policy that reads the oracle, a token exits at the earliest depth that predicts what the last one
    /// predicts. Passes take several times as long. The [settings](EngineExecutor::with_prompts_of) must say how deep
    /// prompts run. Where exits are known, prompts end early in service, but a look-ahead reads their deeper entries.
    pub fn looking_ahead(self) -> Self {
        Self { looking_ahead: true, oracle: Some(Oracle::Ahead), ..self.recording() }
    }

    /// As [`looking_ahead`](Self::looking_ahead), but what the oracle answers is drawn: at each depth before the last, a
    /// token exits with this probability.
    pub(crate) fn exiting_by_chance(self, seed: u64, probability: f64) -> Self {
        self.looking_ahead().with_chance(seed, probability)
    }

    /// Records all depths of the rows that start in a pass and predict.
    pub(super) fn look_ahead(&mut self, pass: &Pass<'_>) -> Result<(), EngineError> {
        let started: Vec<usize> = (0..pass.segments.len()).filter(|&index| pass.segments[index].depth == 0).collect();
        if started.is_empty() {
            return Ok(());
        }
        let current = std::mem::replace(&mut self.current, Current { is_ahead: true, ..Current::default() });
        let mut segments: Vec<Segment> = started.iter().map(|&index| pass.segments[index]).collect();
        self.current.findings = started.iter().map(|&index| current.findings[index]).collect();
        self.record(&Pass { segments: &segments, ..*pass });

        let rows: usize = segments.iter().map(|segment| segment.tokens as usize).sum();
        self.arena.reserve(&mut *self.backend, rows)?;
        let ahead = self.arena.free.split_off(self.arena.free.len() - rows);
        let mut places = ahead.clone();
        let mut replaced = (Vec::new(), Vec::new());
        for depth in 1..self.num_loops() {
            self.end_prompts(&mut segments, &mut places);
            segments.iter_mut().for_each(|segment| segment.depth = depth as u8);
            let pass = Pass { segments: &segments, ..*pass };
            self.run_ahead(&pass, &places)?;
            if depth == 1 {
                let in_service = self.replace_in_flight(&segments, places.iter().copied().map(Some));
                replaced = (segments.clone(), in_service);
            }
            self.record(&pass);
        }
        if self.sequences.overwrites() {
            self.replace_in_flight(&segments, std::iter::repeat(None));
            segments.iter_mut().for_each(|segment| segment.depth = 0);
            self.run_ahead(&Pass { segments: &segments, ..*pass }, &places)?;
        }
        let (segments, in_service) = replaced;
        self.replace_in_flight(&segments, in_service.into_iter());
        self.arena.free.extend(ahead);
        self.current = current;
        Ok(())
    }

    /// Drops the rows that have run the last depth of prompts, and their places.
    fn end_prompts(&self, segments: &mut Vec<Segment>, places: &mut Vec<u32>) {
        let mut of_rows = std::mem::take(places).into_iter();
        segments.retain_mut(|segment| {
            let before = positions(segment).filter(|&position| !self.sequences.goes_on(segment, position)).count();
            let of_segment = of_rows.by_ref().take(segment.tokens as usize);
            places.extend(of_segment.skip(before));
            segment.start += before as u32;
            segment.tokens -= before as u32;
            segment.tokens > 0
        });
    }

    /// Runs the rows of a pass from their states in flight; they are kept in the arena rows `ahead`.
    fn run_ahead(&mut self, pass: &Pass<'_>, ahead: &[u32]) -> Result<(), EngineError> {
        let order = by_depth(pass, (0..pass.segments.len()).collect());
        self.place_rows(pass, &order);
        let questions = self.questions(pass, None);
        let sources = self.sources(pass, &order);
        let places = ahead.iter().copied().map(Some).collect();
        self.run_placed(pass, &order, &questions, sources, places, &mut || ())
    }

    /// Replaces the states in flight of the rows of segments, and returns those that were there.
    fn replace_in_flight(
        &mut self,
        segments: &[Segment],
        mut by: impl Iterator<Item = Option<u32>>,
    ) -> Vec<Option<u32>> {
        let mut replaced = Vec::new();
        for segment in segments {
            let in_flight = &mut self.sequences.of_mut(segment).in_flight;
            for position in positions(segment) {
                let place = by.next().expect("a state for each row");
                replaced.push(std::mem::replace(&mut in_flight[position], place));
            }
        }
        replaced
    }

    /// The earliest depth at which the token that is looked ahead of has the prediction of the last depth.
    pub(super) fn earliest_final_depth(&self, generation: &Generation) -> u8 {
        let rows = &generation.recorded[generation.tokens.len() * self.num_loops()..];
        let last = self.num_loops() - 1;
        rows.iter().position(|row| row.1 == rows[last].1).unwrap_or(last) as u8
    }

    /// The depth at which a token exits by chance.
    pub(super) fn drawn_depth(&self, seed: u64, probability: f64, request: u32, token: usize) -> u8 {
        let key = mix(seed ^ mix((u64::from(request) << 32) | token as u64));
        let last = self.num_loops() as u64 - 1;
        let exits = |&depth: &u64| uniform(mix(key ^ mix(depth))) < probability;
        (0..last).find(exits).unwrap_or(last) as u8
    }
}

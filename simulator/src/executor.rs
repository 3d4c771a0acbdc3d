//! An executor that runs no model: it looks times up in a latency model and exit signals up in an exit model.

use scheduler::{Executor, KvFill, Pass, Segment, Settings, Slot};
use traces::{Component, Nanos, Request};

use crate::attention::{AttentionShape, is_chunk};
use crate::exits::{Cursor, ExitError, ExitModel};
use crate::latency::{Extrapolations, LatencyModel, PassShape, nanos};
use crate::parts::TimeByPart;
use crate::reach::Reach;
use crate::spread::Spread;

/// Runs passes of a profile.
#[derive(Clone, Debug)]
pub struct ProfileExecutor<'m> {
    latency: &'m LatencyModel,
    exits: &'m ExitModel,
    /// By slot.
    cursors: Vec<Cursor>,
    /// None where rows attend to every token before them.
    reach: Option<Reach>,
    /// None where every time is the median.
    spread: Option<Spread>,
    tokens: u64,
    agreeing: u64,
    extrapolations: Extrapolations,
    time: TimeByPart,
    attention: AttentionShape,
}

impl<'m> ProfileExecutor<'m> {
    /// An executor of passes under `settings`. The caller sees to it that all three are of the same model.
    pub fn new(latency: &'m LatencyModel, exits: &'m ExitModel, settings: &Settings) -> Self {
        let Settings { kv_fill, num_loops, max_batch, .. } = *settings;
        Self {
            latency,
            exits,
            cursors: vec![Cursor::default(); max_batch as usize],
            reach: (kv_fill == KvFill::Skip).then(|| Reach::new(num_loops, max_batch)),
            spread: None,
            tokens: 0,
            agreeing: 0,
            extrapolations: Extrapolations::default(),
            time: TimeByPart::default(),
            attention: AttentionShape::default(),
        }
    }

    /// Draws times from their measured spread around the median instead of taking the median.
    pub fn with_spread(self, seed: u64) -> Self {
        Self { spread: Some(Spread::new(seed)), ..self }
    }

    /// Tokens emitted so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Tokens emitted so far that equal what full depth gives.
    pub fn agreeing_tokens(&self) -> u64 {
        self.agreeing
    }

    /// Where the time of passes went so far.
    pub fn time(&self) -> &TimeByPart {
        &self.time
    }

    /// Where the run has left the measured grid so far.
    pub fn extrapolations(&self) -> &Extrapolations {
        &self.extrapolations
    }
}

/// Tokens that a segment attends to before its first.
#[inline]
fn history(reach: &Option<Reach>, segment: &Segment) -> u32 {
    reach.as_ref().map_or(segment.start, |reach| reach.history(segment))
}

impl Executor for ProfileExecutor<'_> {
    type Error = ExitError;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), ExitError> {
        self.cursors[slot as usize] = self.exits.cursor(request, generated)?;
        if let Some(reach) = &mut self.reach {
            reach.admit(slot, request, generated);
        }
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        if let Some(reach) = &mut self.reach {
            reach.release(slot);
        }
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, ExitError> {
        let mut shape = PassShape::default();
        let mut depths = 0u64;
        let mut chunks_ns = 0.0;
        for (segment, signal) in pass.segments.iter().zip(signals) {
            shape.rows += segment.tokens;
            shape.embed_rows += if segment.depth == 0 { segment.tokens } else { 0 };
            shape.head_rows += u32::from(segment.head);
            depths |= 1 << segment.depth;
            let history = history(&self.reach, segment);
            if is_chunk(segment) {
                chunks_ns += self.latency.prefill_attention_ns(segment.tokens, history, &mut self.extrapolations);
            } else {
                shape.decode_rows += 1;
                shape.decode_history += u64::from(history);
            }
            if segment.look {
                let row = self.exits.row(&self.cursors[segment.slot as usize], segment.depth);
                *signal = self.exits.signal(pass.look, row);
            }
        }
        shape.depths = depths.count_ones();
        let parts = self.latency.parts_ns(&shape, &mut self.extrapolations);
        let overhead = self.latency.overhead_ns();
        let mut ns = chunks_ns + (overhead + parts.iter().sum::<f64>());
        self.time.add_overhead(overhead);
        self.time.add(Component::PrefillAttention, chunks_ns);
        for (component, part) in LatencyModel::PARTS.into_iter().zip(parts) {
            self.time.add(component, part);
        }
        if self.latency.has_mixed_attention() {
            self.attention.measure(pass, |segment| history(&self.reach, segment));
            let attention = self.latency.mixed_attention_ns(&self.attention, &mut self.extrapolations);
            let alone = self.attention.chunks.is_empty();
            self.time.add(if alone { Component::DecodeAttention } else { Component::PrefillAttention }, attention);
            ns += attention;
        }
        if let Some(spread) = &mut self.spread {
            let chunks = pass.segments.iter().filter(|segment| is_chunk(segment));
            let chunks = chunks.map(|chunk| (chunk.tokens, history(&self.reach, chunk)));
            ns = spread.draw(ns, self.latency.squared_pass_spread(&shape, chunks));
        }
        Ok(nanos(ns))
    }

    fn emit(&mut self, pass: &Pass<'_>, leaving: &[u32]) -> Result<Nanos, ExitError> {
        let mut head_rows = 0;
        for &index in leaving {
            let segment = &pass.segments[index as usize];
            let cursor = &mut self.cursors[segment.slot as usize];
            self.agreeing += u64::from(self.exits.agrees(self.exits.row(cursor, segment.depth)));
            self.exits.advance(cursor);
            self.exits.prefetch(pass.look, cursor);
            head_rows += u32::from(!segment.head);
            if let Some(reach) = &mut self.reach {
                reach.emit(segment);
            }
        }
        self.tokens += leaving.len() as u64;
        let mut ns = self.latency.head_ns(head_rows, &mut self.extrapolations);
        self.time.add(Component::Head, ns);
        if let Some(spread) = &mut self.spread {
            ns = spread.draw(ns, self.latency.squared_head_spread(head_rows));
        }
        Ok(nanos(ns))
    }
}

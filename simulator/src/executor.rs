//! An executor that runs no model: it looks times up in a latency model and exit signals up in an exit model.

use scheduler::{Executor, KvFill, Pass, Segment, Settings, Slot};
use traces::{Component, Nanos, Request};

use crate::attention::{AttentionShape, is_chunk};
use crate::exits::{Cursor, ExitError, ExitModel, Left};
use crate::latency::{Extrapolations, LatencyModel, PassBefore, PassShape, nanos};
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
    /// Whether rows that leave copy their keys and values to the depths they skip.
    copies: bool,
    /// None where every time is the median.
    spread: Option<Spread>,
    tokens: u64,
    agreeing: u64,
    extrapolations: Extrapolations,
    time: TimeByPart,
    attention: AttentionShape,
    /// The last pass, as the next finds it.
    last: PassBefore,
    /// Whether the last pass ran the exit head, or the one before.
    head_at_hand: bool,
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
            copies: kv_fill == KvFill::Reuse,
            spread: None,
            tokens: 0,
            agreeing: 0,
            extrapolations: Extrapolations::default(),
            time: TimeByPart::default(),
            attention: AttentionShape::default(),
            last: PassBefore::default(),
            head_at_hand: false,
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
        self.exits.look(pass, &self.cursors, signals);
        let mut shape = match &self.reach {
            None => PassShape::of(pass, |segment| segment.start),
            Some(reach) => PassShape::of(pass, |segment| reach.history(segment)),
        };
        shape.before = self.last;
        self.head_at_hand = shape.has_head_at_hand();
        self.last = PassBefore { rows: shape.rows, head: shape.head_rows > 0 };
        let parts = self.latency.parts_ns(&shape, &mut self.extrapolations);
        self.time.add_pass(self.latency.overhead_ns(), &parts);
        let mut ns = self.latency.overhead_ns() + parts.iter().sum::<f64>();
        if shape.decode_rows < shape.rows {
            let chunks = pass.segments.iter().filter(|segment| is_chunk(segment));
            let chunks = chunks.map(|chunk| (chunk.tokens, history(&self.reach, chunk)));
            let attention = self.latency.prefills_ns(chunks, &mut self.extrapolations);
            self.time.add(Component::PrefillAttention, attention);
            ns += attention;
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
        if let Some(reach) = &mut self.reach {
            leaving.iter().for_each(|&index| reach.emit(&pass.segments[index as usize]));
        }
        let Left { agreeing, head_rows, skipped_depths } = self.exits.leave(pass, leaving, &mut self.cursors);
        self.agreeing += agreeing;
        self.tokens += leaving.len() as u64;
        let filled = if self.copies { skipped_depths } else { 0 };
        let head = self.latency.head_ns(head_rows, self.head_at_hand, &mut self.extrapolations);
        let copies = self.latency.kv_fill_ns(filled, &mut self.extrapolations);
        self.last.head |= head_rows > 0;
        self.time.add(Component::Head, head);
        self.time.add(Component::KvFill, copies);
        let mut ns = head + copies;
        if let Some(spread) = &mut self.spread {
            ns = spread.draw(ns, self.latency.squared_emit_spread(head_rows, self.head_at_hand, filled));
        }
        Ok(nanos(ns))
    }
}

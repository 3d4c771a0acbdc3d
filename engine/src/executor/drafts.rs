//! Drafts of early exits, and what full depth predicts in their place.
//!
//! A draft is chosen with the random numbers that full depth chooses the same token with. So the text is that of full depth
//! at every temperature, not only in distribution, and a draft is contradicted only where the two distributions part.

use scheduler::{Pass, RowKind, Segment};

use super::{EngineError, EngineExecutor, Generation, Sequence, positions};
use crate::backend::Heads;
use crate::model::Rows;
use crate::sampling::Chosen;

impl EngineExecutor {
    /// Segments of the pass whose rows have left drafts, of which the pass decides.
    pub(super) fn verified(&self, pass: &Pass<'_>) -> Vec<usize> {
        (0..pass.segments.len()).filter(|&index| pass.verifies(&pass.segments[index])).collect()
    }

    /// Index in the output of the token that the row at a position predicts.
    fn token_after(&self, segment: &Segment, position: usize) -> usize {
        position + 1 - self.sequences.of(segment).generation.prompt.len()
    }

    /// Adds every row of the `verified` segments to the rows of the head. They are at the last depth, and so behind the others.
    pub(super) fn add_verified(&self, pass: &Pass<'_>, verified: &[usize], heads: &mut Heads) {
        for &index in verified {
            let segment = &pass.segments[index];
            let first_row = self.current.first_rows[index];
            heads.rows.extend(first_row..first_row + segment.tokens as usize);
            let request = self.sequences.of(segment).request;
            let key = |position| self.sampling.key(request, self.token_after(segment, position));
            heads.keys.extend(positions(segment).map(key));
        }
    }

    /// Compares drafts with what full depth predicts, and sets the number of confirmed drafts of each segment that the pass
    /// verifies. Replaces the first contradicted draft of a sequence, and forgets what follows.
    pub(super) fn verify(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<(), EngineError> {
        for (index, predicted) in std::mem::take(&mut self.current.verified) {
            let segment = &pass.segments[index];
            let chosen = self.chosen_at_full_depth(pass, index)?;
            let mut accepted = 0;
            for (row, position) in positions(segment).enumerate() {
                let token = self.token_after(segment, position);
                if !predicted[row].top1.is_finite() {
                    let request = self.sequences.of(segment).request;
                    return Err(EngineError::NotFinite { request, token, depth: segment.depth });
                }
                let choice = chosen.as_ref().and_then(|chosen| chosen[row].clone());
                let full_depth = choice.as_ref().map_or(predicted[row].token, |choice| choice.token);
                let Sequence { generation, certain, .. } = self.sequences.of_mut(segment);
                *certain = token + 1;
                if let (Some(kept), Some(choice)) = (generation.chosen.get_mut(token), choice) {
                    *kept = choice;
                }
                if generation.tokens[token] != full_depth {
                    self.correct(segment, position, full_depth);
                    break;
                }
                accepted += 1;
            }
            signals[index] = accepted as f32;
        }
        Ok(())
    }

    /// What full depth chooses after each row of a segment, where the request chooses that token by rules of its own.
    fn chosen_at_full_depth(
        &mut self,
        pass: &Pass<'_>,
        index: usize,
    ) -> Result<Option<Vec<Option<Chosen>>>, EngineError> {
        let segment = &pass.segments[index];
        let Some(decoding) = self.sequences.of(segment).decoding.clone() else { return Ok(None) };
        let tokens: Vec<usize> = positions(segment).map(|position| self.token_after(segment, position)).collect();
        if !tokens.iter().any(|&token| decoding.reads_logits(token)) {
            return Ok(None);
        }
        let mut rows = Rows::default();
        positions(segment).for_each(|position| rows.push(self.sequences.row(pass, segment, position)));
        let first_row = self.current.first_rows[index];
        let picks: Vec<usize> = (first_row..first_row + tokens.len()).collect();
        let logits = self.backend.logits(&rows, &picks)?;
        let choose = |(logits, token): (&Vec<f32>, usize)| {
            // Other tokens are those that the head predicts, as in passes without drafts.
            decoding.reads_logits(token).then(|| decoding.choose(logits, token))
        };
        Ok(Some(logits.iter().zip(tokens).map(choose).collect()))
    }

    /// Replaces the draft of the token that the row at a position predicts, and forgets the tokens and rows behind it.
    fn correct(&mut self, segment: &Segment, position: usize, full_depth: u32) {
        let token = self.token_after(segment, position);
        let Sequence { generation, in_flight, .. } = self.sequences.of_mut(segment);
        generation.truncate(token);
        generation.chosen.truncate(token + 1);
        generation.tokens.push(full_depth);
        generation.exit_depths.push(segment.depth);
        generation.exit_signals.push(None);
        self.arena.free.extend(in_flight[position + 1..].iter_mut().filter_map(Option::take));
    }

    /// Whether a row that exits has left a draft, so that its state is kept for the depths that it has skipped.
    pub(super) fn leaves_draft(&self, segment: &Segment) -> bool {
        self.exit.speculates() && segment.kind == RowKind::Decode && usize::from(segment.depth) + 1 < self.num_loops()
    }
}

impl Generation {
    /// Forgets the tokens from an index on, but what is kept of their distributions.
    fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.exit_depths.truncate(tokens);
        self.exit_signals.truncate(tokens);
    }

    /// Forgets the tokens from an index on.
    pub(super) fn take_back(&mut self, tokens: usize) {
        self.truncate(tokens);
        self.chosen.truncate(tokens);
    }
}

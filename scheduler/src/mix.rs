//! A random choice between two static depths, once for each request: what a user can do without an exit signal.

use std::fmt;

use traces::hash::{mix, uniform};

use crate::pass::{Segment, Slot};

/// Each request runs all its tokens at one of two static depths.
///
/// The draw depends only on the seed and the id of the request, so a request has the same depth in every executor, under
/// every batching policy and after a preemption.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DepthMix {
    /// The two exit depths, from 0.
    pub depths: [u8; 2],
    /// Probability of the first, 0 to 1.
    pub share: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl DepthMix {
    /// The exit depth of all tokens of a request.
    pub fn depth(&self, request: u32) -> u8 {
        let drawn = uniform(mix(self.seed ^ mix(u64::from(request))));
        self.depths[usize::from(drawn >= f64::from(self.share))]
    }

    pub(crate) fn shallowest(&self) -> u8 {
        self.depths[0].min(self.depths[1])
    }

    pub(crate) fn deepest(&self) -> u8 {
        self.depths[0].max(self.depths[1])
    }
}

impl fmt::Display for DepthMix {
    /// `mix:DEPTH:DEPTH:SHARE`, and `:SEED` if the seed is not 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { depths: [first, second], share, seed } = self;
        write!(f, "mix:{first}:{second}:{share}")?;
        if *seed == 0 { Ok(()) } else { write!(f, ":{seed}") }
    }
}

/// The depths of the requests that hold a slot.
#[derive(Clone, Debug)]
pub(crate) struct MixedDepths {
    mix: DepthMix,
    /// By slot.
    depths: Vec<u8>,
}

impl MixedDepths {
    pub fn new(mix: DepthMix, max_batch: u32) -> Self {
        Self { mix, depths: vec![0; max_batch as usize] }
    }

    /// A request takes a slot, for the first time or again.
    pub fn admit(&mut self, slot: Slot, request: u32) {
        self.depths[slot as usize] = self.mix.depth(request);
    }

    /// 1 where the last row of a segment exits, 0 where it does not.
    pub fn exits(&self, segment: &Segment) -> f32 {
        f32::from(u8::from(segment.depth >= self.depths[segment.slot as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_drawn_with_the_given_probability_and_independently_of_their_neighbours() {
        for share in [0.0_f32, 0.3, 0.5, 1.0] {
            let mix = DepthMix { depths: [2, 0], share, seed: 3 };
            let drawn: Vec<bool> = (0..20_000).map(|request| mix.depth(request) == 2).collect();
            let of = |held: usize| held as f64 / 20_000.0;
            let found = of(drawn.iter().filter(|&&first| first).count());
            assert!((found - f64::from(share)).abs() < 0.01, "{found} of {share}");
            let in_a_row = of(drawn.windows(2).filter(|pair| pair[0] && pair[1]).count());
            assert!((in_a_row - f64::from(share * share)).abs() < 0.01, "{in_a_row} of {share} squared");
        }
    }

    #[test]
    fn another_seed_draws_others() {
        let drawn = |seed| (0..64).map(move |request| DepthMix { depths: [0, 1], share: 0.5, seed }.depth(request));
        assert!(drawn(0).eq(drawn(0)) && !drawn(0).eq(drawn(1)));
    }
}

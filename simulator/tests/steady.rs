//! What a steady load takes, by a profile.

mod common;

use common::profile;
use scheduler::SteadyLoad;
use simulator::{LatencyModel, SteadyTimes};
use traces::{Component, Nanos};

#[test]
fn passes_take_what_the_profile_says_of_them() {
    let mut profile = profile(2, &[(Component::Block, 1, 0, 1, 10.0), (Component::Head, 1, 0, 1, 5.0)]);
    profile.meta.overhead_us = 1.0;
    let load = SteadyLoad::new(2, 1, 1, 1, 16, 32);
    let times = SteadyTimes::new(load, &LatencyModel::new(&profile).unwrap(), 40).unwrap();
    // Of a prompt of 16 tokens, each runs at both depths; the last one's second pass needs the head.
    assert_eq!(times.of(&(0..31)), Nanos(31 * 11_000));
    assert_eq!(times.of(&(31..33)), Nanos(11_000 + 5_000 + 11_000));
    assert_eq!(times.of(&(7..7)), Nanos::ZERO);
}

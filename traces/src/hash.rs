//! Random numbers that depend on nothing but what they are of, such as a seed and the id of a request: the same in any
//! order, after a preemption and in every executor.

/// A bijection of 64 bits whose outputs for neighbouring inputs look independent (the finalizer of SplitMix64, after a
/// step).
#[inline]
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The number that a hash stands for, from 0 until before 1.
#[inline]
pub fn uniform(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1_u64 << 53) as f64
}

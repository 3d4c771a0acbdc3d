//! Vector code without intrinsics: plain loops that are compiled for the widest registers of the CPU.

/// Numbers in one vector register of the widest kind.
pub const LANES: usize = 16;

/// One vector register. Functions take and return it by value, so that it can stay in the register.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub struct Lanes(pub [f32; LANES]);

impl Lanes {
    /// All zero.
    pub const ZERO: Self = Self([0.0; LANES]);

    /// The first numbers of a slice.
    #[inline(always)]
    pub fn load(numbers: &[f32]) -> Self {
        let mut lanes = Self::ZERO;
        lanes.0.copy_from_slice(&numbers[..LANES]);
        lanes
    }

    /// All numbers of a slice that does not fill a register, padded with zeros.
    #[inline(always)]
    pub fn load_some(numbers: &[f32]) -> Self {
        let mut lanes = Self::ZERO;
        lanes.0[..numbers.len()].copy_from_slice(numbers);
        lanes
    }

    /// `self + a * b`, fused.
    #[inline(always)]
    pub fn add_scaled(mut self, a: f32, b: Self) -> Self {
        for lane in 0..LANES {
            self.0[lane] = a.mul_add(b.0[lane], self.0[lane]);
        }
        self
    }

    /// `self + a * b` lane by lane, fused.
    #[inline(always)]
    pub fn add_product(mut self, a: Self, b: Self) -> Self {
        for lane in 0..LANES {
            self.0[lane] = a.0[lane].mul_add(b.0[lane], self.0[lane]);
        }
        self
    }

    /// `f` of each lane.
    #[inline(always)]
    pub fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = f(self.0[lane]);
        }
        self
    }

    /// `f` of each pair of lanes.
    #[inline(always)]
    pub fn zip(mut self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = f(self.0[lane], other.0[lane]);
        }
        self
    }

    /// The first `count` lanes, and `rest` in the others.
    #[inline(always)]
    pub fn first(mut self, count: usize, rest: f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = if lane < count { self.0[lane] } else { rest };
        }
        self
    }

    /// The lanes from `count` on, and `rest` in the others.
    #[inline(always)]
    pub fn after(mut self, count: usize, rest: f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = if lane >= count { self.0[lane] } else { rest };
        }
        self
    }

    /// Reduces all lanes to one number, by halves.
    #[inline(always)]
    pub fn reduce(mut self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                self.0[lane] = f(self.0[lane], self.0[half + lane]);
            }
            half /= 2;
        }
        self.0[0]
    }
}

/// Whether the CPU has AVX-512, and so 32 registers of one [`Lanes`] each. AVX2 has 16 registers of half the width.
pub fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Defines functions that are compiled for AVX-512, for AVX2 and for the target's baseline. Each call uses the best
/// version that the CPU supports. All versions give bit-identical results.
macro_rules! multiversion {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $ret)? { body($($arg),*) }
                if $crate::kernels::simd::has_avx512() {
                    // SAFETY: the CPU has the features that the function needs.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    )*};
}
pub(crate) use multiversion;

/// The sum of products, in a fixed order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let product = |a, b| Lanes::load(a).zip(Lanes::load(b), |a, b| a * b);
    a.zip(b).fold(Lanes::ZERO, |sum, (a, b)| sum.zip(product(a, b), |sum, ab| sum + ab)).reduce(|a, b| a + b) + rest
}

/// The sum of squared differences, in a fixed order.
#[inline(always)]
pub fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let squared = |a: f32, b: f32| (a - b) * (a - b);
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| squared(a, b)).sum();
    let squares = |a, b| Lanes::load(a).zip(Lanes::load(b), squared);
    a.zip(b).fold(Lanes::ZERO, |sum, (a, b)| sum.zip(squares(a, b), |sum, ab| sum + ab)).reduce(|a, b| a + b) + rest
}

/// The greater of two numbers, `b` if `a` is NaN: one instruction, unlike `f32::max`.
#[inline(always)]
pub fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// `e^x` to about 2 units in the last place; 0 below -87, where the result would be denormal.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of Cephes' expf. Adding 1.5 * 2^23 rounds to an
    // integer, which is then in the lowest bits and is moved into the exponent.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, coefficient);
    }
    let e_r = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < -87.0 { 0.0 } else { e_r * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_real_one() {
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) - expected).abs() <= 2.5e-7 * expected, "exp({x}) = {}", exp(x));
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }
}

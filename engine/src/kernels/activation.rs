//! Activation functions of the MLP.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::simd::{exp, multiversion};
use super::{each_chunk, slice};
use crate::config::Activation;

/// Numbers read below which a second thread does not pay.
const PARALLEL_NUMBERS: usize = 1 << 12;

/// `activation(x)` of `[rows, inner]`; or, gated, `activation(gate) * up` (arXiv 2002.05202) of `[rows, 2 * inner]`,
/// gates first: `[rows, inner]`.
///
/// # Errors
/// If a gated width is odd.
pub fn activate(x: &Tensor, activation: Activation, gated: bool) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Activate { activation, gated })
}

struct Activate {
    activation: Activation,
    gated: bool,
}

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let parts = if self.gated { 2 } else { 1 };
        if !width.is_multiple_of(parts) {
            bail!("gates and ups are {width} together, expected an even number");
        }
        let inner = width / parts;
        let mut out = vec![0.0; rows * inner];
        let chunk = PARALLEL_NUMBERS.div_ceil(width);
        each_chunk(slice(x, layout)?, &mut out, chunk * width, chunk * inner, |x, out| match self.gated {
            true => gate_rows(x, self.activation, inner, out),
            false => activate_numbers(x, self.activation, out),
        });
        Ok((CpuStorage::F32(out), (rows, inner).into()))
    }
}

multiversion! {
    fn gate_rows(x: &[f32], activation: Activation, inner: usize, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(2 * inner).zip(out.chunks_exact_mut(inner)) {
            let (gate, up) = x.split_at(inner);
            let inputs = || gate.iter().zip(up);
            match activation {
                Activation::Silu => each(inputs(), out, |(&gate, up)| silu(gate) * up),
                Activation::Gelu => each(inputs(), out, |(&gate, up)| gelu(gate) * up),
                Activation::GeluTanh => each(inputs(), out, |(&gate, up)| gelu_tanh(gate) * up),
            }
        }
    }

    fn activate_numbers(x: &[f32], activation: Activation, out: &mut [f32]) {
        match activation {
            Activation::Silu => each(x.iter(), out, |&x| silu(x)),
            Activation::Gelu => each(x.iter(), out, |&x| gelu(x)),
            Activation::GeluTanh => each(x.iter(), out, |&x| gelu_tanh(x)),
        }
    }
}

#[inline(always)]
fn each<X>(inputs: impl Iterator<Item = X>, out: &mut [f32], f: impl Fn(X) -> f32) {
    for (x, out) in inputs.zip(out) {
        *out = f(x);
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// With the error function of Abramowitz and Stegun 7.1.26, whose error is at most 1.5e-7.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 0.327_591_1_f32.mul_add(z, 1.0).recip();
    let mut p = 1.061_405_4_f32;
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p.mul_add(t, coefficient);
    }
    // Tail of the normal distribution beyond |x|, times x.
    let beyond = 0.5 * x * (p * t * exp(-z * z));
    if x < 0.0 { beyond } else { x - beyond }
}

/// `x / 2 (1 + tanh(y))` is `x / (1 + e^(-2 y))`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_8_OVER_PI: f32 = 1.595_769;
    x / (1.0 + exp(-SQRT_8_OVER_PI * 0.044_715_f32.mul_add(x * x * x, x)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// By definition, with numerical integration of the normal density.
    fn normal_share(x: f64) -> f64 {
        let steps = 20_000;
        let width = x / f64::from(steps);
        let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        0.5 + (0..steps).map(|step| density((f64::from(step) + 0.5) * width) * width).sum::<f64>()
    }

    fn definition(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => x * normal_share(x),
            Activation::GeluTanh => {
                let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                x / 2.0 * (1.0 + y.tanh())
            }
        }
    }

    #[test]
    fn activations_equal_their_definitions_plain_and_gated() {
        let numbers: Vec<f32> = (-60..60).map(|i| i as f32 * 0.17).collect();
        let x = Tensor::from_slice(&numbers, (6, 20), &Device::Cpu).unwrap();
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let plain = activate(&x, activation, false).unwrap().to_vec2::<f32>().unwrap();
            let gated = activate(&x, activation, true).unwrap().to_vec2::<f32>().unwrap();
            for (row, numbers) in numbers.chunks_exact(20).enumerate() {
                for (i, &x) in numbers.iter().enumerate() {
                    let expected = definition(activation, f64::from(x));
                    let close = |found: f32, expected: f64, scale: f64| {
                        let error = (f64::from(found) - expected).abs();
                        assert!(error <= 1e-6 * scale, "{activation:?}({x}): {found} is not {expected}");
                    };
                    close(plain[row][i], expected, 1.0 + f64::from(x.abs()));
                    if let Some(up) = numbers.get(i + 10) {
                        let up = f64::from(*up);
                        close(gated[row][i], expected * up, 1.0 + (expected * up).abs() + up.abs());
                    }
                }
            }
        }
        let far = Tensor::new(&[[-1e4_f32, 1e4]], &Device::Cpu).unwrap();
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let found = activate(&far, activation, false).unwrap().to_vec2::<f32>().unwrap();
            assert!(found[0][0].abs() < 1e-30 && found[0][1] == 1e4, "{activation:?}: {found:?}");
        }
    }
}

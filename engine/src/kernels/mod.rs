//! The engine's own operations, as candle custom ops over `f32` rows.
//!
//! Every op processes each row separately: the result for a row depends, to the bit, on that row only, and not on other
//! rows of the pass. A request's tokens are therefore independent of batching.

pub mod activation;
pub mod adapters;
pub mod attention;
pub mod linear;
pub mod norm;
pub mod quantized;
pub mod rotary;
pub mod rows;
pub mod signals;
pub mod simd;

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, bail};
use rayon::prelude::*;

/// Ranges of rows, in order, each with the depth of its rows.
pub type DepthRanges = [(usize, Range<usize>)];

/// Ranges of `rows` rows with their parameter sets: one of `sets` sets for all depths, or one for each.
fn by_set(sets: usize, rows: usize, depths: &DepthRanges) -> Vec<(usize, Range<usize>)> {
    match sets {
        1 => vec![(0, 0..rows)],
        _ => depths.to_vec(),
    }
}

/// The numbers of a contiguous `f32` tensor.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a kernel got a tensor of shape {:?} that is not contiguous", layout.shape()),
    }
}

/// The numbers of a contiguous `f32` tensor, for changes in place.
fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(numbers)) => Ok(&mut numbers[start..end]),
        (Some(_), other) => bail!("a kernel got a tensor of {:?}, expected f32", other.dtype()),
        (None, _) => bail!("a kernel got a tensor of shape {:?} that is not contiguous", layout.shape()),
    }
}

/// Calls `kernel` on pieces of `x` and `out`, on several threads if there are several pieces.
fn each_chunk(x: &[f32], out: &mut [f32], x_len: usize, out_len: usize, kernel: impl Fn(&[f32], &mut [f32]) + Sync) {
    if x.len() <= x_len {
        kernel(x, out);
    } else {
        x.par_chunks(x_len).zip(out.par_chunks_mut(out_len)).for_each(|(x, out)| kernel(x, out));
    }
}

/// Calls `kernel` on pieces of `numbers`, on several threads if there are several pieces.
fn each_chunk_mut(numbers: &mut [f32], len: usize, kernel: impl Fn(&mut [f32]) + Send + Sync) {
    if numbers.len() <= len {
        kernel(numbers);
    } else {
        numbers.par_chunks_mut(len).for_each(kernel);
    }
}

/// Memory that several threads write in ranges that never overlap.
#[derive(Clone, Copy)]
struct Shared<'a> {
    start: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `Shared::get`, whose callers promise disjoint ranges.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(numbers: &'a mut [f32]) -> Self {
        Self { start: numbers.as_mut_ptr(), len: numbers.len(), lifetime: PhantomData }
    }

    /// # Safety
    /// No two ranges that are live at the same time may overlap.
    #[inline(always)]
    unsafe fn get(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len);
        // SAFETY: in bounds by the assertion, exclusive as the caller ensures.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

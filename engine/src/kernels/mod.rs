//! The engine's own operations, as candle custom ops over `f32` rows.
//!
//! Every op treats a row by itself: what comes out for a row depends, to the bit, on that row alone, never on
//! which or how many others share the pass. That is what makes a request's tokens independent of batching.

pub mod attention;
pub mod linear;
pub mod rows;
pub mod signals;
pub mod simd;

use std::marker::PhantomData;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, bail};

/// The numbers of a contiguous `f32` tensor.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a kernel got a tensor of shape {:?} that is not contiguous", layout.shape()),
    }
}

/// The numbers of a contiguous `f32` tensor, to be changed in place.
fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(numbers)) => Ok(&mut numbers[start..end]),
        (Some(_), other) => bail!("a kernel got a tensor of {:?}, expected f32", other.dtype()),
        (None, _) => bail!("a kernel got a tensor of shape {:?} that is not contiguous", layout.shape()),
    }
}

/// Memory that several threads write at places that never overlap.
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
    /// No two ranges that are alive at the same time may overlap.
    #[inline(always)]
    unsafe fn get(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

//! What the backend asks of a device: memory, launches, products.

use std::ffi::c_void;
use std::marker::PhantomData;

use candle_core::Result;

/// Threads of a block of every kernel, as in `scalar.cuh`.
pub const THREADS: usize = 128;

/// A GPU, or what stands for one.
///
/// Work is done in the order in which it was asked for; only [`download`](Self::download) waits for it.
pub trait Device {
    /// Memory of the device, freed when dropped.
    type Memory;

    /// Memory of so many bytes, aligned to 16, with anything in it.
    ///
    /// # Errors
    /// If there is no such memory.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Where memory lies, in the device's addresses.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// Copies to the start of memory.
    ///
    /// # Errors
    /// If the device fails.
    fn upload(&self, to: &Self::Memory, bytes: &[u8]) -> Result<()>;

    /// Waits for all work, then copies from the start of memory.
    ///
    /// # Errors
    /// If the device fails, now or in work done before.
    fn download(&self, from: &Self::Memory, bytes: &mut [u8]) -> Result<()>;

    /// Runs a kernel over a grid of blocks of [`THREADS`] threads. An empty grid is no work.
    ///
    /// # Errors
    /// If there is no such kernel, or the device fails.
    ///
    /// # Safety
    /// `arguments` point to what the kernel takes, in number and type, and the addresses among them to memory that is
    /// as large as the kernel reads or writes.
    unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], arguments: &[*const c_void]) -> Result<()>;
}

/// What may be copied to a device byte by byte.
///
/// # Safety
/// The type has no padding, and any bytes are a value of it.
pub unsafe trait Plain: Copy {}

// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}

/// The bytes of numbers.
pub fn bytes_of<T: Plain>(numbers: &[T]) -> &[u8] {
    // SAFETY: plain types have no padding, so all their bytes are there to be read.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The bytes of numbers, to be written.
pub fn bytes_of_mut<T: Plain>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`; and whatever is written is a value of the type.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// Marks numbers stored as the kernels' [`Scalar`](super::source::Scalar).
#[derive(Clone, Copy, Debug)]
pub enum Stored {}

/// Where numbers lie on a device, and how many. Good for as long as the memory it was taken of.
#[derive(Debug)]
pub struct View<T> {
    pub(super) address: u64,
    pub(super) len: usize,
    numbers: PhantomData<T>,
}

impl<T> Clone for View<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<T> {}

impl<T> View<T> {
    /// `len` numbers from an address on; 0 for none.
    pub fn new(address: u64, len: usize) -> Self {
        Self { address, len, numbers: PhantomData }
    }
}

//! The interface of a device: memory, kernels, products, graphs of both, and timing.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::time::Duration;
use traces::hash::mix;

use candle_core::Result;

use super::source::{Scalar, Specialization};

/// Threads of a block of every kernel, as in `scalar.cuh`.
pub const THREADS: usize = 128;

/// A GPU, or its emulation.
///
/// Work runs in the order in which it is submitted. Only [`download`](Self::download) and [`elapsed`](Self::elapsed)
/// wait for it.
pub trait Device: Send + Sync {
    /// Memory of the device, freed when dropped.
    type Memory: Send + Sync;
    /// Kernels, ready to be launched.
    type Module: Send;
    /// Recorded work, which can be submitted again as a whole.
    type Graph: Send;
    /// A point in time between two pieces of work.
    type Event: Send;

    /// Name of the device, as in a latency profile.
    fn name(&self) -> String;

    /// Other properties that a measurement should record: driver, versions, and current clocks and power, where known.
    fn state(&self) -> String;

    /// The kernels of a model, compiled unless they are cached.
    ///
    /// # Errors
    /// If they cannot be compiled for the device.
    fn load(&self, specialization: &Specialization) -> Result<Self::Module>;

    /// Allocates `bytes` bytes with undefined contents, aligned to 16.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Address of memory on the device.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// Copies to memory, from a number of bytes after its start on.
    ///
    /// # Errors
    /// If the device fails.
    fn upload_at(&self, to: &Self::Memory, start: usize, bytes: &[u8]) -> Result<()>;

    /// Copies to the start of memory.
    ///
    /// # Errors
    /// If the device fails.
    fn upload(&self, to: &Self::Memory, bytes: &[u8]) -> Result<()> {
        self.upload_at(to, 0, bytes)
    }

    /// Waits for all work, then copies from the start of memory.
    ///
    /// # Errors
    /// If the device fails, now or in earlier work.
    fn download(&self, from: &Self::Memory, bytes: &mut [u8]) -> Result<()>;

    /// Runs a kernel over a grid of blocks of [`THREADS`] threads. An empty grid does nothing.
    ///
    /// # Errors
    /// If the kernel does not exist, or the device fails.
    ///
    /// # Safety
    /// `arguments` must match the kernel's parameters in number and type. Addresses among them must point to memory of
    /// at least the size that the kernel accesses.
    unsafe fn launch(
        &self,
        module: &Self::Module,
        kernel: &'static str,
        grid: [usize; 3],
        arguments: &[*const c_void],
    ) -> Result<()>;

    /// Multiplies rows with a weight. Zero rows are no work.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// The addresses must point to memory of the sizes in the product, and `y` must overlap neither `x` nor the weight.
    unsafe fn product(&self, product: &Product) -> Result<()>;

    /// Records the launches and products that `work` submits, with their arguments, without running them. `work` may
    /// submit only launches and products.
    ///
    /// # Errors
    /// If `work` or the device fails.
    fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Graph>;

    /// Runs the work of a graph.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// The memory of the graph's launches and products must still exist.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()>;

    /// An event that has not been recorded.
    ///
    /// # Errors
    /// If the device fails.
    fn event(&self) -> Result<Self::Event>;

    /// Records the point in time at which all work submitted so far is done, replacing an earlier record.
    ///
    /// # Errors
    /// If the device fails.
    fn record(&self, event: &Self::Event) -> Result<()>;

    /// Waits for `to`, then returns how much later than `from` it was. Both must have been recorded.
    ///
    /// # Errors
    /// If the device fails.
    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration>;
}

/// The product `y` `[rows, outputs]` of `x` `[rows, inputs]` and a weight `[outputs, inputs]`, all row-major. Sums are
/// in `f32`; factors in `f32` are not rounded to fewer bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Storage type of `x` and the weight.
    pub scalar: Scalar,
    /// Number of rows.
    pub rows: usize,
    /// Width of a row.
    pub inputs: usize,
    /// Numbers per output row.
    pub outputs: usize,
    /// Address of `x`.
    pub x: u64,
    /// Address of the weight.
    pub weight: u64,
    /// Address of `y`.
    pub y: u64,
    /// Storage of `y`, and what happens to its contents.
    pub out: Out,
}

/// Destination of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// Replaces numbers of the storage type of `x`.
    Stored,
    /// Replaces `f32` numbers.
    F32,
    /// Adds to `f32` numbers.
    AddedToF32,
}

/// Types that can be copied to a device byte by byte.
///
/// # Safety
/// The type must have no padding, and every bit pattern must be a valid value.
pub unsafe trait Plain: Copy {}

// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}

/// The bytes of numbers.
pub fn bytes_of<T: Plain>(numbers: &[T]) -> &[u8] {
    // SAFETY: plain types have no padding, so all their bytes are initialized.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The bytes of numbers, for writing.
pub fn bytes_of_mut<T: Plain>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`; every bit pattern is a value of the type.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// Marks numbers in the kernels' storage type, a [`Scalar`].
#[derive(Clone, Copy, Debug)]
pub enum Stored {}

/// Address and number of values on a device. Valid as long as the memory that it refers to.
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
    /// `len` numbers from an address on; address 0 for none.
    pub fn new(address: u64, len: usize) -> Self {
        Self { address, len, numbers: PhantomData }
    }
    /// Address of the first number.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of values.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The first `len` of these numbers.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn first(self, len: usize) -> Self {
        assert!(len <= self.len, "{len} numbers of {}", self.len);
        Self { len, ..self }
    }

    /// The view, moved by a number of bytes.
    pub fn moved(self, bytes: u64) -> Self {
        Self { address: self.address + bytes, ..self }
    }
}

/// Memory of a device and the numbers in it.
pub struct Held<D: Device, T> {
    memory: D::Memory,
    /// View of the numbers.
    pub view: View<T>,
}

impl<D: Device, T> Held<D, T> {
    /// Allocates `len` numbers of `bytes_of_number` bytes each, with undefined contents.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn room(device: &D, len: usize, bytes_of_number: usize) -> Result<Self> {
        let memory = device.allocate(len * bytes_of_number)?;
        Ok(Self { view: View::new(device.address(&memory), len), memory })
    }

    /// The memory.
    pub fn memory(&self) -> &D::Memory {
        &self.memory
    }
}

impl<D: Device, T: Plain> Held<D, T> {
    /// Copies numbers to a device.
    ///
    /// # Errors
    /// If there is not enough memory, or the device fails.
    pub fn of(device: &D, numbers: &[T]) -> Result<Self> {
        let held = Self::room(device, numbers.len(), size_of::<T>())?;
        device.upload(&held.memory, bytes_of(numbers))?;
        Ok(held)
    }
}

impl<D: Device> Held<D, Stored> {
    /// Rounds numbers to the storage type and copies them to a device.
    ///
    /// # Errors
    /// If there is not enough memory, or the device fails.
    pub fn stored(device: &D, scalar: Scalar, numbers: &[f32]) -> Result<Self> {
        let held = Self::room(device, numbers.len(), scalar.bytes())?;
        device.upload(&held.memory, &scalar.encode(numbers))?;
        Ok(held)
    }
}

/// `count` numbers from -1 to 1, for timed work whose values do not matter.
pub(super) fn any_numbers(count: usize) -> Vec<f32> {
    (0..count as u64).map(|index| (mix(index) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

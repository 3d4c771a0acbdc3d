//! What a pass asks of a device: memory, kernels, products, graphs of both, and the time that they take.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::time::Duration;

use candle_core::Result;

use super::source::{Scalar, Specialization};
use crate::kernels::signals::mix;

/// Threads of a block of every kernel, as in `scalar.cuh`.
pub const THREADS: usize = 128;

/// A GPU, or what stands for one.
///
/// Work is done in the order in which it was asked for; only [`download`](Self::download) and
/// [`elapsed`](Self::elapsed) wait for it.
pub trait Device: Send + Sync {
    /// Memory of the device, freed when dropped.
    type Memory: Send + Sync;
    /// Kernels, ready to be launched.
    type Module: Send;
    /// Work that was recorded once, to be asked for again as a whole.
    type Graph: Send;
    /// A moment between two pieces of work.
    type Event: Send;

    /// The device's name, as a latency profile holds it.
    fn name(&self) -> String;

    /// What else a measurement should say of it: driver, versions, clocks and power, as far as they are known now.
    fn state(&self) -> String;

    /// The kernels of a model, compiled unless they were before.
    ///
    /// # Errors
    /// If they cannot be compiled for the device.
    fn load(&self, specialization: &Specialization) -> Result<Self::Module>;

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
    unsafe fn launch(
        &self,
        module: &Self::Module,
        kernel: &'static str,
        grid: [usize; 3],
        arguments: &[*const c_void],
    ) -> Result<()>;

    /// Multiplies rows with a weight. No rows are no work.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// The addresses are of memory that is as large as the product says, and `y` overlaps neither `x` nor the weight.
    unsafe fn product(&self, product: &Product) -> Result<()>;

    /// Records the launches and products that `work` asks for, with their arguments, and does none of them. Nothing but
    /// launches and products may be asked for meanwhile.
    ///
    /// # Errors
    /// If `work` fails or the device does.
    fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Graph>;

    /// Does what a graph holds.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// The memory that the graph's launches and products were given is still there.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()>;

    /// An event that has not been recorded.
    ///
    /// # Errors
    /// If the device fails.
    fn event(&self) -> Result<Self::Event>;

    /// Makes an event the moment when all work asked for so far is done, in place of any before.
    ///
    /// # Errors
    /// If the device fails.
    fn record(&self, event: &Self::Event) -> Result<()>;

    /// Waits for `to`, then says how much later it was than `from`. Both have been recorded.
    ///
    /// # Errors
    /// If the device fails.
    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration>;
}

/// `y` `[rows, outputs]` of `x` `[rows, inputs]` and a weight `[outputs, inputs]`: each row of `x` with each of the weight,
/// all row by row in memory. Sums are in `f32`, of `f32` numbers exact ones: none are rounded to fewer bits on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// How `x` and the weight are stored.
    pub scalar: Scalar,
    /// Rows.
    pub rows: usize,
    /// Width of a row.
    pub inputs: usize,
    /// Numbers that come of a row.
    pub outputs: usize,
    /// Address of `x`.
    pub x: u64,
    /// Address of the weight.
    pub weight: u64,
    /// Address of `y`.
    pub y: u64,
    /// What becomes of what was in `y`, and how it is stored.
    pub out: Out,
}

/// Where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// Replaces numbers stored as `x` is.
    Stored,
    /// Replaces numbers of `f32`.
    F32,
    /// Is added to numbers of `f32`.
    AddedToF32,
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
// SAFETY: numbers.
unsafe impl Plain for u8 {}

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

/// Marks numbers stored as the kernels' [`Scalar`].
#[derive(Clone, Copy, Debug)]
pub enum Stored {}

/// Where numbers lie on a device, and how many. Good for as long as the memory that it was taken of.
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
    /// Where the first lies.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The first `len` of these numbers.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn first(self, len: usize) -> Self {
        assert!(len <= self.len, "{len} numbers of {}", self.len);
        Self { len, ..self }
    }

    /// The same numbers, so many bytes further on.
    pub fn moved(self, bytes: u64) -> Self {
        Self { address: self.address + bytes, ..self }
    }
}

/// Memory of a device and the numbers in it.
pub struct Held<D: Device, T> {
    memory: D::Memory,
    /// Where they lie.
    pub view: View<T>,
}

impl<D: Device, T> Held<D, T> {
    /// Room for `len` numbers that take so many bytes each, with anything in it.
    ///
    /// # Errors
    /// If there is no such memory.
    pub fn room(device: &D, len: usize, bytes_of_number: usize) -> Result<Self> {
        let memory = device.allocate(len * bytes_of_number)?;
        Ok(Self { view: View::new(device.address(&memory), len), memory })
    }

    /// The memory itself.
    pub fn memory(&self) -> &D::Memory {
        &self.memory
    }
}

impl<D: Device, T: Plain> Held<D, T> {
    /// Numbers, copied to a device.
    ///
    /// # Errors
    /// If there is no memory, or the device fails.
    pub fn of(device: &D, numbers: &[T]) -> Result<Self> {
        let held = Self::room(device, numbers.len(), size_of::<T>())?;
        device.upload(&held.memory, bytes_of(numbers))?;
        Ok(held)
    }
}

impl<D: Device> Held<D, Stored> {
    /// Numbers, rounded to how they are stored and copied to a device.
    ///
    /// # Errors
    /// If there is no memory, or the device fails.
    pub fn stored(device: &D, scalar: Scalar, numbers: &[f32]) -> Result<Self> {
        let held = Self::room(device, numbers.len(), scalar.bytes())?;
        device.upload(&held.memory, &scalar.encode(numbers))?;
        Ok(held)
    }
}

/// So many numbers from -1 to 1, for what is timed whatever it holds.
pub(super) fn any_numbers(count: usize) -> Vec<f32> {
    (0..count as u64).map(|index| (mix(index) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

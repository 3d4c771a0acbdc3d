//! Random numbers on the machine under test, and the same numbers for the CPU operations.

use std::sync::Arc;

use candle_core::{Device as CandleDevice, Tensor};
use engine::cuda::device::{self, Device, Plain, Stored, bytes_of_mut};
use engine::cuda::kernels::Kernels;
use engine::cuda::pass::{Arrays, BlockTable, OnDevice, PassRows};
use engine::cuda::source::{Scalar, Specialization};
use engine::kernels::attention::Row;
use half::{bf16, f16};
use traces::hash::mix;

use crate::emulator::{Machine, machine};

/// A random generator with a seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = mix(self.0);
        self.0
    }

    /// From `0` to `end - 1`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// From -1 to 1.
    pub fn number(&mut self) -> f32 {
        ((self.bits() >> 40) as f32 / (1 << 23) as f32) - 1.0
    }

    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

/// A number after rounding to the storage type.
pub fn rounded(scalar: Scalar, x: f32) -> f32 {
    match scalar {
        Scalar::F32 => x,
        Scalar::F16 => f16::from_f32(x).to_f32(),
        Scalar::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Tolerance for results around 1, compared with the CPU operation: sums in another order in `f32`, and rounding to the
/// storage type in between.
pub fn tolerance(scalar: Scalar) -> f32 {
    match scalar {
        Scalar::F32 => 2e-5,
        Scalar::F16 => 3e-3,
        Scalar::Bf16 => 2e-2,
    }
}

/// Checks that results are close to the expected ones; NaN is close to nothing.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: other lengths");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= tolerance * (1.0 + expected.abs()), "{what}: number {i} is {found}, expected {expected}");
    }
}

/// The machine under test with the kernels of a specialization.
pub struct Bench {
    pub machine: Arc<Machine>,
    pub module: <Machine as Device>::Module,
    pub specialization: Specialization,
}

/// Memory of the machine under test with its numbers.
pub type Held<T> = device::Held<Machine, T>;

/// Rows of a pass with their memory.
pub struct Rows {
    pub views: OnDevice,
    _memory: Held<u8>,
}

impl Bench {
    /// `None` if there is no such machine.
    pub fn new(specialization: Specialization) -> Option<Self> {
        let machine = machine()?;
        Some(Self { module: machine.load(&specialization).unwrap(), machine, specialization })
    }

    /// Kernels for small heads, for tests without attention.
    pub fn of(scalar: Scalar) -> Option<Self> {
        Self::new(Specialization::new(scalar, 64, 2, 16).unwrap())
    }

    pub fn kernels(&self) -> Kernels<'_, Machine> {
        Kernels { device: &*self.machine, module: &self.module, specialization: self.specialization }
    }

    pub fn scalar(&self) -> Scalar {
        self.specialization.scalar
    }

    /// Memory for `count` numbers; emulated memory is all NaN.
    pub fn empty<T: Plain>(&self, count: usize) -> Held<T> {
        Held::room(&*self.machine, count, size_of::<T>()).unwrap()
    }

    pub fn empty_stored(&self, count: usize) -> Held<Stored> {
        Held::room(&*self.machine, count, self.scalar().bytes()).unwrap()
    }

    pub fn put<T: Plain>(&self, numbers: &[T]) -> Held<T> {
        Held::of(&*self.machine, numbers).unwrap()
    }

    pub fn get<T: Plain + Default>(&self, held: &Held<T>) -> Vec<T> {
        let mut numbers = vec![T::default(); held.view.len()];
        self.machine.download(held.memory(), bytes_of_mut(&mut numbers)).unwrap();
        numbers
    }

    /// Rows of a pass. `window` is the window of layers that have one, `slots` the number of depths with their own pages.
    pub fn upload(&self, rows: &[Row<'_>], window: Option<usize>, slots: usize) -> Rows {
        let (mut table, mut arrays) = (BlockTable::default(), Arrays::default());
        let rows = PassRows::new(rows, window, slots, &mut table);
        let table = table.append(&mut arrays);
        let views = rows.append(&mut arrays, rows.room(), table);
        let memory = self.put(arrays.bytes());
        Rows { views: views.moved(self.machine.address(memory.memory())), _memory: memory }
    }

    /// Memory with numbers in the storage type.
    pub fn store(&self, numbers: &[f32]) -> Held<Stored> {
        Held::stored(&*self.machine, self.scalar(), numbers).unwrap()
    }

    pub fn stored(&self, held: &Held<Stored>) -> Vec<f32> {
        let mut bytes = vec![0; held.view.len() * self.scalar().bytes()];
        self.machine.download(held.memory(), &mut bytes).unwrap();
        self.scalar().decode(&bytes)
    }

    /// Random numbers after rounding to the storage type.
    pub fn random(&self, dice: &mut Dice, count: usize) -> Vec<f32> {
        dice.numbers(count).into_iter().map(|x| rounded(self.scalar(), x)).collect()
    }
}

/// A matrix for the CPU operations.
pub fn matrix(numbers: &[f32], width: usize) -> Tensor {
    Tensor::from_slice(numbers, (numbers.len() / width, width), &CandleDevice::Cpu).unwrap()
}

/// All numbers of a tensor.
pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

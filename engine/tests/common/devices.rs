//! The devices that tests run on.

use std::sync::Arc;

use engine::cuda::CudaModel;
use engine::cuda::source::Scalar;
use engine::{Model, ServedModel, WeightType, Weights};

use super::emulator;

/// The devices that models run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// The CUDA kernels: emulated, or with the feature `cuda` on the first GPU.
    Cuda,
}

impl Device {
    /// A model in `f32` on the device; `None`, with a message on standard error, if there is no such device.
    pub fn serve(self, weights: &Weights) -> Option<Arc<dyn ServedModel>> {
        match self {
            Self::Cpu => Some(Arc::new(Model::load(weights, WeightType::F32).unwrap())),
            Self::Cuda => Some(Arc::new(CudaModel::load(emulator::machine()?, weights, Scalar::F32).unwrap())),
        }
    }

    /// Tolerance for numbers around 1, compared with the CPU's, whose sums have another order.
    pub fn tolerance(self) -> f32 {
        match self {
            Self::Cpu => 0.0,
            Self::Cuda => 1e-4,
        }
    }

    pub fn assert_close(self, what: &str, found: f32, expected: f32) {
        let error = (found - expected).abs();
        assert!(error <= self.tolerance() * (1.0 + expected.abs()), "{what}: {found} on {self:?}, expected {expected}");
    }
}

//! Names of devices in files and arguments.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::{Device, Result, bail};
use serde::{Deserialize, Serialize};

use crate::backend::ServedModel;
use crate::config::ModelConfig;
use crate::cuda::floors::{Load, Sizes};
use crate::cuda::source::Scalar;
use crate::cuda::timing::Report;
use crate::kernels::linear::WeightType;
use crate::model::Model;
use crate::weights::{Weights, WeightsError};

/// `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceName {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, numbered from 0 among those visible under `CUDA_VISIBLE_DEVICES`.
    Cuda(usize),
}

impl DeviceName {
    /// The device for candle's operations.
    ///
    /// # Errors
    /// If there is no such device, or this program was built without the feature `cuda`.
    pub fn candle(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => cuda::candle(ordinal),
        }
    }

    /// Loads a model to the device, with its weights stored as `weight_type`; on a GPU, activations, keys and values
    /// have that type too.
    ///
    /// # Errors
    /// As [`candle`](Self::candle); or if the device does not support the type, its kernels do not support the model's
    /// sizes, or its memory is too small.
    pub fn serve(
        self,
        weights: &Weights,
        weight_type: WeightType,
    ) -> std::result::Result<Arc<dyn ServedModel>, WeightsError> {
        match self {
            Self::Cpu => Ok(Arc::new(Model::load(weights, weight_type)?)),
            Self::Cuda(ordinal) => {
                cuda::serve(ordinal, weights, self.scalar(weight_type).map_err(WeightsError::Device)?)
            }
        }
    }

    /// Peak rates of a GPU, and the time of each operation in passes with these loads. `None` on the CPU, whose kernels
    /// have benchmarks.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn report(self, config: &ModelConfig, weight_type: WeightType, loads: &[Load]) -> Result<Option<Report>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(ordinal) => {
                let sizes = Sizes { config, scalar: self.scalar(weight_type)? };
                cuda::report(ordinal, &sizes, loads).map(Some)
            }
        }
    }

    /// The GPU's storage type for the CPU's `weight_type`.
    fn scalar(self, weight_type: WeightType) -> Result<Scalar> {
        let known = [(WeightType::F32, Scalar::F32), (WeightType::F16, Scalar::F16), (WeightType::Bf16, Scalar::Bf16)];
        match known.iter().find(|(known, _)| *known == weight_type) {
            Some((_, scalar)) => Ok(*scalar),
            None => bail!("weights of {weight_type} on `{self}`, which multiplies with f32, f16, bf16"),
        }
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use crate::cuda::CudaModel;
    use crate::cuda::nvidia::Nvidia;
    use crate::cuda::timing::{Effort, report as report_on};

    pub fn candle(ordinal: usize) -> Result<Device> {
        Nvidia::check(ordinal)?;
        Device::new_cuda(ordinal)
    }

    pub fn serve(
        ordinal: usize,
        weights: &Weights,
        scalar: Scalar,
    ) -> std::result::Result<Arc<dyn ServedModel>, WeightsError> {
        Ok(Arc::new(CudaModel::load(Arc::new(Nvidia::new(ordinal).map_err(WeightsError::Device)?), weights, scalar)?))
    }

    pub fn report(ordinal: usize, sizes: &Sizes<'_>, loads: &[Load]) -> Result<Report> {
        report_on(&Nvidia::new(ordinal)?, sizes, loads, Effort::GPU)
    }
}

/// Stand-ins in a program without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::Error;

    use super::*;

    pub fn candle(ordinal: usize) -> Result<Device> {
        Err(refusal(ordinal))
    }

    pub fn serve(
        ordinal: usize,
        _weights: &Weights,
        _scalar: Scalar,
    ) -> std::result::Result<Arc<dyn ServedModel>, WeightsError> {
        Err(WeightsError::Device(refusal(ordinal)))
    }

    pub fn report(ordinal: usize, _sizes: &Sizes<'_>, _loads: &[Load]) -> Result<Report> {
        Err(refusal(ordinal))
    }

    fn refusal(ordinal: usize) -> Error {
        let device = DeviceName::Cuda(ordinal);
        Error::Msg(format!(
            "device `{device}`: this program was built without CUDA, scripts/cuda-build.sh builds it with"
        ))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = match text.split_once(':') {
            None if text == "cpu" => Some(Self::Cpu),
            None if text == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().ok().map(Self::Cuda),
            _ => None,
        };
        found.ok_or_else(|| format!("unknown device `{text}`: expected cpu, cuda or cuda:N"))
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(device: DeviceName) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_read_as_they_are_written() {
        for (text, device) in [("cpu", DeviceName::Cpu), ("cuda", DeviceName::Cuda(0)), ("cuda:3", DeviceName::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        for text in ["gpu", "cuda:", "cuda:-1", "cpu:0", ""] {
            let message = text.parse::<DeviceName>().unwrap_err();
            assert_eq!(message, format!("unknown device `{text}`: expected cpu, cuda or cuda:N"));
        }
    }

    #[test]
    fn weights_that_a_gpu_does_not_multiply_with_are_refused() {
        assert_eq!(DeviceName::Cuda(0).scalar(WeightType::F16).unwrap(), Scalar::F16);
        let message = DeviceName::Cuda(0).scalar(WeightType::Q8).unwrap_err().to_string();
        assert!(message.contains("weights of q8_0 on `cuda`, which multiplies with f32, f16, bf16"), "{message}");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_is_refused_where_cuda_was_not_built_in() {
        let message = DeviceName::Cuda(1).candle().unwrap_err().to_string();
        assert!(message.contains("device `cuda:1`: this program was built without CUDA"), "{message}");
    }
}

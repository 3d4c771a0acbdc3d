//! Where a model runs, as files and arguments name it.

use std::fmt;
use std::str::FromStr;

use candle_core::{Device, Result};
use serde::{Deserialize, Serialize};

/// `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceName {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, numbered from 0 among those that `CUDA_VISIBLE_DEVICES` leaves.
    Cuda(usize),
}

impl DeviceName {
    /// The device as candle's, for what candle does there.
    ///
    /// # Errors
    /// If there is no such device, or this program was built without the feature `cuda`.
    pub fn candle(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => candle_cuda(ordinal),
        }
    }
}

#[cfg(feature = "cuda")]
fn candle_cuda(ordinal: usize) -> Result<Device> {
    crate::cuda::nvidia::Nvidia::check(ordinal)?;
    Device::new_cuda(ordinal)
}

#[cfg(not(feature = "cuda"))]
fn candle_cuda(ordinal: usize) -> Result<Device> {
    Err(without_cuda(ordinal))
}

/// Why a program without the feature `cuda` does not open a GPU.
#[cfg(not(feature = "cuda"))]
pub(crate) fn without_cuda(ordinal: usize) -> candle_core::Error {
    let device = DeviceName::Cuda(ordinal);
    candle_core::Error::Msg(format!(
        "device `{device}`: this program was built without CUDA, scripts/cuda-build.sh builds it with"
    ))
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

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_is_refused_where_cuda_was_not_built_in() {
        let message = DeviceName::Cuda(1).candle().unwrap_err().to_string();
        assert!(message.contains("device `cuda:1`: this program was built without CUDA"), "{message}");
    }
}

//! The CUDA kernels against the CPU operations, and passes by them against the CPU's: on the CPU, the kernels' source
//! compiled behind `emulation.h`, or with the feature `cuda` on the first GPU.

mod attention;
mod bench;
#[cfg(not(feature = "cuda"))]
mod breaks;
#[path = "../common/mod.rs"]
mod common;
mod operations;
mod passes;
mod timing;

use common::emulator;

//! The CUDA kernels compared with the CPU operations, and passes with them compared with the CPU's. The kernels' source
//! runs on the CPU after `emulation.h` or, with the feature `cuda`, on the first GPU.

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

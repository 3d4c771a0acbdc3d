//! The CUDA kernels against the CPU operations, and passes by them against the CPU's, on the CPU: the kernels' source is
//! compiled behind `emulation.h`.

mod attention;
mod bench;
mod breaks;
#[path = "../common/mod.rs"]
mod common;
mod operations;
mod passes;

use common::emulator;

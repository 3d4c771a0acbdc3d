//! The CUDA kernels against the CPU operations: with the feature `cuda` on a GPU; without it on the CPU, where their
//! source is compiled behind `emulation.h`.

mod attention;
mod bench;
#[cfg(not(feature = "cuda"))]
mod breaks;
#[cfg_attr(feature = "cuda", path = "gpu.rs")]
#[cfg_attr(not(feature = "cuda"), path = "emulator.rs")]
mod machine;
mod operations;

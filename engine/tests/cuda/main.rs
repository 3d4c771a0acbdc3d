//! The CUDA kernels against the CPU operations, on the CPU: their source is compiled behind `emulation.h`.

mod attention;
mod bench;
mod breaks;
mod emulator;
mod operations;

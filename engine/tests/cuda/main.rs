//! The CUDA kernels without a GPU: their source, compiled for the CPU, against the CPU operations.

mod attention;
mod bench;
mod breaks;
mod emulator;
mod operations;

//! Kernels for NVIDIA GPUs in CUDA C++, and what launches them.
//!
//! ```text
//! *.cu, *.cuh   the kernels
//! source        joins them, with what a model fixes, into the source that is compiled
//! device        what a device must do: memory, launches
//! pass          what the kernels must know of a pass's rows, uploaded once a pass
//! kernels       a function per kernel: checks sizes, computes the grid, launches
//! ```
//! Nothing here needs CUDA: the only device so far is the one that the tests emulate on the CPU. See `docs/cuda.md`.

pub mod device;
pub mod floors;
pub mod kernels;
#[cfg(feature = "cuda")]
pub mod nvidia;
pub mod pass;
pub mod source;

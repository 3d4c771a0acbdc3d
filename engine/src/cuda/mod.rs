//! The backend for NVIDIA GPUs: kernels in CUDA C++, what launches them, and devices that they run on.
//!
//! ```text
//! *.cu, *.cuh   the kernels
//! source        joins them, with what a model fixes, into the source that is compiled
//! device        what a device must do: memory, launches, products
//! pass          what the kernels must know of a pass's rows, uploaded once a pass
//! kernels       a function per kernel: checks sizes, computes the grid, launches
//! nvidia        GPUs, by cudarc; with the feature `cuda`
//! ```
//! Nothing here but `nvidia` needs CUDA: the tests run the same launches on an emulated device. See `docs/cuda.md`.

pub mod device;
pub mod kernels;
#[cfg(feature = "cuda")]
pub mod nvidia;
pub mod pass;
pub mod source;

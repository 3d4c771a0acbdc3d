//! Kernels for NVIDIA GPUs in CUDA C++, and a model's passes by them.
//!
//! ```text
//! *.cu, *.cuh   the kernels
//! source        joins them, with what a model fixes, into the source that is compiled
//! device        what a device must do: memory, launches, products, graphs, events
//! nvidia        that device on a GPU, with the feature `cuda`
//! pass          what the kernels must know of a pass's rows, uploaded once a pass
//! kernels       a function per kernel: checks sizes, computes the grid, launches
//! layers        a layer's weights on a device, and a run of rows through it
//! model         a whole model's weights on a device
//! backend       passes: sections, memory, graphs, answers
//! floors        the least time that each operation can take
//! timing        what it takes
//! ```
//! All but `nvidia` runs on any [`Device`](device::Device), such as the one that the tests emulate on the CPU. See
//! `docs/explanation/cuda.md`.

mod backend;
pub mod device;
pub mod floors;
pub mod kernels;
mod layers;
mod model;
#[cfg(feature = "cuda")]
pub mod nvidia;
pub mod pass;
pub mod source;
pub mod timing;

pub use model::CudaModel;

//! CUDA C++ kernels for NVIDIA GPUs, and a model's passes with them.
//!
//! ```text
//! *.cu, *.cuh   the kernels
//! source        the kernels' source, joined and specialized to a model
//! device        the interface of a device: memory, launches, products, graphs, events
//! nvidia        its implementation on a GPU, with the feature `cuda`
//! pass          data about a pass's rows for the kernels, uploaded once per pass
//! kernels       a function per kernel: checks sizes, computes the grid, launches
//! layers        a layer's weights on a device, and a run of rows through it
//! model         a whole model's weights on a device
//! sizes         the sizes to which sections of a pass are padded
//! backend       passes: sections, memory, graphs, results
//! floors        the minimum time of each operation
//! timing        the measured time of each operation
//! ```
//! Everything except `nvidia` runs on any [`Device`](device::Device), such as the one that the tests emulate on the
//! CPU. See `docs/explanation/cuda.md`.

mod backend;
pub mod device;
pub mod floors;
pub mod kernels;
mod layers;
mod model;
#[cfg(feature = "cuda")]
pub mod nvidia;
pub mod pass;
mod sizes;
pub mod source;
pub mod timing;

pub use model::CudaModel;

//! The first GPU, in place of the emulator.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::cuda::nvidia::Nvidia;

/// The machine under test.
pub type Machine = Nvidia;

/// The GPU, each time with its own stream, so that one test's graphs do not record another's work. `None`, with a
/// message on standard error, if there is no GPU.
pub fn machine() -> Option<Arc<Machine>> {
    match Nvidia::check(0) {
        Ok(()) => Some(Arc::new(Nvidia::new(0).unwrap_or_else(|error| panic!("{error}")))),
        Err(error) => {
            eprintln!("SKIPPED: nothing was run on a GPU: {error}");
            None
        }
    }
}

/// Whether a row's product depends on the number of rows: cuBLAS selects kernels by it, which sum in different orders.
pub const PRODUCTS_DEPEND_ON_ROWS: bool = true;

/// A GPU does not count replayed graphs.
pub fn replays(_machine: &Machine) -> Option<usize> {
    None
}

/// Number of launches of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkDone {
    pub launches: usize,
    pub blocks: usize,
}

/// A GPU does not count launches.
pub fn work_done(_machine: &Machine) -> Option<BTreeMap<&'static str, WorkDone>> {
    None
}

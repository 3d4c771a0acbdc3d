//! The first GPU, in the emulator's place.

use std::sync::Arc;

use engine::cuda::nvidia::Nvidia;

/// The machine under test.
pub type Machine = Nvidia;

/// It, each time with a stream of its own, so that one test's graphs record nothing of another's; none, said on standard
/// error, if there is no GPU.
pub fn machine() -> Option<Arc<Machine>> {
    match Nvidia::check(0) {
        Ok(()) => Some(Arc::new(Nvidia::new(0).unwrap_or_else(|error| panic!("{error}")))),
        Err(error) => {
            eprintln!("SKIPPED: nothing was run on a GPU: {error}");
            None
        }
    }
}

/// cuBLAS takes another kernel for another number of rows, which adds up in another order.
pub const PRODUCTS_DEPEND_ON_ROWS: bool = true;

/// A GPU does not count how often graphs were replayed.
pub fn replays(_machine: &Machine) -> Option<usize> {
    None
}

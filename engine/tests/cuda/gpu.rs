//! The first GPU.

use std::sync::Arc;

use engine::cuda::nvidia::Nvidia;
use engine::cuda::source::Specialization;

/// The machine under test.
pub type Machine = Nvidia;

/// It with the kernels of a specialization, or none, said on standard error, if there is no GPU.
pub fn machine(specialization: Specialization) -> Option<Arc<Machine>> {
    if Nvidia::count() == 0 {
        eprintln!("SKIPPED: the CUDA kernels were not run, there is no GPU");
        return None;
    }
    Some(Arc::new(Nvidia::new(0, &specialization).unwrap_or_else(|error| panic!("{error}"))))
}

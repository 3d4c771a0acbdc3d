//! What a process that trains asks of its allocator and of candle.

/// Sets a process up for training; to be called before it starts a thread.
///
/// A step is shared among threads; those that candle adds inside of one spin for work and take more than half of the
/// processor from them. A step also frees and asks for the same large pieces of memory over and over: glibc is told to
/// keep them, since getting them from the system anew takes as long as computing with them.
pub fn prepare_for_training() {
    for variable in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        // SAFETY: the process has started no other thread yet.
        unsafe { std::env::set_var(variable, "1") };
    }
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_MMAP_THRESHOLD, KEPT_BYTES), (libc::M_TRIM_THRESHOLD, i32::MAX)] {
        // SAFETY: the options are glibc's own, and it refuses values out of range without harm.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Smaller pieces of memory are kept: 32 MiB, the most that glibc allows.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: i32 = 32 << 20;

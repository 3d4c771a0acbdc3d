//! What Ctrl-C does: it ends the process with the shell's usual status, and leaves no unfinished folder behind.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::output::note;

/// What a shell expects of a command that was interrupted.
pub const INTERRUPTED: u8 = 130;

/// What is said at the end.
static LAST_WORDS: Mutex<Option<String>> = Mutex::new(None);
/// Whether the command ends by itself when it is asked to.
static ENDS_ITSELF: AtomicBool = AtomicBool::new(false);
/// Whether it has been asked to.
static STOP: AtomicBool = AtomicBool::new(false);

/// From now on, Ctrl-C removes what is unfinished and ends the process.
///
/// # Errors
/// If the signal cannot be handled.
pub fn end() -> Result<()> {
    ctrlc::set_handler(|| {
        // One that is asked twice ends at once.
        if ENDS_ITSELF.load(Ordering::Relaxed) && !STOP.swap(true, Ordering::Relaxed) {
            return;
        }
        traces::unfinished::remove_all();
        let last_words = LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner);
        note!("\ninterrupted: {}", last_words.as_deref().unwrap_or("nothing was written"));
        // Not by `exit`, at which libraries come to their end, CUDA's among them, that other threads still call.
        #[cfg(unix)]
        // SAFETY: it ends the process and does nothing else.
        unsafe {
            libc::_exit(INTERRUPTED.into())
        }
        #[cfg(not(unix))]
        std::process::exit(INTERRUPTED.into());
    })
    .context("cannot handle Ctrl-C")
}

/// What Ctrl-C says from now on, where it keeps something.
pub fn say(last_words: String) {
    *LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner) = Some(last_words);
}

/// A command that was asked to stop has ended by itself.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// From now on, Ctrl-C only sets the flag that is returned: the command ends by itself, with [`Interrupted`].
pub fn flag() -> &'static AtomicBool {
    ENDS_ITSELF.store(true, Ordering::Relaxed);
    &STOP
}

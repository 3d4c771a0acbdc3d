//! The one place that writes to standard output and standard error.
//!
//! What a command says waits until its results are in their place, so that no reader that goes away and no full disk can
//! undo them; only `generate` writes as it goes. A reader that has gone ends the command quietly, with the status that
//! shells know; any other error is one of the command's.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

/// What a shell expects of a command whose reader has gone.
pub const READER_GONE: u8 = 141;

static WAITING: Mutex<String> = Mutex::new(String::new());

/// Standard output does not take what it is given.
#[derive(Debug)]
pub struct Unprinted(io::Error);

impl Unprinted {
    /// Whether its reader has gone.
    pub fn reader_gone(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

impl fmt::Display for Unprinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to standard output: {}", self.0)
    }
}

impl std::error::Error for Unprinted {}

/// Says a line on standard output, once the command has ended.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::wait(format_args!($($text)*)) };
}

/// Says a line on standard error at once.
macro_rules! note {
    ($($text:tt)*) => { $crate::output::tell(format_args!($($text)*)) };
}

pub(crate) use {note, say};

/// See [`say!`].
pub fn wait(line: fmt::Arguments<'_>) {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    *waiting += &format!("{line}\n");
}

/// See [`note!`]. A closed standard error is not an error of the command.
pub fn tell(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes what waits.
///
/// # Errors
/// If standard output does not take it.
pub fn flush() -> Result<(), Unprinted> {
    let waiting = std::mem::take(&mut *WAITING.lock().unwrap_or_else(PoisonError::into_inner));
    stream(&waiting)
}

/// Writes a text at once, for a reader who follows.
///
/// # Errors
/// If standard output does not take it.
pub fn stream(text: &str) -> Result<(), Unprinted> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Unprinted)
}

//! What is being written, so that a program that is interrupted can remove it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static UNFINISHED: Mutex<Vec<(PathBuf, Kind)>> = Mutex::new(Vec::new());

/// What is removed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    File,
    /// If it is empty.
    Folder,
    /// With all that is in it.
    Tree,
}

fn all() -> MutexGuard<'static, Vec<(PathBuf, Kind)>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what is being written: for a program that is interrupted, before it ends. From then on nothing is begun and
/// nothing is put in its place.
pub fn remove_all() {
    /// Looks for what other threads still write, a few milliseconds in all.
    const LOOKS: usize = 5;
    let unfinished = all();
    for _ in 0..LOOKS {
        unfinished.iter().rev().for_each(remove);
        std::thread::sleep(Duration::from_millis(1));
    }
    unfinished.iter().rev().for_each(remove);
    std::mem::forget(unfinished);
}

fn remove((path, kind): &(PathBuf, Kind)) {
    // It may not be there yet.
    let _ = match kind {
        Kind::File => std::fs::remove_file(path),
        Kind::Folder => std::fs::remove_dir(path),
        Kind::Tree => std::fs::remove_dir_all(path),
    };
}

/// A path that is removed if the program is interrupted, until this is dropped.
#[derive(Debug)]
pub struct Registered(PathBuf);

impl Registered {
    fn new(path: &Path, kind: Kind) -> Self {
        all().push((path.to_owned(), kind));
        Self(path.to_owned())
    }

    /// A file that is about to be made and not finished until this is dropped.
    pub fn file(path: &Path) -> Self {
        Self::new(path, Kind::File)
    }

    /// A file that `make` makes. No interruption comes between that and its registration. Where the file belongs to
    /// somebody else, `make` returns `None`, and nothing is registered.
    ///
    /// # Errors
    /// As `make`.
    pub fn made<T>(path: &Path, make: impl FnOnce() -> io::Result<Option<T>>) -> io::Result<Option<(T, Self)>> {
        let mut unfinished = all();
        let Some(made) = make()? else { return Ok(None) };
        unfinished.push((path.to_owned(), Kind::File));
        Ok(Some((made, Self(path.to_owned()))))
    }

    /// A folder that is only removed if it is empty.
    pub fn folder(path: &Path) -> Self {
        Self::new(path, Kind::Folder)
    }

    /// A folder that is removed with all that is in it.
    pub fn tree(path: &Path) -> Self {
        Self::new(path, Kind::Tree)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut unfinished = all();
        if let Some(at) = unfinished.iter().rposition(|(path, _)| *path == self.0) {
            unfinished.remove(at);
        }
    }
}

/// Does what must not be cut short by an interruption. Nothing may be registered meanwhile.
pub fn without_interruption<T>(work: impl FnOnce() -> T) -> T {
    let _guard = all();
    work()
}

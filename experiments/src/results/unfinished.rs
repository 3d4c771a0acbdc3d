//! What is being written, so that a program that is interrupted can remove it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn all() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what is being written: for a program that is interrupted, before it ends. From then on nothing is begun and
/// nothing is put in its place.
pub fn remove_unfinished() {
    /// Looks for what other threads still write, a few milliseconds in all.
    const LOOKS: usize = 5;
    let unfinished = all();
    for _ in 0..LOOKS {
        unfinished.iter().rev().for_each(|path| remove(path));
        std::thread::sleep(Duration::from_millis(1));
    }
    unfinished.iter().rev().for_each(|path| remove(path));
    std::mem::forget(unfinished);
}

/// Removes a file, or a folder with all that is in it if it is ours to fill, or else only if it is empty.
fn remove(path: &Path) {
    let _ = match path.file_name().is_some_and(|name| name == super::STAGING) {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path)),
    };
}

/// A path that is removed if the program is interrupted, until this is dropped.
#[derive(Debug)]
pub(super) struct Registered(PathBuf);

/// A file that is not finished.
pub(super) fn file(path: &Path) -> Registered {
    all().push(path.to_owned());
    Registered(path.to_owned())
}

/// A folder that is not finished: if it is not [`STAGING`](super::STAGING), it is only removed when it is empty.
pub(super) fn folder(path: &Path) -> Registered {
    file(path)
}

/// Does what must not be cut short by an interruption.
pub(super) fn without_interruption<T>(work: impl FnOnce() -> T) -> T {
    let _guard = all();
    work()
}

impl Drop for Registered {
    fn drop(&mut self) {
        all().retain(|path| *path != self.0);
    }
}

//! A file that several processes may write at once: it appears complete, and each process waits for the one before.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Result, TraceError};
use crate::unfinished::Registered;

/// A file under a temporary name next to its final path, `NAME.part`, to which it is renamed when it is complete.
///
/// The temporary name depends on the path only. It is locked while it is written, by a lock that ends with its process;
/// what a killed process left is overwritten by the next one.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    path: PathBuf,
    part: PathBuf,
    _registered: Registered,
}

impl SharedFile {
    /// Starts a file that will replace `path`, as soon as no other process writes it.
    ///
    /// # Errors
    /// If the temporary file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        // A link stays, and what it points to is replaced.
        let place = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let mut name = OsString::from(&place);
        name.push(".part");
        let part = PathBuf::from(name);
        let (file, registered) = Self::hold(&part).map_err(TraceError::io("write", path))?;
        Ok(Self { file, path: place, part, _registered: registered })
    }

    fn hold(part: &Path) -> io::Result<(File, Registered)> {
        loop {
            if let Some(held) = Registered::made(part, || try_hold(part))? {
                return Ok(held);
            }
            // Another process writes it: wait until it has ended or renamed the file.
            match OpenOptions::new().write(true).open(part) {
                Ok(of_other) => of_other.lock()?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Where it is until it is complete.
    pub fn part(&self) -> &Path {
        &self.part
    }

    /// Renames the file to its final path.
    ///
    /// # Errors
    /// If renaming fails; the file is then removed.
    pub fn place(self) -> Result<()> {
        std::fs::rename(&self.part, &self.path).map_err(TraceError::io("write", &self.path))
    }
}

/// Makes and locks the file, unless another process holds it.
fn try_hold(part: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(part)?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(None),
        // A file system without locks: nothing is held.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
        Err(TryLockError::Error(error)) => return Err(error),
        Ok(()) => {}
    }
    if !is_at(&file, part)? {
        return Ok(None);
    }
    file.set_len(0)?;
    Ok(Some(file))
}

/// Whether a file was not renamed or removed while its lock was waited for.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;

    let held = file.metadata()?;
    Ok(std::fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (held.dev(), held.ino())))
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> io::Result<bool> {
    path.try_exists()
}

impl Write for SharedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // After `place` there is no such file, or one that the next process holds.
        if is_at(&self.file, &self.part).unwrap_or(false) {
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_file_that_is_abandoned_leaves_the_earlier_one_and_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        // Of a process that was killed.
        std::fs::write(folder.path().join("out.part"), "a longer text of a process that was killed").unwrap();
        for (text, is_placed) in [("first", true), ("second", false), ("third", true)] {
            let before = std::fs::read_to_string(&path).ok();
            let mut file = SharedFile::create(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).ok(), before);
            if is_placed {
                file.place().unwrap();
                assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            } else {
                drop(file);
                assert_eq!(std::fs::read_to_string(&path).ok(), before);
            }
            assert_eq!(names(folder.path()), ["out"]);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_what_it_points_to_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("out"), folder.path().join("link"));
        std::fs::write(&path, "first").unwrap();
        std::os::unix::fs::symlink("out", &link).unwrap();
        let mut file = SharedFile::create(&link).unwrap();
        file.write_all(b"second").unwrap();
        file.place().unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
    }

    #[test]
    fn writers_take_turns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let writing = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let (path, writing) = (&path, &writing);
                scope.spawn(move || {
                    for turn in 0..20 {
                        let mut file = SharedFile::create(path).unwrap();
                        assert_eq!(writing.fetch_add(1, Ordering::SeqCst), 0, "another writes");
                        file.write_all(writer.to_string().repeat(1000).as_bytes()).unwrap();
                        writing.fetch_sub(1, Ordering::SeqCst);
                        if (writer + turn) % 3 == 0 { drop(file) } else { file.place().unwrap() }
                    }
                });
            }
        });
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() == 1000 && text.chars().all(|letter| text.starts_with(letter)), "{text}");
        assert_eq!(names(folder.path()), ["out"]);
    }
}

//! One run at a time in a folder: a lock that ends with its process, whatever ends it.

use std::path::Path;

use anyhow::{Context, Result};

/// Holds a folder, and makes it if it is not there.
///
/// On Unix the folder itself is locked, so that no file of a lock stays behind. Elsewhere, and on file systems without
/// locks, nothing is held.
#[derive(Debug)]
pub(super) struct Lock {
    /// Whether the folder was made.
    pub(super) made: bool,
    #[cfg(unix)]
    _folder: std::fs::File,
}

impl Lock {
    /// # Errors
    /// If another run holds the folder, or it cannot be made.
    pub(super) fn hold(folder: &Path) -> Result<Self> {
        loop {
            let made = !folder.exists();
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
            if let Some(lock) = Self::try_hold(folder, made)? {
                return Ok(lock);
            }
        }
    }

    #[cfg(not(unix))]
    fn try_hold(_: &Path, made: bool) -> Result<Option<Self>> {
        Ok(Some(Self { made }))
    }

    /// None if the folder was removed meanwhile.
    #[cfg(unix)]
    fn try_hold(folder: &Path, made: bool) -> Result<Option<Self>> {
        use std::fs::{File, TryLockError, metadata};
        use std::io::ErrorKind;
        use std::os::unix::fs::MetadataExt;

        let cannot = || format!("cannot open {}", folder.display());
        let file = match File::open(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.with_context(cannot)?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                anyhow::bail!(
                    "{} is being written by another run: wait for it, or choose another --out",
                    folder.display()
                )
            }
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", folder.display()));
            }
        }
        let held = file.metadata().with_context(cannot)?;
        let is_there = metadata(folder).is_ok_and(|there| (there.dev(), there.ino()) == (held.dev(), held.ino()));
        Ok(is_there.then_some(Self { made, _folder: file }))
    }
}

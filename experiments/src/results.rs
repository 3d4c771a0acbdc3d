//! A folder of results that is there whole or not at all.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

/// What a folder of ours always holds: the configuration that it came from.
pub const CONFIG: &str = "config.yaml";

/// The pass log of a folder of ours.
pub const PASS_LOG: &str = "passes.parquet";

/// What a folder that we may replace holds: results, or an exit trace.
const MARKS: [&str; 2] = [CONFIG, "exits.yaml"];

/// Unfinished folders; see [`remove_unfinished`].
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Results being written, beside the place they are to appear at.
#[derive(Debug)]
pub struct ResultsFolder {
    target: PathBuf,
    unfinished: PathBuf,
}

impl ResultsFolder {
    /// Starts a folder that will replace `target`.
    ///
    /// # Errors
    /// If `target` is there and neither a folder of results nor an exit trace, or the folder beside it cannot be made.
    pub fn create(target: &Path) -> Result<Self> {
        if target.exists() && !is_replaceable(target) {
            bail!("{} is there already and holds no {}: choose another --out", target.display(), MARKS.join(" nor "));
        }
        let name = target.file_name().with_context(|| format!("{}: not a folder's name", target.display()))?;
        let unfinished =
            target.with_file_name(format!(".{}.unfinished.{}", name.to_string_lossy(), std::process::id()));
        std::fs::create_dir_all(&unfinished).with_context(|| format!("cannot make {}", unfinished.display()))?;
        UNFINISHED.lock().expect("no thread panics with it").push(unfinished.clone());
        Ok(Self { target: target.to_owned(), unfinished })
    }

    /// Starts a folder that will appear at `target`, where there is none yet or an empty one.
    ///
    /// # Errors
    /// As for [`ResultsFolder::create`], and if `target` holds anything.
    pub fn create_new(target: &Path) -> Result<Self> {
        if target.exists() && !is_empty(target) {
            bail!("{} is there already and not empty: choose another --out", target.display());
        }
        Self::create(target)
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.unfinished
    }

    /// Puts the folder in its place.
    ///
    /// # Errors
    /// If it cannot be renamed; an earlier folder is then left as it was.
    pub fn finish(self) -> Result<()> {
        let place = || -> std::io::Result<()> {
            if self.target.exists() {
                let earlier = self.unfinished.with_extension("replaced");
                std::fs::rename(&self.target, &earlier)?;
                std::fs::rename(&self.unfinished, &self.target)
                    .or_else(|error| std::fs::rename(&earlier, &self.target).and(Err(error)))?;
                std::fs::remove_dir_all(&earlier)
            } else {
                std::fs::rename(&self.unfinished, &self.target)
            }
        };
        place().with_context(|| format!("cannot put the results at {}", self.target.display()))
    }
}

impl Drop for ResultsFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.unfinished);
        UNFINISHED.lock().expect("no thread panics with it").retain(|folder| *folder != self.unfinished);
    }
}

fn is_replaceable(folder: &Path) -> bool {
    is_empty(folder) || MARKS.iter().any(|mark| folder.join(mark).is_file())
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Removes the folders that are being written: for a program that is interrupted, before it ends.
pub fn remove_unfinished() {
    for folder in UNFINISHED.lock().iter().flat_map(|folders| folders.iter()) {
        let _ = std::fs::remove_dir_all(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_appear_whole_and_replace_only_results() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("out");
        for text in ["first", "second"] {
            let folder = ResultsFolder::create(&target).unwrap();
            std::fs::write(folder.path().join(CONFIG), text).unwrap();
            folder.finish().unwrap();
            assert_eq!(std::fs::read_to_string(target.join(CONFIG)).unwrap(), text);
        }
        let abandoned = ResultsFolder::create(&target).unwrap();
        std::fs::write(abandoned.path().join(CONFIG), "third").unwrap();
        drop(abandoned);
        assert_eq!(std::fs::read_to_string(target.join(CONFIG)).unwrap(), "second");
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing is left beside it");

        let foreign = scratch.path().join("foreign");
        std::fs::create_dir(&foreign).unwrap();
        std::fs::write(foreign.join("thesis.tex"), "dear to somebody").unwrap();
        assert!(ResultsFolder::create(&foreign).unwrap_err().to_string().contains("choose another --out"));
    }
}

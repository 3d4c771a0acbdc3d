//! Folders of results: there whole or not at all, never in the place of a folder of others, written by one run at a time.
//!
//! ```text
//! out/
//!   depthwise-results.json   who wrote what: without it, the folder is not ours
//!   summary.csv, figures/    what it lists: replaced by the next results of the same command
//!   notes.md, small/         what it does not list: the user's, never touched
//!   .depthwise-unfinished/   results being written: moved into place at the end, else removed
//! ```
//!
//! The folder itself is locked while it is written, by a lock that ends with the process.

mod file;
mod lock;
mod marker;
mod seal;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use traces::table::{partial_name, write_whole};
use traces::unfinished::{Registered, without_interruption};

pub use file::write_file;
use lock::Lock;
pub use marker::{MARKER, Marker, set_commit};
pub use seal::Seal;

/// What a folder of ours mostly holds: the configuration that it came from.
pub const CONFIG: &str = "config.yaml";
/// The pass log of a folder of ours.
pub const PASS_LOG: &str = "passes.parquet";

/// Where results are until they are whole.
const STAGING: &str = ".depthwise-unfinished";
/// Where results go whose place is taken by a file of the user's.
const UNPLACED: &str = "new-results";

/// A folder of results that is being written.
#[derive(Debug)]
pub struct ResultsFolder {
    target: PathBuf,
    kind: String,
    /// What an earlier run wrote.
    earlier: BTreeSet<String>,
    /// Whether the folder says that what an earlier run wrote is whole.
    is_complete: bool,
    /// Whether files of the earlier run stay that are not written anew.
    adds: bool,
    /// Files that grow in their place.
    growing: BTreeSet<String>,
    /// Files that may not change any more.
    sealed: BTreeMap<String, Seal>,
    staging: Option<Registered>,
    /// If the folder was made, it is removed again where it stays empty.
    made: Option<Registered>,
    _lock: Lock,
}

impl ResultsFolder {
    /// Starts results of a command, `kind`, that will replace those which the same command left in `target`.
    ///
    /// # Errors
    /// If `target` is there and is not ours, or holds results of another command; if another run writes it; or if it
    /// cannot be made.
    pub fn create(target: &Path, kind: &str) -> Result<Self> {
        let (folder, marker) = Self::hold(target, kind)?;
        folder.check_ours(marker, false)
    }

    /// Starts results that will appear in `target`, where there is nothing yet or an empty folder.
    ///
    /// # Errors
    /// As for [`ResultsFolder::create`], and if `target` holds anything.
    pub fn create_new(target: &Path, kind: &str) -> Result<Self> {
        let (folder, marker) = Self::hold(target, kind)?;
        if marker.is_some() {
            bail!("{} is there already and not empty: choose another --out", target.display());
        }
        folder.check_ours(marker, false)
    }

    /// Goes on with what the same command left in `target`, or starts it.
    ///
    /// # Errors
    /// As for [`ResultsFolder::create`].
    pub fn open(target: &Path, kind: &str) -> Result<Self> {
        let (folder, marker) = Self::hold(target, kind)?;
        folder.check_ours(marker, true)
    }

    /// Adds to the results of any command.
    ///
    /// # Errors
    /// If `target` is not ours, another run writes it, or it cannot be written.
    pub fn add(target: &Path) -> Result<Self> {
        match Marker::read(target)? {
            Some(marker) => Self::open(target, &marker.kind),
            None => bail!("no {MARKER} in {} says that it holds results: choose another --out", target.display()),
        }
    }

    /// Goes on with a folder that the user says is ours, though it may be older than its marker: `files` in it are then
    /// ours.
    ///
    /// # Errors
    /// If another run writes it, or it holds results of another command.
    pub fn adopt(target: &Path, kind: &str, files: &[&str]) -> Result<Self> {
        let (folder, marker) = Self::hold(target, kind)?;
        let files = files.iter().map(|&file| file.to_owned()).collect();
        folder.check_ours(Some(marker.unwrap_or_else(|| Marker::new(kind, false, files))), true)
    }

    fn hold(target: &Path, kind: &str) -> Result<(Self, Option<Marker>)> {
        let shown = target.display();
        if target.exists() && !target.is_dir() {
            bail!("{shown} is there already and is not a folder: choose another --out");
        }
        let lock = Lock::hold(target)?;
        let made = lock.made.then(|| Registered::folder(target));
        recover(target)?;
        let marker = Marker::read(target)?;
        let folder = Self {
            target: target.to_owned(),
            kind: kind.to_owned(),
            earlier: BTreeSet::new(),
            is_complete: false,
            adds: false,
            growing: BTreeSet::new(),
            sealed: BTreeMap::new(),
            staging: None,
            made,
            _lock: lock,
        };
        Ok((folder, marker))
    }

    fn check_ours(mut self, marker: Option<Marker>, adds: bool) -> Result<Self> {
        let shown = self.target.display();
        let was_marked = marker.is_some();
        match marker {
            Some(marker) if marker.kind != self.kind => {
                bail!("{shown} is there already and holds results of `depthwise {}`: choose another --out", marker.kind)
            }
            Some(marker) => (self.earlier, self.is_complete) = (marker.files, marker.complete),
            None if is_empty(&self.target)? => {}
            None => bail!(
                "{shown} is there already, and no {MARKER} in it says that it holds results: choose another --out"
            ),
        }
        self.adds = adds;
        // Of a run that was killed: the folder is held, so no other writes it.
        let staging = self.target.join(STAGING);
        if staging.exists() && (was_marked || is_our_staging(&staging)?) {
            std::fs::remove_dir_all(&staging).with_context(|| format!("cannot remove {}", staging.display()))?;
        }
        let partial = partial_name(&self.target.join(MARKER));
        remove_if_there(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
        Ok(self)
    }

    /// The folder where results will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where to write what will appear at the end. It is made now, if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn path(&mut self) -> Result<PathBuf> {
        let staging = self.target.join(STAGING);
        if self.staging.is_none() {
            let registered = Registered::tree(&staging);
            std::fs::create_dir(&staging).with_context(|| format!("cannot make {}", staging.display()))?;
            self.staging = Some(registered);
            Marker::new(&self.kind, false, BTreeSet::new()).write(&staging.join(MARKER))?;
        }
        Ok(staging)
    }

    /// Writes a table now, whole or not at all, that may not change any more: the results' marker keeps the time and the
    /// hash.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn seal(&mut self, name: &str, lines: impl IntoIterator<Item = impl Serialize>) -> Result<Seal> {
        let path = self.path()?.join(name);
        let mut table = csv::Writer::from_writer(Vec::new());
        lines.into_iter().try_for_each(|line| table.serialize(line))?;
        let table = table.into_inner()?;
        write_whole(&path, |out| io::Write::write_all(out, &table))?;
        let seal = Seal::now(&table)?;
        self.sealed.insert(name.to_owned(), seal.clone());
        Ok(seal)
    }

    /// The place of a file that is written there from the beginning, and kept whatever ends the run. Results that are
    /// whole with this file stay so until [`ResultsFolder::mark`] says that it is to grow.
    ///
    /// # Errors
    /// If a file of the user's has that name, or the folder cannot be written.
    pub fn grow(&mut self, name: &str) -> Result<PathBuf> {
        self.claim(&[name])?;
        if !self.is_complete || !self.earlier.contains(name) {
            self.mark()?;
        }
        Ok(self.target.join(name))
    }

    /// Claims files that grow in their place, before the first of them is there.
    ///
    /// # Errors
    /// If a file of the user's has one of the names.
    pub fn claim(&mut self, names: &[&str]) -> Result<()> {
        for &name in names {
            let path = self.target.join(name);
            let is_ours = self.earlier.contains(name) || self.growing.contains(name);
            if !is_ours && path.symlink_metadata().is_ok() {
                bail!("{} is there already and is not listed in {MARKER}: choose another --out", path.display());
            }
            self.growing.insert(name.to_owned());
        }
        Ok(())
    }

    /// Says in the folder that it is ours, with the files that were claimed, and that its results are not whole.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn mark(&mut self) -> Result<()> {
        self.is_complete = false;
        let files = self.earlier.union(&self.growing).cloned().collect();
        Marker::new(&self.kind, false, files).write(&self.target.join(MARKER))
    }

    /// Removes what an earlier run wrote, and nothing else. The folder stays marked as ours.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove_earlier(&mut self) -> Result<()> {
        let earlier = std::mem::take(&mut self.earlier);
        if earlier.is_empty() {
            return Ok(());
        }
        self.is_complete = false;
        let mark = || Marker::new(&self.kind, false, earlier.clone()).write(&self.target.join(MARKER));
        // A full disk may have room for it only when the files are gone.
        let marked = mark();
        remove_files(&self.target, &earlier)
            .with_context(|| format!("cannot remove the results in {}", self.target.display()))?;
        marked.or_else(|_| mark())
    }

    /// Puts the results in their place.
    ///
    /// # Errors
    /// If a sealed file has changed, or they cannot be moved. Earlier results are left as they were if the disk is full. Where a file of the user's
    /// has the place of a new one, the new results are kept in a folder beside it. Where only some could be moved, the
    /// next run moves the others.
    pub fn finish(mut self) -> Result<()> {
        let staging = self.path()?;
        let mut new = BTreeSet::new();
        list_files(&staging, "", &mut new)?;
        new.remove(MARKER);
        let kept: BTreeSet<String> = match self.adds {
            true => self.earlier.union(&self.growing).cloned().collect(),
            false => self.growing.clone(),
        };
        let cannot = || format!("cannot put the results at {}", self.target.display());
        self.sealed.iter().try_for_each(|(name, seal)| seal.check(&staging.join(name)))?;
        let files = kept.union(&new).cloned().collect();
        let complete = Marker::new(&self.kind, true, files).with_sealed(self.sealed.clone());
        complete.write(&staging.join(MARKER)).with_context(cannot)?;
        if let Some(taken) = new.iter().find(|file| self.is_taken(file)) {
            let aside =
                (1..).map(|number| self.target.join(format!("{UNPLACED}-{number}"))).find(|path| !path.exists());
            let aside = aside.context("no name is free")?;
            without_interruption(|| std::fs::rename(&staging, &aside)).with_context(cannot)?;
            bail!(
                "{}: {taken} is there already and is not listed in {MARKER}: the results are in {}",
                self.target.display(),
                aside.display()
            );
        }
        let stale: BTreeSet<String> = self.earlier.difference(&complete.files).cloned().collect();
        // New results are coming, beside what is there. All that needs room on the disk is written before that is said; a
        // run that is killed from then on is ended by the next one: see `recover`.
        let incomplete = staging.join("incomplete");
        let both = self.earlier.iter().chain(&complete.files).cloned().collect();
        Marker::new(&self.kind, false, both).write(&incomplete).with_context(cannot)?;
        let mut is_coming = false;
        let placed = without_interruption(|| {
            std::fs::rename(&incomplete, self.target.join(MARKER))?;
            is_coming = true;
            place(&staging, &self.target, &new, &stale)
        });
        let placed = placed.with_context(|| match is_coming {
            true => format!("{}: the next run moves them into place", staging.display()),
            false => cannot(),
        });
        if is_coming {
            // They are not removed where they could not be moved.
            (self.staging, self.made) = (None, None);
        }
        placed
    }

    /// Whether something that is not ours has the place of a new file, or of a folder above it.
    fn is_taken(&self, file: &str) -> bool {
        let path = self.target.join(file);
        let is_other = path.symlink_metadata().is_ok_and(|there| there.is_dir() || !self.earlier.contains(file));
        let mut above = path.ancestors().skip(1).take_while(|folder| *folder != self.target);
        is_other || above.any(|folder| folder.symlink_metadata().is_ok() && !folder.is_dir())
    }
}

/// Moves new files into place and removes stale ones, in a folder that says that its results are incomplete and lists
/// both; then it says that they are complete.
fn place(staging: &Path, target: &Path, new: &BTreeSet<String>, stale: &BTreeSet<String>) -> io::Result<()> {
    remove_files(target, stale)?;
    for file in new {
        // Else it was moved with its folder, or by a run that was killed.
        if staging.join(file).exists() {
            let path = outermost_missing(target, Path::new(file));
            std::fs::rename(staging.join(path), target.join(path))?;
        }
    }
    std::fs::rename(staging.join(MARKER), target.join(MARKER))?;
    std::fs::remove_dir_all(staging)
}

/// A file, or the outermost folder above it that is not there: to move a folder needs no room on the disk, to make one does.
fn outermost_missing<'a>(target: &Path, file: &'a Path) -> &'a Path {
    let folders = file.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
    folders.take_while(|folder| !target.join(folder).exists()).last().unwrap_or(file)
}

impl Drop for ResultsFolder {
    fn drop(&mut self) {
        if self.staging.take().is_some() {
            let _ = std::fs::remove_dir_all(self.target.join(STAGING));
        }
        if self.made.take().is_some() {
            // Only if it is empty.
            let _ = std::fs::remove_dir(&self.target);
        }
    }
}

/// Puts results in their place that a killed run was about to: they are whole, and the folder already says that they are
/// coming.
fn recover(target: &Path) -> Result<()> {
    let staging = target.join(STAGING);
    let (Some(there), Some(coming)) = (Marker::read(target)?, Marker::read(&staging)?) else { return Ok(()) };
    if there.complete || !coming.complete || !coming.files.is_subset(&there.files) {
        return Ok(());
    }
    let stale: BTreeSet<String> = there.files.difference(&coming.files).cloned().collect();
    without_interruption(|| place(&staging, target, &coming.files, &stale))
        .with_context(|| format!("cannot put the results of an earlier run at {}", target.display()))
}

/// Whether a folder holds nothing, or only what a killed run of ours left unfinished.
fn is_empty(folder: &Path) -> Result<bool> {
    let cannot = || format!("cannot read {}", folder.display());
    for entry in std::fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let is_ours = match entry.file_name() {
            name if name == STAGING => is_our_staging(&entry.path())?,
            name => Path::new(&name) == partial_name(Path::new(MARKER)),
        };
        if !is_ours {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a folder of unfinished results is ours: it has a marker, or a run was killed before it wrote one.
fn is_our_staging(staging: &Path) -> Result<bool> {
    if staging.join(MARKER).exists() {
        return Ok(true);
    }
    let cannot = || format!("cannot read {}", staging.display());
    for entry in std::fs::read_dir(staging).with_context(cannot)? {
        if !entry.with_context(cannot)?.file_name().to_string_lossy().starts_with(MARKER) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// All files in a folder and the folders in it, with `/` between names.
fn list_files(folder: &Path, above: &str, files: &mut BTreeSet<String>) -> Result<()> {
    let cannot = || format!("cannot read {}", folder.display());
    for entry in std::fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let name = entry.file_name();
        let name = name.to_str().with_context(|| format!("{}: not a name in UTF-8", entry.path().display()))?;
        match entry.path().is_dir() {
            true => list_files(&entry.path(), &format!("{above}{name}/"), files)?,
            false => drop(files.insert(format!("{above}{name}"))),
        }
    }
    Ok(())
}

/// Removes files of a folder, and the folders that this leaves empty.
fn remove_files(target: &Path, files: &BTreeSet<String>) -> io::Result<()> {
    let mut folders = BTreeSet::new();
    for file in files {
        let path = target.join(file);
        // A folder of that name is not ours.
        if !path.symlink_metadata().is_ok_and(|there| there.is_dir()) {
            remove_if_there(&path)?;
        }
        folders.extend(Path::new(file).ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()));
    }
    for folder in folders.into_iter().rev() {
        // Only if it is empty.
        let _ = std::fs::remove_dir(target.join(folder));
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// Writes results of files that hold a text.
    fn write(target: &Path, files: &[&str], text: &str) -> Result<()> {
        let mut folder = ResultsFolder::create(target, "test")?;
        let path = folder.path()?;
        for file in files {
            fs::create_dir_all(path.join(file).parent().unwrap()).unwrap();
            fs::write(path.join(file), text).unwrap();
        }
        folder.finish()
    }

    fn all_files(folder: &Path) -> Vec<String> {
        let mut files = BTreeSet::new();
        list_files(folder, "", &mut files).unwrap();
        files.into_iter().collect()
    }

    fn scratch() -> (TempDir, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("out");
        (scratch, target)
    }

    #[test]
    fn results_replace_the_files_that_are_listed_and_no_others() {
        let (scratch, target) = scratch();
        write(&target, &["a", "figures/b", "figures/c"], "first").unwrap();
        fs::write(target.join("notes.md"), "dear to somebody").unwrap();
        fs::write(target.join("figures/mine.svg"), "drawn by hand").unwrap();
        write(&target.join("nested"), &["a"], "nested").unwrap();
        write(&target, &["a", "d/e"], "second").unwrap();
        assert_eq!(
            all_files(&target),
            ["a", "d/e", MARKER, "figures/mine.svg", "nested/a", &format!("nested/{MARKER}"), "notes.md"]
        );
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "second");
        assert_eq!(fs::read_to_string(target.join("nested/a")).unwrap(), "nested");
        let marker = Marker::read(&target).unwrap().unwrap();
        assert!(marker.complete && marker.kind == "test");
        assert_eq!(marker.files.iter().collect::<Vec<_>>(), ["a", "d/e"]);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn abandoned_results_leave_what_was_there() {
        let (scratch, target) = scratch();
        let mut folder = ResultsFolder::create(&target, "test").unwrap();
        fs::write(folder.path().unwrap().join("a"), "").unwrap();
        drop(folder);
        assert!(!target.exists());
        write(&target, &["a"], "first").unwrap();
        let mut folder = ResultsFolder::create(&target, "test").unwrap();
        fs::write(folder.path().unwrap().join("a"), "second").unwrap();
        drop(folder);
        assert_eq!(all_files(&target), ["a", MARKER]);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "first");
        drop(scratch);
    }

    #[test]
    fn folders_of_others_are_refused_with_the_remedy() {
        let (_scratch, target) = scratch();
        fs::create_dir_all(target.join("src")).unwrap();
        for text in
            [None, Some("{}"), Some(r#"{"program":"other","version":"1","kind":"test","complete":true,"files":[]}"#)]
        {
            fs::write(target.join("config.yaml"), "another program's").unwrap();
            if let Some(text) = text {
                fs::write(target.join(MARKER), text).unwrap();
            }
            let before = all_files(&target);
            let error = format!("{:#}", write(&target, &["a"], "").unwrap_err());
            assert!(error.contains("choose another --out") || error.contains(MARKER), "{error}");
            assert_eq!(all_files(&target), before);
            assert!(target.join("src").is_dir());
        }
        let escape = r#"{"program":"depthwise","version":"1","kind":"test","complete":true,"files":["../dear"]}"#;
        fs::write(target.join(MARKER), escape).unwrap();
        let error = write(&target, &["a"], "").unwrap_err().to_string();
        assert!(error.contains("expected names inside the folder"), "{error}");
        fs::write(target.join(MARKER), escape.replace("../dear", "dear").replace("test", "train")).unwrap();
        let error = write(&target, &["a"], "").unwrap_err().to_string();
        assert!(error.contains("holds results of `depthwise train`: choose another --out"), "{error}");
    }

    #[test]
    fn where_the_user_has_put_a_file_the_results_are_kept_beside_it() {
        let (_scratch, target) = scratch();
        write(&target, &["a"], "first").unwrap();
        fs::write(target.join("b"), "dear to somebody").unwrap();
        let error = write(&target, &["a", "b"], "second").unwrap_err().to_string();
        assert!(error.contains("b is there already") && error.contains("new-results-1"), "{error}");
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "first");
        assert_eq!(fs::read_to_string(target.join("b")).unwrap(), "dear to somebody");
        assert_eq!(fs::read_to_string(target.join("new-results-1/b")).unwrap(), "second");
        // A folder in the place of a file that we wrote.
        fs::remove_file(target.join("a")).unwrap();
        fs::create_dir(target.join("a")).unwrap();
        fs::write(target.join("a/mine"), "dear to somebody").unwrap();
        let error = write(&target, &["a"], "third").unwrap_err().to_string();
        assert!(error.contains("a is there already") && error.contains("new-results-2"), "{error}");
        write(&target, &["c"], "fourth").unwrap();
        assert_eq!(fs::read_to_string(target.join("a/mine")).unwrap(), "dear to somebody");
    }

    #[test]
    fn files_that_grow_are_kept_and_restarting_removes_only_them() {
        let (_scratch, target) = scratch();
        let mut folder = ResultsFolder::open(&target, "test").unwrap();
        fs::write(folder.grow("lines").unwrap(), "1").unwrap();
        drop(folder);
        assert!(!Marker::read(&target).unwrap().unwrap().complete);
        fs::write(target.join("notes.md"), "dear to somebody").unwrap();
        let mut folder = ResultsFolder::open(&target, "test").unwrap();
        assert_eq!(fs::read_to_string(folder.grow("lines").unwrap()).unwrap(), "1");
        fs::write(folder.path().unwrap().join("means"), "1").unwrap();
        folder.finish().unwrap();
        let marker = Marker::read(&target).unwrap().unwrap();
        assert!(marker.complete);
        assert_eq!(marker.files.iter().collect::<Vec<_>>(), ["lines", "means"]);
        let mut folder = ResultsFolder::open(&target, "test").unwrap();
        folder.remove_earlier().unwrap();
        assert_eq!(all_files(&target), [MARKER, "notes.md"]);
        assert!(!Marker::read(&target).unwrap().unwrap().complete);
    }

    #[test]
    fn results_that_are_whole_stay_so_until_one_of_their_files_is_to_grow() {
        let (_scratch, target) = scratch();
        let is_complete = || Marker::read(&target).unwrap().unwrap().complete;
        let mut folder = ResultsFolder::open(&target, "test").unwrap();
        fs::write(folder.grow("lines").unwrap(), "1").unwrap();
        folder.finish().unwrap();
        let mut folder = ResultsFolder::open(&target, "test").unwrap();
        folder.grow("lines").unwrap();
        assert!(is_complete());
        folder.mark().unwrap();
        assert!(!is_complete());
        folder.finish().unwrap();
        let mut folder = ResultsFolder::open(&target, "test").unwrap();
        folder.grow("others").unwrap();
        assert!(!is_complete());
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_is_written_by_one_run_at_a_time() {
        let (_scratch, target) = scratch();
        let folder = ResultsFolder::create(&target, "test").unwrap();
        let error = ResultsFolder::create(&target, "test").unwrap_err().to_string();
        assert!(error.contains("is being written by another run"), "{error}");
        drop(folder);
        write(&target, &["a"], "").unwrap();
    }

    #[test]
    fn what_a_killed_run_left_unfinished_is_removed() {
        let (_scratch, target) = scratch();
        fs::create_dir_all(target.join(STAGING)).unwrap();
        fs::write(target.join(STAGING).join("model.bin"), "not of ours: no marker").unwrap();
        assert!(write(&target, &["a"], "").is_err());
        Marker::new("test", false, BTreeSet::new()).write(&target.join(STAGING).join(MARKER)).unwrap();
        write(&target, &["a"], "").unwrap();
        assert_eq!(all_files(&target), ["a", MARKER]);
        // Killed between making the folder and marking it, in a folder of ours and in a new one.
        fs::create_dir(target.join(STAGING)).unwrap();
        write(&target, &["a"], "").unwrap();
        let new = target.join("new");
        fs::create_dir_all(new.join(STAGING)).unwrap();
        fs::write(new.join(STAGING).join(format!("{MARKER}.partial")), "{").unwrap();
        write(&new, &["a"], "").unwrap();
        assert_eq!(all_files(&new), ["a", MARKER]);
    }

    #[test]
    fn results_whose_placing_was_cut_short_are_put_in_their_place() {
        let (_scratch, target) = scratch();
        write(&target, &["a", "b", "old"], "first").unwrap();
        let set = |files: &[&str]| files.iter().map(|&file| file.to_owned()).collect();
        let staging = target.join(STAGING);
        fs::create_dir(&staging).unwrap();
        // As a kill leaves it: `a` is in its place, `b` is not, `old` is not yet removed.
        Marker::new("test", true, set(&["a", "b"])).write(&staging.join(MARKER)).unwrap();
        Marker::new("test", false, set(&["a", "b", "old"])).write(&target.join(MARKER)).unwrap();
        fs::write(target.join("a"), "second").unwrap();
        fs::write(staging.join("b"), "second").unwrap();
        drop(ResultsFolder::add(&target).unwrap());
        assert_eq!(all_files(&target), ["a", "b", MARKER]);
        assert_eq!(fs::read_to_string(target.join("b")).unwrap(), "second");
        assert!(Marker::read(&target).unwrap().unwrap().complete);
    }

    #[test]
    fn a_sealed_file_is_kept_with_its_hash_and_may_not_change() {
        let (_scratch, target) = scratch();
        let mut folder = ResultsFolder::create(&target, "test").unwrap();
        let seal = folder.seal("a.csv", [("x", 1)]).unwrap();
        folder.finish().unwrap();
        assert_eq!(fs::read_to_string(target.join("a.csv")).unwrap(), "x,1\n");
        // As `printf 'x,1\n' | sha256sum` says.
        assert_eq!(seal.sha256, "c70aa381191a9a81846a5180b91f09043fb10307d68f7b76483439b8cafa9000");
        assert!(seal.written_at.ends_with('Z'), "{seal}");
        assert_eq!(Marker::read(&target).unwrap().unwrap().sealed["a.csv"], seal);

        let mut folder = ResultsFolder::create(&target, "test").unwrap();
        folder.seal("a.csv", [("x", 2)]).unwrap();
        fs::write(folder.path().unwrap().join("a.csv"), "x,3\n").unwrap();
        let error = folder.finish().unwrap_err().to_string();
        assert!(error.contains("a.csv: SHA-256 is") && error.contains("was changed after"), "{error}");
        assert_eq!(fs::read_to_string(target.join("a.csv")).unwrap(), "x,1\n");
    }

    #[test]
    fn a_single_file_replaces_only_its_like() {
        let (scratch, target) = scratch();
        let write = |text: &str| write_file(&target, b"ours", |out| io::Write::write_all(out, text.as_bytes()));
        write("ours, first").unwrap();
        write("ours, second").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "ours, second");
        fs::write(&target, "dear to somebody").unwrap();
        assert!(write("ours").unwrap_err().to_string().contains("choose another --out"));
        assert_eq!(fs::read_to_string(&target).unwrap(), "dear to somebody");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    }
}

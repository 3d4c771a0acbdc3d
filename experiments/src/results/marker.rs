//! Whose a folder is: the file that says that we wrote it, and what in it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Component, Path};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use traces::table::write_whole;

use super::seal::Seal;

/// File in a folder of results that says who wrote it.
pub const MARKER: &str = "depthwise-results.json";

const PROGRAM: &str = "depthwise";

/// The commit that the program was built from. The library is not rebuilt for every commit, so the program says it.
static COMMIT: OnceLock<&str> = OnceLock::new();

/// Says which commit the program was built from: folders that are written from now on record it.
pub fn set_commit(commit: &'static str) {
    // The first one stays: a program has one.
    let _ = COMMIT.set(commit);
}

/// What a folder of results says of itself.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Marker {
    program: String,
    /// The version that wrote it.
    pub version: String,
    /// The commit that the program was built from, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The command that wrote it.
    pub kind: String,
    /// Whether all results are there. A sweep and a training run are incomplete until they end.
    pub complete: bool,
    /// The files that we wrote, relative to the folder, with `/` between names. All others are the user's.
    pub files: BTreeSet<String>,
    /// Files that were written before what they are about was measured, with the time and the hash of each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sealed: BTreeMap<String, Seal>,
}

impl Marker {
    pub(super) fn new(kind: &str, complete: bool, files: BTreeSet<String>) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let commit = COMMIT.get().map(|&commit| commit.to_owned());
        let (program, kind) = (PROGRAM.to_owned(), kind.to_owned());
        Self { program, version, commit, kind, complete, files, sealed: BTreeMap::new() }
    }

    pub(super) fn with_sealed(self, sealed: BTreeMap<String, Seal>) -> Self {
        Self { sealed, ..self }
    }

    /// Reads the marker of a folder; none if it has none.
    ///
    /// # Errors
    /// If the file does not read, or was not written by this program.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MARKER);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let marker: Self = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let program = &marker.program;
        ensure!(program == PROGRAM, "{}: program: found `{program}`, expected `{PROGRAM}`", path.display());
        let outside = marker.files.iter().find(|file| !is_inside(file));
        ensure!(outside.is_none(), "{}: files: found {outside:?}, expected names inside the folder", path.display());
        Ok(Some(marker))
    }

    /// Writes the marker into a folder, whole or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        Ok(write_whole(path, |out| serde_json::to_writer_pretty(out, self).map_err(io::Error::other))?)
    }
}

fn is_inside(file: &str) -> bool {
    !file.is_empty() && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)))
}

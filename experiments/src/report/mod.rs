//! One HTML page of folders of results, to send to a colleague: it needs no other file and no network.
//!
//! ```text
//! folders ──► Folder: tables, curves, facts ──JSON──► page: page/*.js draws it with D3 and Observable Plot
//! ```
//!
//! What the page shows is decided here, how it looks in `page/`. The same folders give the same bytes.

mod depths;
mod folder;
mod page;
mod runs;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use serde::Serialize;

use folder::Folder;
pub use page::PAGE_BEGINNING;

/// Bytes that a page takes at most.
pub const MOST_BYTES: usize = 3_000_000;
/// Folders that a page shows at most: panels beside each other are compared by eye.
pub const MOST_FOLDERS: usize = 12;
/// Times that the detail is halved before the page is given up.
const MOST_HALVINGS: u32 = 8;

/// How much of the folders goes into the page.
#[derive(Clone, Copy, Debug)]
struct Detail {
    /// Cells of all tables of a folder that differ from line to line.
    cells: usize,
    /// Passes of all runs of a folder.
    passes: usize,
    /// Slices of time of a run, times runs.
    slices: usize,
    /// Values of each latency of a run, of which a distribution is drawn.
    quantiles: usize,
}

impl Detail {
    const WHOLE: Self = Self { cells: 120_000, passes: 60_000, slices: 6_000, quantiles: 128 };

    /// The detail of each of some folders, halved some times.
    fn shared(self, folders: usize, halvings: u32) -> Self {
        let share = |most: usize| (most / folders) >> halvings;
        Self {
            cells: share(self.cells),
            passes: share(self.passes),
            slices: share(self.slices),
            quantiles: (self.quantiles >> halvings).max(16),
        }
    }
}

/// What the page knows.
#[derive(Debug, Serialize)]
struct Data {
    /// Of the program that wrote the page.
    version: &'static str,
    folders: Vec<Folder>,
}

/// The page of some folders, as HTML of at most [`MOST_BYTES`]. Long tables and long runs are sampled if needed; the page
/// says so.
///
/// # Errors
/// If a folder is not one that a command wrote, is given twice, or a file in it does not read.
pub fn report(folders: &[PathBuf]) -> Result<String> {
    ensure!(!folders.is_empty(), "expected a folder of results");
    ensure!(
        folders.len() <= MOST_FOLDERS,
        "found {} folders, expected at most {MOST_FOLDERS} to lie side by side",
        folders.len()
    );
    let names = names(folders)?;
    for halvings in 0..=MOST_HALVINGS {
        let detail = Detail::WHOLE.shared(folders.len(), halvings);
        let read = |(folder, name): (&PathBuf, &String)| Folder::read(folder, name, &detail);
        let read: Vec<Vec<Folder>> = folders.iter().zip(&names).map(read).collect::<Result<_>>()?;
        let data = Data { version: env!("CARGO_PKG_VERSION"), folders: read.into_iter().flatten().collect() };
        let page = page::page(&data)?;
        if page.len() <= MOST_BYTES {
            return Ok(page);
        }
    }
    bail!("the page takes more than {MOST_BYTES} bytes however its tables are sampled: expected fewer folders")
}

/// Names of folders: the shortest ends of their paths that differ.
fn names(folders: &[PathBuf]) -> Result<Vec<String>> {
    let whole = |folder: &PathBuf| folder.canonicalize().unwrap_or_else(|_| folder.clone());
    let paths: Vec<PathBuf> = folders.iter().map(whole).collect();
    if let Some(place) = (0..paths.len()).find(|&place| paths[..place].contains(&paths[place])) {
        bail!("{} is given twice", folders[place].display());
    }
    let longest = paths.iter().map(|path| path.components().count()).max().unwrap_or_default();
    let of_length = |parts: usize| paths.iter().map(|path| last_parts(path, parts)).collect::<Vec<_>>();
    let differ = |names: &[String]| (0..names.len()).all(|place| !names[..place].contains(&names[place]));
    Ok((1..=longest).map(of_length).find(|names| differ(names)).unwrap_or_else(|| of_length(longest)))
}

fn last_parts(path: &Path, count: usize) -> String {
    let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts[parts.len().saturating_sub(count)..].join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_called_by_the_parts_of_their_paths_that_differ() {
        let names = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(names(&["/x/results/a", "/x/results/b"]).unwrap(), ["a", "b"]);
        assert_eq!(names(&["/x/1/a", "/x/2/a", "/b"]).unwrap(), ["1/a", "2/a", "//b"]);
        assert!(names(&["/x/a", "/x/a"]).unwrap_err().to_string().contains("/x/a is given twice"));
    }
}

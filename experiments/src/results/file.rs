//! Single files of results: there whole or not at all, and never in the place of a file of others.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use traces::SharedFile;

use super::unfinished;

/// Writes a file of results. One that is there already is replaced if it begins with `beginning`, which every file of the
/// kind begins with.
///
/// # Errors
/// If another file is there, or the file cannot be written; an earlier one is then left as it was.
pub fn write_file(
    path: &Path,
    beginning: &[u8],
    write: impl FnOnce(&mut BufWriter<&mut SharedFile>) -> io::Result<()>,
) -> Result<()> {
    if path.exists() && !begins_with(path, beginning) {
        bail!("{} is there already and is not such a file of ours: choose another --out", path.display());
    }
    let mut part = SharedFile::create(path)?;
    let _registered = unfinished::file(part.part());
    let mut out = BufWriter::new(&mut part);
    write(&mut out).and_then(|()| out.flush()).with_context(|| format!("cannot write {}", path.display()))?;
    drop(out);
    Ok(part.place()?)
}

fn begins_with(path: &Path, beginning: &[u8]) -> bool {
    let mut read = vec![0; beginning.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut read)).is_ok() && read == beginning
}

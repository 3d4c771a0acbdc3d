//! Single files of results: there whole or not at all, and never in the place of a file of others.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use traces::SharedFile;
use traces::unfinished::Registered;

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
    let _registered = Registered::file(&part_name(path));
    let mut part = SharedFile::create(path)?;
    let mut out = BufWriter::new(&mut part);
    write(&mut out).and_then(|()| out.flush()).with_context(|| format!("cannot write {}", path.display()))?;
    drop(out);
    Ok(part.place()?)
}

/// The temporary name, which is registered before the file is there: an interruption may come between.
fn part_name(path: &Path) -> PathBuf {
    let mut name = path.canonicalize().unwrap_or_else(|_| path.to_owned()).into_os_string();
    name.push(".part");
    PathBuf::from(name)
}

fn begins_with(path: &Path, beginning: &[u8]) -> bool {
    let mut read = vec![0; beginning.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut read)).is_ok() && read == beginning
}

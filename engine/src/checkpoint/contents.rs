//! What a file holds instead of a model: a pointer, an archive, an error page.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Bytes that tell what a file is.
const START: usize = 512;

/// The whole file.
///
/// # Errors
/// If it is unreadable, or holds what [`foreign`] knows.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path)?;
    refuse(&bytes[..bytes.len().min(START)])?;
    Ok(bytes)
}

/// Opens a file.
///
/// # Errors
/// If it is unreadable, or holds what [`foreign`] knows.
pub(crate) fn open(path: &Path) -> Result<File> {
    let mut start = Vec::new();
    File::open(path)?.take(START as u64).read_to_end(&mut start)?;
    refuse(&start)?;
    File::open(path)
}

fn refuse(start: &[u8]) -> Result<()> {
    match foreign(start) {
        None => Ok(()),
        Some(what) => Err(Error::new(ErrorKind::InvalidData, what)),
    }
}

/// What a file that starts with these bytes is, if it is nothing that a model is made of, and what to do about it.
fn foreign(start: &[u8]) -> Option<&'static str> {
    let text: Vec<u8> = start.iter().skip_while(|byte| byte.is_ascii_whitespace()).take(14).copied().collect();
    let is_page = [&b"<!doctype html"[..], b"<html", b"<?xml"]
        .iter()
        .any(|tag| text.get(..tag.len()).is_some_and(|found| found.eq_ignore_ascii_case(tag)));
    match start {
        [] => Some("empty: its download or copy did not end"),
        _ if is_page => Some("a web page in place of the file, such as an error or a login: fetch it anew"),
        _ => packed(start),
    }
}

/// What a file that starts with these bytes is, if it is a pointer to the file, an archive or in the format of another
/// program, and what to do about it.
pub fn packed(start: &[u8]) -> Option<&'static str> {
    const PYTORCH: &str = "a file of PyTorch: save the model as safetensors, by `save_pretrained` of transformers";
    const BEFORE_GGUF: &str = "of llama.cpp's format before GGUF: convert the model anew";
    const KINDS: [(&[u8], &str); 12] = [
        (b"version https://git-lfs", "a git-lfs pointer in place of the file: run `git lfs pull` where it was cloned"),
        (b"\x1f\x8b", "compressed by gzip: unpack it first, by `gunzip`"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first, by `unzstd`"),
        (b"\xfd7zXZ\x00", "compressed by xz: unpack it first, by `unxz`"),
        (b"BZh", "compressed by bzip2: unpack it first, by `bunzip2`"),
        (b"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
        (b"Rar!", "a RAR archive: unpack it first"),
        (b"\x89HDF", "a file of Keras: save the model as safetensors, by `save_pretrained` of transformers"),
        (b"lmgg", BEFORE_GGUF),
        (b"fmgg", BEFORE_GGUF),
        (b"tjgg", BEFORE_GGUF),
        (b"\x80\x02", PYTORCH),
    ];
    let start = &start[..start.len().min(START)];
    let has = |name: &[u8]| start.windows(name.len()).any(|window| window == name);
    match KINDS.iter().find(|(magic, _)| start.starts_with(magic)) {
        Some((_, what)) => Some(what),
        None if start.starts_with(b"PK\x03\x04") && (has(b"data.pkl") || has(b"/version")) => Some(PYTORCH),
        None if start.starts_with(b"PK\x03\x04") => Some("a zip archive: unpack it first"),
        None if start.get(257..262) == Some(b"ustar") => Some("a tar archive: unpack it first"),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_model_is_named_with_the_remedy() {
        let tar = [&[b'a'; 257][..], b"ustar\x0000"].concat();
        let cases: [(&[u8], &str); 12] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
            (b"", "empty"),
            (b"\x1f\x8b\x08\x00", "gunzip"),
            (b"PK\x03\x04\x00\x00archive/data.pkl", "a file of PyTorch: save the model as safetensors"),
            (b"PK\x03\x04\x00\x00model.gguf", "a zip archive"),
            (b"\x80\x02}q\x00", "a file of PyTorch"),
            (b"\x28\xb5\x2f\xfd\x00", "zstd"),
            (b"\n <!DOCTYPE html><html lang=\"en\">", "a web page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "a web page"),
            (b"<HTML>", "a web page"),
            (b"tjgg\x03\x00", "before GGUF"),
            (&tar, "a tar archive"),
        ];
        for (start, expected) in cases {
            let found = foreign(start).unwrap_or("nothing");
            assert!(found.contains(expected), "{found}: {}", String::from_utf8_lossy(start));
        }
        for model in [&b"GGUF\x03\x00\x00\x00"[..], b"{\"a\": 1}", b"\x40\x00\x00\x00\x00\x00\x00\x00{"] {
            assert_eq!(foreign(model), None);
        }
    }
}

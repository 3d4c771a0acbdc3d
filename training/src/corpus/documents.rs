//! Documents of a text: plain files, JSON lines, and folders of both.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use engine::checkpoint::contents::packed;

use crate::error::TrainingError;

/// Extension of files with one document per line.
const JSON_LINES: &str = "jsonl";
/// Extension of files in folders that are one document each.
const PLAIN_TEXT: &str = "txt";

/// The files of `paths` in order. A folder is replaced by the `.txt` and `.jsonl` files in it and its subfolders,
/// ordered by name.
///
/// # Errors
/// If a path does not exist or a folder contains no such file.
pub fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, TrainingError> {
    let mut files = Vec::new();
    for path in paths {
        let metadata = fs::metadata(path).map_err(|e| TrainingError::in_file(path, e))?;
        if !metadata.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        add_folder(path, &mut files)?;
        if files.len() == before {
            let none = std::io::Error::other("a folder without .txt or .jsonl files");
            return Err(TrainingError::in_file(path, none));
        }
    }
    Ok(files)
}

fn add_folder(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), TrainingError> {
    let entries = fs::read_dir(folder).and_then(|entries| {
        let paths = entries.map(|entry| Ok(entry?.path()));
        paths.collect::<std::io::Result<Vec<_>>>()
    });
    let mut entries = entries.map_err(|e| TrainingError::in_file(folder, e))?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            add_folder(&path, files)?;
        } else if has_extension(&path, PLAIN_TEXT) || has_extension(&path, JSON_LINES) {
            files.push(path);
        }
    }
    Ok(())
}

/// Calls `each` with every document of a file. In a `.jsonl` file, that is each line's text under `field`; any other
/// file is one document.
///
/// # Errors
/// If the file cannot be read or is not UTF-8, a line is not a JSON object or lacks the field, or `each` fails.
pub fn read(
    path: &Path,
    field: &str,
    mut each: impl FnMut(&str) -> Result<(), TrainingError>,
) -> Result<(), TrainingError> {
    let in_file = |e| TrainingError::in_file(path, e);
    if !has_extension(path, JSON_LINES) {
        let bytes = fs::read(path).map_err(in_file)?;
        if let Some(what) = packed(&bytes) {
            return Err(in_file(std::io::Error::other(what)));
        }
        return each(utf8(path, 1, &bytes)?);
    }
    let mut reader = BufReader::new(File::open(path).map_err(in_file)?);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(in_file)? == 0 {
            break;
        }
        let text = utf8(path, number, &line)?;
        if !text.trim().is_empty() {
            each(&document(path, number, text, field)?)?;
        }
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// Converts bytes of a file, which start at line `first_line`, to text.
fn utf8<'a>(path: &Path, first_line: usize, bytes: &'a [u8]) -> Result<&'a str, TrainingError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line = first_line + before.iter().filter(|byte| **byte == b'\n').count();
        let byte = || format!("the byte {:#04x}", bytes[before.len()]);
        let found = packed(bytes).map_or_else(byte, |what| format!("a file that is {what}"));
        TrainingError::Line { path: path.to_owned(), line, found, expected: "UTF-8".to_owned() }
    })
}

/// The text under `field` of a line of JSON.
fn document(path: &Path, line: usize, text: &str, field: &str) -> Result<String, TrainingError> {
    let refuse = |found: String| {
        let expected = format!("a JSON object with a text under `{field}`");
        TrainingError::Line { path: path.to_owned(), line, found, expected }
    };
    let object: serde_json::Value = serde_json::from_str(text).map_err(|e| refuse(format!("no JSON ({e})")))?;
    match object.get(field) {
        Some(serde_json::Value::String(document)) => Ok(document.clone()),
        Some(other) => Err(refuse(format!("{other} under `{field}`"))),
        None if object.is_object() => Err(refuse(format!("no `{field}`"))),
        None => Err(refuse(object.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(path: &Path, field: &str) -> Result<Vec<String>, TrainingError> {
        let mut documents = Vec::new();
        read(path, field, |text| {
            documents.push(text.to_owned());
            Ok(())
        })?;
        Ok(documents)
    }

    #[test]
    fn archives_and_pointers_are_refused_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes, remedy) in [
            ("a.txt", &b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"[..], "run `git lfs pull`"),
            ("b.txt", b"\x1f\x8b\x08\x00", "compressed by gzip: unpack it first"),
            ("c.jsonl", b"\x1f\x8b\x08\x00", "compressed by gzip: unpack it first"),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let message = read(&path, "text", |_| Ok(())).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(remedy), "{message}");
        }
    }

    #[test]
    fn a_folder_gives_its_texts_and_json_lines_by_name_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("b")).unwrap();
        for name in ["c.txt", "b/x.txt", "a.jsonl", "notes.md"] {
            fs::write(path(name), "").unwrap();
        }
        let found = files(&[path("notes.md"), folder.path().to_owned()]).unwrap();
        assert_eq!(found, [path("notes.md"), path("a.jsonl"), path("b/x.txt"), path("c.txt")]);
        fs::remove_file(path("b/x.txt")).unwrap();
        let message = files(&[path("b")]).unwrap_err().to_string();
        assert!(message.ends_with("b: a folder without .txt or .jsonl files"), "{message}");
    }

    #[test]
    fn a_text_file_is_one_document_and_a_json_line_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let (text, lines) = (folder.path().join("a.txt"), folder.path().join("a.jsonl"));
        fs::write(&text, "one\ntwo\n").unwrap();
        fs::write(&lines, "{\"text\": \"one\\n\", \"id\": 3}\n\n{\"text\": \"zwei ☃\"}").unwrap();
        assert_eq!(documents(&text, "text").unwrap(), ["one\ntwo\n"]);
        assert_eq!(documents(&lines, "text").unwrap(), ["one\n", "zwei ☃"]);
    }

    #[test]
    fn errors_name_the_file_the_line_and_what_was_found() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            documents(&path, "text").unwrap_err().to_string()
        };
        let message = refusal("a.txt", b"fine\nfine\nna\xefve\n");
        assert!(message.ends_with("a.txt:3: found the byte 0xef, expected UTF-8"), "{message}");
        let message = refusal("a.jsonl", b"{\"text\": \"\"}\n\xff\n");
        assert!(message.ends_with("a.jsonl:2: found the byte 0xff, expected UTF-8"), "{message}");
        let message = refusal("a.jsonl", b"{\"text\": \"\"}\n{\"text\": \n");
        assert!(message.contains("a.jsonl:2: found no JSON (EOF"), "{message}");
        let message = refusal("a.jsonl", b"{\"body\": \"\"}\n");
        assert!(message.contains("a.jsonl:1: found no `text`, expected a JSON object with a text under"), "{message}");
        let message = refusal("a.jsonl", b"{\"text\": 7}\n");
        assert!(message.contains("a.jsonl:1: found 7 under `text`"), "{message}");
        let message = refusal("a.jsonl", b"[]\n");
        assert!(message.contains("a.jsonl:1: found [], expected"), "{message}");
    }
}

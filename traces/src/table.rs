//! CSV files read row by row, with errors that name line and column, and files that are written completely or not at
//! all.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use csv::ByteRecord;

use crate::error::{Result, TraceError, quote};
use crate::input::{Text, ends_with_newline, open_file, open_text, read_text};
use crate::unfinished::Registered;

/// The origin of a file, which decides how strictly its header is checked.
#[derive(Clone, Copy, PartialEq)]
pub enum Owner {
    /// Written by this crate: exactly these columns in this order, and a line end after the last row.
    Us,
    /// Published by others, who add and move columns: columns are found by name, others are ignored.
    Others,
}

/// A CSV file whose columns are addressed by their index in `columns`.
pub struct Table {
    path: PathBuf,
    columns: Vec<&'static str>,
    /// Position in the file of each of `columns`.
    places: Vec<usize>,
    /// Names of the file's columns that are not among `columns`.
    unused: Vec<String>,
    reader: csv::Reader<Text>,
    record: ByteRecord,
}

impl Table {
    /// Opens a file and finds the columns in its header.
    ///
    /// # Errors
    /// If the file cannot be read, or lacks a column.
    pub fn open(path: &Path, columns: &[&'static str], owner: Owner) -> Result<Self> {
        Self::open_optional(path, columns, columns.len(), owner)
    }

    /// As [`open`](Self::open), but each of the columns from index `optional` on may be missing
    /// ([`has_column`](Self::has_column)). Indices are those among the columns that the file has.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_optional(path: &Path, columns: &[&'static str], optional: usize, owner: Owner) -> Result<Self> {
        let text = open_file(path)?;
        if owner == Owner::Us {
            check_ends_with_newline(path, columns)?;
        }
        let mut reader = csv::ReaderBuilder::new().from_reader(text);
        let header = reader.byte_headers().map_err(|error| from_csv(path, error))?.clone();
        let names: Vec<&[u8]> = header.iter().map(<[u8]>::trim_ascii).collect();
        let all = columns;
        let is_there = |&(place, name): &(usize, &&str)| place < optional || names.contains(&name.as_bytes());
        let columns: Vec<&'static str> = all.iter().enumerate().filter(is_there).map(|(_, &name)| name).collect();
        let places = columns.iter().map(|name| names.iter().position(|found| *found == name.as_bytes()));
        let places: Option<Vec<usize>> = places.collect();
        let wrong =
            |found: String, expected: String| TraceError::Line { path: path.to_owned(), line: 1, found, expected };
        let is_twice = |name: &&&str| names.iter().filter(|found| **found == name.as_bytes()).count() > 1;
        if let Some(twice) = columns.iter().find(is_twice) {
            return Err(wrong(format!("column `{twice}` twice"), "it once".to_owned()));
        }
        let exact = header.iter().eq(columns.iter().map(|name| name.as_bytes()));
        match places {
            Some(places) if exact || owner == Owner::Others => {
                let others = names.iter().enumerate().filter(|(place, _)| !places.contains(place));
                let unused = others.map(|(_, name)| String::from_utf8_lossy(name).into_owned()).collect();
                Ok(Self { path: path.to_owned(), columns, places, unused, reader, record: ByteRecord::new() })
            }
            _ => Err(wrong(
                format!("columns {}", quote(&header.iter().collect::<Vec<_>>().join(&b','))),
                format!("columns `{}`", all.join(",")),
            )),
        }
    }

    /// The index of a column that a file of others may have; `None` if it has none of that name.
    ///
    /// # Errors
    /// If the header has the column twice.
    pub fn find(&mut self, name: &'static str) -> Result<Option<usize>> {
        let header = self.reader.byte_headers().map_err(|error| from_csv(&self.path, error))?;
        let mut places = (0..header.len()).filter(|&place| header[place].trim_ascii() == name.as_bytes());
        let Some(place) = places.next() else { return Ok(None) };
        if places.next().is_some() {
            let (path, found) = (self.path.clone(), format!("column `{name}` twice"));
            return Err(TraceError::Line { path, line: 1, found, expected: "it once".to_owned() });
        }
        self.unused.retain(|unused| unused != name);
        self.columns.push(name);
        self.places.push(place);
        Ok(Some(self.columns.len() - 1))
    }

    /// Whether the file has a column of a name, read or not.
    pub fn has_column(&self, name: &str) -> bool {
        self.columns.contains(&name) || self.unused.iter().any(|unused| unused == name)
    }

    /// Names of the file's columns that nothing is read from.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The next row; `None` after the last.
    ///
    /// # Errors
    /// If the line is not a row of the table.
    pub fn next_row(&mut self) -> Result<Option<Row<'_>>> {
        match self.reader.read_byte_record(&mut self.record) {
            Ok(true) => Ok(Some(Row { table: self })),
            Ok(false) => Ok(None),
            Err(error) => Err(from_csv(&self.path, error)),
        }
    }
}

/// The names of the columns of a CSV file.
///
/// # Errors
/// If it cannot be read.
pub fn read_header(path: &Path) -> Result<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().from_reader(open_text(path)?);
    let header = reader.byte_headers().map_err(|error| from_csv(path, error))?;
    Ok(header.iter().map(|name| String::from_utf8_lossy(name.trim_ascii()).into_owned()).collect())
}

/// A row of a [`Table`].
pub struct Row<'a> {
    table: &'a Table,
}

impl Row<'_> {
    /// The value of a column, parsed by `parse`. `column` is an index into the `columns` of [`Table::open`].
    ///
    /// # Errors
    /// If `parse` rejects the value.
    pub fn get<T>(&self, column: usize, expected: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
        let text = std::str::from_utf8(self.bytes(column)).ok();
        text.and_then(|text| parse(text.trim_ascii())).ok_or_else(|| self.error(column, expected))
    }

    /// The text of a column, without blanks around it.
    ///
    /// # Errors
    /// If it is not UTF-8.
    pub fn text(&self, column: usize) -> Result<&str> {
        let text = std::str::from_utf8(self.bytes(column)).map(str::trim_ascii);
        text.map_err(|_| self.error(column, "UTF-8"))
    }

    /// The value of a column, parsed as a number and checked by `valid`.
    ///
    /// # Errors
    /// If the value does not parse or is not valid.
    pub fn number<T: FromStr>(&self, column: usize, expected: &str, valid: impl Fn(&T) -> bool) -> Result<T> {
        self.get(column, expected, |text| text.parse().ok().filter(valid))
    }

    /// The error for an invalid value.
    pub fn error(&self, column: usize, expected: impl Into<String>) -> TraceError {
        let byte = self.table.record.position().map_or(0, csv::Position::byte);
        TraceError::Value {
            path: self.table.path.clone(),
            line: line_of_record(&self.table.path, byte),
            column: self.table.columns[column].into(),
            found: quote(self.bytes(column)),
            expected: expected.into(),
        }
    }

    fn bytes(&self, column: usize) -> &[u8] {
        &self.table.record[self.table.places[column]]
    }
}

/// A file of this crate that was cut off inside its last number would read as another number.
fn check_ends_with_newline(path: &Path, columns: &[&str]) -> Result<()> {
    match ends_with_newline(path)? {
        Some(true) => Ok(()),
        Some(false) => Err(TraceError::file(path, "a last line that is cut off", "a line end after it")),
        None => Err(TraceError::file(path, "an empty file", format!("columns `{}`", columns.join(",")))),
    }
}

fn from_csv(path: &Path, error: csv::Error) -> TraceError {
    let byte = error.position().map_or(0, csv::Position::byte);
    let message = error.to_string();
    let (found, expected) = match error.into_kind() {
        csv::ErrorKind::Io(source) => return TraceError::Io { action: "read", path: path.to_owned(), source },
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            (format!("{len} columns"), format!("{expected_len}, as in the header"))
        }
        _ => (message, "comma-separated values".to_owned()),
    };
    TraceError::Line { path: path.to_owned(), line: line_of_record(path, byte), found, expected }
}

/// Line number, from 1, of the record that starts at `byte`.
///
/// The reader's own count is wrong after CRLF and blank lines. Errors are rare enough to count again.
fn line_of_record(path: &Path, byte: u64) -> u64 {
    let Ok(text) = open_text(path) else { return 0 };
    let mut reader = BufReader::new(text);
    let newlines = |part: &[u8]| part.iter().filter(|&&byte| byte == b'\n').count() as u64;
    let (mut line, mut passed) = (1, 0);
    while let Ok(buffer) = reader.fill_buf() {
        if buffer.is_empty() {
            break;
        }
        let before = (byte.saturating_sub(passed)).min(buffer.len() as u64) as usize;
        line += newlines(&buffer[..before]);
        let blank = buffer[before..].iter().take_while(|byte| matches!(byte, b'\n' | b'\r')).count();
        line += newlines(&buffer[before..before + blank]);
        if before + blank < buffer.len() {
            break;
        }
        let length = buffer.len();
        passed += length as u64;
        reader.consume(length);
    }
    line
}

/// A file under a temporary name next to its final path, to which it is renamed when it is complete. Other processes
/// never see a partial file, and a file that is dropped earlier is removed.
#[derive(Debug)]
pub struct PartialFile {
    out: BufWriter<File>,
    path: PathBuf,
    partial: PathBuf,
    _registered: Registered,
}

impl PartialFile {
    /// Starts a file that will replace `path`.
    ///
    /// # Errors
    /// If the temporary file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let partial = partial_name(path);
        let registered = Registered::file(&partial);
        let out = BufWriter::new(File::create(&partial).map_err(TraceError::io("write", path))?);
        Ok(Self { out, path: path.to_owned(), partial, _registered: registered })
    }

    /// Renames the file to its final path.
    ///
    /// # Errors
    /// If writing the remaining bytes or renaming fails.
    pub fn finish(mut self) -> Result<()> {
        let placed = self.out.flush().and_then(|()| std::fs::rename(&self.partial, &self.path));
        placed.map_err(TraceError::io("write", &self.path))
    }
}

/// The temporary name of a file that is not complete.
pub fn partial_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".partial");
    PathBuf::from(name)
}

impl Write for PartialFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        // After `finish` there is no file; otherwise an earlier error is the one to report.
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// Writes a file, completely or not at all.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut PartialFile) -> io::Result<()>) -> Result<()> {
    let mut file = PartialFile::create(path)?;
    write(&mut file).map_err(TraceError::io("write", path))?;
    file.finish()
}

/// Writes a CSV file, completely or not at all.
pub fn write_rows<R: serde::Serialize>(path: &Path, columns: &[&str], rows: impl IntoIterator<Item = R>) -> Result<()> {
    write_whole(path, |out| {
        let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(out);
        writer.write_record(columns)?;
        for row in rows {
            writer.serialize(row)?;
        }
        writer.flush()
    })
}

/// Reads a YAML file, which may begin with a byte order mark.
pub fn read_yaml<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_yaml::from_str(&read_text(path)?).map_err(|source| TraceError::Yaml { path: path.to_owned(), source })
}

/// Checks that a file has the version that this program reads.
pub(crate) fn check_version(path: &Path, found: u32, expected: u32) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(TraceError::Key {
            path: path.to_owned(),
            key: "schema_version",
            found: found.to_string(),
            expected: format!("{expected}, the version of this program"),
        }),
    }
}

/// Writes a YAML file, completely or not at all.
pub fn write_yaml<T: serde::Serialize>(path: &Path, value: &T) -> Result<()> {
    write_whole(path, |out| serde_yaml::to_writer(out, value).map_err(io::Error::other))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Line named by the error about the row whose number does not parse.
    fn line_of_bad_row(contents: &str) -> u64 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.csv");
        std::fs::write(&path, contents).unwrap();
        let mut table = Table::open(&path, &["a", "b"], Owner::Others).unwrap();
        loop {
            let row = table.next_row().unwrap().expect("a bad row");
            match row.number::<u32>(1, "a number", |_| true) {
                Ok(_) => continue,
                Err(TraceError::Value { line, .. }) => return line,
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn errors_name_the_line_whatever_ends_lines() {
        assert_eq!(line_of_bad_row("a,b\n1,2\n3,x\n5,6\n"), 3);
        assert_eq!(line_of_bad_row("a,b\r\n1,2\r\n3,x\r\n"), 3);
        assert_eq!(line_of_bad_row("\u{feff}a,b\n1,2\n3,x"), 3);
        assert_eq!(line_of_bad_row("\u{feff}a,b\r\n\r\n1,2\r\n\r\n\r\n3,x"), 6);
        let many = 20_000;
        assert_eq!(line_of_bad_row(&format!("a,b\n{}1,x\n", "1,2\n".repeat(many))), many as u64 + 2);
    }

    #[test]
    fn columns_of_others_are_found_by_name_and_ours_must_match() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.csv");
        std::fs::write(&path, "extra,\"b\",a\n0,1,2\n").unwrap();
        let mut table = Table::open(&path, &["a", "b"], Owner::Others).unwrap();
        let row = table.next_row().unwrap().unwrap();
        assert_eq!(row.number::<u32>(0, "", |_| true).unwrap(), 2);
        assert_eq!(row.number::<u32>(1, "", |_| true).unwrap(), 1);
        let message = Table::open(&path, &["a", "b"], Owner::Us).err().unwrap().to_string();
        assert!(message.ends_with("table.csv:1: found columns `extra,b,a`, expected columns `a,b`"), "{message}");
    }

    #[test]
    fn a_column_that_is_read_stands_in_the_header_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.csv");
        std::fs::write(&path, "a,x,b,x,a\n1,2,3,4,5\n").unwrap();
        let message = Table::open(&path, &["a", "b"], Owner::Others).err().unwrap().to_string();
        assert!(message.ends_with("table.csv:1: found column `a` twice, expected it once"), "{message}");
        assert_eq!(Table::open(&path, &["b"], Owner::Others).unwrap().unused(), ["a", "x", "x", "a"]);
    }

    #[test]
    fn yaml_may_begin_with_a_byte_order_mark() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        std::fs::write(&path, "\u{feff}count: 4\n").unwrap();
        let read: std::collections::BTreeMap<String, u32> = read_yaml(&path).unwrap();
        assert_eq!(read["count"], 4);
    }

    #[test]
    fn a_file_is_written_whole_or_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.csv");
        std::fs::write(&path, "old").unwrap();
        let failed = write_whole(&path, |out| {
            out.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        write_whole(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    }
}

//! Files of other programs as streams of text: compressed files are unpacked on the way, and other binary files are
//! rejected.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::Path;

use crate::error::{Result, TraceError};

/// A stream of the bytes of a text.
pub type Text = Box<dyn Read + Send>;

/// Maximum number of bytes in a line of a trace, so that an endless line of an unpacked file cannot exhaust memory.
const LONGEST_LINE: usize = 64 << 20;
/// Maximum number of bytes of a text that is read as a whole.
const LONGEST_TEXT: u64 = 256 << 20;

/// Compression of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    None,
    Gzip,
    Zstd,
}

/// Opens a text file. Files compressed with gzip or Zstandard are unpacked while they are read.
///
/// # Errors
/// If the file cannot be read or is not text: another archive, a Git LFS pointer, or a binary table. The error then
/// names the remedy.
pub fn open_text(path: &Path) -> Result<Text> {
    let failed = |error| TraceError::io("read", path)(error);
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let unpacked: Text = match recognize(path, file.fill_buf().map_err(failed)?)? {
        Packing::None => return Ok(Box::new(Lines::new(file))),
        Packing::Gzip => Box::new(Unpacked { kind: "gzip", inner: flate2::bufread::MultiGzDecoder::new(file) }),
        Packing::Zstd => {
            let inner = zstd::stream::read::Decoder::with_buffer(file).map_err(failed)?;
            Box::new(Unpacked { kind: "Zstandard", inner })
        }
    };
    let mut unpacked = BufReader::new(unpacked);
    match recognize(path, unpacked.fill_buf().map_err(failed)?)? {
        Packing::None => Ok(Box::new(Lines::new(unpacked))),
        _ => Err(TraceError::file(path, "a file that was compressed twice", "one that was compressed once")),
    }
}

/// Opens a text file that is read more than once, such as a table, to find the line of an error.
///
/// # Errors
/// As [`open_text`], and if the file is a pipe or a device.
pub(crate) fn open_file(path: &Path) -> Result<Text> {
    let kind = std::fs::metadata(path).map_err(TraceError::io("read", path))?;
    match kind.is_file() {
        true => open_text(path),
        false if kind.is_dir() => Err(TraceError::file(path, "a folder", "a file")),
        false => Err(TraceError::file(path, "a pipe or a device", "a file, which is read more than once")),
    }
}

/// A whole text, without its byte order mark.
///
/// # Errors
/// As [`open_text`], and if the text is not UTF-8 or has more than 256 MiB.
pub fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    open_text(path)?.take(LONGEST_TEXT + 1).read_to_string(&mut text).map_err(TraceError::io("read", path))?;
    if text.len() as u64 > LONGEST_TEXT {
        return Err(TraceError::file(path, "more than 256 MiB of text", "less"));
    }
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// Rejects files that are known not to be text, for which other readers have unclear errors.
///
/// # Errors
/// If the file cannot be read, or is a Git LFS pointer or another archive; the error names the remedy.
pub fn check_no_pointer(path: &Path) -> Result<()> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(TraceError::io("read", path))?;
    file.take(64).read_to_end(&mut head).map_err(TraceError::io("read", path))?;
    match POINTERS.iter().find(|(magic, ..)| head.starts_with(magic)) {
        Some((_, found, expected)) => Err(TraceError::file(path, *found, *expected)),
        None => Ok(()),
    }
}

/// The message of an error in a line of JSON for people: without its place, which is named otherwise, and without names
/// of Rust's types.
pub fn json_message(error: &serde_json::Error) -> String {
    const TYPES: [(&str, &str); 8] = [
        ("u64", "a whole number"),
        ("u32", "a whole number"),
        ("usize", "a whole number"),
        ("f64", "a number"),
        ("a sequence", "a list"),
        ("a map", "an object"),
        ("a JSON number", "a number"),
        ("ident", "null, true or false"),
    ];
    let message = error.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    if error.is_eof() {
        return format!("{message}, expected a whole object in each line: `jq -c .` writes it so");
    }
    match message.rsplit_once("expected ") {
        Some((before, found)) => {
            let known = TYPES.iter().find(|(name, _)| *name == found);
            let words = known.map_or(found, |(_, words)| words);
            format!("{before}expected {}", if found.starts_with("struct ") { "an object" } else { words })
        }
        None => message.to_owned(),
    }
}

/// Whether a file ends with a line end; `None` if it is empty.
pub(crate) fn ends_with_newline(path: &Path) -> Result<Option<bool>> {
    let failed = |error| TraceError::io("read", path)(error);
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let mut last = [0];
    if recognize(path, file.fill_buf().map_err(failed)?)? == Packing::None {
        let read = file.seek(io::SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last));
        // An empty file has no position before its first byte.
        return Ok(read.ok().map(|()| last == *b"\n"));
    }
    let (mut text, mut buffer, mut found) = (open_text(path)?, [0; 1 << 16], None);
    loop {
        match text.read(&mut buffer).map_err(failed)? {
            0 => return Ok(found),
            read => found = Some(buffer[read - 1] == b'\n'),
        }
    }
}

/// Files that point to another one, by their first bytes.
const POINTERS: [(&[u8], &str, &str); 2] = [
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer",
        "the file that it stands for: run `git lfs pull`",
    ),
    (b"/annex/objects/", "a git-annex pointer", "the file that it stands for: run `git annex get`"),
];

/// Binary files, by their first bytes.
const BINARIES: [(&[u8], &str, &str); 8] = [
    (b"\xfd7zXZ\0", "an xz file", "text, or gzip or Zstandard: run `xz -d`"),
    (b"PK\x03\x04", "a ZIP archive", "text, or gzip or Zstandard: run `unzip`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "text, or gzip or Zstandard: unpack it first"),
    (b"\x04\x22\x4d\x18", "an LZ4 file", "text, or gzip or Zstandard: run `lz4 -d`"),
    (b"PAR1", "a Parquet file", "text: write the table as CSV or JSON lines"),
    (b"SQLite format 3\0", "an SQLite database", "text: write the table as CSV or JSON lines"),
    (b"\xff\xfe", "UTF-16 text", "UTF-8: run `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "UTF-16 text", "UTF-8: run `iconv -f UTF-16 -t UTF-8`"),
];

/// Compression of a file, by its first bytes.
fn recognize(path: &Path, head: &[u8]) -> Result<Packing> {
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Packing::Gzip);
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Ok(Packing::Zstd);
    }
    let refuse = |found: &str, expected: &str| Err(TraceError::file(path, found, expected));
    if let Some((_, found, expected)) = POINTERS.iter().chain(&BINARIES).find(|(magic, ..)| head.starts_with(magic)) {
        return refuse(found, expected);
    }
    if head.starts_with(b"BZh") && head.get(4..10) == Some(b"1AY&SY") {
        return refuse("a bzip2 file", "text, or gzip or Zstandard: run `bzip2 -d`");
    }
    if head.get(257..262) == Some(b"ustar") {
        return refuse("a tar archive", "one file: unpack it first");
    }
    let start = head.trim_ascii_start();
    if ["<!doctype html", "<html"]
        .iter()
        .any(|tag| start.len() > tag.len() && start[..tag.len()].eq_ignore_ascii_case(tag.as_bytes()))
    {
        return refuse("a web page", "the file itself: download it from its raw address");
    }
    match head.contains(&0) {
        true => refuse("binary data", "text"),
        false => Ok(Packing::None),
    }
}

/// Marks errors as errors of the compressed data.
struct Unpacked<R> {
    kind: &'static str,
    inner: R,
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            let message = match error.kind() {
                io::ErrorKind::UnexpectedEof => format!("its {} data is cut off", self.kind),
                _ => format!("its {} data is damaged: {error}", self.kind),
            };
            io::Error::new(io::ErrorKind::InvalidData, message)
        })
    }
}

/// A text with a limited length of lines.
struct Lines<R> {
    inner: R,
    /// Bytes since the last line end.
    since: usize,
}

impl<R> Lines<R> {
    fn new(inner: R) -> Self {
        Self { inner, since: 0 }
    }
}

impl<R: Read> Read for Lines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.since = match buffer[..read].iter().rposition(|&byte| byte == b'\n') {
            Some(place) => read - place - 1,
            None => self.since + read,
        };
        match self.since > LONGEST_LINE {
            true => Err(io::Error::new(io::ErrorKind::InvalidData, "a line has more than 64 MiB")),
            false => Ok(read),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const TEXT: &str = "a,b\n1,2\n";

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        read_text(&path)
    }

    #[test]
    fn compressed_texts_read_as_plain_ones() {
        let zstd = zstd::encode_all(TEXT.as_bytes(), 3).unwrap();
        let twice = [gzip(TEXT.as_bytes()), gzip(TEXT.as_bytes())].concat();
        assert_eq!(read(TEXT.as_bytes()).unwrap(), TEXT);
        assert_eq!(read(&gzip(TEXT.as_bytes())).unwrap(), TEXT);
        assert_eq!(read(&zstd).unwrap(), TEXT);
        assert_eq!(read(&twice).unwrap(), TEXT.repeat(2), "members of a gzip file follow each other");
        assert_eq!(read(&gzip(format!("\u{feff}{TEXT}").as_bytes())).unwrap(), TEXT);
        assert_eq!(read(b"").unwrap(), "");
    }

    #[test]
    fn a_compressed_text_that_is_cut_off_or_damaged_says_so() {
        let long: String = (0..2000).map(|row| format!("{row},{}\n", row * row % 977)).collect();
        let gzip = gzip(long.as_bytes());
        // The checksum of a gzip file is at its end; the type of Zstandard's first block follows its header.
        let (sum, block) = (gzip.len() - 6, 7);
        for (kind, packed, place) in
            [("gzip", gzip, sum), ("Zstandard", zstd::encode_all(long.as_bytes(), 3).unwrap(), block)]
        {
            for length in [20, packed.len() / 2, packed.len() - 1] {
                let error = read(&packed[..length]).unwrap_err().to_string();
                assert!(error.contains(&format!("its {kind} data is cut off")), "{length} bytes: {error}");
            }
            let mut damaged = packed.clone();
            damaged[place] ^= 0xff;
            let error = read(&damaged).unwrap_err().to_string();
            assert!(error.contains(&format!("its {kind} data is ")), "{error}");
        }
    }

    #[test]
    fn what_is_no_text_is_named_with_its_remedy_and_never_printed() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";
        for (bytes, message) in [
            (&pointer[..], "found a Git LFS pointer, expected the file that it stands for: run `git lfs pull`"),
            (b"/annex/objects/SHA256E-s1--0a.csv\n", "run `git annex get`"),
            (b"BZh91AY&SY\x01\x02", "run `bzip2 -d`"),
            (b"\xfd7zXZ\0\0\x04", "run `xz -d`"),
            (b"PK\x03\x04\x14\0", "run `unzip`"),
            (b"PAR1\x15\x04", "found a Parquet file"),
            (b"\xff\xfea\0", "run `iconv -f UTF-16 -t UTF-8`"),
            (b"\n<!DOCTYPE html><html>", "found a web page"),
            (b"a,b\n\x00\x01", "found binary data, expected text"),
            (&gzip(&gzip(TEXT.as_bytes())), "compressed twice"),
            (&gzip(&[&[b'x'; 257][..], b"ustar\0"].concat()), "found a tar archive"),
        ] {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert!(error.chars().all(|letter| letter.is_ascii_graphic() || letter == ' '), "{error:?}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused_before_it_fills_the_memory() {
        let bomb = gzip(&vec![b'1'; LONGEST_LINE + (1 << 20)]);
        assert!(bomb.len() < 1 << 20);
        let error = read(&bomb).unwrap_err().to_string();
        assert!(error.contains("a line has more than 64 MiB"), "{error}");
    }

    #[test]
    fn messages_about_json_have_no_words_of_rust() {
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "only errors are looked at")]
        struct Line {
            count: u64,
            list: Vec<f64>,
        }
        for (text, expected) in [
            ("{\"count\": 1.5}", "invalid type: floating point `1.5`, expected a whole number"),
            ("{\"count\": 1, \"list\": {}}", "invalid type: map, expected a list"),
            ("{\"count\": 1, \"list\": [\"a\"]}", "invalid type: string \"a\", expected a number"),
            ("3", "invalid type: integer `3`, expected an object"),
            ("{\"count\"", "EOF while parsing an object, expected a whole object in each line: `jq -c .` writes it so"),
            ("{}", "missing field `count`"),
            ("{,}", "key must be a string"),
        ] {
            let error = serde_json::from_str::<Line>(text).unwrap_err();
            assert_eq!(json_message(&error), expected);
        }
    }

    #[test]
    fn folders_and_pipes_are_refused_where_a_file_is_read_more_than_once() {
        let folder = tempfile::tempdir().unwrap();
        let error = open_file(folder.path()).err().unwrap().to_string();
        assert!(error.contains("found a folder, expected a file"), "{error}");
        if cfg!(unix) {
            let error = open_file(Path::new("/dev/null")).err().unwrap().to_string();
            assert!(error.contains("found a pipe or a device"), "{error}");
        }
    }
}

//! Token cache: texts are tokenized once, and their tokens are stored under a name derived from all they depend on.
//!
//! A cached file is in the safetensors format with one tensor, `tokens` (`U32`, one dimension), and the number of
//! tokenized bytes as metadata `bytes`. The file is written under a temporary name, renamed, and read through a memory
//! map.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use engine::Tokenizer;
use engine::weights::write_safetensors;
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use traces::SharedFile;

use super::documents;
use crate::error::TrainingError;

/// Part of every name. It changes when texts are tokenized differently, so that older files are not found.
const FORMAT: &str = "depthwise tokens 1";
const TENSOR: &str = "tokens";
const BYTES: &str = "bytes";
/// A longer document is tokenized in pieces of about this many bytes.
const PIECE_BYTES: usize = 1 << 20;

/// What the tokens of a text depend on, apart from the text.
pub struct Encoding<'a> {
    /// JSON key of a document's text.
    pub field: &'a str,
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Token put after each document, if any.
    pub end_of_document: Option<u32>,
}

/// Tokens in a memory map.
#[derive(Debug)]
pub struct CachedTokens {
    map: Mmap,
    tokens: Range<usize>,
    bytes: usize,
}

impl CachedTokens {
    /// The tokens of `files`, from the cache in `folder`, to which missing ones are added. Calls `report` with every
    /// file before it is tokenized.
    ///
    /// # Errors
    /// If a file cannot be read or is not text, or the cache cannot be written or is damaged.
    pub fn open(
        folder: &Path,
        files: &[PathBuf],
        encoding: &Encoding,
        report: &mut dyn FnMut(&Path),
    ) -> Result<Self, TrainingError> {
        let path = folder.join(format!("{}.safetensors", key(files, encoding)?));
        if !path.exists() {
            let (tokens, bytes) = tokenize(files, encoding, report)?;
            write(folder, &path, &tokens, bytes)?;
        }
        Self::map(&path)
    }

    /// The token ids.
    pub fn tokens(&self) -> &[u32] {
        bytemuck::cast_slice(&self.map[self.tokens.clone()])
    }

    /// Number of bytes that were tokenized.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn map(path: &Path) -> Result<Self, TrainingError> {
        let file = File::open(path).map_err(|e| TrainingError::in_file(path, e))?;
        // SAFETY: files of the cache are renamed into place complete and never written again.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| TrainingError::in_file(path, e))?;
        match locate(&map) {
            Some((tokens, bytes)) => Ok(Self { map, tokens, bytes }),
            None => {
                let damaged = std::io::Error::other("no cached tokens; remove it");
                Err(TrainingError::in_file(path, damaged))
            }
        }
    }
}

/// Range of the tokens in a cached file, and the number of bytes they came from.
fn locate(map: &[u8]) -> Option<(Range<usize>, usize)> {
    let (_, metadata) = SafeTensors::read_metadata(map).ok()?;
    let bytes = metadata.metadata().as_ref()?.get(BYTES)?.parse().ok()?;
    let file = SafeTensors::deserialize(map).ok()?;
    let tokens = file.tensor(TENSOR).ok().filter(|tensor| tensor.dtype() == Dtype::U32)?.data();
    let start = tokens.as_ptr() as usize - map.as_ptr() as usize;
    bytemuck::try_cast_slice::<u8, u32>(tokens).ok()?;
    Some((start..start + tokens.len(), bytes))
}

/// A hash of the files' bytes, their order and the encoding.
fn key(files: &[PathBuf], encoding: &Encoding) -> Result<String, TrainingError> {
    let mut hash = Sha256::new();
    for part in [FORMAT, encoding.field, &encoding.tokenizer.to_json()?, &format!("{:?}", encoding.end_of_document)] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    for path in files {
        // The extension decides whether a file contains JSON lines or one document.
        hash.update(path.extension().unwrap_or_default().as_encoded_bytes());
        hash.update(file_hash(path).map_err(|e| TrainingError::in_file(path, e))?);
    }
    Ok(hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

fn file_hash(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
    }
}

fn tokenize(
    files: &[PathBuf],
    encoding: &Encoding,
    report: &mut dyn FnMut(&Path),
) -> Result<(Vec<u32>, usize), TrainingError> {
    let (mut tokens, mut bytes) = (Vec::new(), 0);
    for path in files {
        report(path);
        documents::read(path, encoding.field, |document| {
            bytes += document.len();
            tokens.extend(encode(document, encoding.tokenizer)?);
            tokens.extend(encoding.end_of_document);
            Ok(())
        })?;
    }
    Ok((tokens, bytes))
}

/// Token ids of a document. The tokenizer's memory is many times the size of its text, so a long document is cut into
/// pieces.
pub fn encode(document: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, TrainingError> {
    let (mut tokens, mut rest) = (Vec::new(), document);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(piece_end(rest, PIECE_BYTES));
        tokens.extend(tokenizer.encode(piece)?);
        rest = after;
    }
    Ok(tokens)
}

/// End of a piece of at least `at_least` bytes: the start of a line that does not begin with white space. Tokenizers
/// join neither words nor white space across such a position.
fn piece_end(text: &str, at_least: usize) -> usize {
    let line_starts = text.bytes().enumerate().skip(at_least).filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
    let is_end = |at: &usize| text[*at..].chars().next().is_some_and(|first| !first.is_whitespace());
    line_starts.into_iter().find(is_end).unwrap_or(text.len())
}

fn write(folder: &Path, path: &Path, tokens: &[u32], bytes: usize) -> Result<(), TrainingError> {
    let failed = |error: std::io::Error| TrainingError::in_file(path, error);
    std::fs::create_dir_all(folder).map_err(failed)?;
    let tensor = TensorView::new(Dtype::U32, vec![tokens.len()], bytemuck::cast_slice(tokens));
    let tensor = tensor.map_err(|error| failed(std::io::Error::other(error)))?;
    let metadata = [(BYTES.to_owned(), bytes.to_string())].into();
    // Several runs may tokenize a text at once.
    let part = SharedFile::create(path)?;
    write_safetensors(part.part(), [(TENSOR, tensor)], Some(metadata)).map_err(failed)?;
    Ok(part.place()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "And the evening and the morning were the first day.\n";

    fn tokenizer(text: &str) -> Tokenizer {
        Tokenizer::train(text, 260).unwrap()
    }

    fn open(folder: &Path, files: &[PathBuf], encoding: &Encoding) -> (Result<CachedTokens, TrainingError>, usize) {
        let mut tokenized = 0;
        let tokens = CachedTokens::open(&folder.join("cache"), files, encoding, &mut |_| tokenized += 1);
        (tokens, tokenized)
    }

    #[test]
    fn a_text_is_tokenized_once_and_again_when_anything_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a.txt"), folder.path().join("b.txt"));
        std::fs::write(&a, TEXT).unwrap();
        std::fs::write(&b, "day\n").unwrap();
        let (first, other) = (tokenizer(TEXT), tokenizer("the end of the end"));
        let encoding = Encoding { field: "text", tokenizer: &first, end_of_document: None };
        let tokenized = |files: &[&PathBuf], encoding: &Encoding| {
            let files: Vec<PathBuf> = files.iter().copied().cloned().collect();
            open(folder.path(), &files, encoding).1
        };
        assert_eq!(tokenized(&[&a, &b], &encoding), 2);
        assert_eq!(tokenized(&[&a, &b], &encoding), 0);
        assert_eq!(tokenized(&[&b, &a], &encoding), 2);
        assert_eq!(tokenized(&[&a, &b], &Encoding { tokenizer: &other, ..encoding }), 2);
        assert_eq!(tokenized(&[&a, &b], &Encoding { end_of_document: Some(1), ..encoding }), 2);
        std::fs::write(&b, "dad\n").unwrap();
        assert_eq!(tokenized(&[&a, &b], &encoding), 2);
    }

    #[test]
    fn cached_tokens_are_those_of_the_documents_with_their_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "{\"t\": \"the day\"}\n{\"t\": \"evening\"}\n").unwrap();
        let tokenizer = tokenizer(TEXT);
        let encoding = Encoding { field: "t", tokenizer: &tokenizer, end_of_document: Some(5) };
        let mut expected = tokenizer.encode("the day").unwrap();
        expected.push(5);
        expected.extend(tokenizer.encode("evening").unwrap());
        expected.push(5);
        for _ in 0..2 {
            let cached = open(folder.path(), std::slice::from_ref(&path), &encoding).0.unwrap();
            assert_eq!((cached.tokens(), cached.bytes()), (&expected[..], "the dayevening".len()));
        }
    }

    #[test]
    fn a_damaged_cache_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, TEXT).unwrap();
        let tokenizer = tokenizer(TEXT);
        let encoding = Encoding { field: "text", tokenizer: &tokenizer, end_of_document: None };
        let files = [path];
        open(folder.path(), &files, &encoding).0.unwrap();
        let cached = folder.path().join("cache").join(format!("{}.safetensors", key(&files, &encoding).unwrap()));
        let whole = std::fs::read(&cached).unwrap();
        std::fs::write(&cached, &whole[..whole.len() - 4]).unwrap();
        let message = open(folder.path(), &files, &encoding).0.unwrap_err().to_string();
        assert!(message.contains(cached.file_name().unwrap().to_str().unwrap()), "{message}");
        assert!(message.ends_with("no cached tokens; remove it"), "{message}");
    }

    #[test]
    fn long_documents_are_cut_before_lines_and_never_within_white_space() {
        let text = "one\n\n  two\nthree ☃\nfour";
        assert_eq!(piece_end(text, 2), "one\n\n  two\n".len());
        assert_eq!(piece_end(text, 0), "one\n\n  two\n".len());
        assert_eq!(piece_end(text, 12), "one\n\n  two\nthree ☃\n".len());
        assert_eq!(piece_end(text, 22), text.len());
        assert_eq!(piece_end(text, 100), text.len());
    }
}

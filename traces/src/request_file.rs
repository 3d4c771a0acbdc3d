//! Files of request traces: four formats published by others, and our own.

use std::fmt;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::str::FromStr;

use jiff::{Timestamp, civil, tz::TimeZone};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError, quote};
use crate::request::{PrefixHashes, Request, RequestTrace};
use crate::table::{Owner, Row, Table, write_rows};
use crate::units::Nanos;

/// How a file holds requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestFormat {
    /// Our own CSV: `request,arrival_us,prompt_tokens,output_tokens`.
    Depthwise,
    /// Azure LLM inference traces, CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`. The first arrival becomes 0.
    Azure,
    /// BurstGPT, CSV: `Timestamp` (seconds), `Request tokens`, `Response tokens`. Requests that failed are left out.
    BurstGpt,
    /// Mooncake, JSON lines: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens.
    Mooncake,
    /// Workloads of LLMServingSim, JSON lines: `arrival_time_ns`, `input_toks`, `output_toks`, `input_tok_ids`.
    LlmServingSim,
}

impl RequestFormat {
    /// Every format.
    pub const ALL: [Self; 5] = [Self::Depthwise, Self::Azure, Self::BurstGpt, Self::Mooncake, Self::LlmServingSim];

    /// The name in configurations and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Depthwise => "depthwise",
            Self::Azure => "azure",
            Self::BurstGpt => "burst_gpt",
            Self::Mooncake => "mooncake",
            Self::LlmServingSim => "llm_serving_sim",
        }
    }

    /// Columns or keys without which a file is not of this format.
    fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Depthwise => &["request", "arrival_us", "prompt_tokens", "output_tokens"],
            Self::Azure => &["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
            Self::BurstGpt => &["Timestamp", "Request tokens", "Response tokens"],
            Self::Mooncake => &["timestamp", "input_length", "output_length"],
            Self::LlmServingSim => &["arrival_time_ns", "input_toks", "output_toks"],
        }
    }

    /// Recognizes a format by the first line of a file: a header, or an object.
    fn of_first_line(line: &str) -> Option<Self> {
        let has = |field: &str| match line.starts_with('{') {
            true => line.contains(&format!("\"{field}\"")),
            false => line.split(',').any(|column| column.trim().trim_matches('"') == field),
        };
        Self::ALL.into_iter().find(|format| format.fields().iter().all(|field| has(field)))
    }
}

impl fmt::Display for RequestFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RequestFormat {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("unknown request format `{name}`: expected one of {names}")
        })
    }
}

/// How to read a file of requests.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// The format; none to recognize it by the first line.
    pub format: Option<RequestFormat>,
    /// Block size in tokens for the prefix hashes of files that hold token ids; at least 1.
    pub prefix_block_tokens: u32,
}

impl ReadOptions {
    /// Block size of prefix hashes that nobody chose: that of vLLM's cache.
    pub const DEFAULT_PREFIX_BLOCK_TOKENS: u32 = 16;
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { format: None, prefix_block_tokens: Self::DEFAULT_PREFIX_BLOCK_TOKENS }
    }
}

impl RequestTrace {
    /// Reads a file of any known format.
    ///
    /// Files of others may list requests in any order: they are sorted by arrival, and those that
    /// arrive together stay in the order of the file. In our own files the column `request` counts
    /// from 0 in order of arrival.
    ///
    /// # Errors
    /// If the file cannot be read, is of no known format, has no request, or a value is missing,
    /// of another type or out of range (no token, more than [`Request::MAX_TOKENS`], a time that is
    /// negative or beyond [`Request::MAX_ARRIVAL`]).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::read_with(path, &ReadOptions::default())
    }

    /// Reads a file with a forced format or another block size of prefix hashes; see [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_with(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self> {
        let path = path.as_ref();
        let format = match options.format {
            Some(format) => format,
            None => detect(path)?,
        };
        let trace = match format {
            RequestFormat::Depthwise => read_depthwise(path),
            RequestFormat::Azure => read_azure(path),
            RequestFormat::BurstGpt => read_burst_gpt(path),
            RequestFormat::Mooncake => read_json_lines(path, MOONCAKE_BLOCK_TOKENS, MooncakeLine::into_request),
            RequestFormat::LlmServingSim => {
                let block_tokens = options.prefix_block_tokens.max(1);
                read_json_lines(path, block_tokens, |line, row| ServingSimLine::into_request(line, row, block_tokens))
            }
        }?;
        if trace.requests.is_empty() {
            let found = format!("no request that did not fail ({} dropped)", trace.dropped);
            return Err(TraceError::file(path, found, "at least one request"));
        }
        Ok(trace)
    }

    /// Writes our own CSV, whole or not at all; prefix hashes are not part of it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let rows = self.requests.iter().map(|request| {
            let Nanos(nanos) = request.arrival;
            let arrival_us = format!("{}.{:03}", nanos / 1000, nanos % 1000);
            (request.id, arrival_us, request.prompt_tokens, request.output_tokens)
        });
        write_rows(path.as_ref(), RequestFormat::Depthwise.fields(), rows)
    }
}

const TOKENS: &str = "a whole number of tokens from 1 to 1073741824";
const TIME: &str = "a time from 0 to a century";

fn name_of(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

fn detect(path: &Path) -> Result<RequestFormat> {
    let mut lines = Lines::open(path)?;
    let expected = || {
        let known = RequestFormat::ALL.map(|format| format!("{format} ({})", format.fields().join(",")));
        format!("the fields of a request trace: {}", known.join(", "))
    };
    let Some((line, first)) = lines.next_line()? else {
        return Err(TraceError::file(path, "an empty file", expected()));
    };
    RequestFormat::of_first_line(&String::from_utf8_lossy(first)).ok_or_else(|| TraceError::Line {
        path: path.to_owned(),
        line,
        found: quote(first),
        expected: expected(),
    })
}

fn tokens(row: &Row<'_>, column: usize) -> Result<u32> {
    row.number(column, TOKENS, |tokens| (1..=Request::MAX_TOKENS).contains(tokens))
}

fn read_depthwise(path: &Path) -> Result<RequestTrace> {
    let mut table = Table::open(path, RequestFormat::Depthwise.fields(), Owner::Us)?;
    let mut requests: Vec<Request> = Vec::new();
    while let Some(row) = table.next_row()? {
        let next = u32::try_from(requests.len()).map_err(|_| row.error(0, "fewer requests"))?;
        let id = row.get(0, "", |text| text.parse().ok().filter(|&id: &u32| id == next));
        let id = id.map_err(|_| row.error(0, format!("{next}: requests are counted from 0")))?;
        let arrival = row.get(1, "microseconds from 0 to a century, such as 12.345", parse_micros)?;
        if requests.last().is_some_and(|last| arrival < last.arrival) {
            return Err(row.error(1, "an arrival no earlier than the one before it"));
        }
        requests.push(Request { id, arrival, prompt_tokens: tokens(&row, 2)?, output_tokens: tokens(&row, 3)? });
    }
    Ok(RequestTrace { name: name_of(path), requests, prefix_hashes: None, dropped: 0 })
}

/// Decimal microseconds to nanoseconds without a detour over floats, so that what was written is read.
fn parse_micros(text: &str) -> Option<Nanos> {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let thousandths: u64 = format!("{fraction:0<3}")[..3].parse().ok()?;
    let nanos = whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(thousandths)?;
    Some(Nanos(nanos)).filter(|&arrival| arrival <= Request::MAX_ARRIVAL)
}

fn read_azure(path: &Path) -> Result<RequestTrace> {
    let mut table = Table::open(path, RequestFormat::Azure.fields(), Owner::Others)?;
    let mut times: Vec<i128> = Vec::new();
    let mut requests = Vec::new();
    while let Some(row) = table.next_row()? {
        times.push(row.get(0, "a date and time such as `2023-11-16 18:17:03.9799600`", parse_date)?);
        let request =
            Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: tokens(&row, 1)?, output_tokens: tokens(&row, 2)? };
        requests.push(request);
    }
    let first = times.iter().copied().min().unwrap_or(0);
    let last = times.iter().copied().max().unwrap_or(0);
    if last - first > i128::from(Request::MAX_ARRIVAL.0) {
        return Err(TraceError::file(path, "arrivals more than a century apart", TIME));
    }
    for (request, time) in requests.iter_mut().zip(&times) {
        request.arrival = Nanos((time - first) as u64);
    }
    Ok(RequestTrace::from_unsorted(name_of(path), requests, None))
}

/// Nanoseconds since 1970; a time without an offset from UTC is taken as UTC.
fn parse_date(text: &str) -> Option<i128> {
    let utc = |date: civil::DateTime| date.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    let timestamp = text.parse::<Timestamp>().ok().or_else(|| text.parse().ok().and_then(utc))?;
    Some(timestamp.as_nanosecond())
}

fn read_burst_gpt(path: &Path) -> Result<RequestTrace> {
    let mut table = Table::open(path, RequestFormat::BurstGpt.fields(), Owner::Others)?;
    let mut requests = Vec::new();
    let mut dropped = 0;
    while let Some(row) = table.next_row()? {
        let seconds = row.number(0, "seconds from 0 to a century", |&seconds: &f64| is_time(seconds))?;
        let expected = "a whole number of tokens from 0 to 1073741824";
        let in_range = |tokens: &u32| *tokens <= Request::MAX_TOKENS;
        let (prompt_tokens, output_tokens) = (row.number(1, expected, in_range)?, row.number(2, expected, in_range)?);
        match prompt_tokens == 0 || output_tokens == 0 {
            true => dropped += 1,
            false => {
                requests.push(Request { id: 0, arrival: Nanos::from_secs_f64(seconds), prompt_tokens, output_tokens })
            }
        }
    }
    Ok(RequestTrace { dropped, ..RequestTrace::from_unsorted(name_of(path), requests, None) })
}

fn is_time(seconds: f64) -> bool {
    (0.0..=Request::MAX_ARRIVAL.as_secs_f64()).contains(&seconds)
}

/// The lines of a text file that are not blank, with their numbers, held one at a time.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    line: u64,
    buffer: Vec<u8>,
}

impl<'a> Lines<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let file = File::open(path).map_err(TraceError::io("read", path))?;
        Ok(Self { path, reader: BufReader::new(file), line: 0, buffer: Vec::new() })
    }

    fn next_line(&mut self) -> Result<Option<(u64, &[u8])>> {
        loop {
            self.buffer.clear();
            let read = self.reader.read_until(b'\n', &mut self.buffer).map_err(TraceError::io("read", self.path))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            if !trim(&self.buffer).is_empty() {
                return Ok(Some((self.line, trim(&self.buffer))));
            }
        }
    }
}

fn trim(line: &[u8]) -> &[u8] {
    line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line).trim_ascii()
}

/// Stands for the key where a line as a whole is wrong.
const WHOLE_LINE: &str = "the object";

/// Where a line of JSON stands, to say so in errors.
struct JsonRow<'a> {
    path: &'a Path,
    line: u64,
}

impl JsonRow<'_> {
    fn parse<T: DeserializeOwned>(&self, text: &[u8]) -> Result<T> {
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
            let message = error.inner().to_string();
            // The position within the line is of no use beside its number and the key.
            let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
            let key = error.path().to_string();
            self.json_error(if matches!(key.as_str(), "." | "?") { WHOLE_LINE } else { &key }, message)
        })?;
        deserializer.end().map_err(|_| self.json_error(WHOLE_LINE, "expected nothing after it"))?;
        Ok(value)
    }

    fn json_error(&self, key: &str, message: &str) -> TraceError {
        TraceError::Json { path: self.path.to_owned(), line: self.line, key: key.into(), message: message.into() }
    }

    fn tokens(&self, key: &str, tokens: u64) -> Result<u32> {
        let in_range = u32::try_from(tokens).ok().filter(|tokens| (1..=Request::MAX_TOKENS).contains(tokens));
        in_range.ok_or_else(|| self.value_error(key, tokens, TOKENS))
    }

    fn seconds(&self, key: &str, value: f64, seconds: f64) -> Result<Nanos> {
        match is_time(seconds) {
            true => Ok(Nanos::from_secs_f64(seconds)),
            false => Err(self.value_error(key, value, TIME)),
        }
    }

    fn value_error(&self, column: &str, found: impl fmt::Display, expected: impl Into<String>) -> TraceError {
        let (path, column, found) = (self.path.to_owned(), column.into(), format!("`{found}`"));
        TraceError::Value { path, line: self.line, column, found, expected: expected.into() }
    }
}

/// Reads a trace of one JSON object per line; each gives a request and, in all lines or none, its prefix hashes.
fn read_json_lines<L: DeserializeOwned>(
    path: &Path,
    block_tokens: u32,
    into_request: impl Fn(L, &JsonRow<'_>) -> Result<(Request, Option<Vec<u64>>)>,
) -> Result<RequestTrace> {
    let mut lines = Lines::open(path)?;
    let mut requests = Vec::new();
    let mut prefix_hashes: Option<PrefixHashes> = None;
    while let Some((line, text)) = lines.next_line()? {
        let row = JsonRow { path, line };
        let (request, hashes) = into_request(row.parse(text)?, &row)?;
        if requests.is_empty() && hashes.is_some() {
            prefix_hashes = Some(PrefixHashes::new(block_tokens));
        }
        match (&mut prefix_hashes, hashes) {
            (Some(all), Some(hashes)) => all.push(hashes),
            (None, None) => {}
            _ => return Err(row.json_error(WHOLE_LINE, "expected prompt blocks or tokens in every line or in none")),
        }
        requests.push(request);
    }
    Ok(RequestTrace::from_unsorted(name_of(path), requests, prefix_hashes))
}

/// Tokens of a block of Mooncake's `hash_ids`.
const MOONCAKE_BLOCK_TOKENS: u32 = 512;

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Option<Vec<u64>>,
}

impl MooncakeLine {
    fn into_request(self, row: &JsonRow<'_>) -> Result<(Request, Option<Vec<u64>>)> {
        let arrival = row.seconds("timestamp", self.timestamp, self.timestamp * 1e-3)?;
        let prompt_tokens = row.tokens("input_length", self.input_length)?;
        let output_tokens = row.tokens("output_length", self.output_length)?;
        let hashes = self.hash_ids.map(|mut ids| {
            let blocks = prompt_tokens.div_ceil(MOONCAKE_BLOCK_TOKENS) as usize;
            if ids.len() != blocks {
                let expected = format!("{blocks}, one for each 512 tokens of the prompt");
                return Err(row.value_error("hash_ids", format_args!("{} ids", ids.len()), expected));
            }
            ids.truncate((prompt_tokens / MOONCAKE_BLOCK_TOKENS) as usize);
            Ok(ids)
        });
        Ok((Request { id: 0, arrival, prompt_tokens, output_tokens }, hashes.transpose()?))
    }
}

#[derive(Deserialize)]
struct ServingSimLine {
    arrival_time_ns: u64,
    input_toks: u64,
    output_toks: u64,
    input_tok_ids: Option<Vec<u32>>,
}

impl ServingSimLine {
    fn into_request(self, row: &JsonRow<'_>, block_tokens: u32) -> Result<(Request, Option<Vec<u64>>)> {
        let arrival = Nanos(self.arrival_time_ns);
        if arrival > Request::MAX_ARRIVAL {
            return Err(row.value_error("arrival_time_ns", arrival.0, TIME));
        }
        let prompt_tokens = row.tokens("input_toks", self.input_toks)?;
        let output_tokens = row.tokens("output_toks", self.output_toks)?;
        if let Some(ids) = self.input_tok_ids.as_ref().filter(|ids| ids.len() != prompt_tokens as usize) {
            let expected = format!("{prompt_tokens}, as in input_toks");
            return Err(row.value_error("input_tok_ids", format_args!("{} ids", ids.len()), expected));
        }
        let hashes = self.input_tok_ids.map(|ids| hash_prefixes(&ids, block_tokens));
        Ok((Request { id: 0, arrival, prompt_tokens, output_tokens }, hashes))
    }
}

/// A hash of all tokens up to the end of each whole block.
fn hash_prefixes(token_ids: &[u32], block_tokens: u32) -> Vec<u64> {
    let mut prefix = DefaultHasher::new();
    let blocks = token_ids.chunks_exact(block_tokens as usize);
    let hash = |block: &[u32]| {
        block.iter().for_each(|&token| prefix.write_u32(token));
        prefix.finish()
    };
    blocks.map(hash).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_with(contents: &str, options: &ReadOptions) -> Result<RequestTrace> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.any");
        std::fs::write(&path, contents).unwrap();
        RequestTrace::read_with(path, options)
    }

    fn read(contents: &str) -> Result<RequestTrace> {
        read_with(contents, &ReadOptions::default())
    }

    /// Arrival in nanoseconds, prompt and output tokens of each request.
    fn rows(trace: &RequestTrace) -> Vec<(u64, u32, u32)> {
        let row = |request: &Request| (request.arrival.0, request.prompt_tokens, request.output_tokens);
        trace.requests.iter().map(row).collect()
    }

    const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n\
        2023-11-16 18:17:04.0319600,3180,8\r\n2023-11-16 18:17:05.0319605,110,27";
    const BURST_GPT: &str = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
        5,1,2.5,ChatGPT,472,18,490,Conversation log\n45.5,,,GPT-4,1087,0,1087,API log\n118,,,GPT-4,417,276,693,API log\n";
    const MOONCAKE: &str = "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [0, 1, 2]}\n\
        {\"timestamp\": 3500, \"input_length\": 1024, \"output_length\": 9, \"hash_ids\": [0, 4]}\n";
    const SERVING_SIM: &str = "{\"input_toks\": 5, \"output_toks\": 7, \"arrival_time_ns\": 1500000, \"input_tok_ids\": [1, 2, 3, 4, 5]}\n\
        {\"input_toks\": 4, \"output_toks\": 3, \"arrival_time_ns\": 2500000, \"input_tok_ids\": [1, 2, 9, 4]}\n";
    const OURS: &str = "request,arrival_us,prompt_tokens,output_tokens\n0,0.5,10,1\n1,1000,20,2\n";

    #[test]
    fn each_format_is_recognized_and_read() {
        assert_eq!(rows(&read(AZURE).unwrap()), [(0, 4808, 10), (52_000_000, 3180, 8), (1_052_000_500, 110, 27)]);
        let burst = read(BURST_GPT).unwrap();
        assert_eq!(rows(&burst), [(5_000_000_000, 472, 18), (118_000_000_000, 417, 276)]);
        assert_eq!(burst.dropped, 1);
        assert_eq!(rows(&read(MOONCAKE).unwrap()), [(0, 1100, 5), (3_500_000_000, 1024, 9)]);
        assert_eq!(rows(&read(SERVING_SIM).unwrap()), [(1_500_000, 5, 7), (2_500_000, 4, 3)]);
        assert_eq!(rows(&read(OURS).unwrap()), [(500, 10, 1), (1_000_000, 20, 2)]);
    }

    #[test]
    fn byte_order_marks_and_line_ends_of_windows_make_no_difference() {
        for contents in [AZURE, BURST_GPT, MOONCAKE, SERVING_SIM, OURS] {
            let unix = contents.replace("\r\n", "\n");
            let windows = format!("\u{feff}{}", unix.replace('\n', "\r\n"));
            assert_eq!(read(&unix).unwrap(), read(&windows).unwrap());
        }
    }

    #[test]
    fn requests_out_of_order_are_sorted_except_in_our_own_files() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
            2024-05-10 00:00:02+00:00,1,1\n2024-05-10 00:00:01+00:00,2,2\n2024-05-10 00:00:02+00:00,3,3\n";
        assert_eq!(rows(&read(azure).unwrap()), [(0, 2, 2), (1_000_000_000, 1, 1), (1_000_000_000, 3, 3)]);
        let error = read(&OURS.replace("1,1000", "1,0.499")).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "trace.any:3: arrival_us: found `0.499`, expected an arrival no earlier than the one before it"
            ),
            "{error}"
        );
    }

    #[test]
    fn blocks_of_prompts_that_begin_alike_have_equal_hashes() {
        let mooncake = read(MOONCAKE).unwrap().prefix_hashes.unwrap();
        assert_eq!((mooncake.block_tokens, mooncake.of(0), mooncake.of(1)), (512, &[0, 1][..], &[0, 4][..]));
        let options = ReadOptions { prefix_block_tokens: 2, ..ReadOptions::default() };
        let hashes = read_with(SERVING_SIM, &options).unwrap().prefix_hashes.unwrap();
        let (first, second) = (hashes.of(0), hashes.of(1));
        assert_eq!((first.len(), second.len()), (2, 2));
        assert_eq!(first[0], second[0]);
        assert_ne!(first[1], second[1]);
        // The second blocks hold the same tokens after different first ones.
        assert_ne!(hash_prefixes(&[1, 2, 7, 7], 2)[1], hash_prefixes(&[3, 4, 7, 7], 2)[1]);
        assert!(read(SERVING_SIM).unwrap().prefix_hashes.unwrap().of(0).is_empty(), "no whole block of 16");
    }

    #[test]
    fn damaged_files_name_line_field_and_what_was_expected() {
        for (contents, message) in [
            (
                String::new(),
                "trace.any: found an empty file, expected the fields of a request trace: depthwise (request,",
            ),
            ("\n\r\n".into(), "found an empty file"),
            ("hello\n".into(), "trace.any:1: found `hello`, expected the fields of a request trace"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n".into(), "found no request that did not fail (0 dropped)"),
            (AZURE.replace("ContextTokens", "Context"), "trace.any:1: found `TIMESTAMP,Context,GeneratedTokens`"),
            (AZURE.replace("3180,8", "3180"), "trace.any:3: found 2 columns, expected 3, as in the header"),
            (AZURE.replace("2023-11-16 18:17:04", "2023-13-16"), "trace.any:3: TIMESTAMP: found `2023-13-16.0319600`"),
            (
                AZURE.replace("3180", "0"),
                "trace.any:3: ContextTokens: found `0`, expected a whole number of tokens from 1",
            ),
            (AZURE.replace("3180", "-3"), "trace.any:3: ContextTokens: found `-3`"),
            (AZURE.replace("3180", "5000000000"), "trace.any:3: ContextTokens: found `5000000000`"),
            (AZURE.replace("110,27", "110,"), "trace.any:4: GeneratedTokens: found ``"),
            (BURST_GPT.replace("45.5", "NaN"), "trace.any:3: Timestamp: found `NaN`, expected seconds"),
            (BURST_GPT.replace("45.5", "-1"), "trace.any:3: Timestamp: found `-1`"),
            (BURST_GPT.replace("45.5", "1e300"), "trace.any:3: Timestamp: found `1e300`"),
            (BURST_GPT.replace("1087,0", "1087,x"), "trace.any:3: Response tokens: found `x`"),
            (
                BURST_GPT.replace(",18,", ",0,").replace(",276,", ",0,"),
                "found no request that did not fail (3 dropped)",
            ),
            (MOONCAKE.replace("1024", "0"), "trace.any:2: input_length: found `0`, expected a whole number of tokens"),
            (MOONCAKE.replace("1024", "-5"), "trace.any:2: input_length: invalid value: integer `-5`, expected u64"),
            (MOONCAKE.replace("3500", "-5"), "trace.any:2: timestamp: found `-5`, expected a time from 0 to a century"),
            (
                MOONCAKE.replace("[0, 4]", "[0, \"4\"]"),
                "trace.any:2: hash_ids[1]: invalid type: string \"4\", expected u64",
            ),
            (
                MOONCAKE.replace("[0, 4]", "[0]"),
                "trace.any:2: hash_ids: found `1 ids`, expected 2, one for each 512 tokens",
            ),
            (
                MOONCAKE.replace(", \"hash_ids\": [0, 4]", ""),
                "trace.any:2: the object: expected prompt blocks or tokens in every line",
            ),
            (MOONCAKE.replace("\"output_length\": 9, ", ""), "trace.any:2: the object: missing field `output_length`"),
            (MOONCAKE[..120].into(), "trace.any:2: the object: EOF while parsing"),
            (MOONCAKE.replace("[0, 4]}", "[0, 4]}}"), "trace.any:2: the object: expected nothing after it"),
            (SERVING_SIM.replace("[1, 2, 9, 4]", "[1, 2, 9]"), "trace.any:2: input_tok_ids: found `3 ids`, expected 4"),
            (SERVING_SIM.replace("2500000", "18000000000000000000"), "trace.any:2: arrival_time_ns: found `180000"),
            (
                OURS.replace("1,1000", "2,1000"),
                "trace.any:3: request: found `2`, expected 1: requests are counted from 0",
            ),
            (OURS.replace("1000", "1e3"), "trace.any:3: arrival_us: found `1e3`, expected microseconds"),
            (OURS.replace("1000", "99999999999999999999"), "trace.any:3: arrival_us: found `9999"),
            (OURS.trim_end().into(), "found a last line that is cut off"),
        ] {
            let error = read(&contents).unwrap_err().to_string();
            assert!(error.contains(message), "expected `{message}` in `{error}`");
        }
    }

    #[test]
    fn a_forced_format_and_a_missing_file_are_taken_at_their_word() {
        let forced = ReadOptions { format: Some(RequestFormat::Azure), ..ReadOptions::default() };
        let error = read_with(OURS, &forced).unwrap_err().to_string();
        assert!(error.contains("expected columns `TIMESTAMP,ContextTokens,GeneratedTokens`"), "{error}");
        assert!(RequestTrace::read("no/such.csv").unwrap_err().to_string().starts_with("cannot read no/such.csv: "));
        assert_eq!(RequestFormat::ALL.map(|format| format.name().parse()), RequestFormat::ALL.map(Ok));
        assert!("azur".parse::<RequestFormat>().unwrap_err().contains("unknown request format `azur`"));
    }

    proptest! {
        #[test]
        fn our_own_file_reads_back_as_it_was_written(
            requests in prop::collection::vec((0..=Request::MAX_ARRIVAL.0, 1..=Request::MAX_TOKENS, 1..=Request::MAX_TOKENS), 1..20),
        ) {
            let request = |(nanos, prompt_tokens, output_tokens)| Request { id: 0, arrival: Nanos(nanos), prompt_tokens, output_tokens };
            let trace = RequestTrace::from_unsorted("written".into(), requests.into_iter().map(request).collect(), None);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("written.csv");
            trace.write(&path).unwrap();
            prop_assert_eq!(RequestTrace::read(&path).unwrap(), trace);
        }
    }
}

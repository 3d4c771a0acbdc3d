//! Files of request traces: formats published by others, and our own.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError};
use crate::formats::{self, Layout};
use crate::request::RequestTrace;
use crate::table::write_whole;
use crate::units::Nanos;

/// How a file holds requests. `docs/reference/files.md` lists the fields of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestFormat {
    /// Our own CSV: `request,arrival_us,prompt_tokens,output_tokens`, perhaps sessions and prefix hashes.
    Depthwise,
    /// Azure LLM inference traces of 2023 to 2025, CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`. The first arrival
    /// becomes 0.
    Azure,
    /// BurstGPT, CSV: `Timestamp` (seconds), `Request tokens`, `Response tokens`.
    BurstGpt,
    /// Vidur, CSV: `arrived_at` (seconds), `num_prefill_tokens`, `num_decode_tokens`.
    Vidur,
    /// TraceV2 of BLIS (inference-sim), its CSV: `arrival_time_us`, `input_tokens`, `output_tokens`, `prefix_group`.
    Blis,
    /// Traces that GuideLLM replays, CSV: `timestamp`, `input_length`, `output_length`.
    GuidellmTrace,
    /// Qwen's Bailian traces, JSON lines: `chat_id`, `timestamp` (seconds), `input_length`, `output_length`, `hash_ids`
    /// of blocks of 16 tokens.
    Bailian,
    /// Mooncake, JSON lines: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens; and
    /// files of that layout with other blocks or units, without hashes, or with sessions and delays, such as those of
    /// Dynamo and AIPerf.
    Mooncake,
    /// Workloads of LLMServingSim, JSON lines: `arrival_time_ns`, and `input_toks`, `output_toks`, `input_tok_ids` or
    /// the `sub_requests` of an agent.
    LlmServingSim,
    /// Results of AIPerf, JSON lines (`profile_export.jsonl`): `metadata` and `metrics` of each request.
    AiperfResults,
    /// Result of `vllm bench serve --save-detailed`, JSON: `input_lens`, `output_lens`, `start_times` (seconds).
    VllmResults,
    /// Report of GuideLLM, JSON: `benchmarks` with `requests`.
    GuidellmResults,
    /// ShareGPT, JSON: a list of `conversations`, whose texts are counted by a tokenizer.
    ShareGpt,
}

impl RequestFormat {
    /// Every format.
    pub const ALL: [Self; 13] = [
        Self::Depthwise,
        Self::Azure,
        Self::BurstGpt,
        Self::Vidur,
        Self::Blis,
        Self::GuidellmTrace,
        Self::Bailian,
        Self::Mooncake,
        Self::LlmServingSim,
        Self::AiperfResults,
        Self::VllmResults,
        Self::GuidellmResults,
        Self::ShareGpt,
    ];

    /// The name in configurations and on the command line.
    pub fn name(self) -> &'static str {
        Layout::of(self).name
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

/// Unit of the times in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeUnit {
    /// Seconds.
    #[serde(rename = "s")]
    Seconds,
    /// Milliseconds.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Microseconds.
    #[serde(rename = "us")]
    Microseconds,
    /// Nanoseconds.
    #[serde(rename = "ns")]
    Nanoseconds,
}

impl TimeUnit {
    const ALL: [Self; 4] = [Self::Seconds, Self::Milliseconds, Self::Microseconds, Self::Nanoseconds];

    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
            Self::Microseconds => "us",
            Self::Nanoseconds => "ns",
        }
    }

    fn in_nanos(self) -> u64 {
        match self {
            Self::Seconds => 1_000_000_000,
            Self::Milliseconds => 1_000_000,
            Self::Microseconds => 1_000,
            Self::Nanoseconds => 1,
        }
    }

    /// A time in this unit, rounded to the nanosecond; none if it is negative or out of range.
    pub(crate) fn nanos(self, time: &serde_json::Number) -> Option<Nanos> {
        match time.as_u64() {
            Some(whole) => whole.checked_mul(self.in_nanos()).map(Nanos),
            None => self.nanos_of(time.as_f64()?),
        }
    }

    /// As [`Self::nanos`], of a number with a fraction.
    pub(crate) fn nanos_of(self, time: f64) -> Option<Nanos> {
        let nanos = (time * self.in_nanos() as f64).round();
        (0.0..=u64::MAX as f64).contains(&nanos).then_some(Nanos(nanos as u64))
    }
}

impl fmt::Display for TimeUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TimeUnit {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let unit = Self::ALL.into_iter().find(|unit| unit.name() == name);
        unit.ok_or_else(|| format!("unknown unit of time `{name}`: expected s, ms, us or ns"))
    }
}

/// What to do with rows without prompt or output tokens, which cannot be served: requests that failed, mostly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroTokens {
    /// Leave them out, with a warning that counts them.
    #[default]
    Skip,
    /// Refuse the file.
    Refuse,
}

impl FromStr for ZeroTokens {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "skip" => Ok(Self::Skip),
            "refuse" => Ok(Self::Refuse),
            _ => Err(format!("`{name}`: expected skip or refuse")),
        }
    }
}

impl fmt::Display for ZeroTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Skip => "skip",
            Self::Refuse => "refuse",
        })
    }
}

/// Counts the tokens of texts, for files that hold texts.
pub trait CountTokens: fmt::Debug {
    /// Number of tokens of a text, without tokens at its beginning or end.
    ///
    /// # Errors
    /// Why the text cannot be split into tokens.
    fn count(&self, text: &str) -> Result<usize, String>;
}

/// How to read a file of requests.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions<'a> {
    /// The format; none to recognize it by the beginning of the file.
    pub format: Option<RequestFormat>,
    /// Block size in tokens for the prefix hashes of files that hold token ids or groups of prefixes; at least 1.
    pub prefix_block_tokens: u32,
    /// Tokens of a block of the hashes in the file, where it does not determine them.
    pub hash_block_tokens: Option<u32>,
    /// Unit of the times, where the file does not determine it.
    pub time_unit: Option<TimeUnit>,
    /// What to do with rows without prompt or output tokens.
    pub zero_tokens: ZeroTokens,
    /// Counts the tokens of files that hold texts.
    pub tokenizer: Option<&'a dyn CountTokens>,
}

impl ReadOptions<'_> {
    /// Block size of prefix hashes that is not set: that of vLLM's cache.
    pub const DEFAULT_PREFIX_BLOCK_TOKENS: u32 = 16;

    /// Whether the options have a meaning for a format.
    pub(crate) fn check(&self, layout: &Layout) -> Result<()> {
        let other = |key, found: String, of: &str| {
            let expected = format!("it for a trace {of}; this one is of the format {}", layout.name);
            Err(TraceError::spec(key, found, expected))
        };
        match (self.time_unit, self.hash_block_tokens) {
            (_, Some(0)) => Err(TraceError::spec("hash_block_tokens", 0, "at least 1")),
            (_, Some(tokens)) if !layout.has_blocks => other("hash_block_tokens", tokens.to_string(), "with hash_ids"),
            (Some(unit), _) if !layout.has_unit => {
                other("time_unit", unit.to_string(), "whose times have a unit of the file's own")
            }
            _ => Ok(()),
        }
    }
}

impl Default for ReadOptions<'_> {
    fn default() -> Self {
        Self {
            format: None,
            prefix_block_tokens: Self::DEFAULT_PREFIX_BLOCK_TOKENS,
            hash_block_tokens: None,
            time_unit: None,
            zero_tokens: ZeroTokens::default(),
            tokenizer: None,
        }
    }
}

/// Prompt and output tokens of requests.
pub(crate) type Lengths = Vec<(u32, u32)>;

impl RequestTrace {
    /// Reads a file of any known format.
    ///
    /// Files of others may list requests in any order: they are sorted by arrival, and those that
    /// arrive together stay in the order of the file. In our own files the column `request` counts
    /// from 0 in order of arrival.
    ///
    /// # Errors
    /// If the file cannot be read, is of no known format, has no request, or a value is missing,
    /// of another type or out of range (no token, more than [`Request::MAX_TOKENS`](crate::Request::MAX_TOKENS), a time that is
    /// negative or beyond [`Request::MAX_ARRIVAL`](crate::Request::MAX_ARRIVAL)).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::read_with(path, &ReadOptions::default())
    }

    /// Reads a file with a forced format or other options; see [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_with(path: impl AsRef<Path>, options: &ReadOptions<'_>) -> Result<Self> {
        let path = path.as_ref();
        let trace = Layout::of_file(path, options)?.read(path, options)?;
        match trace.requests.is_empty() {
            false => Ok(trace),
            true => Err(no_request(path, &trace.warnings)),
        }
    }

    /// Pairs of prompt and output length of a file of any known format, and what is to be said of it. Neither times nor
    /// hashes play a part, so that no option is needed to read them.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) fn read_lengths(path: &Path, options: &ReadOptions<'_>) -> Result<(Lengths, Vec<String>)> {
        let (lengths, warnings) = formats::detect(path)?.read_lengths(path, options)?;
        match lengths.is_empty() {
            false => Ok((lengths, warnings)),
            true => Err(no_request(path, &warnings)),
        }
    }

    /// Writes our own CSV, whole or not at all, with sessions and prefix hashes if the trace has them.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        write_whole(path, |out| self.write_to(out))
    }

    /// Writes our own CSV; see [`Self::write`].
    ///
    /// # Errors
    /// If the output does not take it.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        formats::depthwise::write(self, out)
    }

    /// How every file that [`Self::write`] writes begins.
    pub const BEGINNING: &'static [u8] = b"request,arrival_us,prompt_tokens,output_tokens";
}

fn no_request(path: &Path, warnings: &[String]) -> TraceError {
    let found = [&["no request".to_owned()], warnings].concat().join("; ");
    TraceError::file(path, found, "at least one with prompt and output tokens")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::Request;

    fn read_with(contents: &str, options: &ReadOptions<'_>) -> Result<RequestTrace> {
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
        let left_out = "requests left out: 1 without output tokens (`zero_tokens: refuse` refuses the file)";
        assert_eq!(burst.warnings, [left_out]);
        assert_eq!(rows(&read(MOONCAKE).unwrap()), [(0, 1100, 5), (3_500_000_000, 1024, 9)]);
        assert_eq!(rows(&read(SERVING_SIM).unwrap()), [(1_500_000, 5, 7), (2_500_000, 4, 3)]);
        assert_eq!(rows(&read(OURS).unwrap()), [(500, 10, 1), (1_000_000, 20, 2)]);
    }

    #[test]
    fn byte_order_marks_and_line_ends_of_windows_make_no_difference() {
        for contents in [AZURE, BURST_GPT, BAILIAN, MOONCAKE, SERVING_SIM, OURS] {
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
        assert!(read(SERVING_SIM).unwrap().prefix_hashes.unwrap().of(0).is_empty(), "no whole block of 16");
    }

    #[test]
    fn whole_numbers_may_have_a_fraction_of_zero() {
        let plain = [read(AZURE).unwrap(), read(MOONCAKE).unwrap()].map(|trace| trace.requests);
        let floats = [AZURE.replace("3180", "3180.0").replace(",8", ",8.00"), MOONCAKE.replace("1024", "1024.0")];
        assert_eq!(floats.map(|contents| read(&contents).unwrap().requests), plain);
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
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n".into(), "found no request, expected at least one with prompt"),
            (AZURE.replace("ContextTokens", "Context"), "trace.any:1: found `TIMESTAMP,Context,GeneratedTokens`"),
            (AZURE.replace("3180,8", "3180"), "trace.any:3: found 2 columns, expected 3, as in the header"),
            (AZURE.replace("2023-11-16 18:17:04", "2023-13-16"), "trace.any:3: TIMESTAMP: found `2023-13-16.0319600`"),
            (AZURE.replace("3180", "-3"), "trace.any:3: ContextTokens: found `-3`"),
            (AZURE.replace("3180", "5000000000"), "trace.any:3: ContextTokens: found `5000000000`"),
            (AZURE.replace("110,27", "110,"), "trace.any:4: GeneratedTokens: found ``"),
            (BURST_GPT.replace("45.5", "NaN"), "trace.any:3: Timestamp: found `NaN`, expected a time from 0"),
            (BURST_GPT.replace("45.5", "-1"), "trace.any:3: Timestamp: found `-1`"),
            (BURST_GPT.replace("45.5", "1e300"), "trace.any:3: Timestamp: found `1e300`"),
            (BURST_GPT.replace("1087,0", "1087,x"), "trace.any:3: Response tokens: found `x`"),
            (
                BURST_GPT.replace(",18,", ",0,").replace(",276,", ",0,"),
                "found no request; requests left out: 3 without output tokens (`zero_tokens: refuse` refuses the file)",
            ),
            (MOONCAKE.replace("1024", "5000000000"), "trace.any:2: input_length: found `5000000000`, expected a whole"),
            (
                MOONCAKE.replace("1024", "-5"),
                "trace.any:2: input_length: found `-5`, expected a whole number of at least 0",
            ),
            (MOONCAKE.replace("1024", "1024.5"), "trace.any:2: input_length: found `1024.5`, expected a whole number"),
            (MOONCAKE.replace("1024", "\"1024\""), "input_length: invalid type: string \"1024\", expected a number"),
            (AZURE.replace("3180", "3180.5"), "trace.any:3: ContextTokens: found `3180.5`"),
            (
                AZURE.replace(',', ";"),
                "trace.any:1: found `TIMESTAMP;ContextTokens;GeneratedTokens`, expected columns separated by commas",
            ),
            (
                "time,input_length,output_length\n0,10,5\n".into(),
                "expected the fields of a request trace: depthwise (request,arrival_us,prompt_tokens,output_tokens), azure",
            ),
            (
                "{\"TIMESTAMP\": 1, \"ContextTokens\": 1, \"GeneratedTokens\": 1}\n".into(),
                "expected the fields of a request",
            ),
            (MOONCAKE.replace("3500", "-5"), "trace.any:2: timestamp: found `-5`, expected a time from 0 to a century"),
            (
                MOONCAKE.replace("[0, 4]", "[0, \"4\"]"),
                "trace.any:2: hash_ids[1]: invalid type: string \"4\", expected a whole number",
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
            (
                MOONCAKE.replace("9, ", "9, \"output_length\": 8, "),
                "trace.any:2: the object: duplicate field `output_length`",
            ),
            (format!("[{}]", MOONCAKE.replace('\n', ",")), "expected an object in each line, not one list: run `jq"),
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

    const BAILIAN: &str = "{\"chat_id\": 159, \"parent_chat_id\": -1, \"timestamp\": 0.21, \"input_length\": 12, \
        \"output_length\": 30, \"type\": \"text\", \"turn\": 1, \"hash_ids\": [5]}\n\
        {\"chat_id\": 160, \"parent_chat_id\": 159, \"timestamp\": 61.5, \"input_length\": 45, \"output_length\": 20, \
        \"type\": \"text\", \"turn\": 2, \"hash_ids\": [5, 8, 9]}\n\
        {\"chat_id\": 161, \"parent_chat_id\": -1, \"timestamp\": 3600.25, \"input_length\": 30, \"output_length\": 10, \
        \"type\": \"file\", \"turn\": 1, \"hash_ids\": [21, 22]}\n";
    const BAILIAN_ROWS: [(u64, u32, u32); 3] =
        [(210_000_000, 12, 30), (61_500_000_000, 45, 20), (3_600_250_000_000, 30, 10)];

    /// Lines of JSON without a key whose value is a number, a text or a list.
    fn without(key: &str, lines: &str) -> String {
        let start = format!(", \"{key}\": ");
        let strip = |line: &str| match line.split_once(&start) {
            Some((before, after)) => {
                let end =
                    if after.starts_with('[') { after.find(']').unwrap() + 1 } else { after.find([',', '}']).unwrap() };
                format!("{before}{}\n", &after[end..])
            }
            None => format!("{line}\n"),
        };
        lines.lines().map(strip).collect()
    }

    #[test]
    fn bailian_traces_are_of_seconds_with_or_without_hashes() {
        let trace = read(BAILIAN).unwrap();
        assert_eq!(rows(&trace), BAILIAN_ROWS);
        let hashes = trace.prefix_hashes.unwrap();
        assert_eq!(hashes.block_tokens, 16);
        assert_eq!([hashes.of(0), hashes.of(1), hashes.of(2)], [&[][..], &[5, 8], &[21]]);
        assert!(trace.warnings.is_empty());
        let sessions = trace.sessions.unwrap();
        assert_eq!(sessions.links().iter().map(|link| link.session).collect::<Vec<_>>(), [Some(0), Some(0), Some(1)]);
        let bare = read(&without("hash_ids", BAILIAN)).unwrap();
        assert_eq!((rows(&bare), bare.prefix_hashes), (BAILIAN_ROWS.to_vec(), None));
    }

    #[test]
    fn seconds_and_milliseconds_that_the_file_does_not_tell_apart_need_the_option() {
        let anonymous = BAILIAN.replace("\"chat_id\": 159, \"parent_chat_id\": -1, ", "");
        let bare = without("hash_ids", MOONCAKE);
        let small = MOONCAKE.replace("1100", "40").replace("1024", "25");
        let fractions = MOONCAKE.replace("3500", "3500.5");
        for (contents, reason) in [
            (&anonymous, "with fractions, as 0.21 in line 1"),
            (&bare, "without hash_ids"),
            (&small, "with blocks of 16 tokens"),
            (&fractions, "with fractions, as 3500.5 in line 2"),
        ] {
            let error = read(contents).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("`--time-unit ms`"), "{error}");
            for (unit, nanos) in [(TimeUnit::Seconds, 1_000_000_000.0), (TimeUnit::Milliseconds, 1_000_000.0)] {
                let options = ReadOptions { time_unit: Some(unit), ..ReadOptions::default() };
                let last = read_with(contents, &options).unwrap().requests.last().unwrap().arrival;
                let in_unit: f64 = if contents == &anonymous {
                    3600.25
                } else if contents == &fractions {
                    3500.5
                } else {
                    3500.0
                };
                assert_eq!(last, Nanos((in_unit * nanos) as u64));
            }
        }
        assert_eq!(rows(&read(MOONCAKE).unwrap())[1].0, 3_500_000_000, "Mooncake's own blocks and whole milliseconds");
        for contents in [AZURE, OURS, SERVING_SIM] {
            let options = ReadOptions { time_unit: Some(TimeUnit::Seconds), ..ReadOptions::default() };
            let error = read_with(contents, &options).unwrap_err().to_string();
            assert!(error.contains("time_unit: found s, expected it for a trace whose times"), "{error}");
        }
    }

    #[test]
    fn times_that_are_dates_count_from_the_first_in_any_unit() {
        let in_units = |unit, scale: u64| {
            let line = |time: u64| format!("{{\"timestamp\": {time}, \"input_length\": 9, \"output_length\": 3}}\n");
            let contents = [1_727_000_000, 1_727_000_002].map(|second| line(second * scale)).concat();
            rows(&read_with(&contents, &ReadOptions { time_unit: Some(unit), ..ReadOptions::default() }).unwrap())
        };
        for (unit, scale) in [
            (TimeUnit::Seconds, 1),
            (TimeUnit::Milliseconds, 1_000),
            (TimeUnit::Microseconds, 1_000_000),
            (TimeUnit::Nanoseconds, 1_000_000_000),
        ] {
            assert_eq!(in_units(unit, scale), [(0, 9, 3), (2_000_000_000, 9, 3)]);
        }
    }

    #[test]
    fn blocks_of_hashes_have_the_size_that_all_prompts_determine() {
        let trace = |prompts: &[(u32, u32)]| {
            let line = |(prompt, blocks): &(u32, u32)| {
                let ids: Vec<u32> = (0..*blocks).collect();
                format!(
                    "{{\"timestamp\": 1, \"input_length\": {prompt}, \"output_length\": 1, \"hash_ids\": {ids:?}}}\n"
                )
            };
            prompts.iter().map(line).collect::<String>()
        };
        let blocks = |prompts: &[(u32, u32)], hash_block_tokens| {
            let options =
                ReadOptions { hash_block_tokens, time_unit: Some(TimeUnit::Milliseconds), ..ReadOptions::default() };
            read_with(&trace(prompts), &options)
        };
        let size = |prompts: &[(u32, u32)]| blocks(prompts, None).unwrap().prefix_hashes.unwrap().block_tokens;
        assert_eq!(size(&[(64, 1), (65, 2), (640, 10)]), 64);
        assert_eq!(size(&[(24, 1), (25, 2)]), 24, "no power of two, and the only size");
        let assumed = blocks(&[(500, 8), (1000, 16)], None).unwrap();
        assert_eq!(assumed.prefix_hashes.unwrap().block_tokens, 64);
        let warning = "hash_ids are taken to be of blocks of 64 tokens: of the sizes that fit every prompt, 63 to 66, the \
                       only power of two";
        assert_eq!(assumed.warnings, [warning]);

        let error = blocks(&[(60, 3)], None).unwrap_err().to_string();
        let message =
            "hash_ids of blocks of 20 to 29 tokens, each of which fits every prompt, expected the size of a block";
        assert!(error.contains(message) && error.contains("`--hash-block-tokens N`"), "{error}");
        assert_eq!(blocks(&[(60, 3)], Some(24)).unwrap().prefix_hashes.unwrap().block_tokens, 24);
        let error = blocks(&[(34, 3)], Some(17)).unwrap_err().to_string();
        assert!(error.contains("trace.any:1: hash_ids: found `3 ids`, expected 2, one for each 17 tokens"), "{error}");
        let error = blocks(&[(34, 3), (1000, 2)], None).unwrap_err().to_string();
        let message =
            "trace.any:2: hash_ids: found `2 ids`, expected one for each block of the 12 to 16 tokens that fit";
        assert!(error.contains(message), "{error}");
        let options = ReadOptions { hash_block_tokens: Some(16), ..ReadOptions::default() };
        let error = read_with(AZURE, &options).unwrap_err().to_string();
        assert!(error.contains("hash_block_tokens: found 16, expected it for a trace with hash_ids"), "{error}");
    }

    #[test]
    fn rows_without_tokens_are_counted_and_left_out_or_refused() {
        let refuse = ReadOptions { zero_tokens: ZeroTokens::Refuse, ..ReadOptions::default() };
        for (contents, key) in [
            (AZURE.replace("3180", "0"), "ContextTokens"),
            (AZURE.replace("3180,8", "3180,0"), "GeneratedTokens"),
            (BURST_GPT.replace("1087,0", "0,0"), "Request tokens"),
            (BAILIAN.replace("45", "0"), "input_length"),
            (MOONCAKE.replace("\"output_length\": 9", "\"output_length\": 0"), "output_length"),
            (SERVING_SIM.replace("\"input_toks\": 4", "\"input_toks\": 0"), "input_toks"),
        ] {
            let trace = read(&contents).unwrap();
            let kind = if key.starts_with("Gen") || key.starts_with("out") { "output" } else { "prompt" };
            let warning = format!("requests left out: 1 without {kind} tokens");
            assert!(trace.warnings[0].starts_with(&warning), "{key}: {:?}", trace.warnings);
            let lines = contents.trim().lines().count() - usize::from(!contents.starts_with('{'));
            assert_eq!(trace.requests.len(), lines - 1);
            let error = read_with(&contents, &refuse).unwrap_err().to_string();
            assert!(
                error.contains(&format!(": {key}: found `0`, expected a whole number of tokens from 1")),
                "{error}"
            );
        }
        let error = read(&OURS.replace(",20,2", ",0,2")).unwrap_err().to_string();
        assert!(error.contains("trace.any:3: prompt_tokens: found `0`"), "we write no such rows: {error}");
    }

    #[test]
    fn azure_traces_of_every_year_are_read() {
        let later = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.071000,1,1200,33\n\
            2024-10-15 00:00:00.350000,0,220,5\n2024-10-15 00:00:02.000001,3,4000,12\n";
        let trace = read(later).unwrap();
        assert_eq!(rows(&trace), [(0, 1200, 33), (279_000_000, 220, 5), (1_929_001_000, 4000, 12)]);
        assert_eq!(trace.warnings, ["not used: `NumImages`"]);
        for time in [
            "2024-05-12 00:00:01.009930+00:00",
            "2024-05-12T00:00:01.00993Z",
            "2024-05-12 02:00:01.009930+02:00",
            "2024-05-11 19:00:01.009930-05:00",
        ] {
            let contents =
                format!("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00+00:00,1,1\n{time},2,2\n");
            assert_eq!(rows(&read(&contents).unwrap()), [(0, 1, 1), (1_009_930_000, 2, 2)], "{time}");
        }
    }

    #[test]
    fn keys_that_are_not_used_are_named_once() {
        let line = |time: u32, rest: &str| {
            format!(
                "{{\"timestamp\": {time}, \"input_length\": 1024, \"output_length\": 9, \"hash_ids\": [0, 4]{rest}}}\n"
            )
        };
        let contents = line(0, "")
            + &line(1, ", \"user_id\": \"a\", \"think_time\": 500, \"priority\": 2")
            + &line(2, ", \"priority\": 1");
        let sessions =
            "sessions and delays are not replayed (`think_time`, `user_id`): each request arrives at its own time";
        assert_eq!(read(&contents).unwrap().warnings, [sessions, "not used: `priority`"]);
        let follows = line(0, "") + &line(1, ", \"delay\": 500").replace("\"timestamp\": 1, ", "");
        let error = read(&follows).unwrap_err().to_string();
        let message = "trace.any:2: the object: missing field `timestamp`: a request that is sent so long after another one (`delay`) needs a `session_id`";
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn compressed_traces_of_every_format_read_as_plain_ones() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        for contents in [AZURE, BURST_GPT, BAILIAN, MOONCAKE, SERVING_SIM, OURS] {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            gzip.write_all(contents.as_bytes()).unwrap();
            let gzip = gzip.finish().unwrap();
            let zstd = zstd::encode_all(contents.as_bytes(), 1).unwrap();
            let plain = read(contents).unwrap();
            for (name, bytes) in [("trace.any.gz", &gzip), ("trace.any.zst", &zstd), ("trace.any", &gzip)] {
                let path = folder.path().join(name);
                std::fs::write(&path, bytes).unwrap();
                assert_eq!(RequestTrace::read(&path).unwrap(), plain, "{name} of {contents}");
            }
            let path = folder.path().join("cut.gz");
            std::fs::write(&path, &gzip[..gzip.len() - 3]).unwrap();
            let error = RequestTrace::read(&path).unwrap_err().to_string();
            assert!(error.contains("cut.gz: its gzip data is cut off"), "{error}");
        }
        let damaged = AZURE.replace("3180", "x");
        let path = folder.path().join("bad.zst");
        std::fs::write(&path, zstd::encode_all(damaged.as_bytes(), 1).unwrap()).unwrap();
        let error = RequestTrace::read(&path).unwrap_err().to_string();
        assert!(error.contains("bad.zst:3: ContextTokens: found `x`"), "lines are those of the text: {error}");
    }

    #[test]
    fn lengths_are_read_without_the_options_that_times_and_hashes_need() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        for contents in [without("hash_ids", MOONCAKE), MOONCAKE.replace("3500", "3500.5"), AZURE.to_owned()] {
            std::fs::write(&path, &contents).unwrap();
            let (lengths, warnings) = RequestTrace::read_lengths(&path, &ReadOptions::default()).unwrap();
            assert!(lengths == [(1100, 5), (1024, 9)] || lengths == [(4808, 10), (3180, 8), (110, 27)], "{lengths:?}");
            assert!(warnings.is_empty());
        }
        std::fs::write(&path, MOONCAKE.replace("1024", "0")).unwrap();
        assert_eq!(RequestTrace::read_lengths(&path, &ReadOptions::default()).unwrap().1.len(), 1);
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

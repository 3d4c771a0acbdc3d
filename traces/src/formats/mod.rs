//! The formats of request traces: one table that says how each is recognized, and a reader for each.

mod aiperf;
mod azure;
mod blis;
mod burst_gpt;
pub(crate) mod depthwise;
mod document;
mod drafts;
mod guidellm;
mod json_lines;
mod recognize;
mod rows;
mod share_gpt;
mod vidur;
mod vllm;

use std::path::Path;

pub(crate) use recognize::detect;
pub(crate) use rows::Rows;

use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace};
use crate::request_file::{Lengths, ReadOptions, RequestFormat, TimeUnit, ZeroTokens};
use crate::table::{Row, Table};
use crate::units::Nanos;
use json_lines::{JsonLines, Keys};

/// Outer form of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// CSV with a header.
    Table,
    /// One JSON object per line.
    Lines,
    /// One JSON object.
    Object,
    /// One JSON list of objects.
    List,
}

/// What makes a request trace out of a file.
#[derive(Clone, Copy)]
enum Reader {
    /// The columns or keys mean the same in each line.
    Keys(&'static Keys),
    /// A function.
    Of(fn(&Path, Reading<'_>) -> Result<RequestTrace>),
}

/// Opens the rows of a file; `None` if they cannot be read one by one.
type OpenRows = for<'a> fn(&Path, &ReadOptions<'a>) -> Result<Option<Rows<'a>>>;

/// What a reader is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Reading<'a> {
    options: &'a ReadOptions<'a>,
    /// Whether times and hashes play a part. If not, a file that leaves their unit open is read as well.
    is_timed: bool,
}

/// A format of request traces: how it is recognized and read.
pub(crate) struct Layout {
    /// In configurations and on the command line.
    pub name: &'static str,
    shape: Shape,
    /// Columns or keys without which a file is not of the format; each may have several spellings.
    fields: &'static [&'static [&'static str]],
    /// Whether the unit of its times may be set.
    pub has_unit: bool,
    /// Whether it has hashes of blocks whose size may be set.
    pub has_blocks: bool,
    reader: Reader,
    /// For formats whose rows may be requests by themselves.
    rows: Option<OpenRows>,
}

/// Every format, in the order of [`RequestFormat`]. A file is of the first one of its shape whose fields it has.
static LAYOUTS: [Layout; 13] = [
    Layout {
        name: "depthwise",
        shape: Shape::Table,
        fields: &[&["request"], &["arrival_us"], &["prompt_tokens"], &["output_tokens"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(depthwise::read),
        rows: Some(depthwise::rows),
    },
    Layout {
        name: "azure",
        shape: Shape::Table,
        fields: &[&["TIMESTAMP"], &["ContextTokens"], &["GeneratedTokens"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(azure::read),
        rows: Some(azure::rows),
    },
    Layout {
        name: "burst_gpt",
        shape: Shape::Table,
        fields: &[&["Timestamp"], &["Request tokens"], &["Response tokens"]],
        has_unit: true,
        has_blocks: false,
        reader: Reader::Of(burst_gpt::read),
        rows: Some(burst_gpt::rows),
    },
    Layout {
        name: "vidur",
        shape: Shape::Table,
        fields: &[&["arrived_at"], &["num_prefill_tokens"], &["num_decode_tokens"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(vidur::read),
        rows: Some(vidur::rows),
    },
    Layout {
        name: "blis",
        shape: Shape::Table,
        fields: &[&["arrival_time_us"], &["input_tokens"], &["output_tokens"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(blis::read),
        rows: None,
    },
    Layout {
        name: "guidellm_trace",
        shape: Shape::Table,
        fields: &[&["timestamp"], &["input_length"], &["output_length"]],
        has_unit: true,
        has_blocks: false,
        reader: Reader::Of(guidellm::read_trace),
        rows: None,
    },
    Layout {
        name: "bailian",
        shape: Shape::Lines,
        fields: &[&["chat_id"], &["timestamp"], &["input_length"], &["output_length"]],
        has_unit: true,
        has_blocks: true,
        reader: Reader::Keys(&json_lines::BAILIAN),
        rows: None,
    },
    Layout {
        name: "mooncake",
        shape: Shape::Lines,
        fields: &[
            &["timestamp", "created_time", "session_id"],
            &["input_length", "input_tokens"],
            &["output_length", "output_tokens"],
        ],
        has_unit: true,
        has_blocks: true,
        reader: Reader::Keys(&json_lines::MOONCAKE),
        rows: None,
    },
    Layout {
        name: "llm_serving_sim",
        shape: Shape::Lines,
        fields: &[&["arrival_time_ns"], &["input_toks", "sub_requests"], &["output_toks", "sub_requests"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Keys(&json_lines::LLM_SERVING_SIM),
        rows: None,
    },
    Layout {
        name: "aiperf_results",
        shape: Shape::Lines,
        fields: &[&["metadata"], &["metrics", "error"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(aiperf::read),
        rows: None,
    },
    Layout {
        name: "vllm_results",
        shape: Shape::Object,
        fields: &[&["input_lens"], &["output_lens"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(vllm::read),
        rows: None,
    },
    Layout {
        name: "guidellm_results",
        shape: Shape::Object,
        fields: &[&["benchmarks"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(guidellm::read_report),
        rows: None,
    },
    Layout {
        name: "share_gpt",
        shape: Shape::List,
        fields: &[&["conversations", "conversation"]],
        has_unit: false,
        has_blocks: false,
        reader: Reader::Of(share_gpt::read),
        rows: None,
    },
];

impl Layout {
    /// The layout of a format.
    pub fn of(format: RequestFormat) -> &'static Self {
        &LAYOUTS[format as usize]
    }

    /// The layout of a file: the format that the options force, or the one that its beginning tells.
    ///
    /// # Errors
    /// If the file cannot be read or is of no known format, or the options have no meaning for it.
    pub fn of_file(path: &Path, options: &ReadOptions<'_>) -> Result<&'static Self> {
        let layout = match options.format {
            Some(format) => Self::of(format),
            None => detect(path)?,
        };
        options.check(layout)?;
        Ok(layout)
    }

    /// Reads a file of this format.
    pub fn read(&self, path: &Path, options: &ReadOptions<'_>) -> Result<RequestTrace> {
        match self.reader {
            Reader::Keys(keys) => JsonLines::read(path, keys, options)?.into_trace(),
            Reader::Of(read) => read(path, Reading { options, is_timed: true }),
        }
    }

    /// The requests of a file of this format one by one; `None` if it can only be read as a whole.
    pub fn rows<'a>(&self, path: &Path, options: &ReadOptions<'a>) -> Result<Option<Rows<'a>>> {
        self.rows.map_or(Ok(None), |open| open(path, options))
    }

    /// The lengths of all requests of a file of this format, and the warnings.
    pub fn read_lengths(&self, path: &Path, options: &ReadOptions<'_>) -> Result<(Lengths, Vec<String>)> {
        match self.reader {
            Reader::Keys(keys) => Ok(JsonLines::read(path, keys, options)?.into_lengths()),
            Reader::Of(read) => {
                let trace = read(path, Reading { options, is_timed: false })?;
                let lengths = trace.requests.iter().map(|request| (request.prompt_tokens, request.output_tokens));
                Ok((lengths.collect(), trace.warnings))
            }
        }
    }

    /// The fields, for messages.
    fn describe(&self) -> String {
        let spellings: Vec<String> = self.fields.iter().map(|spellings| spellings.join("|")).collect();
        format!("{} ({})", self.name, spellings.join(","))
    }

    /// Whether a file with these columns or keys is of this format.
    fn matches(&self, names: &[String]) -> bool {
        let has = |spellings: &&[&str]| spellings.iter().any(|field| names.iter().any(|name| name == field));
        self.fields.iter().all(has)
    }
}

const TOKENS: &str = "a whole number of tokens from 1 to 1073741824";
const TIME: &str = "a time from 0 to a century";

/// The file's name without its ending, `.csv` or `.csv.gz`.
pub(crate) fn name_of(path: &Path) -> String {
    let packed = path.extension().is_some_and(|ending| ending == "gz" || ending == "zst");
    let name = if packed { path.file_stem().map(Path::new).unwrap_or(path) } else { path };
    name.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

/// Rows of a file that are not requests.
#[derive(Clone, Copy, Debug, Default)]
struct LeftOut {
    without_prompt: usize,
    without_output: usize,
}

impl LeftOut {
    /// None if a row has tokens; otherwise, it is counted, or the place of the length that makes the file be refused:
    /// 0 of the prompt, 1 of the output.
    fn without_tokens(&mut self, prompt: u32, output: u32, zero_tokens: ZeroTokens) -> Option<Option<usize>> {
        let place = [prompt, output].iter().position(|&tokens| tokens == 0)?;
        match (zero_tokens, place) {
            (ZeroTokens::Refuse, _) => return Some(Some(place)),
            (ZeroTokens::Skip, 0) => self.without_prompt += 1,
            (ZeroTokens::Skip, _) => self.without_output += 1,
        }
        Some(None)
    }

    /// What to say of them.
    fn warnings(self) -> impl Iterator<Item = String> {
        let Self { without_prompt, without_output } = self;
        let counted = [(without_prompt, "prompt"), (without_output, "output")].into_iter().filter(|kind| kind.0 > 0);
        let counted: Vec<String> = counted.map(|(count, kind)| format!("{count} without {kind} tokens")).collect();
        let counted = (!counted.is_empty()).then(|| counted.join(" and "));
        counted.into_iter().map(|rows| format!("requests left out: {rows} (`zero_tokens: refuse` refuses the file)"))
    }
}

/// Keys that link requests to each other, where a format has no use for them.
const SESSION_KEYS: [&str; 13] = [
    "session_id",
    "session",
    "conversation_id",
    "parent_chat_id",
    "parent_id",
    "user_id",
    "delay",
    "delay_ms",
    "delay_us",
    "think_time",
    "think_time_ms",
    "think_time_us",
    "depends_on",
];

/// Warnings about columns or keys of a file that are not used.
fn unused_warnings<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let (sessions, others): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| SESSION_KEYS.contains(name));
    let list = |names: &[&str]| {
        const SHOWN: usize = 8;
        let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{}`", name.escape_debug())).collect();
        let more = names.len().saturating_sub(SHOWN);
        if more > 0 { format!("{} and {more} others", shown.join(", ")) } else { shown.join(", ") }
    };
    let mut warnings = Vec::new();
    if !sessions.is_empty() {
        let names = list(&sessions);
        warnings.push(format!("sessions and delays are not replayed ({names}): each request arrives at its own time"));
    }
    if !others.is_empty() {
        warnings.push(format!("not used: {}", list(&others)));
    }
    warnings
}

/// What is to be said of a table of others; `silent` are columns that change nothing of what is replayed.
fn table_warnings(table: &Table, left_out: LeftOut, silent: &[&str]) -> Vec<String> {
    let unused = table.unused().iter().map(String::as_str).filter(|column| !silent.contains(column));
    left_out.warnings().chain(unused_warnings(unused)).collect()
}

/// A number of tokens, perhaps with a fraction of zero, as some programs write whole numbers.
fn parse_tokens(text: &str) -> Option<u32> {
    let whole = text.split_once('.').filter(|(_, zeros)| !zeros.is_empty() && zeros.trim_matches('0').is_empty());
    let tokens: u32 = whole.map_or(text, |(whole, _)| whole).parse().ok()?;
    (tokens <= Request::MAX_TOKENS).then_some(tokens)
}

/// Prompt and output tokens of a row of others, which are in these columns; none of one that is left out.
fn lengths(
    row: &Row<'_>,
    columns: [usize; 2],
    options: &ReadOptions<'_>,
    left_out: &mut LeftOut,
) -> Result<Option<(u32, u32)>> {
    let [prompt, output] = columns.map(|column| row.get(column, TOKENS, parse_tokens));
    let (prompt, output) = (prompt?, output?);
    match left_out.without_tokens(prompt, output, options.zero_tokens) {
        None => Ok(Some((prompt, output))),
        Some(None) => Ok(None),
        Some(Some(place)) => Err(row.error(columns[place], TOKENS)),
    }
}

/// A time in a column, in a unit.
fn parse_time(text: &str, unit: TimeUnit) -> Option<Nanos> {
    unit.nanos_of(text.parse().ok()?).filter(|&arrival| arrival <= Request::MAX_ARRIVAL)
}

/// The error of a file whose times may be in seconds or milliseconds.
fn unknown_unit(path: &Path, found: &str, key: &str) -> TraceError {
    let found = format!("a file {found} whose {key} may be seconds or milliseconds");
    let expected = "the unit: `time_unit: s` or `time_unit: ms` (`--time-unit s`, `--time-unit ms`)";
    TraceError::file(path, found, expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_formats_and_names_them_as_files_do() {
        for format in RequestFormat::ALL {
            assert_eq!(serde_yaml::to_string(&format).unwrap().trim(), format.name());
        }
    }
}

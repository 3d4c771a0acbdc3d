//! Request traces with one JSON object per line: arrival, lengths, and hashes or token ids of the prompt.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Number;

use crate::error::{Result, TraceError};
use crate::input::{Text, json_message, open_file};
use crate::request::{PrefixHashes, Request, RequestTrace};
use crate::request_file::{LeftOut, Lengths, ReadOptions, TIME, TOKENS, TimeUnit, name_of};

/// The keys of a format.
pub(crate) struct Keys {
    pub time: &'static str,
    pub prompt: &'static str,
    pub output: &'static str,
    pub ids: &'static str,
    /// Keys that do not affect a replay.
    pub silent: &'static [&'static str],
    /// Unit of the times, if the format has a fixed one.
    pub unit: Option<TimeUnit>,
    /// Meaning of the ids.
    pub ids_are: Ids,
}

/// Meaning of a line's list of numbers.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Ids {
    /// A hash for each block of the prompt, the last of which may be partial. Blocks have this many tokens unless the
    /// file determines another size.
    Blocks(u32),
    /// The prompt's tokens.
    Tokens,
}

/// Keys that link requests to each other. A trace with one of them consists of sessions, and is replayed without them.
const SESSION_KEYS: [&str; 14] = [
    "session_id",
    "session",
    "conversation_id",
    "parent_chat_id",
    "parent_id",
    "user_id",
    "Session ID",
    "delay",
    "delay_ms",
    "delay_us",
    "think_time",
    "think_time_ms",
    "think_time_us",
    "depends_on",
];

/// Warnings about columns or keys of a file that are not used.
pub(crate) fn unused_warnings<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
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

/// The non-blank lines of a text file with their numbers, one at a time in memory.
pub(crate) struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<Text>,
    line: u64,
    buffer: Vec<u8>,
}

impl<'a> Lines<'a> {
    pub fn open(path: &'a Path) -> Result<Self> {
        Ok(Self { path, reader: BufReader::new(open_file(path)?), line: 0, buffer: Vec::new() })
    }

    pub fn next_line(&mut self) -> Result<Option<(u64, &[u8])>> {
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

/// Name in place of a key, in errors about a whole line.
const WHOLE_LINE: &str = "the object";

/// Position of a line of JSON, for errors.
#[derive(Clone, Copy)]
struct JsonRow<'a> {
    path: &'a Path,
    line: u64,
}

impl JsonRow<'_> {
    fn parse(&self, text: &[u8], keys: &Keys, others: &mut BTreeSet<String>) -> Result<Line> {
        let mut json = serde_json::Deserializer::from_slice(text);
        let mut track = serde_path_to_error::Track::new();
        let line = LineSeed { keys, others }.deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track));
        let line = line.map_err(|error: serde_json::Error| {
            let key = track.path().to_string();
            self.json_error(if matches!(key.as_str(), "." | "?") { WHOLE_LINE } else { &key }, &json_message(&error))
        })?;
        json.end().map_err(|_| self.json_error(WHOLE_LINE, "expected nothing after it"))?;
        Ok(line)
    }

    fn json_error(&self, key: &str, message: &str) -> TraceError {
        TraceError::Json { path: self.path.to_owned(), line: self.line, key: key.into(), message: message.into() }
    }

    fn tokens(&self, key: &str, tokens: u64) -> Result<u32> {
        let in_range = u32::try_from(tokens).ok().filter(|&tokens| tokens <= Request::MAX_TOKENS);
        in_range.ok_or_else(|| self.value_error(key, tokens, TOKENS))
    }

    fn value_error(&self, column: &str, found: impl fmt::Display, expected: impl Into<String>) -> TraceError {
        let (path, column, found) = (self.path.to_owned(), column.into(), format!("`{found}`"));
        TraceError::Value { path, line: self.line, column, found, expected: expected.into() }
    }
}

/// Contents of a line.
struct Line {
    time: Number,
    prompt: u64,
    output: u64,
    ids: Option<Vec<u64>>,
}

/// Reads a [`Line`], and keeps the names of unused keys.
struct LineSeed<'a> {
    keys: &'a Keys,
    others: &'a mut BTreeSet<String>,
}

/// A key of a line, by its index among the four that are read.
enum Key {
    Read(usize),
    Other,
}

struct KeySeed<'a, 'b>(&'a mut LineSeed<'b>);

impl<'de> DeserializeSeed<'de> for KeySeed<'_, '_> {
    type Value = Key;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_, '_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Key, E> {
        let LineSeed { keys, others } = self.0;
        if let Some(place) = [keys.time, keys.prompt, keys.output, keys.ids].iter().position(|key| *key == name) {
            return Ok(Key::Read(place));
        }
        if !keys.silent.contains(&name) && !others.contains(name) {
            others.insert(name.to_owned());
        }
        Ok(Key::Other)
    }
}

impl<'de> DeserializeSeed<'de> for LineSeed<'_> {
    type Value = Line;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Line, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for LineSeed<'_> {
    type Value = Line;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a request")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Line, A::Error> {
        let (mut time, mut lengths, mut ids) = (None, [None, None], None);
        let mut seen = [false; 4];
        while let Some(key) = map.next_key_seed(KeySeed(&mut self))? {
            let Key::Read(place) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if std::mem::replace(&mut seen[place], true) {
                let Keys { time, prompt, output, ids, .. } = *self.keys;
                return Err(de::Error::duplicate_field([time, prompt, output, ids][place]));
            }
            match place {
                0 => time = Some(map.next_value::<Number>()?),
                1 | 2 => lengths[place - 1] = Some(map.next_value::<Whole>()?.0),
                _ => ids = map.next_value::<Option<Vec<u64>>>()?,
            }
        }
        let Keys { time: time_key, prompt: prompt_key, output: output_key, .. } = *self.keys;
        let time = time.ok_or_else(|| match self.others.iter().find(|key| SESSION_KEYS.contains(&key.as_str())) {
            Some(key) if key.starts_with("delay") || key.starts_with("think") => de::Error::custom(format!(
                "missing field `{time_key}`: a request that follows another one after `{key}` cannot be replayed"
            )),
            _ => de::Error::missing_field(time_key),
        })?;
        let prompt = lengths[0].ok_or_else(|| de::Error::missing_field(prompt_key))?;
        let output = lengths[1].ok_or_else(|| de::Error::missing_field(output_key))?;
        Ok(Line { time, prompt, output, ids })
    }
}

/// A whole number, which some programs write with a fraction of zero (pandas, in a column where a number is missing).
struct Whole(u64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const MOST: f64 = (1_u64 << 53) as f64;
        let number = Number::deserialize(deserializer)?;
        let float = || number.as_f64().filter(|number| number.fract() == 0.0 && (0.0..=MOST).contains(number));
        let whole = number.as_u64().or_else(|| float().map(|number| number as u64));
        let expected = || de::Error::custom(format!("found `{number}`, expected a whole number of at least 0"));
        whole.map(Self).ok_or_else(expected)
    }
}

/// A request whose time unit is not known yet.
struct Pending {
    line: u64,
    time: Number,
    prompt_tokens: u32,
    output_tokens: u32,
}

/// Block sizes that match the number of hashes of every prompt so far.
#[derive(Clone, Copy)]
struct BlockSizes {
    least: u64,
    most: u64,
}

impl BlockSizes {
    const ANY: Self = Self { least: 1, most: Request::MAX_TOKENS as u64 };

    /// Block sizes for which a prompt has `blocks` blocks, the last of which may be partial.
    fn of(prompt_tokens: u32, blocks: usize) -> Self {
        let (tokens, blocks) = (u64::from(prompt_tokens), blocks as u64);
        match blocks {
            0 => Self { least: 1, most: 0 },
            1 => Self { least: tokens, ..Self::ANY },
            _ => Self { least: tokens.div_ceil(blocks), most: (tokens - 1) / (blocks - 1) },
        }
    }

    fn and(self, other: Self) -> Self {
        Self { least: self.least.max(other.least), most: self.most.min(other.most) }
    }

    fn contains(self, tokens: u32) -> bool {
        (self.least..=self.most).contains(&u64::from(tokens))
    }

    fn is_empty(self) -> bool {
        self.least > self.most
    }

    /// The only size, or the only one that is a power of two.
    fn only(self) -> Option<u32> {
        if self.least == self.most {
            return u32::try_from(self.least).ok();
        }
        let power = self.least.next_power_of_two();
        (power <= self.most && 2 * power > self.most).then_some(power as u32)
    }
}

/// A trace of one object per line.
pub(crate) struct JsonLines<'a> {
    path: &'a Path,
    keys: &'a Keys,
    options: &'a ReadOptions,
    requests: Vec<Pending>,
    /// All lines' ids one after the other; those of line `i` end at `ends[i]`.
    ids: Vec<u64>,
    ends: Vec<usize>,
    sizes: BlockSizes,
    left_out: LeftOut,
    others: BTreeSet<String>,
}

impl<'a> JsonLines<'a> {
    /// Reads all lines.
    ///
    /// # Errors
    /// If a line cannot be read.
    pub fn read(path: &'a Path, keys: &'a Keys, options: &'a ReadOptions) -> Result<Self> {
        let mut trace = Self {
            path,
            keys,
            options,
            requests: Vec::new(),
            ids: Vec::new(),
            ends: Vec::new(),
            sizes: BlockSizes::ANY,
            left_out: LeftOut::default(),
            others: BTreeSet::new(),
        };
        let mut lines = Lines::open(path)?;
        while let Some((line, text)) = lines.next_line()? {
            trace.push(JsonRow { path, line }, text)?;
        }
        Ok(trace)
    }

    fn push(&mut self, row: JsonRow<'_>, text: &[u8]) -> Result<()> {
        let Keys { prompt, output, .. } = *self.keys;
        let line = row.parse(text, self.keys, &mut self.others)?;
        let (prompt_tokens, output_tokens) = (row.tokens(prompt, line.prompt)?, row.tokens(output, line.output)?);
        if let Some(column) = self.left_out.without_tokens(prompt_tokens, output_tokens, self.options.zero_tokens) {
            return match column {
                Some(column) => Err(row.value_error([prompt, output][column], 0, TOKENS)),
                None => Ok(()),
            };
        }
        match line.ids {
            Some(ids) if self.ends.len() == self.requests.len() => {
                self.push_ids(row, prompt_tokens, &ids)?;
            }
            None if self.ends.is_empty() => {}
            _ => return Err(row.json_error(WHOLE_LINE, "expected prompt blocks or tokens in every line or in none")),
        }
        self.requests.push(Pending { line: row.line, time: line.time, prompt_tokens, output_tokens });
        Ok(())
    }

    fn push_ids(&mut self, row: JsonRow<'_>, prompt_tokens: u32, ids: &[u64]) -> Result<()> {
        let wrong = |expected: String| row.value_error(self.keys.ids, format_args!("{} ids", ids.len()), expected);
        match self.keys.ids_are {
            Ids::Tokens if ids.len() == prompt_tokens as usize => {
                let hashes = hash_prefixes(ids, self.options.prefix_block_tokens.max(1));
                self.ids.extend(hashes);
            }
            Ids::Tokens => return Err(wrong(format!("{prompt_tokens}, as in {}", self.keys.prompt))),
            Ids::Blocks(usual) => {
                let sizes = self.sizes.and(BlockSizes::of(prompt_tokens, ids.len()));
                let given = self.options.hash_block_tokens;
                let block = given.or(self.sizes.contains(usual).then_some(usual));
                if sizes.is_empty() || given.is_some_and(|given| !sizes.contains(given)) {
                    let BlockSizes { least, most } = self.sizes;
                    return Err(wrong(match block {
                        Some(block) => {
                            let blocks = prompt_tokens.div_ceil(block);
                            format!("{blocks}, one for each {block} tokens of the prompt")
                        }
                        None => format!("one for each block of the {least} to {most} tokens that fit the lines before"),
                    }));
                }
                self.sizes = sizes;
                self.ids.extend(ids);
            }
        }
        self.ends.push(self.ids.len());
        Ok(())
    }

    /// The lengths of all prompts and outputs, and the warnings. Times and hashes are ignored.
    pub fn into_lengths(self) -> (Lengths, Vec<String>) {
        let warnings = self.left_out.warnings().collect();
        (self.requests.into_iter().map(|request| (request.prompt_tokens, request.output_tokens)).collect(), warnings)
    }

    /// The trace.
    ///
    /// # Errors
    /// If the file does not determine the unit of its times or the size of its blocks, or a time is out of range.
    pub fn into_trace(self) -> Result<RequestTrace> {
        let mut warnings: Vec<String> = self.left_out.warnings().collect();
        let block_tokens = self.block_tokens(&mut warnings)?;
        let unit = self.unit(block_tokens)?;
        let arrival = |pending: &Pending| {
            let row = JsonRow { path: self.path, line: pending.line };
            let arrival = unit.nanos(&pending.time).filter(|&arrival| arrival <= Request::MAX_ARRIVAL);
            arrival.ok_or_else(|| row.value_error(self.keys.time, &pending.time, TIME))
        };
        let mut requests = Vec::with_capacity(self.requests.len());
        for pending in &self.requests {
            let &Pending { prompt_tokens, output_tokens, .. } = pending;
            requests.push(Request { id: 0, arrival: arrival(pending)?, prompt_tokens, output_tokens });
        }
        let prefix_hashes = block_tokens.map(|block_tokens| {
            let mut hashes = PrefixHashes::new(block_tokens);
            let mut start = 0;
            for (request, &end) in requests.iter().zip(&self.ends) {
                let whole = (request.prompt_tokens / block_tokens) as usize;
                hashes.push(self.ids[start..end].iter().copied().take(whole));
                start = end;
            }
            hashes
        });
        warnings.extend(unused_warnings(self.others.iter().map(String::as_str)));
        Ok(RequestTrace { warnings, ..RequestTrace::from_unsorted(name_of(self.path), requests, prefix_hashes) })
    }

    /// Tokens per block; `None` without hashes.
    fn block_tokens(&self, warnings: &mut Vec<String>) -> Result<Option<u32>> {
        let usual = match self.keys.ids_are {
            _ if self.ends.is_empty() => return Ok(None),
            Ids::Tokens => return Ok(Some(self.options.prefix_block_tokens.max(1))),
            Ids::Blocks(usual) => usual,
        };
        if let Some(given) = self.options.hash_block_tokens {
            return Ok(Some(given));
        }
        if self.sizes.contains(usual) {
            return Ok(Some(usual));
        }
        let (BlockSizes { least, most }, ids) = (self.sizes, self.keys.ids);
        let Some(only) = self.sizes.only() else {
            let found = format!("{ids} of blocks of {least} to {most} tokens, each of which fits every prompt");
            let expected = "the size of a block: `hash_block_tokens: N` (`--hash-block-tokens N`)";
            return Err(TraceError::file(self.path, found, expected));
        };
        if least < most {
            let sizes = format!("of the sizes that fit every prompt, {least} to {most}, the only power of two");
            warnings.push(format!("{ids} are taken to be of blocks of {only} tokens: {sizes}"));
        }
        Ok(Some(only))
    }

    /// Unit of the times. Mooncake's times are milliseconds. Files of its layout with other blocks, with fractions or
    /// without hashes come from other sources, and are as often in seconds.
    fn unit(&self, block_tokens: Option<u32>) -> Result<TimeUnit> {
        if let Some(unit) = self.options.time_unit.or(self.keys.unit) {
            return Ok(unit);
        }
        let is_whole = |pending: &Pending| pending.time.as_f64().is_some_and(|time| time.fract() == 0.0);
        let fraction = self.requests.iter().find(|pending| !is_whole(pending));
        let found = match (block_tokens, fraction) {
            (Some(block), None) if self.keys.ids_are == Ids::Blocks(block) => return Ok(TimeUnit::Milliseconds),
            (None, _) => "without hash_ids".to_owned(),
            (_, Some(Pending { time, line, .. })) => format!("with fractions, as {time} in line {line},"),
            (Some(block), None) => format!("with blocks of {block} tokens"),
        };
        let found = format!("a file {found} whose {} may be seconds or milliseconds", self.keys.time);
        let expected = "the unit: `time_unit: s` or `time_unit: ms` (`--time-unit s`, `--time-unit ms`)";
        Err(TraceError::file(self.path, found, expected))
    }
}

/// A hash of all tokens up to the end of each whole block.
fn hash_prefixes(token_ids: &[u64], block_tokens: u32) -> Vec<u64> {
    let mut prefix = DefaultHasher::new();
    let blocks = token_ids.chunks_exact(block_tokens as usize);
    let hash = |block: &[u64]| {
        block.iter().for_each(|&token| prefix.write_u64(token));
        prefix.finish()
    };
    blocks.map(hash).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_tokens_has_another_hash_after_other_tokens() {
        assert_ne!(hash_prefixes(&[1, 2, 7, 7], 2)[1], hash_prefixes(&[3, 4, 7, 7], 2)[1]);
        assert_eq!(hash_prefixes(&[1, 2, 7, 7], 2)[0], hash_prefixes(&[1, 2, 8], 2)[0]);
    }

    #[test]
    fn block_sizes_are_those_with_which_a_prompt_has_so_many_blocks() {
        for tokens in 1..70 {
            for blocks in 1..9 {
                let sizes = BlockSizes::of(tokens, blocks);
                for size in 1..80 {
                    let fits = tokens.div_ceil(size) as usize == blocks;
                    assert_eq!(sizes.contains(size), fits, "{tokens} tokens in {blocks} blocks of {size}");
                }
            }
        }
        assert!(BlockSizes::of(5, 0).is_empty());
    }

    #[test]
    fn a_size_is_determined_if_it_is_the_only_one_or_the_only_power_of_two() {
        let only = |least, most| BlockSizes { least, most }.only();
        assert_eq!(only(24, 24), Some(24));
        assert_eq!(only(23, 45), Some(32));
        assert_eq!(only(16, 31), Some(16));
        assert_eq!(only(16, 32), None, "two powers");
        assert_eq!(only(17, 31), None, "no power");
        assert_eq!(BlockSizes::ANY.only(), None);
    }
}

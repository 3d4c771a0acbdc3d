//! Request traces with one JSON object per line, whose keys mean the same in each: arrival, lengths, hashes or token ids
//! of the prompt, and sessions.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Number;

use super::drafts::{Draft, Drafts};
use super::{LeftOut, TIME, TOKENS, unknown_unit, unused_warnings};
use crate::error::{Result, TraceError};
use crate::input::{Text, json_message, open_file};
use crate::request::{PrefixHashes, Request, RequestTrace};
use crate::request_file::{Lengths, ReadOptions, TimeUnit};

/// The keys of a format.
pub(super) struct Keys {
    /// What is read, by its spellings.
    read: &'static [(&'static str, Field)],
    /// Keys that do not affect a replay.
    silent: &'static [&'static str],
    /// Unit of the times, if the format has a fixed one.
    unit: Option<TimeUnit>,
    /// Meaning of the ids.
    ids_are: Ids,
}

/// Meaning of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// Arrival.
    Time,
    /// Tokens of the prompt.
    Prompt,
    /// Tokens of the output.
    Output,
    /// Hashes of blocks of the prompt, or its tokens.
    Ids,
    /// Name of the session.
    Session,
    /// Name of the request, by which others name it as their parent.
    Name,
    /// Name of the request before in the session, or a negative number.
    Parent,
    /// Time from the answer before, in this unit or in that of the times.
    Delay(Option<TimeUnit>),
    /// The requests of an agent, one after the other.
    SubRequests,
}

/// Meaning of a line's list of numbers.
#[derive(Clone, Copy, PartialEq)]
enum Ids {
    /// A hash for each block of the prompt, the last of which may be partial. Blocks have this many tokens unless the
    /// file determines another size.
    Blocks(u32),
    /// The prompt's tokens.
    Tokens,
}

pub(super) static MOONCAKE: Keys = Keys {
    read: &[
        ("timestamp", Field::Time),
        ("created_time", Field::Time),
        ("input_length", Field::Prompt),
        ("input_tokens", Field::Prompt),
        ("output_length", Field::Output),
        ("output_tokens", Field::Output),
        ("hash_ids", Field::Ids),
        ("session_id", Field::Session),
        ("delay", Field::Delay(None)),
        ("delay_ms", Field::Delay(Some(TimeUnit::Milliseconds))),
    ],
    silent: &["request_id", "type", "output_token_ids"],
    unit: None,
    ids_are: Ids::Blocks(512),
};

pub(super) static BAILIAN: Keys = Keys {
    read: &[
        ("timestamp", Field::Time),
        ("input_length", Field::Prompt),
        ("output_length", Field::Output),
        ("hash_ids", Field::Ids),
        ("chat_id", Field::Name),
        ("parent_chat_id", Field::Parent),
    ],
    silent: &["turn", "type"],
    unit: Some(TimeUnit::Seconds),
    ids_are: Ids::Blocks(16),
};

pub(super) static LLM_SERVING_SIM: Keys = Keys {
    read: &[
        ("arrival_time_ns", Field::Time),
        ("input_toks", Field::Prompt),
        ("output_toks", Field::Output),
        ("input_tok_ids", Field::Ids),
        ("session_id", Field::Session),
        ("sub_requests", Field::SubRequests),
    ],
    silent: &["request_id", "output_tok_ids"],
    unit: Some(TimeUnit::Nanoseconds),
    ids_are: Ids::Tokens,
};

impl Keys {
    /// The first spelling of a field, for messages.
    fn name(&self, field: Field) -> &'static str {
        self.read.iter().find(|(_, found)| *found == field).map_or("", |(name, _)| name)
    }
}

/// The non-blank lines of a text file with their numbers, one at a time in memory.
pub(super) struct Lines<'a> {
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
pub(super) struct JsonRow<'a> {
    pub path: &'a Path,
    pub line: u64,
}

impl JsonRow<'_> {
    /// The line, read by `seed`.
    pub fn parse<'de, S: DeserializeSeed<'de>>(&self, text: &'de [u8], seed: S) -> Result<S::Value> {
        let mut json = serde_json::Deserializer::from_slice(text);
        let mut track = serde_path_to_error::Track::new();
        let line = seed.deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track));
        let line = line.map_err(|error: serde_json::Error| {
            let key = track.path().to_string();
            self.json_error(if matches!(key.as_str(), "." | "?") { WHOLE_LINE } else { &key }, &json_message(&error))
        })?;
        json.end().map_err(|_| self.json_error(WHOLE_LINE, "expected nothing after it"))?;
        Ok(line)
    }

    pub fn json_error(&self, key: &str, message: &str) -> TraceError {
        TraceError::Json { path: self.path.to_owned(), line: self.line, key: key.into(), message: message.into() }
    }

    pub fn tokens(&self, key: &str, tokens: u64) -> Result<u32> {
        let in_range = u32::try_from(tokens).ok().filter(|&tokens| tokens <= Request::MAX_TOKENS);
        in_range.ok_or_else(|| self.value_error(key, tokens, TOKENS))
    }

    pub fn value_error(&self, column: &str, found: impl fmt::Display, expected: impl Into<String>) -> TraceError {
        let (path, column, found) = (self.path.to_owned(), column.into(), format!("`{found}`"));
        TraceError::Value { path, line: self.line, column, found, expected: expected.into() }
    }
}

/// Contents of a line; values with the spelling of their key.
#[derive(Default)]
struct Line {
    time: Option<(&'static str, Number)>,
    prompt: Option<(&'static str, u64)>,
    output: Option<(&'static str, u64)>,
    ids: Option<Vec<u64>>,
    session: Option<String>,
    name: Option<String>,
    parent: Option<String>,
    delay: Option<(&'static str, Number, Option<TimeUnit>)>,
    sub_requests: Option<Vec<SubRequest>>,
}

/// A request of an agent.
#[derive(Deserialize)]
struct SubRequest {
    input_toks: Whole,
    output_toks: Whole,
    input_tok_ids: Option<Vec<u64>>,
    /// Time of the tool that the answer calls, before the next request of the agent.
    tool_duration_ns: Option<Whole>,
}

/// Reads a [`Line`], and keeps the names of unused keys.
struct LineSeed<'a> {
    keys: &'a Keys,
    others: &'a mut BTreeSet<String>,
}

struct KeySeed<'a, 'b>(&'a mut LineSeed<'b>);

impl<'de> DeserializeSeed<'de> for KeySeed<'_, '_> {
    /// The place of the key among those that are read.
    type Value = Option<usize>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_, '_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        let LineSeed { keys, others } = self.0;
        let place = keys.read.iter().position(|(key, _)| *key == name);
        if place.is_none() && !keys.silent.contains(&name) && !others.contains(name) {
            others.insert(name.to_owned());
        }
        Ok(place)
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
        let mut line = Line::default();
        let mut seen: Vec<Field> = Vec::new();
        let is_same = |a: Field, b: Field| a == b || matches!((a, b), (Field::Delay(_), Field::Delay(_)));
        while let Some(place) = map.next_key_seed(KeySeed(&mut self))? {
            let Some(place) = place else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let (key, field) = self.keys.read[place];
            if seen.iter().any(|&before| is_same(before, field)) {
                return Err(de::Error::duplicate_field(key));
            }
            seen.push(field);
            match field {
                Field::Time => line.time = map.next_value::<Option<Number>>()?.map(|time| (key, time)),
                Field::Prompt => line.prompt = Some((key, map.next_value::<Whole>()?.0)),
                Field::Output => line.output = Some((key, map.next_value::<Whole>()?.0)),
                Field::Ids => line.ids = map.next_value()?,
                Field::Session => line.session = map.next_value::<Option<Name>>()?.map(|name| name.0),
                Field::Name => line.name = map.next_value::<Option<Name>>()?.map(|name| name.0),
                Field::Parent => line.parent = map.next_value::<Option<Name>>()?.map(|name| name.0),
                Field::Delay(unit) => line.delay = map.next_value::<Option<Number>>()?.map(|delay| (key, delay, unit)),
                Field::SubRequests => line.sub_requests = map.next_value()?,
            }
        }
        let needed = [
            (Field::Prompt, line.prompt.is_none() && line.sub_requests.is_none()),
            (Field::Output, line.output.is_none() && line.sub_requests.is_none()),
        ];
        if let Some((field, _)) = needed.into_iter().find(|(_, is_missing)| *is_missing) {
            return Err(de::Error::missing_field(self.keys.name(field)));
        }
        let time = self.keys.name(Field::Time);
        match (&line.time, &line.session, &line.delay) {
            (None, None, Some((key, ..))) => Err(de::Error::custom(format!(
                "missing field `{time}`: a request that is sent so long after another one (`{key}`) needs a `session_id`"
            ))),
            (None, None, None) => Err(de::Error::missing_field(time)),
            _ => Ok(line),
        }
    }
}

/// A whole number, which some programs write with a fraction of zero (pandas, in a column where a number is missing).
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole(pub u64);

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

/// The name of a session or a request: a text or a whole number.
#[derive(Clone, Debug)]
pub(super) struct Name(pub String);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl Visitor<'_> for Visit {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a whole number")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Name, E> {
                Ok(Name(name.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, name: u64) -> Result<Name, E> {
                Ok(Name(name.to_string()))
            }

            fn visit_i64<E: de::Error>(self, name: i64) -> Result<Name, E> {
                Ok(Name(name.to_string()))
            }
        }
        deserializer.deserialize_any(Visit)
    }
}

/// A request whose time unit is not known yet.
struct Pending {
    line: u64,
    time: Option<(&'static str, Number)>,
    prompt_tokens: u32,
    output_tokens: u32,
    session: Option<u32>,
    delay: Option<(&'static str, Number, Option<TimeUnit>)>,
    /// Whether the line is one of a session without its tokens, which only adds to the delay of the next one.
    is_left_out: bool,
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
pub(super) struct JsonLines<'a> {
    path: &'a Path,
    keys: &'static Keys,
    options: &'a ReadOptions<'a>,
    requests: Vec<Pending>,
    drafts: Drafts,
    /// All requests' ids one after the other; those of request `i` end at `ends[i]`.
    ids: Vec<u64>,
    ends: Vec<usize>,
    /// Number of requests with tokens.
    served: usize,
    sizes: BlockSizes,
    left_out: LeftOut,
    others: BTreeSet<String>,
}

/// One request of a line, as its keys have it.
struct Entry {
    time: Option<(&'static str, Number)>,
    prompt: (&'static str, u64),
    output: (&'static str, u64),
    ids: Option<Vec<u64>>,
    session: Option<u32>,
    delay: Option<(&'static str, Number, Option<TimeUnit>)>,
}

impl<'a> JsonLines<'a> {
    /// Reads all lines.
    ///
    /// # Errors
    /// If a line cannot be read.
    pub fn read(path: &'a Path, keys: &'static Keys, options: &'a ReadOptions<'a>) -> Result<Self> {
        let mut trace = Self {
            path,
            keys,
            options,
            requests: Vec::new(),
            drafts: Drafts::new(path, keys.name(Field::Time)),
            ids: Vec::new(),
            ends: Vec::new(),
            served: 0,
            sizes: BlockSizes::ANY,
            left_out: LeftOut::default(),
            others: BTreeSet::new(),
        };
        let mut lines = Lines::open(path)?;
        while let Some((line, text)) = lines.next_line()? {
            trace.push_line(JsonRow { path, line }, text)?;
        }
        Ok(trace)
    }

    fn push_line(&mut self, row: JsonRow<'_>, text: &[u8]) -> Result<()> {
        let line = row.parse(text, LineSeed { keys: self.keys, others: &mut self.others })?;
        let agent = line.session.as_ref().filter(|_| line.sub_requests.is_some());
        if let Some(name) = agent.filter(|name| self.drafts.knows(name)) {
            let message = format!("found `{name}` again, expected an agent of another name");
            return Err(row.json_error("session_id", &message));
        }
        let session = self.session(&line, row.line);
        let Line { time, prompt, output, ids, delay, sub_requests, .. } = line;
        let Some(sub_requests) = sub_requests else {
            let (Some(prompt), Some(output)) = (prompt, output) else { return Ok(()) };
            return self.push(row, Entry { time, prompt, output, ids, session, delay });
        };
        if sub_requests.is_empty() {
            return Err(row.json_error("sub_requests", "found none, expected at least one request"));
        }
        let (mut time, mut delay) = (time, None);
        for sub in sub_requests {
            let (prompt, output) = (("input_toks", sub.input_toks.0), ("output_toks", sub.output_toks.0));
            let entry = Entry { time: time.take(), prompt, output, ids: sub.input_tok_ids, session, delay };
            self.push(row, entry)?;
            let tool = sub.tool_duration_ns.map_or(0, |tool| tool.0);
            delay = Some(("tool_duration_ns", tool.into(), Some(TimeUnit::Nanoseconds)));
        }
        Ok(())
    }

    /// The session of a line.
    fn session(&mut self, line: &Line, number: u64) -> Option<u32> {
        if let Some(name) = &line.session {
            return Some(self.drafts.session(name));
        }
        if line.sub_requests.is_some() {
            return Some(self.drafts.session(&format!("\n{number}")));
        }
        let (name, parent) = (line.name.as_ref()?, line.parent.as_ref()?);
        let root = if parent.starts_with('-') { name } else { parent };
        let session = self.drafts.session(root);
        self.drafts.same_session(name.clone(), session);
        Some(session)
    }

    fn push(&mut self, row: JsonRow<'_>, entry: Entry) -> Result<()> {
        let Entry { time, prompt, output, ids, session, delay } = entry;
        let (prompt_tokens, output_tokens) = (row.tokens(prompt.0, prompt.1)?, row.tokens(output.0, output.1)?);
        let mut pending =
            Pending { line: row.line, time, prompt_tokens, output_tokens, session, delay, is_left_out: false };
        if let Some(column) = self.left_out.without_tokens(prompt_tokens, output_tokens, self.options.zero_tokens) {
            if let Some(column) = column {
                return Err(row.value_error([prompt.0, output.0][column], 0, TOKENS));
            }
            if session.is_some() {
                pending.is_left_out = true;
                self.requests.push(pending);
            }
            return Ok(());
        }
        match ids {
            Some(ids) if self.ends.len() == self.served => self.push_ids(row, prompt, prompt_tokens, &ids)?,
            None if self.ends.is_empty() => {}
            _ => return Err(row.json_error(WHOLE_LINE, "expected prompt blocks or tokens in every line or in none")),
        }
        self.served += 1;
        self.requests.push(pending);
        Ok(())
    }

    fn push_ids(
        &mut self,
        row: JsonRow<'_>,
        prompt: (&'static str, u64),
        prompt_tokens: u32,
        ids: &[u64],
    ) -> Result<()> {
        let key = self.keys.name(Field::Ids);
        let wrong = |expected: String| row.value_error(key, format_args!("{} ids", ids.len()), expected);
        match self.keys.ids_are {
            Ids::Tokens if ids.len() == prompt_tokens as usize => {
                let hashes = PrefixHashes::of_tokens(ids, self.options.prefix_block_tokens.max(1));
                self.ids.extend(hashes);
            }
            Ids::Tokens => return Err(wrong(format!("{prompt_tokens}, as in {}", prompt.0))),
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
        let served = self.requests.into_iter().filter(|request| !request.is_left_out);
        (served.map(|request| (request.prompt_tokens, request.output_tokens)).collect(), warnings)
    }

    /// The trace.
    ///
    /// # Errors
    /// If the file does not determine the unit of its times or the size of its blocks, or a time is out of range.
    pub fn into_trace(self) -> Result<RequestTrace> {
        let mut warnings: Vec<String> = self.left_out.warnings().collect();
        let block_tokens = self.block_tokens(&mut warnings)?;
        let unit = self.unit(block_tokens)?;
        let Self { path, requests, mut drafts, ids, ends, others, .. } = self;
        let in_unit = |line: u64, key: &str, time: &Number, unit: Option<TimeUnit>| {
            // A file without times has no unit to be told apart.
            let found = unit.unwrap_or(TimeUnit::Milliseconds).nanos(time);
            let found = found.filter(|&time| time <= Request::MAX_ARRIVAL);
            found.ok_or_else(|| JsonRow { path, line }.value_error(key, time, TIME))
        };
        let mut hashes = block_tokens.map(PrefixHashes::new);
        let (mut start, mut ends) = (0, ends.iter());
        for pending in &requests {
            let &Pending { line, prompt_tokens, output_tokens, session, ref time, ref delay, is_left_out } = pending;
            let think = delay.as_ref().map(|(key, delay, own)| in_unit(line, key, delay, own.or(unit))).transpose()?;
            let time = time.as_ref().map(|(key, time)| in_unit(line, key, time, unit)).transpose()?;
            if is_left_out {
                drafts.leave_out(session, time, think);
                continue;
            }
            if let (Some(hashes), Some(&end)) = (&mut hashes, ends.next()) {
                let whole = (prompt_tokens / hashes.block_tokens) as usize;
                hashes.push(ids[start..end].iter().copied().take(whole));
                start = end;
            }
            drafts.push(Draft { line, time, prompt_tokens, output_tokens, session, think });
        }
        warnings.extend(unused_warnings(others.iter().map(String::as_str)));
        drafts.into_trace(hashes, warnings)
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
        let (BlockSizes { least, most }, ids) = (self.sizes, self.keys.name(Field::Ids));
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

    /// Unit of the times and delays, if the file has any. Mooncake's times are milliseconds. Files of its layout with
    /// other blocks, with fractions or without hashes come from other sources, and are as often in seconds.
    fn unit(&self, block_tokens: Option<u32>) -> Result<Option<TimeUnit>> {
        let fixed = self.options.time_unit.or(self.keys.unit);
        let times = self.requests.iter().flat_map(|pending| {
            let delay = pending.delay.as_ref().filter(|(.., unit)| unit.is_none()).map(|(key, delay, _)| (*key, delay));
            let time = pending.time.as_ref().map(|(key, time)| (*key, time));
            time.into_iter().chain(delay).map(|(key, time)| (pending.line, key, time))
        });
        let Some((_, first_key, _)) = times.clone().next() else { return Ok(None) };
        if fixed.is_some() {
            return Ok(fixed);
        }
        let is_whole = |time: &Number| time.as_f64().is_some_and(|time| time.fract() == 0.0);
        let fraction = times.clone().find(|(.., time)| !is_whole(time));
        let (found, key) = match (block_tokens, fraction) {
            (Some(block), None) if self.keys.ids_are == Ids::Blocks(block) => return Ok(Some(TimeUnit::Milliseconds)),
            (None, _) => ("without hash_ids".to_owned(), first_key),
            (_, Some((line, key, time))) => (format!("with fractions, as {time} in line {line},"), key),
            (Some(block), None) => (format!("with blocks of {block} tokens"), first_key),
        };
        Err(unknown_unit(self.path, &found, key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

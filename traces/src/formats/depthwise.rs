//! Our own CSV: whole, in order, and with everything that a trace holds.

use std::io::{self, Write};
use std::path::Path;

use super::rows::{Origin, RowLayout, Rows, TimedRow};
use super::{Reading, TOKENS, name_of};
use crate::error::Result;
use crate::request::{PrefixHashes, Request, RequestTrace};
use crate::request_file::ReadOptions;
use crate::sessions::{Link, Sessions};
use crate::table::{Owner, Row, Table, read_header};
use crate::units::Nanos;

const COLUMNS: [&str; 4] = ["request", "arrival_us", "prompt_tokens", "output_tokens"];
/// Columns of a trace with sessions.
const OF_SESSIONS: [&str; 2] = ["session", "think_time_us"];
/// Columns of a trace with prefix hashes.
const OF_HASHES: [&str; 2] = ["hash_block_tokens", "hash_ids"];

const ORDER: &str = "an arrival no earlier than the one before it";
const MICROS: &str = "microseconds from 0 to a century, such as 12.345";

/// The columns of a trace.
fn columns(has_sessions: bool, has_hashes: bool) -> Vec<&'static str> {
    let mut columns = COLUMNS.to_vec();
    columns.extend(OF_SESSIONS.iter().filter(|_| has_sessions));
    columns.extend(OF_HASHES.iter().filter(|_| has_hashes));
    columns
}

static LAYOUT: RowLayout = RowLayout {
    columns: &COLUMNS,
    owner: Owner::Us,
    silent: &[],
    origin: Origin::Zero,
    read: |row, _, before| {
        check_id(row, before.count)?;
        let time = i128::from(row.get(1, MICROS, parse_micros)?.0);
        if time < before.time {
            return Err(row.error(1, ORDER));
        }
        let (prompt_tokens, output_tokens) = (tokens(row, 2)?, tokens(row, 3)?);
        Ok(Some(TimedRow { time, prompt_tokens, output_tokens }))
    },
};

/// The rows of a file without sessions and prefix hashes.
pub(super) fn rows<'a>(path: &Path, options: &ReadOptions<'a>) -> Result<Option<Rows<'a>>> {
    let (has_sessions, has_hashes) = optional_columns(path)?;
    if has_sessions || has_hashes { Ok(None) } else { Rows::open(path, &LAYOUT, options).map(Some) }
}

/// Whether a file has columns of sessions, and of prefix hashes.
fn optional_columns(path: &Path) -> Result<(bool, bool)> {
    let header = read_header(path)?;
    let has = |names: &[&str]| names.iter().any(|name| header.iter().any(|column| column == name));
    Ok((has(&OF_SESSIONS), has(&OF_HASHES)))
}

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    if let Some(rows) = rows(path, options)? {
        return rows.into_trace();
    }
    let (has_sessions, has_hashes) = optional_columns(path)?;
    let mut table = Table::open(path, &columns(has_sessions, has_hashes), Owner::Us)?;
    let mut requests: Vec<Request> = Vec::new();
    let (mut links, mut hashes): (Vec<Link>, Option<PrefixHashes>) = (Vec::new(), None);
    let mut latest: Vec<Nanos> = Vec::new();
    let mut are_starts_timed = None;
    while let Some(row) = table.next_row()? {
        let next = u32::try_from(requests.len()).map_err(|_| row.error(0, "fewer requests"))?;
        let id = check_id(&row, next)?;
        let session = if has_sessions { read_session(&row, latest.len())? } else { None };
        let before = session.and_then(|session| latest.get(session as usize).copied());
        let think = if has_sessions { read_think(&row, before.is_some())? } else { None };
        let is_timed = !has_sessions || !row.text(1)?.is_empty();
        let arrival = match (is_timed, before, think) {
            (true, ..) => row.get(1, MICROS, parse_micros)?,
            (false, Some(before), Some(think)) => before + think,
            (false, None, None) => Nanos::ZERO,
            _ => return Err(row.error(1, format!("{MICROS}, or none where `think_time_us` is given"))),
        };
        if before.is_none() && *are_starts_timed.get_or_insert(is_timed) != is_timed {
            return Err(row.error(1, "an arrival at the beginning of every session, or of none"));
        }
        if arrival > Request::MAX_ARRIVAL {
            return Err(row.error(5, "a think time that keeps arrivals within a century"));
        }
        if requests.last().is_some_and(|last| arrival < last.arrival) {
            let column = if is_timed { 1 } else { 5 };
            return Err(row.error(column, ORDER));
        }
        if let Some(session) = session {
            latest.resize(latest.len().max(session as usize + 1), Nanos::ZERO);
            latest[session as usize] = arrival;
        }
        links.push(Link { session, think, is_timed });
        let prompt_tokens = tokens(&row, 2)?;
        requests.push(Request { id, arrival, prompt_tokens, output_tokens: tokens(&row, 3)? });
        if has_hashes {
            let first = if has_sessions { 6 } else { 4 };
            let block_tokens = tokens(&row, first)?;
            let hashes = hashes.get_or_insert_with(|| PrefixHashes::new(block_tokens));
            if hashes.block_tokens != block_tokens {
                return Err(row.error(first, format!("{}, as in the lines before", hashes.block_tokens)));
            }
            let blocks = (prompt_tokens / block_tokens) as usize;
            let expected = format!("{blocks} whole numbers, one for each whole block of the prompt");
            let ids = row.get(first + 1, &expected, |text| {
                let ids: Option<Vec<u64>> = text.split_ascii_whitespace().map(|id| id.parse().ok()).collect();
                ids.filter(|ids| ids.len() == blocks)
            })?;
            hashes.push(ids);
        }
    }
    let mut trace = RequestTrace { prefix_hashes: hashes, ..RequestTrace::new(name_of(path), requests) };
    trace.sessions = has_sessions.then(|| Sessions::new(links));
    Ok(trace)
}

fn check_id(row: &Row<'_>, next: u32) -> Result<u32> {
    let id = row.get(0, "", |text| text.parse().ok().filter(|&id: &u32| id == next));
    id.map_err(|_| row.error(0, format!("{next}: requests are counted from 0")))
}

fn tokens(row: &Row<'_>, column: usize) -> Result<u32> {
    row.number(column, TOKENS, |tokens| (1..=Request::MAX_TOKENS).contains(tokens))
}

/// The number of a session, which is one that was there or the next one; `None` in an empty field.
fn read_session(row: &Row<'_>, known: usize) -> Result<Option<u32>> {
    if row.text(4)?.is_empty() {
        return Ok(None);
    }
    let expected = format!("a session from 0 to {known}, which are counted in order of appearance, or none");
    row.number(4, &expected, |&session: &u32| session as usize <= known).map(Some)
}

/// The think time; `None` in an empty field.
fn read_think(row: &Row<'_>, has_before: bool) -> Result<Option<Nanos>> {
    match (row.text(5)?.is_empty(), has_before) {
        (true, _) => Ok(None),
        (false, true) => row.get(5, MICROS, parse_micros).map(Some),
        (false, false) => Err(row.error(5, "none in the first request of a session")),
    }
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

/// Writes a trace.
pub(crate) fn write(trace: &RequestTrace, out: &mut dyn Write) -> io::Result<()> {
    let RequestTrace { requests, prefix_hashes, sessions, .. } = trace;
    writeln!(out, "{}", columns(sessions.is_some(), prefix_hashes.is_some()).join(","))?;
    let micros = |Nanos(nanos)| format!("{}.{:03}", nanos / 1000, nanos % 1000);
    for request in requests {
        let link = sessions.as_ref().map_or(Link::ALONE, |sessions| sessions.of(request.id));
        let arrival = if link.is_timed { micros(request.arrival) } else { String::new() };
        write!(out, "{},{arrival},{},{}", request.id, request.prompt_tokens, request.output_tokens)?;
        if sessions.is_some() {
            let session = link.session.map_or_else(String::new, |session| session.to_string());
            write!(out, ",{session},{}", link.think.map_or_else(String::new, micros))?;
        }
        if let Some(hashes) = prefix_hashes {
            let ids: Vec<String> = hashes.of(request.id).iter().map(u64::to_string).collect();
            write!(out, ",{},{}", hashes.block_tokens, ids.join(" "))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

//! TraceV2 of BLIS: a CSV with times in microseconds. The YAML head that goes with it fixes the unit and changes nothing
//! of the requests.

use std::path::Path;

use super::drafts::{Draft, Drafts};
use super::{LeftOut, Reading, TIME, TOKENS, lengths, parse_time, parse_tokens, table_warnings};
use crate::error::Result;
use crate::hash::mix;
use crate::request::{PrefixHashes, Request, RequestTrace};
use crate::request_file::TimeUnit;
use crate::table::{Owner, Table};

const SILENT: [&str; 27] = [
    "request_id",
    "client_id",
    "tenant_id",
    "slo_class",
    "vllm_priority",
    "round_index",
    "prefix_group",
    "prefix_length",
    "streaming",
    "text_tokens",
    "image_tokens",
    "audio_tokens",
    "video_tokens",
    "reason_ratio",
    "model",
    "deadline_us",
    "slo_target_us",
    "server_input_tokens",
    "send_time_us",
    "first_chunk_time_us",
    "last_chunk_time_us",
    "num_chunks",
    "status",
    "error_message",
    "finish_reason",
    "x_request_id",
    "adapter",
];

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let mut table = Table::open(path, &["arrival_time_us", "input_tokens", "output_tokens"], Owner::Others)?;
    let session_id = table.find("session_id")?;
    let server_tokens = table.find("server_input_tokens")?;
    let group_columns = table.find("prefix_group")?.zip(table.find("prefix_length")?);
    let block_tokens = options.prefix_block_tokens.max(1);
    let (mut drafts, mut left_out) = (Drafts::new(path, "arrival_time_us"), LeftOut::default());
    let mut groups = Drafts::new(path, "prefix_group");
    let (mut hashes, mut has_groups) = (PrefixHashes::new(block_tokens), false);
    let mut line = 0;
    while let Some(row) = table.next_row()? {
        line += 1;
        let time = row.get(0, TIME, |text| parse_time(text, TimeUnit::Microseconds))?;
        let Some((input_tokens, output_tokens)) = lengths(&row, [1, 2], options, &mut left_out)? else { continue };
        let group = match group_columns {
            Some((name, length)) if !row.text(name)?.is_empty() => {
                let length = row.get(length, "a whole number of tokens", parse_tokens)?;
                Some((groups.session(row.text(name)?), length))
            }
            _ => None,
        };
        // The tokens of a group's prefix come before those of the column. The server's own count, which includes a
        // template, has precedence where there is no prefix.
        let prompt_tokens = match (group, server_tokens) {
            (Some((_, prefix)), _) => {
                let sum = prefix.checked_add(input_tokens).filter(|&sum| sum <= Request::MAX_TOKENS);
                sum.ok_or_else(|| row.error(1, format!("fewer tokens after a prefix of {prefix}")))?
            }
            (None, Some(column)) => match row.get(column, TOKENS, parse_tokens)? {
                0 => input_tokens,
                counted => counted,
            },
            (None, None) => input_tokens,
        };
        has_groups |= group.is_some();
        let (group, prefix) = group.unwrap_or((0, 0));
        let hash = |block: u32| {
            let is_shared = u64::from(block + 1) * u64::from(block_tokens) <= u64::from(prefix);
            let owner = if is_shared { u64::from(group) } else { (1 << 63) | line };
            mix(mix(owner) ^ u64::from(block))
        };
        hashes.push((0..prompt_tokens / block_tokens).map(hash));
        let name = session_id.map(|column| row.text(column)).transpose()?.filter(|name| !name.is_empty());
        let session = name.map(|name| drafts.session(name));
        drafts.push(Draft { line, time: Some(time), prompt_tokens, output_tokens, session, think: None });
    }
    let mut warnings = table_warnings(&table, left_out, &SILENT);
    if table.has_column("prefix_group") && group_columns.is_none() {
        warnings.push("not used: `prefix_group` without `prefix_length`".to_owned());
    }
    drafts.into_trace(has_groups.then_some(hashes), warnings)
}

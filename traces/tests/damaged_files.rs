//! Whatever happens to a file, reading it gives a sound value or an error, never a panic.

mod allocations;

use std::path::Path;
use std::sync::{Once, OnceLock};

use allocations::Allocations;
use proptest::prelude::*;
use traces::{Component, ExitTable, ExitTrace, LatencyProfile, Request, RequestTrace};

#[global_allocator]
static ALLOCATIONS: Allocations = Allocations;

/// A backtrace of a panic in the parquet crate, which is caught, would take megabytes of its own.
static NO_BACKTRACES: Once = Once::new();

const REQUESTS: [&str; 8] = [
    "request,arrival_us,prompt_tokens,output_tokens\n0,0,10,1\n1,1000.125,20,2\n2,2000,30,3\n",
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n\
     45.5,GPT-4,1087,0,1087,API log\n",
    "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [0, 1, 2]}\n\
     {\"timestamp\": 3500, \"input_length\": 1024, \"output_length\": 9, \"hash_ids\": [0, 4]}\n",
    "{\"input_toks\": 17, \"output_toks\": 7, \"arrival_time_ns\": 1500000, \
     \"input_tok_ids\": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]}\n",
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.071000,1,1200,33\n\
     2024-10-15 00:00:00+00:00,0,220,0\n",
    "{\"chat_id\": 1, \"parent_chat_id\": -1, \"timestamp\": 0.21, \"input_length\": 12, \"output_length\": 30, \
     \"type\": \"text\", \"turn\": 1, \"hash_ids\": [5]}\n{\"chat_id\": 2, \"parent_chat_id\": 1, \"timestamp\": 61.5, \
     \"input_length\": 45, \"output_length\": 20, \"type\": \"text\", \"turn\": 2, \"hash_ids\": [5, 8, 9]}\n",
    "{\"timestamp\": 5, \"input_length\": 64, \"output_length\": 5, \"session_id\": \"a\", \"delay\": 1}\n",
];

const EXITS_YAML: &str = "schema_version: 1\nmodel: m\nfingerprint: f\nnum_loops: 2\nsource: s\n";
const EXITS_CSV: &str = "generation,token,depth,prediction,top1,margin,entropy,similarity\n\
    0,0,0,7,0.5,0.25,1,0\n0,0,1,7,0.75,0.5,0.5,0.9\n1,0,0,1,0.5,0.25,1,0\n1,0,1,1,0.75,0.5,0.5,0.9\n";

const PROFILE_YAML: &str = "schema_version: 1\nmodel: m\nfingerprint: f\nnum_loops: 3\ndevice: d\nsoftware: s\n\
    source: t\noverhead_us: 1.5\nweight_bytes: 10\nkv_bytes_per_token: 2\n";
const PROFILE_CSV: &str = "component,rows,kv_tokens,depths,time_us,spread_us,repeats\n\
    block,1,0,1,10.5,0.1,5\ndepth_mix,8,0,3,1,0,5\nembed,1,0,1,0.5,0,5\nhead,1,0,1,2,0,5\n";

/// One thing done to the bytes of a file; positions are taken modulo its length.
#[derive(Clone, Debug)]
enum Damage {
    Truncate(usize),
    Replace(usize, u8),
    Insert(usize, String),
    Delete(usize, usize),
    Repeat(usize, usize),
}

/// Pieces of text that readers stumble over.
const SCRAPS: &[&str] = &[
    "NaN",
    "-",
    "-1",
    "1e999",
    "4294967296",
    "99999999999999999999",
    "\"",
    "\n",
    "\r\n",
    ",",
    "{",
    "[[[[",
    "\u{feff}",
    "é",
    ": &a *a",
    "0",
    ".",
];

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<usize>().prop_map(Damage::Truncate),
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Damage::Replace(at, byte)),
        (any::<usize>(), prop::sample::select(SCRAPS)).prop_map(|(at, scrap)| Damage::Insert(at, scrap.to_owned())),
        (any::<usize>(), 1..40_usize).prop_map(|(at, length)| Damage::Delete(at, length)),
        (any::<usize>(), 1..40_usize).prop_map(|(at, length)| Damage::Repeat(at, length)),
    ]
}

fn damaged(contents: impl AsRef<[u8]>, damages: &[Damage]) -> Vec<u8> {
    let mut bytes = contents.as_ref().to_vec();
    for damage in damages {
        let place = |at: usize| at % bytes.len().max(1);
        let part = |at: usize, length: usize| place(at)..(place(at) + length).min(bytes.len());
        match damage {
            Damage::Truncate(at) => bytes.truncate(place(*at)),
            Damage::Replace(at, byte) => {
                let at = place(*at);
                if let Some(old) = bytes.get_mut(at) {
                    *old = *byte;
                }
            }
            Damage::Insert(at, scrap) => drop(bytes.splice(place(*at)..place(*at), scrap.bytes()).count()),
            Damage::Delete(at, length) => drop(bytes.drain(part(*at, *length))),
            Damage::Repeat(at, length) => {
                let copy = bytes[part(*at, *length)].to_vec();
                bytes.splice(place(*at)..place(*at), copy);
            }
        }
    }
    bytes
}

/// The trace of [`EXITS_CSV`] as Parquet.
fn parquet_exits() -> Vec<u8> {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "exits.yaml", EXITS_YAML.as_bytes());
        write(folder.path(), "exits.csv", EXITS_CSV.as_bytes());
        ExitTrace::read(folder.path()).unwrap().write(folder.path(), ExitTable::Parquet).unwrap();
        std::fs::read(folder.path().join("exits.parquet")).unwrap()
    });
    bytes.clone()
}

/// Bytes of a Parquet file's footer: the metadata, their length and the magic word.
fn footer_bytes(file: &[u8]) -> usize {
    let length = file[file.len() - 8..].first_chunk().copied().map(u32::from_le_bytes).unwrap();
    length as usize + 8
}

/// More memory than that at once is not for files of a few hundred bytes.
const MEMORY: usize = 1 << 20;

fn write(path: &Path, name: &str, contents: &[u8]) {
    std::fs::write(path.join(name), contents).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_request_traces(contents in prop::sample::select(&REQUESTS[..]), damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "trace", &damaged(contents, &damages));
        let (trace, allocated) = ALLOCATIONS.largest(|| RequestTrace::read(folder.path().join("trace")));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(trace) = trace {
            prop_assert!(!trace.requests.is_empty());
            prop_assert!(trace.requests.is_sorted_by_key(|request| request.arrival));
            for (place, request) in trace.requests.iter().enumerate() {
                prop_assert_eq!(request.id as usize, place);
                prop_assert!(request.prompt_tokens >= 1 && request.output_tokens >= 1);
                prop_assert!(request.arrival <= Request::MAX_ARRIVAL);
                request.context_tokens();
                if let Some(hashes) = &trace.prefix_hashes {
                    prop_assert_eq!(hashes.of(request.id).len() as u32, request.prompt_tokens / hashes.block_tokens);
                }
            }
        }
    }

    #[test]
    fn damaged_exit_traces(in_yaml: bool, damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let (yaml, csv) = if in_yaml { (&damages[..], &[][..]) } else { (&[][..], &damages[..]) };
        write(folder.path(), "exits.yaml", &damaged(EXITS_YAML, yaml));
        write(folder.path(), "exits.csv", &damaged(EXITS_CSV, csv));
        let (trace, allocated) = ALLOCATIONS.largest(|| ExitTrace::read(folder.path()));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(trace) = trace {
            prop_assert!(trace.num_tokens() > 0);
            prop_assert!((1.0..=trace.num_loops() as f64).contains(&trace.mean_oracle_passes()));
            prop_assert!(trace.signals.iter().all(|signals| signals.top1.is_finite() && signals.entropy.is_finite()));
        }
    }

    #[test]
    fn damaged_parquet_exit_traces(damages in prop::collection::vec(damage(), 1..4), in_footer: bool) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "exits.yaml", EXITS_YAML.as_bytes());
        let whole = parquet_exits();
        let (rows, footer) = whole.split_at(whole.len() - footer_bytes(&whole));
        let contents = match in_footer {
            true => [rows, &damaged(footer, &damages)].concat(),
            false => damaged(&whole, &damages),
        };
        NO_BACKTRACES.call_once(|| {
            // SAFETY: the environment is read by Rust's library alone, which locks it.
            unsafe { std::env::set_var("RUST_BACKTRACE", "0") };
        });
        write(folder.path(), "exits.parquet", &contents);
        let (trace, allocated) = ALLOCATIONS.largest(|| ExitTrace::read(folder.path()));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once for a file of {}", contents.len());
        if let Ok(trace) = trace {
            prop_assert!(trace.num_tokens() > 0);
            prop_assert!((1.0..=trace.num_loops() as f64).contains(&trace.mean_oracle_passes()));
            prop_assert!(trace.signals.iter().all(|signals| signals.top1.is_finite() && signals.entropy.is_finite()));
        }
    }

    #[test]
    fn damaged_profiles(in_yaml: bool, damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let (yaml, csv) = if in_yaml { (&damages[..], &[][..]) } else { (&[][..], &damages[..]) };
        write(folder.path(), "profile.yaml", &damaged(PROFILE_YAML, yaml));
        write(folder.path(), "latency.csv", &damaged(PROFILE_CSV, csv));
        let (profile, allocated) = ALLOCATIONS.largest(|| LatencyProfile::read(folder.path()));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(profile) = profile {
            prop_assert!(profile.points.iter().all(|point| point.time_us.is_finite() && point.time_us >= 0.0));
            prop_assert!(profile.points_of(Component::Block).count() > 0);
        }
    }
}

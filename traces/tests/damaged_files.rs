//! Reading a damaged file gives a valid value or an error, never a panic.

mod allocations;
mod damage;

use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use allocations::Allocations;
use damage::{cases, damage, damaged};
use proptest::prelude::*;
use traces::{
    ChunkWork, Component, CountTokens, DepthRows, ExitTable, ExitTrace, LatencyProfile, LoggedPass, Nanos, PassLog,
    PassLogMeta, PassOrigin, PassRun, PassWork, ReadOptions, Request, RequestSpec, RequestTrace, Requests, TimeUnit,
    TraceError,
};

#[global_allocator]
static ALLOCATIONS: Allocations = Allocations;

const REQUESTS: [&str; 18] = [
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
    "{\"session_id\": \"a\", \"created_time\": 1000, \"input_tokens\": 1024, \"output_tokens\": 10, \"hash_ids\": [1, 2]}\n\
     {\"session_id\": \"a\", \"delay_ms\": 500, \"input_tokens\": 1200, \"output_tokens\": 30, \"hash_ids\": [1, 2, 4]}\n",
    "request,arrival_us,prompt_tokens,output_tokens,session,think_time_us,hash_block_tokens,hash_ids\n\
     0,0.5,10,1,,,4,7 8\n1,1000,20,2,0,,4,7 8 9 10 1\n2,,3,3,0,250.125,4,\n",
    "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,374,44\n0.25,396,109\n",
    "session_id,prefix_group,prefix_length,input_tokens,output_tokens,server_input_tokens,arrival_time_us\n\
     s,sys,40,10,5,0,0\ns,,0,33,7,48,2000\n",
    "timestamp,input_length,output_length\n0,512,128\n1.5,256,64\n",
    "{\"session_id\": \"s\", \"arrival_time_ns\": 20, \"sub_requests\": [{\"input_toks\": 17, \"output_toks\": 2, \
     \"tool_duration_ns\": 15}, {\"input_toks\": 20, \"output_toks\": 3}]}\n",
    "{\"metadata\": {\"x_correlation_id\": \"c\", \"turn_index\": 0, \"request_start_ns\": 1760000001000000000, \
     \"request_end_ns\": 1760000003000000000}, \"metrics\": {\"input_sequence_length\": {\"value\": 55}, \
     \"output_sequence_length\": {\"value\": 47}}}\n",
    "{\"input_lens\": [1024, 17], \"output_lens\": [128, 5], \"start_times\": [8123.5, 8124.25], \"request_rate\": \"inf\"}\n",
    "{\"benchmarks\": [{\"requests\": {\"successful\": [{\"request_start_time\": 1760000010.5, \"prompt_tokens\": 256, \
     \"output_tokens\": 128}], \"incomplete\": [{}]}}]}\n",
    "[{\"conversations\": [{\"from\": \"human\", \"value\": \"a b\"}, {\"from\": \"gpt\", \"value\": \"c\"}]}]\n",
];

/// A token for each byte.
#[derive(Debug)]
struct Bytes;

impl CountTokens for Bytes {
    fn count(&self, text: &str) -> Result<usize, String> {
        Ok(text.len())
    }
}

/// A file of requests, whatever its unit.
fn read_requests(path: &Path) -> Result<RequestTrace, TraceError> {
    let options = ReadOptions { tokenizer: Some(&Bytes), ..ReadOptions::default() };
    let found = RequestTrace::read_with(path, &options);
    let in_seconds = ReadOptions { time_unit: Some(TimeUnit::Seconds), ..options };
    found.or_else(|error| RequestTrace::read_with(path, &in_seconds).map_err(|_| error))
}

const EXITS_YAML: &str = "schema_version: 1\nmodel: m\nfingerprint: f\nnum_loops: 2\nsource: s\n";
const EXITS_CSV: &str = "generation,token,depth,prediction,top1,margin,entropy,similarity\n\
    0,0,0,7,0.5,0.25,1,0\n0,0,1,7,0.75,0.5,0.5,0.9\n1,0,0,1,0.5,0.25,1,0\n1,0,1,1,0.75,0.5,0.5,0.9\n";

const PROFILE_YAML: &str = "schema_version: 1\nmodel: m\nfingerprint: f\nnum_loops: 3\ndevice: d\nsoftware: s\n\
    source: t\noverhead_us: 1.5\nweight_bytes: 10\nkv_bytes_per_token: 2\n";
const PROFILE_CSV: &str = "component,rows,kv_tokens,depths,time_us,spread_us,repeats\n\
    block,1,0,1,10.5,0.1,5\ndepth_mix,8,0,3,1,0,5\nembed,1,0,1,0.5,0,5\nhead,1,0,1,2,0,5\n";

const MIXED_CSV: &str =
    "prefill_tokens,prefill_history,decode_rows,decode_history,time_us\n0,0.0,1,16,9.5\n16,0.0,0,0,11.0\n";
const SKEW_CSV: &str = "prefill_tokens,lever,decode_rows,long_share,longest_history,prefill_history,alpha\n\
    0,inf,32,0.05,1024,4294967295,-0.01\n16,2.5,8,1,64,0,0.5\n";

const SPEC_YAML: &str = "generate:\n  count: 50\n  seed: 1\n  arrivals: {gamma: {rate_per_s: 20, cv: 2}}\n\
    \x20 prompt_tokens: {log_normal: {median: 64, sigma: 1}}\n  output_tokens: {uniform: {min: 8, max: 64}}\n\
    max_prompt_tokens: 99\n";

fn packed(text: &[u8], is_gzip: bool) -> Vec<u8> {
    match is_gzip {
        true => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            gzip.write_all(text).unwrap();
            gzip.finish().unwrap()
        }
        false => zstd::encode_all(text, 3).unwrap(),
    }
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

/// A pass log of two runs.
fn pass_log() -> Vec<u8> {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| {
        let pass = |rows: u32| LoggedPass {
            start: Nanos(u64::from(rows) * 1_000),
            elapsed: Nanos(40_000),
            wall_us: 7,
            work: PassWork {
                rows,
                decode_rows: rows / 2,
                chunks: (0..rows % 3).map(|chunk| ChunkWork { tokens: chunk + 1, history: 100 * chunk }).collect(),
                depths: 2,
                ..PassWork::default()
            },
            rows_by_depth: vec![DepthRows { decode: rows / 2, prompt: 1, backfill: 0 }, DepthRows::default()],
            device: None,
        };
        let run = |origin, load| PassRun {
            origin,
            batching: "depth".to_owned(),
            exit: "margin:0.05".to_owned(),
            kv_fill: "skip".to_owned(),
            load,
            repeat: 0,
            passes: (1..9).map(pass).collect(),
        };
        let runs = vec![run(PassOrigin::Replay, Some(0.7)), run(PassOrigin::Steady, None)];
        let log = PassLog { meta: PassLogMeta::new("m", "f", 2, "d"), runs };
        let folder = tempfile::tempdir().unwrap();
        log.write(folder.path().join("passes.parquet")).unwrap();
        std::fs::read(folder.path().join("passes.parquet")).unwrap()
    });
    bytes.clone()
}

/// Bytes of a Parquet file's footer: the metadata, their length and the magic word.
fn footer_bytes(file: &[u8]) -> usize {
    let length = file[file.len() - 8..].first_chunk().copied().map(u32::from_le_bytes).unwrap();
    length as usize + 8
}

/// Limit of a single allocation for files of a few hundred bytes.
const MEMORY: usize = 1 << 20;

fn write(path: &Path, name: &str, contents: &[u8]) {
    std::fs::write(path.join(name), contents).unwrap();
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_request_traces(contents in prop::sample::select(&REQUESTS[..]), damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "trace", &damaged(contents, &damages));
        let (trace, allocated) = ALLOCATIONS.largest(|| read_requests(&folder.path().join("trace")));
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
            if let Some(sessions) = &trace.sessions {
                prop_assert_eq!(sessions.links().len(), trace.requests.len());
            }
            // What is read can be written, and reads as the same.
            let path = folder.path().join("trace.csv");
            trace.write(&path).unwrap();
            prop_assert_eq!(RequestTrace::read(path).unwrap().requests, trace.requests);
        }
    }

    #[test]
    fn damaged_compressed_request_traces(
        contents in prop::sample::select(&REQUESTS[..]),
        in_text in prop::collection::vec(damage(), 0..3),
        in_packed in prop::collection::vec(damage(), 0..3),
        is_gzip: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let text = damaged(contents, &in_text);
        write(folder.path(), "trace", &damaged(packed(&text, is_gzip), &in_packed));
        let (trace, allocated) = ALLOCATIONS.largest(|| read_requests(&folder.path().join("trace")));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Err(error) = trace {
            let message = error.to_string();
            prop_assert!(message.chars().all(|letter| !letter.is_control()), "{message:?}");
        }
    }

    #[test]
    fn damaged_request_configurations(damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "requests.yaml", &damaged(SPEC_YAML, &damages));
        write(folder.path(), "trace.csv", REQUESTS[0].as_bytes());
        let path = folder.path().join("requests.yaml");
        let (_, allocated) = ALLOCATIONS.largest(|| {
            let spec: RequestSpec = traces::table::read_yaml(&path)?;
            // Requests are made one by one: their number takes no memory.
            let lengths = |requests: &mut dyn Iterator<Item = Request>| {
                requests.take(1000).map(|request| u64::from(request.context_tokens())).sum::<u64>()
            };
            spec.open(folder.path())?.requests.read(lengths)
        });
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
    }

    #[test]
    fn damaged_mixed_attention(in_skew: bool, damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let (points, skew) = if in_skew { (&[][..], &damages[..]) } else { (&damages[..], &[][..]) };
        write(folder.path(), "profile.yaml", PROFILE_YAML.as_bytes());
        write(folder.path(), "latency.csv", PROFILE_CSV.as_bytes());
        write(folder.path(), "mixed_attention.csv", &damaged(MIXED_CSV, points));
        write(folder.path(), "skew.csv", &damaged(SKEW_CSV, skew));
        let (profile, allocated) = ALLOCATIONS.largest(|| LatencyProfile::read(folder.path()));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Some(mixed) = profile.ok().and_then(|profile| profile.mixed_attention) {
            prop_assert!(mixed.points.iter().all(|point| point.time_us.is_finite() && point.prefill_context >= 0.0));
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
    fn damaged_pass_logs(damages in prop::collection::vec(damage(), 1..4), in_footer: bool) {
        let folder = tempfile::tempdir().unwrap();
        let whole = pass_log();
        let (rows, footer) = whole.split_at(whole.len() - footer_bytes(&whole));
        let contents = match in_footer {
            true => [rows, &damaged(footer, &damages)].concat(),
            false => damaged(&whole, &damages),
        };
        write(folder.path(), "passes.parquet", &contents);
        let (log, allocated) = ALLOCATIONS.largest(|| PassLog::read(folder.path().join("passes.parquet")));
        prop_assert!(allocated <= 8 * MEMORY, "{allocated} bytes at once for a file of {}", contents.len());
        if let Err(error) = log {
            prop_assert!(error.to_string().contains("passes.parquet"), "{error}");
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

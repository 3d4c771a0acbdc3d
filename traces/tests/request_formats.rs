//! Every published format of request traces, each in a small file of our own in its exact layout.

use std::io::Write;
use std::path::Path;

use proptest::prelude::*;
use traces::{
    CountTokens, Link, Nanos, PrefixHashes, ReadOptions, Request, RequestFormat, RequestSpec, RequestTrace, Sessions,
    ThinkTime, TimeUnit, TraceError, ZeroTokens,
};

const VIDUR: &str = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,374,44\n0.25,396,109\n61.125,879,55\n";

const BLIS: &str = "request_id,client_id,tenant_id,slo_class,session_id,round_index,prefix_group,prefix_length,streaming,\
    input_tokens,output_tokens,text_tokens,image_tokens,audio_tokens,video_tokens,reason_ratio,model,deadline_us,\
    server_input_tokens,arrival_time_us,send_time_us,first_chunk_time_us,last_chunk_time_us,num_chunks,status,\
    error_message,finish_reason\n\
    0,c1,t1,standard,s1,0,sys,40,true,10,5,10,0,0,0,0.0,,0,0,0,0,0,0,0,ok,,stop\n\
    1,c1,t1,standard,,0,sys,40,true,24,6,24,0,0,0,0.0,,0,0,1500000,1500000,0,0,0,ok,,stop\n\
    2,c1,t1,standard,s1,1,,0,true,33,7,33,0,0,0,0.0,,0,48,2000000,2000000,0,0,0,ok,,stop\n";

const GUIDELLM_TRACE: &str = "timestamp,input_length,output_length\n0,512,128\n1500,256,64\n";

/// Dynamo's other spellings, in blocks of 64, with sessions of which later turns have no time.
const DYNAMO: &str = "{\"session_id\": \"a\", \"created_time\": 1000, \"input_tokens\": 128, \"output_tokens\": 10, \"hash_ids\": [1, 2]}\n\
    {\"session_id\": \"b\", \"created_time\": 2500, \"input_tokens\": 65, \"output_tokens\": 20, \"hash_ids\": [1, 3]}\n\
    {\"session_id\": \"a\", \"delay_ms\": 500, \"input_tokens\": 200, \"output_tokens\": 30, \"hash_ids\": [1, 2, 4, 5]}\n\
    {\"session_id\": \"a\", \"delay_ms\": 4000, \"input_tokens\": 300, \"output_tokens\": 40, \"hash_ids\": [1, 2, 4, 6, 7]}\n";

/// AIPerf's spelling, without hashes and without any time but delays.
const AIPERF_SESSIONS: &str = "{\"session_id\": \"abc-123\", \"input_length\": 300, \"output_length\": 40}\n\
    {\"session_id\": \"abc-123\", \"delay\": 2000, \"input_length\": 150, \"output_length\": 20}\n\
    {\"session_id\": \"xyz\", \"input_length\": 50, \"output_length\": 4}\n";

const AGENTS: &str = "{\"session_id\": \"swe-1\", \"arrival_time_ns\": 2000000000, \"sub_requests\": [\
    {\"input_toks\": 100, \"output_toks\": 20, \"tool_duration_ns\": 1500000000}, \
    {\"input_toks\": 150, \"output_toks\": 30, \"tool_duration_ns\": 250000000}, \
    {\"input_toks\": 200, \"output_toks\": 5, \"tool_duration_ns\": 0}]}\n\
    {\"arrival_time_ns\": 2500000000, \"input_toks\": 64, \"output_toks\": 8}\n";

const AIPERF_RESULTS: &str = "{\"metadata\": {\"session_num\": 0, \"x_request_id\": \"r0\", \"x_correlation_id\": \"c0\", \
    \"conversation_id\": \"s\", \"turn_index\": 0, \"request_start_ns\": 1760000001000000000, \
    \"request_end_ns\": 1760000003000000000, \"benchmark_phase\": \"profiling\", \"was_cancelled\": false}, \
    \"metrics\": {\"input_sequence_length\": {\"value\": 550, \"unit\": \"tokens\"}, \
    \"output_sequence_length\": {\"value\": 47, \"unit\": \"tokens\"}, \"request_latency\": {\"value\": 2000.0, \"unit\": \"ms\"}}, \
    \"error\": null}\n\
    {\"metadata\": {\"x_correlation_id\": \"c1\", \"turn_index\": 0, \"request_start_ns\": 1760000001500000000, \
    \"request_end_ns\": 1760000001600000000, \"benchmark_phase\": \"profiling\"}, \"metrics\": {\
    \"input_sequence_length\": {\"value\": 20, \"unit\": \"tokens\"}, \"output_sequence_length\": {\"value\": 9, \"unit\": \"tokens\"}}}\n\
    {\"metadata\": {\"x_correlation_id\": \"c0\", \"turn_index\": 1, \"request_start_ns\": 1760000003750000000, \
    \"request_end_ns\": 1760000005000000000, \"benchmark_phase\": \"profiling\"}, \"metrics\": {\
    \"input_sequence_length\": {\"value\": 640, \"unit\": \"tokens\"}, \"output_sequence_length\": {\"value\": 12, \"unit\": \"tokens\"}}}\n\
    {\"metadata\": {\"x_correlation_id\": \"c7\", \"request_start_ns\": 1760000000000000000, \"benchmark_phase\": \"warmup\"}, \
    \"metrics\": {\"input_sequence_length\": {\"value\": 1, \"unit\": \"tokens\"}, \"output_sequence_length\": {\"value\": 1, \"unit\": \"tokens\"}}}\n\
    {\"metadata\": {\"request_start_ns\": 1760000004000000000, \"benchmark_phase\": \"profiling\"}, \
    \"error\": {\"code\": 500, \"message\": \"gone\"}}\n";

const VLLM_RESULTS: &str = "{\"date\": \"20251111-101010\", \"backend\": \"vllm\", \"num_prompts\": 3, \"request_rate\": 2.0, \
    \"max_concurrency\": null, \"duration\": 3.5, \"completed\": 3, \"input_lens\": [1024, 17, 300], \
    \"output_lens\": [128, 5, 64], \"start_times\": [8123.5, 8124.25, 8123.75], \"ttfts\": [0.05, 0.04, 0.06], \
    \"itls\": [[0.01], [0.02], [0.01]], \"generated_texts\": [\"a\", \"b\", \"c\"], \"errors\": [\"\", \"\", \"\"]}\n";

const GUIDELLM_REPORT: &str = "{\n  \"metadata\": {\"version\": 1},\n  \"args\": {\"target\": \"http://localhost:8000\"},\n  \
    \"benchmarks\": [\n    {\"type_\": \"generative_benchmark\", \"requests\": {\n      \"successful\": [\n        \
    {\"request_id\": \"x\", \"request_start_time\": 1760000010.5, \"prompt_tokens\": 256, \"output_tokens\": 128},\n        \
    {\"request_id\": \"y\", \"request_start_time\": 1760000010.25, \"prompt_tokens\": 250, \"output_tokens\": 100}\n      ],\n      \
    \"incomplete\": [{\"request_id\": \"z\"}],\n      \"errored\": []\n    }}\n  ]\n}\n";

const SHARE_GPT: &str = "[\n  {\"id\": \"A\", \"conversations\": [\n    {\"from\": \"human\", \"value\": \"one two three\"},\n    \
    {\"from\": \"gpt\", \"value\": \"four five\"},\n    {\"from\": \"human\", \"value\": \"six\"},\n    \
    {\"from\": \"gpt\", \"value\": \"seven eight nine ten\"}\n  ]},\n  \
    {\"id\": \"B\", \"conversations\": [{\"from\": \"gpt\", \"value\": \"nothing before it\"}]},\n  \
    {\"id\": \"C\", \"conversations\": [{\"from\": \"human\", \"value\": \"x y\"}, {\"from\": \"gpt\", \"value\": \"z\"}]}\n]\n";

const OURS: &str = "request,arrival_us,prompt_tokens,output_tokens,session,think_time_us,hash_block_tokens,hash_ids\n\
    0,0.500,10,1,,,4,7 8\n1,1000.000,20,2,0,,4,7 8 9 10 18446744073709551615\n2,,3,3,0,250.125,4,\n3,2000.000,4,4,0,5.000,4,1\n";

/// A token for each word.
#[derive(Debug)]
struct Words;

impl CountTokens for Words {
    fn count(&self, text: &str) -> Result<usize, String> {
        Ok(text.split_whitespace().count())
    }
}

fn options() -> ReadOptions<'static> {
    ReadOptions { tokenizer: Some(&Words), ..ReadOptions::default() }
}

fn with_unit(unit: TimeUnit) -> ReadOptions<'static> {
    ReadOptions { time_unit: Some(unit), ..options() }
}

fn read_bytes(contents: &[u8], options: &ReadOptions<'_>) -> Result<RequestTrace, TraceError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.any");
    std::fs::write(&path, contents).unwrap();
    RequestTrace::read_with(path, options)
}

fn read(contents: &str, options: &ReadOptions<'_>) -> Result<RequestTrace, TraceError> {
    read_bytes(contents.as_bytes(), options)
}

/// Arrival in seconds, prompt and output tokens of each request.
fn rows(trace: &RequestTrace) -> Vec<(f64, u32, u32)> {
    let row = |request: &Request| (request.arrival.as_secs_f64(), request.prompt_tokens, request.output_tokens);
    trace.requests.iter().map(row).collect()
}

/// Session and think time in seconds of each request.
fn links(trace: &RequestTrace) -> Vec<(Option<u32>, Option<f64>)> {
    let sessions = trace.sessions.as_ref().expect("sessions");
    sessions.links().iter().map(|link| (link.session, link.think.map(Nanos::as_secs_f64))).collect()
}

fn hashes(trace: &RequestTrace) -> Vec<&[u64]> {
    let hashes = trace.prefix_hashes.as_ref().expect("hashes");
    trace.requests.iter().map(|request| hashes.of(request.id)).collect()
}

/// Every sample, with the options that it needs.
fn samples() -> Vec<(&'static str, ReadOptions<'static>)> {
    let plain = [VIDUR, BLIS, AIPERF_SESSIONS, AGENTS, AIPERF_RESULTS, VLLM_RESULTS, GUIDELLM_REPORT, SHARE_GPT, OURS];
    let milliseconds = with_unit(TimeUnit::Milliseconds);
    let mut samples: Vec<_> = plain.into_iter().map(|sample| (sample, options())).collect();
    samples.extend([(GUIDELLM_TRACE, milliseconds), (DYNAMO, milliseconds)]);
    samples[2].1 = milliseconds;
    samples
}

#[test]
fn vidur_traces_are_of_seconds() {
    let trace = read(VIDUR, &options()).unwrap();
    assert_eq!(rows(&trace), [(0.25, 396, 109), (0.5, 374, 44), (61.125, 879, 55)]);
    assert!(trace.warnings.is_empty() && trace.sessions.is_none());
    let error = read(VIDUR, &with_unit(TimeUnit::Milliseconds)).unwrap_err().to_string();
    assert!(error.contains("time_unit: found ms, expected it for a trace whose times have a unit"), "{error}");
}

#[test]
fn blis_traces_have_sessions_and_groups_of_prefixes() {
    let trace = read(BLIS, &ReadOptions { prefix_block_tokens: 16, ..options() }).unwrap();
    // A prefix is not among the input tokens; without one, the server's own count is the prompt.
    assert_eq!(rows(&trace), [(0.0, 50, 5), (1.5, 64, 6), (2.0, 48, 7)]);
    assert_eq!(links(&trace), [(Some(0), None), (None, None), (Some(0), None)]);
    let hashes = hashes(&trace);
    assert_eq!(hashes.iter().map(|hashes| hashes.len()).collect::<Vec<_>>(), [3, 4, 3]);
    assert_eq!(hashes[0][..2], hashes[1][..2], "32 of the 40 tokens of the prefix fill blocks");
    assert_ne!(hashes[0][2], hashes[1][2]);
    assert!(hashes[2].iter().all(|hash| !hashes[0].contains(hash) && !hashes[1].contains(hash)));
    assert!(trace.warnings.is_empty(), "{:?}", trace.warnings);
    let without_length = BLIS.replace("prefix_length", "prefix_len");
    let warnings = read(&without_length, &options()).unwrap().warnings;
    assert!(warnings.contains(&"not used: `prefix_group` without `prefix_length`".to_owned()), "{warnings:?}");
}

#[test]
fn a_table_of_timestamps_needs_the_unit() {
    let error = read(GUIDELLM_TRACE, &options()).unwrap_err().to_string();
    assert!(error.contains("whose timestamp may be seconds or milliseconds, expected the unit"), "{error}");
    assert!(error.contains("`--time-unit ms`"), "{error}");
    for (unit, last) in [(TimeUnit::Seconds, 1500.0), (TimeUnit::Milliseconds, 1.5)] {
        assert_eq!(rows(&read(GUIDELLM_TRACE, &with_unit(unit)).unwrap()), [(0.0, 512, 128), (last, 256, 64)]);
    }
}

#[test]
fn spellings_of_dynamo_are_those_of_mooncake_and_delays_make_sessions() {
    let error = read(DYNAMO, &options()).unwrap_err().to_string();
    assert!(error.contains("with blocks of 64 tokens whose created_time may be seconds or milliseconds"), "{error}");
    let trace = read(DYNAMO, &with_unit(TimeUnit::Milliseconds)).unwrap();
    // Requests without a time are at the earliest possible.
    assert_eq!(rows(&trace), [(1.0, 128, 10), (1.5, 200, 30), (2.5, 65, 20), (5.5, 300, 40)]);
    assert_eq!(links(&trace), [(Some(0), None), (Some(0), Some(0.5)), (Some(1), None), (Some(0), Some(4.0))]);
    assert_eq!(hashes(&trace), [&[1, 2][..], &[1, 2, 4], &[1], &[1, 2, 4, 6]]);
    assert!(!trace.sessions.unwrap().is_timed());

    // `delay` is in the unit of the times, `delay_ms` is not.
    let seconds = with_unit(TimeUnit::Seconds);
    assert_eq!(links(&read(&DYNAMO.replace("delay_ms", "delay"), &seconds).unwrap())[1].1, Some(500.0));
    let in_seconds = read(&DYNAMO.replace(": 1000,", ": 1,").replace(": 2500,", ": 2.5,"), &seconds).unwrap();
    assert_eq!(rows(&in_seconds), rows(&trace.requests.clone().into_trace()));
    let mixed = DYNAMO.replace("[1, 2, 4, 5]", "[1, 2]");
    let error = read(&mixed, &with_unit(TimeUnit::Milliseconds)).unwrap_err().to_string();
    let message = "trace.any:3: hash_ids: found `2 ids`, expected one for each block of the 64 to 64 tokens that fit";
    assert!(error.contains(message), "{error}");
}

/// A trace for [`rows`].
trait IntoTrace {
    fn into_trace(self) -> RequestTrace;
}

impl IntoTrace for Vec<Request> {
    fn into_trace(self) -> RequestTrace {
        RequestTrace::new("", self)
    }
}

#[test]
fn sessions_without_any_time_need_users() {
    let trace = read(AIPERF_SESSIONS, &with_unit(TimeUnit::Milliseconds)).unwrap();
    assert_eq!(rows(&trace), [(0.0, 300, 40), (0.0, 50, 4), (2.0, 150, 20)]);
    assert_eq!(links(&trace), [(Some(0), None), (Some(1), None), (Some(0), Some(2.0))]);
    assert_eq!(trace.sessions.unwrap().num_without_start(), 2);
    let error = read(AIPERF_SESSIONS, &options()).unwrap_err().to_string();
    assert!(error.contains("without hash_ids whose delay may be seconds or milliseconds"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("trace.jsonl"), AIPERF_SESSIONS).unwrap();
    let load = |yaml: &str| {
        let spec = serde_yaml::from_str::<RequestSpec>(yaml).unwrap();
        let trace = spec.load(folder.path()).unwrap();
        spec.closed_loop(&trace, 1)
    };
    let error = load("{file: trace.jsonl, time_unit: ms}").unwrap_err().to_string();
    assert!(error.contains("users: found none, and 2 requests of trace without an arrival time"), "{error}");
    assert!(error.contains("`users: N` (`--users N`)"), "{error}");
    let error = load("{file: trace.jsonl, time_unit: ms, sessions: ignore}").unwrap_err().to_string();
    assert!(error.contains("sessions: found ignore, and 3 requests of trace without an arrival time"), "{error}");
    assert!(load("{file: trace.jsonl, time_unit: ms, users: 2}").unwrap().unwrap().sessions.is_some());

    let partly = AIPERF_SESSIONS.replace("\"session_id\": \"xyz\",", "\"session_id\": \"xyz\", \"timestamp\": 7,");
    let error = read(&partly, &with_unit(TimeUnit::Milliseconds)).unwrap_err().to_string();
    assert!(
        error.contains("trace.any:1: timestamp: found none, expected one at the beginning of every session"),
        "{error}"
    );
}

#[test]
fn agents_wait_for_their_tools_and_flat_lines_stand_beside_them() {
    let trace = read(AGENTS, &options()).unwrap();
    assert_eq!(rows(&trace), [(2.0, 100, 20), (2.5, 64, 8), (3.5, 150, 30), (3.75, 200, 5)]);
    let expected = [(Some(0), None), (None, None), (Some(0), Some(1.5)), (Some(0), Some(0.25))];
    assert_eq!(links(&trace), expected);

    // A request that is left out still takes the time of its tool.
    let skipped = read(&AGENTS.replace("\"output_toks\": 30", "\"output_toks\": 0"), &options()).unwrap();
    assert_eq!(links(&skipped), [(Some(0), None), (None, None), (Some(0), Some(1.75))]);
    assert!(skipped.warnings[0].starts_with("requests left out: 1 without output tokens"));
    let first = read(&AGENTS.replace("\"input_toks\": 100", "\"input_toks\": 0"), &options()).unwrap();
    assert_eq!(rows(&first), [(2.5, 64, 8), (3.5, 150, 30), (3.75, 200, 5)], "the next one begins in its place");

    let wrong = AGENTS.replace("\"output_toks\": 5, ", "");
    let error = read(&wrong, &options()).unwrap_err().to_string();
    assert!(error.contains("trace.any:1: sub_requests[2]: missing field `output_toks`"), "{error}");
    let negative = AGENTS.replace("250000000", "-5");
    let error = read(&negative, &options()).unwrap_err().to_string();
    assert!(error.contains("sub_requests[1].tool_duration_ns: found `-5`"), "{error}");
    let none = "{\"arrival_time_ns\": 1, \"sub_requests\": []}\n";
    let error = read(none, &options()).unwrap_err().to_string();
    assert!(error.contains("trace.any:1: sub_requests: found none, expected at least one request"), "{error}");
    let agent = AGENTS.lines().next().unwrap();
    let error = read(&format!("{agent}\n{agent}\n"), &options()).unwrap_err().to_string();
    assert!(
        error.contains("trace.any:2: session_id: found `swe-1` again, expected an agent of another name"),
        "{error}"
    );
}

#[test]
fn results_of_aiperf_are_requests_with_the_pauses_of_their_clients() {
    let trace = read(AIPERF_RESULTS, &options()).unwrap();
    assert_eq!(rows(&trace), [(0.0, 550, 47), (0.5, 20, 9), (2.75, 640, 12)]);
    assert_eq!(links(&trace), [(Some(0), None), (None, None), (Some(0), Some(0.75))]);
    let left_out = ["requests left out: 1 of the warm-up", "requests left out: 1 that failed or were cancelled"];
    assert_eq!(trace.warnings, left_out);
    let error = read(&AIPERF_RESULTS.replace("\"value\": 20,", "\"value\": -1,"), &options()).unwrap_err().to_string();
    assert!(error.contains("trace.any:2: metrics.input_sequence_length.value: found `-1`"), "{error}");
    let missing = AIPERF_RESULTS.replacen("\"output_sequence_length\"", "\"osl\"", 1);
    let error = read(&missing, &options()).unwrap_err().to_string();
    assert!(error.contains("trace.any:1: metrics.output_sequence_length.value: found `none`"), "{error}");
}

#[test]
fn results_of_vllm_count_from_their_first_request() {
    let trace = read(VLLM_RESULTS, &options()).unwrap();
    assert_eq!(rows(&trace), [(0.0, 1024, 128), (0.25, 300, 64), (0.75, 17, 5)]);
    let without = VLLM_RESULTS.replace("\"start_times\": [8123.5, 8124.25, 8123.75], ", "");
    let error = read(&without, &options()).unwrap_err().to_string();
    assert!(error.contains("found no start_times") && error.contains("`generate.lengths_from`"), "{error}");
    let at_once = read(&without.replace("\"request_rate\": 2.0", "\"request_rate\": \"inf\""), &options()).unwrap();
    assert_eq!(rows(&at_once), [(0.0, 1024, 128), (0.0, 17, 5), (0.0, 300, 64)]);
    let limited = without.replace("\"request_rate\": 2.0", "\"request_rate\": \"inf\"").replace("null", "16");
    assert!(read(&limited, &options()).is_err(), "clients waited for answers");
    let error = read(&VLLM_RESULTS.replace("[128, 5, 64]", "[128, 5]"), &options()).unwrap_err().to_string();
    assert!(error.contains("found 2 values of output_lens, expected 3 as in input_lens"), "{error}");
    let error = read(&VLLM_RESULTS.repeat(2), &options()).unwrap_err().to_string();
    assert!(
        error.contains("trace.any:2: the object: expected nothing after it: write one document per file"),
        "{error}"
    );
    let error = read(&VLLM_RESULTS.replace("17,", "-17,"), &options()).unwrap_err().to_string();
    assert!(error.contains("trace.any:1: input_lens[1]: found `-17`"), "{error}");
}

#[test]
fn reports_of_guidellm_are_of_one_benchmark() {
    let trace = read(GUIDELLM_REPORT, &options()).unwrap();
    assert_eq!(rows(&trace), [(0.0, 250, 100), (0.25, 256, 128)]);
    assert_eq!(trace.warnings, ["requests left out: 1 incomplete"]);
    let benchmark =
        &GUIDELLM_REPORT[GUIDELLM_REPORT.find("{\"type_\"").unwrap()..GUIDELLM_REPORT.rfind("\n  ]").unwrap()];
    let two = GUIDELLM_REPORT.replace(benchmark, &format!("{benchmark}, {benchmark}"));
    let error = read(&two, &options()).unwrap_err().to_string();
    assert!(error.contains("found 2 benchmarks, expected one: `jq '.benchmarks |= [.[0]]'`"), "{error}");
    let error = read(&GUIDELLM_REPORT.replace("250,", "\"250\","), &options()).unwrap_err().to_string();
    let place = "trace.any:8: benchmarks[0].requests.successful[1].prompt_tokens: invalid type: string \"250\"";
    assert!(error.contains(place), "{error}");
    let error = read(&GUIDELLM_REPORT[..300], &options()).unwrap_err().to_string();
    assert!(error.contains("the document is cut off"), "{error}");
}

#[test]
fn conversations_are_counted_by_the_tokenizer_and_each_answer_is_a_request() {
    let trace = read(SHARE_GPT, &options()).unwrap();
    let found: Vec<_> = trace.requests.iter().map(|request| (request.prompt_tokens, request.output_tokens)).collect();
    assert_eq!(found, [(3, 2), (6, 4), (2, 1)]);
    assert_eq!(links(&trace), [(Some(0), None), (Some(0), Some(0.0)), (Some(1), None)]);
    assert_eq!(trace.sessions.unwrap().num_without_start(), 2);
    assert!(trace.warnings[0].starts_with("requests left out: 1 without prompt tokens"), "{:?}", trace.warnings);
    let error = read(SHARE_GPT, &ReadOptions::default()).unwrap_err().to_string();
    assert!(
        error.contains("found conversations as texts, expected the tokenizer") && error.contains("--tokenizer"),
        "{error}"
    );
    let error = read(&SHARE_GPT.replace("\"value\": \"six\"", "\"value\": 6"), &options()).unwrap_err().to_string();
    assert!(error.contains("trace.any:5:") && error.contains("invalid type: integer `6`"), "{error}");
    let objects = "[{\"timestamp\": 1, \"input_length\": 5, \"output_length\": 4}]\n";
    let error = read(objects, &options()).unwrap_err().to_string();
    assert!(error.contains("expected an object in each line, not one list: run `jq -c '.[]'`"), "{error}");
}

#[test]
fn lengths_of_conversations_and_results_are_drawn_without_their_times() {
    let folder = tempfile::tempdir().unwrap();
    for (file, contents) in [
        ("chats.json", SHARE_GPT.to_owned()),
        ("vllm.json", VLLM_RESULTS.replace("start_times", "other_times")),
        ("guide.csv", GUIDELLM_TRACE.to_owned()),
        ("sessions.jsonl", AIPERF_SESSIONS.to_owned()),
    ] {
        std::fs::write(folder.path().join(file), contents).unwrap();
    }
    std::fs::write(folder.path().join("words.json"), "").unwrap();
    let open = |path: &Path| match path.file_name().is_some_and(|name| name == "words.json") && path.exists() {
        true => Ok(Box::new(Words) as Box<dyn CountTokens>),
        false => Err("no such file".to_owned()),
    };
    let drawn = |file: &str, rest: &str| {
        let yaml = format!("{{generate: {{count: 50, arrivals: all_at_once, lengths_from: {file}}}{rest}}}");
        serde_yaml::from_str::<RequestSpec>(&yaml).unwrap().load_with(folder.path(), &open)
    };
    let pairs = |file: &str, rest: &str| {
        let trace = drawn(file, rest).unwrap();
        let mut pairs: Vec<_> = trace.requests.iter().map(|of| (of.prompt_tokens, of.output_tokens)).collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs
    };
    assert_eq!(pairs("chats.json", ", tokenizer: words.json"), [(2, 1), (3, 2), (6, 4)]);
    assert_eq!(pairs("vllm.json", ""), [(17, 5), (300, 64), (1024, 128)]);
    assert_eq!(pairs("guide.csv", ""), [(256, 64), (512, 128)]);
    assert_eq!(pairs("sessions.jsonl", ""), [(50, 4), (150, 20), (300, 40)]);
    let error = drawn("chats.json", "").unwrap_err().to_string();
    assert!(error.contains("expected the tokenizer"), "{error}");
    let error = drawn("chats.json", ", tokenizer: other.json").unwrap_err().to_string();
    assert!(error.contains("tokenizer: found no such file, expected a tokenizer.json"), "{error}");
}

#[test]
fn our_own_file_holds_sessions_and_hashes() {
    let trace = read(OURS, &options()).unwrap();
    assert_eq!(rows(&trace), [(5e-7, 10, 1), (0.001, 20, 2), (0.001_250_125, 3, 3), (0.002, 4, 4)]);
    assert_eq!(links(&trace), [(None, None), (Some(0), None), (Some(0), Some(0.000_250_125)), (Some(0), Some(5e-6))]);
    assert_eq!(hashes(&trace), [&[7, 8][..], &[7, 8, 9, 10, u64::MAX], &[], &[1]]);
    let folder = tempfile::tempdir().unwrap();
    trace.write(folder.path().join("trace.csv")).unwrap();
    assert_eq!(std::fs::read_to_string(folder.path().join("trace.csv")).unwrap(), OURS);
    for (wrong, message) in [
        (OURS.replace("2,,3,3,0,250.125", "2,,3,3,0,"), "trace.any:4: arrival_us: found ``, expected microseconds"),
        (
            OURS.replace("1,1000.000,20,2,0,,", "1,1000.000,20,2,0,3,"),
            "trace.any:3: think_time_us: found `3`, expected none in the first",
        ),
        (OURS.replace(",20,2,0,", ",20,2,5,"), "trace.any:3: session: found `5`, expected a session from 0 to 0"),
        (
            OURS.replace("4,1\n", "8,1\n"),
            "trace.any:5: hash_block_tokens: found `8`, expected 4, as in the lines before",
        ),
        (OURS.replace("7 8\n", "7\n"), "trace.any:2: hash_ids: found `7`, expected 2 whole numbers"),
        (OURS.replace("7 8\n", "7 x\n"), "trace.any:2: hash_ids: found `7 x`"),
        (
            OURS.replace(",hash_ids", ""),
            "columns `request,arrival_us,prompt_tokens,output_tokens,session,think_time_us,hash_block_tokens,hash_ids`",
        ),
        (OURS.replace("250.125", "-1"), "trace.any:4: think_time_us: found `-1`"),
    ] {
        let error = read(&wrong, &options()).unwrap_err().to_string();
        assert!(error.contains(message), "expected `{message}` in `{error}`");
    }
}

#[test]
fn every_format_survives_a_detour_over_our_own_file() {
    let folder = tempfile::tempdir().unwrap();
    for (sample, options) in samples() {
        let trace = RequestTrace { warnings: Vec::new(), ..read(sample, &options).unwrap() };
        let path = folder.path().join("trace.csv");
        trace.write(&path).unwrap();
        assert_eq!(RequestTrace::read(&path).unwrap(), trace, "{sample}");
    }
}

#[test]
fn compressed_files_of_every_format_read_as_plain_ones_and_cut_ones_are_named() {
    for (sample, options) in samples() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(sample.as_bytes()).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::encode_all(sample.as_bytes(), 1).unwrap();
        let plain = read(sample, &options).unwrap();
        for (kind, packed) in [("gzip", gzip), ("Zstandard", zstd)] {
            assert_eq!(read_bytes(&packed, &options).unwrap(), plain, "{kind} of {sample}");
            let error = read_bytes(&packed[..packed.len() - 3], &options).unwrap_err().to_string();
            assert!(error.contains(&format!("its {kind} data is cut off")), "{error}");
        }
    }
}

#[test]
fn a_byte_order_mark_and_line_ends_of_windows_make_no_difference() {
    for (sample, options) in samples() {
        let windows = format!("\u{feff}{}", sample.replace('\n', "\r\n"));
        assert_eq!(read(&windows, &options).unwrap(), read(sample, &options).unwrap(), "{sample}");
    }
}

#[test]
fn rows_without_tokens_are_counted_or_refused_in_every_format() {
    let refused = |options: ReadOptions<'static>| ReadOptions { zero_tokens: ZeroTokens::Refuse, ..options };
    for (sample, options, from, to, key) in [
        (VIDUR, options(), "396,109", "396,0", "num_decode_tokens"),
        (BLIS, options(), "24,6,24", "24,0,24", "output_tokens"),
        (GUIDELLM_TRACE, with_unit(TimeUnit::Seconds), "256,64", "0,64", "input_length"),
        (DYNAMO, with_unit(TimeUnit::Milliseconds), "\"output_tokens\": 20", "\"output_tokens\": 0", "output_tokens"),
        (AGENTS, options(), "\"output_toks\": 8", "\"output_toks\": 0", "output_toks"),
        (AIPERF_RESULTS, options(), "\"value\": 20,", "\"value\": 0,", "metrics.input_sequence_length.value"),
        (VLLM_RESULTS, options(), "[128, 5, 64]", "[128, 0, 64]", "output_lens[1]"),
        (GUIDELLM_REPORT, options(), "\"prompt_tokens\": 250", "\"prompt_tokens\": 0", "prompt_tokens"),
    ] {
        let contents = sample.replace(from, to);
        let (all, some) = (read(sample, &options).unwrap(), read(&contents, &options).unwrap());
        assert_eq!(some.requests.len(), all.requests.len() - 1, "{key}");
        let kind = if key.contains("out") || key.contains("decode") { "output" } else { "prompt" };
        let warning = format!("requests left out: 1 without {kind} tokens");
        assert!(some.warnings[0].starts_with(&warning), "{key}: {:?}", some.warnings);
        let error = read(&contents, &refused(options)).unwrap_err().to_string();
        assert!(error.contains(&format!("{key}: found `0`, expected a whole number of tokens from 1")), "{error}");
    }
    let error = read(SHARE_GPT, &refused(options())).unwrap_err().to_string();
    assert!(error.contains("found no token before the answer, expected at least one"), "{error}");
}

#[test]
fn a_request_of_a_session_may_not_arrive_before_the_one_that_it_waits_for() {
    let line = |time: u32, rest: &str| {
        format!("{{\"session_id\": 1, \"timestamp\": {time}, \"input_length\": 9, \"output_length\": 3{rest}}}\n")
    };
    let milliseconds = with_unit(TimeUnit::Milliseconds);
    let error = read(&(line(500, "") + &line(400, ", \"delay\": 5")), &milliseconds).unwrap_err().to_string();
    assert!(
        error.contains("trace.any:2: timestamp: found `0.4 s`, expected a time after that of the request"),
        "{error}"
    );
    let trace = read(&(line(500, "") + &line(900, ", \"delay\": 5")), &milliseconds).unwrap();
    assert_eq!((rows(&trace)[1].0, links(&trace)[1]), (0.9, (Some(0), Some(0.005))));
    let twice = line(1, ", \"delay\": 5, \"delay_ms\": 5");
    let error = read(&twice, &milliseconds).unwrap_err().to_string();
    assert!(error.contains("duplicate field `delay_ms`"), "{error}");
}

#[test]
fn merged_traces_share_neither_prefixes_nor_sessions() {
    let trace = |name: &str| RequestTrace { name: name.to_owned(), ..read(OURS, &options()).unwrap() };
    let merged = RequestTrace::merge("both", vec![trace("a"), trace("b")]).unwrap();
    assert_eq!(merged.requests.len(), 8);
    assert!(merged.requests.is_sorted_by_key(|request| request.arrival));
    assert_eq!(merged.sessions.as_ref().unwrap().count(), 2);
    let hashes = hashes(&merged);
    assert_eq!(hashes[0].len(), 2);
    assert!(!hashes[0].contains(&hashes[1][0]), "one prompt of each trace");
    assert_eq!(hashes[0][0], hashes[2][0], "two prompts of the first trace begin alike");
    let alone = RequestTrace::merge("a", vec![trace("a")]).unwrap();
    assert_eq!(alone, RequestTrace { warnings: Vec::new(), ..trace("a") });
    let other = read(VIDUR, &options()).unwrap();
    let error = RequestTrace::merge("both", vec![trace("a"), other]).unwrap_err().to_string();
    assert!(error.contains("a with prefix hashes of blocks of 4 tokens and trace without prefix hashes"), "{error}");
}

#[test]
fn a_closed_loop_and_a_rate_contradict_each_other() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.csv"), OURS).unwrap();
    let load = |yaml: &str| {
        let spec = serde_yaml::from_str::<RequestSpec>(yaml).unwrap();
        let trace = spec.load(folder.path())?;
        spec.closed_loop(&trace, 3)
    };
    let made = "generate: {count: 2, arrivals: ARRIVALS, prompt_tokens: {fixed: 1}, output_tokens: {fixed: 1}}";
    for (yaml, message) in [
        ("{file: a.csv, users: 2, rate_per_s: 3}".to_owned(), "users: found it beside `rate_per_s`"),
        (
            format!("{{{}, users: 2}}", made.replace("ARRIVALS", "{poisson: {rate_per_s: 1}}")),
            "found it beside `generate.arrivals`",
        ),
        ("{file: a.csv, think_time_s: 2}".to_owned(), "think_time_s: found it without `users`"),
        (
            format!("{{{}, sessions: ignore}}", made.replace("ARRIVALS", "all_at_once")),
            "sessions: found it beside `generate`",
        ),
        ("{file: a.csv, sessions: ignore}".to_owned(), "sessions: found ignore, and 1 requests of a without"),
    ] {
        let error = load(&yaml).unwrap_err().to_string();
        assert!(error.contains(message), "{yaml}: {error}");
    }
    let closed = load("{file: a.csv}").unwrap().unwrap();
    assert!(closed.users.is_none() && closed.sessions.is_some());
    let made = made.replace("ARRIVALS", "all_at_once");
    assert_eq!(load(&format!("{{{made}}}")).unwrap(), None);
    let closed = load(&format!("{{{made}, users: 2, think_time_s: 'exponential:1.5'}}")).unwrap().unwrap();
    let users = closed.users.unwrap();
    assert_eq!((users.number.get(), users.think, users.seed), (2, ThinkTime::Exponential(1.5), 3));
    assert!(closed.sessions.is_none());
}

#[test]
fn a_slower_trace_keeps_its_think_times() {
    let trace = read(DYNAMO, &with_unit(TimeUnit::Milliseconds)).unwrap().scale_rate(0.5).unwrap();
    assert_eq!(rows(&trace), [(1.0, 128, 10), (1.5, 200, 30), (4.0, 65, 20), (5.5, 300, 40)]);
    assert_eq!(hashes(&trace)[1], [1, 2, 4]);
    let cut = trace.window(Nanos::from_secs_f64(0.25), Nanos::MAX);
    assert_eq!(
        links(&cut),
        [(Some(0), None), (Some(1), None), (Some(0), Some(4.0))],
        "the first one has lost its past"
    );
    assert!(cut.sessions.as_ref().unwrap().links()[0].is_timed);
    assert!(RequestFormat::ALL.iter().all(|format| format.name().parse() == Ok(*format)));
}

/// Requests with arrival, lengths, session and think time; hashes are of their place.
fn any_trace() -> impl Strategy<Value = RequestTrace> {
    let session = prop::option::of(0_u32..4);
    let row = (0..1_u64 << 40, 1..200_u32, 1..50_u32, session, prop::option::of(0..1_u64 << 40));
    (prop::collection::vec(row, 1..30), any::<bool>(), 1..40_u32).prop_map(|(rows, has_hashes, block_tokens)| {
        let mut arrival = Nanos::ZERO;
        let mut latest = [None::<Nanos>; 4];
        let (mut requests, mut links) = (Vec::new(), Vec::new());
        let mut hashes = PrefixHashes::new(block_tokens);
        for (id, (gap, prompt_tokens, output_tokens, session, think)) in (0_u32..).zip(rows) {
            arrival += Nanos(gap >> 8);
            let before = session.and_then(|session: u32| latest[session as usize]);
            let think = think.map(Nanos).filter(|_| before.is_some());
            // An arrival that is not known is exactly the earliest possible, if it comes in order.
            let earliest = before.zip(think).map(|(before, think)| before + think);
            let is_timed = earliest.is_none_or(|earliest| earliest < arrival);
            arrival = earliest.filter(|_| !is_timed).unwrap_or(arrival);
            if let Some(session) = session {
                latest[session as usize] = Some(arrival);
            }
            requests.push(Request { id, arrival, prompt_tokens, output_tokens });
            links.push(Link { session, think, is_timed });
            hashes.push((0..prompt_tokens / block_tokens).map(|block| (u64::from(block) << 50) | u64::from(id % 3)));
        }
        let mut trace = RequestTrace::new("written", requests);
        trace.sessions = links.iter().any(|link| link.session.is_some()).then(|| Sessions::new(links));
        trace.prefix_hashes = has_hashes.then_some(hashes);
        trace
    })
}

proptest! {
    #[test]
    fn nothing_is_lost_in_our_own_file(trace in any_trace()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("written.csv");
        trace.write(&path).unwrap();
        prop_assert_eq!(RequestTrace::read(&path).unwrap(), trace);
    }

    #[test]
    fn a_selection_keeps_the_order_of_each_session(trace in any_trace(), from in 0..1_u64 << 34, length in 0..1_u64 << 36) {
        let cut = trace.clone().window(Nanos(from), Nanos(from + length));
        if let Some(sessions) = &cut.sessions {
            prop_assert_eq!(sessions.links().len(), cut.requests.len());
            let mut seen = std::collections::HashSet::new();
            for link in sessions.links() {
                let is_first = link.session.is_none_or(|session| seen.insert(session));
                prop_assert!(!is_first || link.think.is_none());
            }
            for (id, next) in (0_u32..).zip(sessions.followers()) {
                prop_assert!(next.is_none_or(|next| next > id && sessions.of(next).session == sessions.of(id).session));
            }
        }
    }
}

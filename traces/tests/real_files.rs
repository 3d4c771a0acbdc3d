//! Published traces in their original form; skipped with a message where they are absent.

use std::path::PathBuf;

use traces::{Nanos, RequestSpec, RequestTrace};

/// A file of the data folder next to the checkout.
fn data(file: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(file);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn total(tokens: impl Iterator<Item = u32>) -> u64 {
    tokens.map(u64::from).sum()
}

#[test]
fn azure_traces_read_in_full() {
    for (file, requests, first_prompt, last_output) in
        [("requests/azure-2023-code.csv", 8_819, 4808, 173), ("requests/azure-2023-conv.csv", 19_366, 374, 183)]
    {
        let Some(path) = data(file) else { return };
        let trace = RequestTrace::read(&path).unwrap();
        assert_eq!(trace.requests.len(), requests, "{file}");
        assert_eq!(trace.requests[0].prompt_tokens, first_prompt);
        assert_eq!(trace.requests[0].arrival, Nanos::ZERO);
        assert_eq!(trace.requests[requests - 1].output_tokens, last_output);
        // Both traces cover about an hour.
        assert!((3400.0..3600.0).contains(&trace.requests[requests - 1].arrival.as_secs_f64()));
    }
}

#[test]
fn mooncake_traces_read_with_their_prefixes() {
    for (file, requests, last_ms) in [
        ("requests/mooncake-conversation.jsonl", 12_031, 3_536_999.0),
        ("requests/mooncake-synthetic.jsonl", 3_993, 1_022_025.0),
    ] {
        let Some(path) = data(file) else { return };
        let trace = RequestTrace::read(&path).unwrap();
        assert_eq!(trace.requests.len(), requests, "{file}");
        assert_eq!(trace.requests[requests - 1].arrival.as_millis_f64(), last_ms);
        let hashes = trace.prefix_hashes.as_ref().unwrap();
        for request in &trace.requests {
            assert_eq!(hashes.of(request.id).len() as u32, request.prompt_tokens / 512);
        }
    }
}

#[test]
fn a_workload_with_token_ids_reads_with_its_prefixes() {
    let Some(path) = data("gpu/rtx4090-llama-3.1-8b/vllm/workload.jsonl") else { return };
    let trace = RequestTrace::read(&path).unwrap();
    assert_eq!(trace.requests.len(), 300);
    assert_eq!(trace.requests[0].arrival, Nanos(46_926_808));
    assert_eq!((trace.requests[0].prompt_tokens, trace.requests[0].output_tokens), (2358, 531));
    assert_eq!(trace.prefix_hashes.unwrap().of(0).len(), 2358 / 16);
}

#[test]
fn a_configuration_shapes_a_published_trace() {
    let Some(path) = data("requests/azure-2023-conv.csv") else { return };
    let yaml = "{file: azure-2023-conv.csv, first: 1000, rate_per_s: 4, max_prompt_tokens: 128, max_output_tokens: 64}";
    let spec: RequestSpec = serde_yaml::from_str(yaml).unwrap();
    let trace = spec.load(path.parent().unwrap()).unwrap();
    assert_eq!(trace.requests.len(), 1000);
    assert!((trace.rate_per_s().unwrap() - 4.0).abs() < 1e-6);
    assert!(trace.requests.iter().all(|request| request.prompt_tokens <= 128 && request.output_tokens <= 64));
    let whole = RequestTrace::read(&path).unwrap().first(1000);
    let clipped = |tokens: u32, most: u32| tokens.min(most);
    assert_eq!(
        total(trace.requests.iter().map(|request| request.prompt_tokens)),
        total(whole.requests.iter().map(|request| clipped(request.prompt_tokens, 128)))
    );
}

#[test]
fn a_published_trace_survives_a_detour_over_our_own_file() {
    let Some(path) = data("requests/azure-2023-code.csv") else { return };
    let trace = RequestTrace::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ours = folder.path().join("azure-2023-code.csv");
    trace.write(&ours).unwrap();
    assert_eq!(RequestTrace::read(ours).unwrap(), trace);
}

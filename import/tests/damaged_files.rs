//! Importing a damaged file gives a profile that reads back or an error, never a panic.

#[path = "../../traces/tests/allocations/mod.rs"]
mod allocations;
#[path = "../../traces/tests/damage/mod.rs"]
mod damage;
mod kernels;

use std::path::Path;

use allocations::Allocations;
use damage::{Damage, cases, damage, damaged};
use import::{KernelTables, LayerTables, MeasuredRun, ModelShape};
use kernels::{SYSTEM, write_kernels};
use parquet::basic::{Compression, ZstdLevel};
use proptest::prelude::*;
use traces::LatencyProfile;

#[global_allocator]
static ALLOCATIONS: Allocations = Allocations;

/// Limit of a single allocation for files of a few hundred bytes.
const MEMORY: usize = 1 << 20;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "sliding_window": 4096}"#;

const LAYERS: [(&str, &str); 5] = [
    (
        "dense.csv",
        "layer,tokens,time_us\nlayernorm,1,2\nqkv_proj,1,10\no_proj,1,5\ngate_up_proj,1,40\ndown_proj,1,20\n\
         embedding,1,4\nlayernorm,8,3\nqkv_proj,8,12\no_proj,8,6\ngate_up_proj,8,50\ndown_proj,8,25\nembedding,8,5\n",
    ),
    ("per_sequence.csv", "layer,sequences,time_us\nlm_head,1,100\nsampler,1,7\nlm_head,4,110\n"),
    ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9\n16,0,0,0,11\n"),
    ("skew_fit.csv", "n_label,kv_big_label,alpha\nn<=32,kvB<=4k,0.25\nn<=64,kvB<=4k,0.5\n"),
    ("meta.yaml", "gpu: G\nvllm_version: 0.19.0\nskew_fit:\n  enabled: true\n"),
];

const RUN: [(&str, &str); 2] = [
    (
        "meta.json",
        r#"{"vllm_version": "0.19.0", "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
            "kv_cache": {"num_gpu_blocks": 101, "block_size": 16, "enable_prefix_caching": true},
            "resolved_config": {"scheduler_config": {"async_scheduling": true, "policy": "fcfs", "watermark": 0.0}}}"#,
    ),
    (
        "requests.jsonl",
        "{\"request_id\": \"r-1\", \"output_toks\": 1, \"arrival_time\": 1001.0, \"queued_ts\": 8.0, \
         \"first_token_ts\": 9.0, \"last_token_ts\": 9.0}\n{\"last_token_ts\": 8.4, \"queued_ts\": 7.6, \
         \"first_token_ts\": 8.0, \"output_toks\": 3, \"arrival_time\": 1000.5, \"request_id\": \"r-0\", \"input_toks\": 20}\n",
    ),
];

/// Files in a folder, one of which is damaged.
fn write_all(folder: &Path, files: &[(&str, &str)], hit: usize, damages: &[Damage]) {
    for (place, (name, contents)) in files.iter().enumerate() {
        let damages = if place == hit % files.len() { damages } else { &[] };
        std::fs::write(folder.join(name), damaged(contents, damages)).unwrap();
    }
}

fn shape(folder: &Path, num_loops: u64) -> ModelShape {
    let path = folder.join("config.json");
    std::fs::write(&path, CONFIG).unwrap();
    ModelShape::read(path, num_loops, 8).unwrap()
}

/// Checks that an imported profile can be written and read back.
fn check_profile(profile: &LatencyProfile) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    if profile.write(folder.path()).is_ok() {
        let read = LatencyProfile::read(folder.path());
        prop_assert!(read.as_ref().is_ok_and(|read| read == profile), "{:?}", read.err());
    }
    Ok(())
}

#[test]
fn whole_files_are_imported() {
    let folder = tempfile::tempdir().unwrap();
    let shape = shape(folder.path(), 2);
    write_all(folder.path(), &LAYERS, 0, &[]);
    let tables = LayerTables::read(folder.path()).unwrap();
    assert_eq!(tables.profile(&shape, "G").mixed_attention.unwrap().skew.len(), 2);
    write_all(folder.path(), &RUN, 0, &[]);
    assert_eq!(MeasuredRun::read(folder.path(), None).unwrap().requests.len(), 2);
    for compression in [Compression::UNCOMPRESSED, Compression::ZSTD(ZstdLevel::default())] {
        write_kernels(folder.path(), compression, 3, |bytes| bytes);
        let tables = KernelTables::read(folder.path(), "g", "vllm", "1.0").unwrap();
        check_profile(&tables.profile(&shape, 0.0).unwrap()).unwrap();
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_model_configurations(damages in prop::collection::vec(damage(), 1..4), num_loops in 1..5_u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, damaged(CONFIG, &damages)).unwrap();
        let (shape, allocated) = ALLOCATIONS.largest(|| ModelShape::read(&path, num_loops, 8));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(shape) = shape {
            prop_assert!(shape.total_weight_bytes() > 0 && shape.kv_bytes_per_depth() > 0);
        }
    }

    #[test]
    fn damaged_layer_tables(hit in 0..LAYERS.len(), damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let shape = shape(folder.path(), 2);
        write_all(folder.path(), &LAYERS, hit, &damages);
        let (profile, allocated) =
            ALLOCATIONS.largest(|| LayerTables::read(folder.path()).map(|tables| tables.profile(&shape, "G")));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(profile) = profile {
            check_profile(&profile)?;
        }
    }

    #[test]
    fn damaged_runs(hit in 0..RUN.len(), damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        write_all(folder.path(), &RUN, hit, &damages);
        let (run, allocated) = ALLOCATIONS.largest(|| MeasuredRun::read(folder.path(), None));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(run) = run {
            prop_assert!(run.requests.iter().all(|times| times.arrival_s.is_finite() && times.output_tokens > 0));
        }
    }

    #[test]
    fn damaged_kernel_tables(
        hit in 0..4_usize,
        is_packed: bool,
        in_footer: bool,
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let shape = shape(folder.path(), 2);
        let system = if hit == 3 { damaged(SYSTEM, &damages) } else { SYSTEM.into() };
        let compression = if is_packed { Compression::ZSTD(ZstdLevel::default()) } else { Compression::UNCOMPRESSED };
        write_kernels(folder.path(), compression, hit, |bytes| {
            let length = bytes[bytes.len() - 8..].first_chunk().copied().map(u32::from_le_bytes).unwrap();
            let (rows, footer) = bytes.split_at(bytes.len() - length as usize - 8);
            if in_footer { [rows, &damaged(footer, &damages)].concat() } else { damaged(&bytes, &damages) }
        });
        std::fs::write(folder.path().join("g.yaml"), system).unwrap();
        let (profile, allocated) = ALLOCATIONS
            .largest(|| KernelTables::read(folder.path(), "g", "vllm", "1.0").and_then(|tables| tables.profile(&shape, 0.0)));
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        if let Ok(profile) = profile {
            check_profile(&profile)?;
        }
    }
}

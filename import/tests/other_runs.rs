//! Runs of synthetic GPUs and models, whose kernel times follow laws that interpolation reproduces exactly. The times
//! of a simulation from their tables are known sums.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use import::comparison::RequestTimes;
use import::{Comparison, LayerTables, MeasuredRun, ModelShape};
use latency::LatencyModel;
use simulator::{ExitModel, Metrics, Simulation};
use traces::{LatencyProfile, ReadOptions, RequestTrace};

const BUDGET: u32 = 64;
const BLOCK: u32 = 8;

/// Kernel times of one layer, in microseconds.
struct Gpu {
    /// Dense layers: name, runs per layer of the model, time without tokens, time per token.
    dense: &'static [(&'static str, f64, f64, f64)],
    layers: f64,
    /// Position between the times at the mean and at the longest history, for two unequal decode rows.
    alpha: f64,
}

/// Attention: start, time per pair of a prompt token and a key, time per key of a decode row.
const ATTENTION: [f64; 3] = [4.0, 1e-3, 0.02];
const LM_HEAD: [f64; 2] = [300.0, 2.0];
const SAMPLER: [f64; 2] = [10.0, 0.5];

impl Gpu {
    /// Attention of chunks (tokens, history before them) and decode rows of one history.
    fn attention(&self, chunks: &[(u32, u32)], rows: f64, history: f64) -> f64 {
        let pairs =
            chunks.iter().map(|&(tokens, before)| f64::from(tokens) * (f64::from(before) + f64::from(tokens) / 2.0));
        ATTENTION[0] + ATTENTION[1] * pairs.sum::<f64>() + ATTENTION[2] * rows * history
    }

    /// Time of a whole step. There may be one decode row, or two of different histories.
    fn step(&self, chunks: &[(u32, u32)], histories: &[u32], predicting: f64) -> f64 {
        let rows = histories.len() as f64;
        let tokens = f64::from(chunks.iter().map(|chunk| chunk.0).sum::<u32>()) + rows;
        let mean =
            if rows > 0.0 { histories.iter().map(|&history| f64::from(history)).sum::<f64>() / rows } else { 0.0 };
        let longest = f64::from(histories.iter().copied().max().unwrap_or(0));
        let even = self.attention(chunks, rows, mean);
        let attention = even + self.alpha * (self.attention(chunks, rows, longest) - even);
        let dense = |once: bool| -> f64 {
            let of_step = self.dense.iter().filter(|layer| (layer.1 == 0.0) == once);
            of_step.map(|&(_, count, start, token)| if once { 1.0 } else { count } * (start + token * tokens)).sum()
        };
        let head = LM_HEAD[0] + SAMPLER[0] + (LM_HEAD[1] + SAMPLER[1]) * predicting;
        self.layers * (dense(false) + attention) + dense(true) + if predicting > 0.0 { head } else { 0.0 }
    }

    /// First and last token of a request that is served by itself, in microseconds after its arrival.
    fn alone(&self, prompt: u32, found: u32, output: u32) -> (f64, f64) {
        let (mut done, mut first) = (found, 0.0);
        while done < prompt {
            let chunk = (prompt - done).min(BUDGET);
            let last = done + chunk == prompt;
            first += self.step(&[(chunk, done)], &[], if last { 1.0 } else { 0.0 });
            done += chunk;
        }
        let decodes: f64 = (prompt..prompt + output - 1).map(|history| self.step(&[], &[history], 1.0)).sum();
        (first, first + decodes)
    }

    fn write_dense(&self, folder: &Path) {
        let mut text = "tokens,time_us,note,layer\n".to_owned();
        for (place, (name, _, start, token)) in self.dense.iter().enumerate() {
            for tokens in [1, 2 + place as u32, 40, 80] {
                writeln!(text, "{tokens},{},x,{name}", start + token * f64::from(tokens)).unwrap();
            }
        }
        fs::write(folder.join("dense.csv"), text).unwrap();
        let mut text = "layer,sequences,time_us\n".to_owned();
        for (name, [start, sequence], counts) in [("lm_head", LM_HEAD, [1, 3, 9]), ("sampler", SAMPLER, [1, 5, 16])] {
            for count in counts {
                writeln!(text, "{name},{count},{}", start + sequence * f64::from(count)).unwrap();
            }
        }
        fs::write(folder.join("per_sequence.csv"), text).unwrap();
    }
}

const ROWS: [u32; 4] = [0, 1, 3, 8];

/// Rows of `attention.csv` for every number of decode rows and histories.
fn decodes(mut row: impl FnMut(u32, u32)) {
    for rows in ROWS {
        for history in if rows == 0 { vec![0] } else { vec![1, 37, 200] } {
            row(rows, history);
        }
    }
}

/// The requests: a prompt longer than the budget; an equal prompt, whose full blocks are found; two at once.
const REQUESTS: [(f64, u32, u32); 4] = [(0.0, 70, 5), (1.0, 70, 3), (2.0, 20, 4), (2.0, 30, 7)];
/// Full blocks of 70 tokens.
const FOUND: u32 = 64;

/// First and last tokens of the requests, in seconds.
fn expected(gpu: &Gpu, prefix_caching: bool) -> Vec<(f64, f64)> {
    let at = |arrival: f64, (first, last): (f64, f64)| (arrival + first * 1e-6, arrival + last * 1e-6);
    let both = gpu.step(&[(20, 0), (30, 0)], &[], 2.0);
    let together: f64 = (0..3).map(|i| gpu.step(&[], &[20 + i, 30 + i], 2.0)).sum();
    let longer: f64 = (3..6).map(|i| gpu.step(&[], &[30 + i], 1.0)).sum();
    vec![
        at(0.0, gpu.alone(70, 0, 5)),
        at(1.0, gpu.alone(70, if prefix_caching { FOUND } else { 0 }, 3)),
        at(2.0, (both, both + together)),
        at(2.0, (both, both + together + longer)),
    ]
}

fn write_run(folder: &Path, meta: &str, times: &[(f64, f64)]) {
    fs::write(folder.join("meta.json"), meta).unwrap();
    let (mut workload, mut lines) = (String::new(), Vec::new());
    for (place, (&(arrival, prompt, output), (first, last))) in REQUESTS.iter().zip(times).enumerate() {
        let seed = if prompt == 70 { 7 } else { 100 * place as u32 };
        let ids: Vec<u32> = (0..prompt).map(|position| seed + position).collect();
        let nanos = (arrival * 1e9) as u64;
        // The client requested more tokens than were generated.
        let asked = output + 1;
        writeln!(workload, r#"{{"input_tok_ids": {ids:?}, "arrival_time_ns": {nanos}, "output_toks": {asked}, "input_toks": {prompt}}}"#).unwrap();
        lines.push(format!(
            r#"{{"status": "ok", "last_token_ts": {}, "first_token_ts": {}, "queued_ts": {}, "output_toks": {output}, "request_id": "x-{place}", "input_toks": {prompt}, "arrival_time": {}}}"#,
            last + 50.0,
            first + 50.0,
            arrival + 50.0,
            arrival + 1e9,
        ));
    }
    lines.reverse();
    fs::write(folder.join("workload.jsonl"), workload).unwrap();
    fs::write(folder.join("requests.jsonl"), lines.join("\n")).unwrap();
}

/// The steps of `depthwise import layer-tables` and `depthwise vllm`.
fn compare(folder: &Path) -> Comparison {
    let shape = ModelShape::read(folder.join("config.json"), 1, 0).unwrap();
    LayerTables::read(folder).unwrap().profile(&shape, "made up").write(folder.join("out")).unwrap();
    let profile = LatencyProfile::read(folder.join("out")).unwrap();
    let measured = MeasuredRun::read(folder, Some(400)).unwrap();
    let options = ReadOptions { prefix_block_tokens: measured.settings.block_tokens, ..ReadOptions::default() };
    let workload = RequestTrace::read_with(folder.join("workload.jsonl"), &options).unwrap();
    let requests = measured.as_served(&workload).unwrap();

    let (latency, exits) = (LatencyModel::new(&profile).unwrap(), ExitModel::full_depth(1, "any").unwrap());
    let prefixes = Arc::new(requests.prefix_hashes.clone().unwrap());
    let mut metrics = Metrics::new(&measured.settings).with_requests();
    let simulation = Simulation::new(measured.settings, &latency, &exits).unwrap().with_prefixes(&prefixes);
    let outcome = simulation.run(requests.requests.iter().copied(), std::slice::from_mut(&mut metrics)).unwrap();
    assert!(outcome.extrapolations.is_empty(), "{}", outcome.extrapolations);
    let times = |request: &simulator::metrics::RequestRow| RequestTimes {
        arrival_s: request.arrival_s,
        queued_s: request.arrival_s,
        first_token_s: request.first_token_s,
        last_token_s: request.finished_s,
        output_tokens: request.output_tokens,
    };
    Comparison::new(&measured.requests, &metrics.requests().map(times).collect::<Vec<_>>())
}

fn assert_exact(comparison: &Comparison) {
    for (metric, measured, simulated) in &comparison.rows {
        assert!((simulated / measured - 1.0).abs() < 2e-6, "{metric}\n{comparison}");
    }
}

#[test]
fn a_qwen_with_tables_of_the_older_form_and_without_prefix_caching() {
    let gpu = Gpu {
        dense: &[
            ("layernorm", 2.0, 1.0, 0.01),
            ("qkv_proj", 1.0, 9.0, 0.2),
            ("qk_norm", 1.0, 1.5, 0.02),
            ("rotary_emb", 1.0, 1.25, 0.01),
            ("o_proj", 1.0, 5.0, 0.1),
            ("gate_up_proj", 1.0, 20.0, 0.5),
            ("act_fn", 1.0, 2.0, 0.03),
            ("down_proj", 1.0, 11.0, 0.25),
            ("embedding", 0.0, 3.0, 0.05),
            ("final_layernorm", 0.0, 1.0, 0.01),
        ],
        layers: 3.0,
        alpha: 0.25,
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(
        folder.join("config.json"),
        r#"{"model_type": "qwen3", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": true,
        "dtype": "float16"}"#,
    )
    .unwrap();
    gpu.write_dense(folder);
    let mut text = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n".to_owned();
    // A chunk's own keys grow with its square, so these tables cannot be exact between measured chunks.
    for (chunk, before) in [(0, 0), (1, 0), (1, 64), (6, 0), (6, 64), (20, 0), (30, 0), (50, 0), (64, 0), (64, 70)] {
        decodes(|rows, history| {
            if chunk + rows > 0 {
                let time = gpu.attention(&[(chunk, before)], rows.into(), history.into());
                writeln!(text, "{chunk},{before},{rows},{history},{time}").unwrap();
            }
        });
    }
    fs::write(folder.join("attention.csv"), text).unwrap();
    let skew = "pc,n_label,skew_rate_label,alpha\n0,n<=2,sr<=40%,0.9\n0,n<=2,sr<=70%,0.25\n0,n>2,sr<=70%,0.8\n16,n<=2,sr<=70%,0.7\n";
    fs::write(folder.join("skew_fit.csv"), skew).unwrap();
    let meta = format!(
        r#"{{"vllm_version": "0.13.0", "kv_cache": {{"enable_prefix_caching": false, "block_size": {BLOCK}}},
        "engine_kwargs": {{"max_num_batched_tokens": {BUDGET}, "max_num_seqs": 3, "dtype": "float16"}}}}"#
    );
    write_run(folder, &meta, &expected(&gpu, false));
    assert_exact(&compare(folder));
}

#[test]
fn a_gemma_with_tables_of_the_newer_form_and_prefix_caching() {
    let gpu = Gpu {
        dense: &[
            ("layernorm", 3.0, 1.0, 0.01),
            ("post_feedforward_layernorm", 1.0, 1.75, 0.04),
            ("qkv_proj", 1.0, 8.0, 0.3),
            ("rotary_emb", 1.0, 1.0, 0.01),
            ("o_proj", 1.0, 6.0, 0.1),
            ("gate_up_proj", 1.0, 30.0, 0.75),
            ("act_fn", 1.0, 2.0, 0.03),
            ("down_proj", 1.0, 15.0, 0.5),
            ("embedding", 0.0, 4.0, 0.05),
            ("final_layernorm", 0.0, 1.0, 0.01),
        ],
        layers: 5.0,
        alpha: 0.5,
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(
        folder.join("config.json"),
        r#"{"model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000, "torch_dtype": "bfloat16"}"#,
    )
    .unwrap();
    gpu.write_dense(folder);
    let mut text = "layer,prefill_chunk,prefill_key,n_decode,kv_decode,decode_q_len,time_us\n".to_owned();
    for chunk in [0, 2, 12, 64] {
        for key in if chunk == 0 { vec![0.0] } else { vec![1.0, 11.5, 90.0] } {
            decodes(|rows, history| {
                if chunk + rows > 0 {
                    let time = gpu.attention(&[], rows.into(), history.into()) + ATTENTION[1] * f64::from(chunk) * key;
                    writeln!(text, "attention,{chunk},{key:.1},{rows},{history},1,{time}").unwrap();
                    writeln!(text, "attention,{chunk},{key:.1},{rows},{history},4,{}", 3.0 * time).unwrap();
                }
            });
        }
    }
    fs::write(folder.join("attention.csv"), text).unwrap();
    fs::write(
        folder.join("meta.yaml"),
        "gpu: G\nskew_fit:\n  enabled: true\n  bucket_axes:\n    axes: [n, pc, lev]\n    pc_bins: [-1, 0, 64]\n    \
        pc_labels: [pc0, pc1]\n    lev_bins: [0.0, 0.001, 1000000000.0]\n    lev_labels: [lev0, lev1]\n",
    )
    .unwrap();
    let skew = "layer,decode_q_len,pc_label,lev_label,n_anchor,alpha,direct_rows,pooled_rows\n\
        attention,1,pc0,lev0,2,0.9,1,1\nattention,1,pc0,lev1,2,0.5,1,1\nattention,1,pc0,lev1,9,0.8,1,1\n\
        attention,4,pc0,lev1,2,0.7,1,1\nattention,1,pc1,lev1,2,0.6,1,1\n";
    fs::write(folder.join("skew_fit.csv"), skew).unwrap();
    let meta = format!(
        r#"{{"resolved_config": {{"scheduler_config": {{"async_scheduling": true, "max_num_scheduled_tokens": {BUDGET},
        "max_num_batched_tokens": 128, "max_num_seqs": 2, "policy": "fcfs", "some_new_key": 1}},
        "cache_config": {{"block_size": {BLOCK}, "num_gpu_blocks": 300, "enable_prefix_caching": true}}}},
        "engine_kwargs": {{"max_num_batched_tokens": 32, "max_num_seqs": 1}}, "vllm_version": "0.28.0"}}"#
    );
    write_run(folder, &meta, &expected(&gpu, true));
    assert_exact(&compare(folder));
}

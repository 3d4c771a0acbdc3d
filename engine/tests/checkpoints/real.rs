//! Real models, if `scripts/fetch-models.sh` was run, compared with llama.cpp on the same files.

use std::path::PathBuf;

use candle_core::{D, Device, Tensor};
use engine::Checkpoint;
use engine::reference::Reference;

fn of_repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Folder of `scripts/fetch-models.sh`: `DEPTHWISE_MODELS`, or `models/fetched`.
fn fetched(name: &str) -> PathBuf {
    let folder = std::env::var_os("DEPTHWISE_MODELS");
    folder.map_or_else(|| of_repository("models/fetched"), PathBuf::from).join(name)
}

/// Number of tokens of a fixed text, with those that begin a prompt, and its perplexity; `None` if the model is absent.
fn tokens_and_perplexity(name: &str) -> Option<(usize, f64)> {
    let path = fetched(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there, run scripts/fetch-models.sh", path.display());
        return None;
    }
    let text = std::fs::read_to_string(of_repository("models/kjv/prompts.txt")).unwrap();
    let text = &text[..4000];
    let Checkpoint { weights, tokenizer } = Checkpoint::read(&path, 1).unwrap();
    let tokenizer = tokenizer.unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    let tokens = tokenizer.encode_prompt(text).unwrap();

    let count = tokens.len();
    let input = Tensor::new(&tokens[..count - 1], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let targets = Tensor::new(&tokens[1..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
    let logits = Reference::new(&weights).unwrap().forward(&input).unwrap().pop().unwrap();
    let of_targets = logits.gather(&targets, 1).unwrap().squeeze(1).unwrap();
    let nats = (logits.log_sum_exp(D::Minus1).unwrap() - of_targets).unwrap().mean_all().unwrap();
    Some((count, f64::from(nats.to_scalar::<f32>().unwrap()).exp()))
}

/// llama.cpp's value is for the file with its matrices converted to f32, since it otherwise rounds activations to 8
/// bits. Its keys and values have 16 bits.
fn assert_near(found: f64, llama_cpp: f64) {
    assert!((found / llama_cpp - 1.0).abs() < 1e-3, "perplexity {found}, of llama.cpp {llama_cpp}");
}

#[test]
fn smollm2_has_the_tokens_and_the_perplexity_that_llama_cpp_finds() {
    if let Some((tokens, perplexity)) = tokens_and_perplexity("SmolLM2-135M-Instruct.Q4_1.gguf") {
        assert_eq!(tokens, 1029);
        assert_near(perplexity, 12.7725);
    }
}

#[test]
fn gemma_3_has_the_tokens_and_the_perplexity_that_llama_cpp_finds() {
    if let Some((tokens, perplexity)) = tokens_and_perplexity("gemma-3-270m-q4_k_m.gguf") {
        assert_eq!(tokens, 1017);
        assert_near(perplexity, 6.3433);
    }
}

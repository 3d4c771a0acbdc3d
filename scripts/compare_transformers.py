#!/usr/bin/env python3
"""Compares depthwise with transformers, an implementation of its own, on small random models of every family.

    python3 -m venv VENV && VENV/bin/pip install torch transformers
    VENV/bin/python scripts/compare_transformers.py [NAME...]      # models whose name contains one of these; else all

Every model is made by transformers, saved as a Hugging Face folder and read by `depthwise evaluate`: the losses on a text
must be equal. `depthwise convert --rank full` then makes it recursive, `depthwise export` plain again, and transformers
must find the logits of the original in that. A model marked UNSUPPORTED must be refused, by the key that says what is not
supported. DEPTHWISE names the program (target/release/depthwise).
"""
import csv
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import (AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, GPTNeoXConfig, LlamaConfig, MistralConfig,
                          Qwen2Config, Qwen3Config, SmolLM3Config)

ROOT = Path(__file__).resolve().parent.parent
DEPTHWISE = os.environ.get("DEPTHWISE", ROOT / "target/release/depthwise")
TOKENIZER = ROOT / "models/kjv/tokenizer.json"
TEXT = (ROOT / "models/kjv/prompts.txt").read_text()[:400]
SIZES = dict(vocab_size=512, hidden_size=48, intermediate_size=56, num_hidden_layers=4, num_attention_heads=6,
             max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None)
LAYERS = ["full_attention", "sliding_attention"] * 2
LOSS_TOLERANCE, LOGIT_TOLERANCE = 1e-5, 1e-3


def rope(kind="default", theta=1e4, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LLAMA = dict(num_key_value_heads=2)
GEMMA = dict(num_key_value_heads=3, head_dim=8)
GEMMA3 = dict(num_key_value_heads=2, head_dim=16, sliding_window=9, layer_types=LAYERS, query_pre_attn_scalar=24)
# Configuration, what all models of the family have in common, and by name what a model has beside it.
FAMILIES = [
    ("llama", LlamaConfig, LLAMA, {
        "multi-head": dict(num_key_value_heads=6),
        "grouped-query": {},
        "multi-query": dict(num_key_value_heads=1),
        "tied": dict(tie_word_embeddings=True),
        "attention bias": dict(attention_bias=True),
        "mlp bias": dict(mlp_bias=True),
        "narrow heads": dict(head_dim=6),
        "wide heads": dict(head_dim=32),
        "rope theta": dict(rope_parameters=rope(theta=5e5)),
        "rope linear": dict(rope_parameters=rope("linear", factor=4.0)),
        "rope llama3": dict(rope_parameters=rope("llama3", 5e5, **LLAMA3)),
        "gelu": dict(hidden_act="gelu"),
        "gelu_new": dict(hidden_act="gelu_new"),
        "eps": dict(rms_norm_eps=0.3),
    }),
    ("mistral", MistralConfig, LLAMA, {
        "full": dict(sliding_window=None),
        "sliding": dict(sliding_window=9, head_dim=16),
        "tied, rope linear": dict(sliding_window=None, tie_word_embeddings=True, rope_parameters=rope("linear", factor=4.0)),
    }),
    ("qwen2", Qwen2Config, LLAMA, {
        "grouped-query": {},
        "tied, rope theta": dict(tie_word_embeddings=True, rope_parameters=rope(theta=5e5)),
    }),
    ("qwen3", Qwen3Config, LLAMA, {
        "narrow heads": dict(head_dim=6),
        "usual heads": {},
        "tied, attention bias": dict(tie_word_embeddings=True, attention_bias=True, head_dim=16),
    }),
    ("smollm3", SmolLM3Config, LLAMA, {
        "tied": {},
        "untied, biases": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        "other layers": dict(no_rope_layers=[0, 1, 1, 0], rope_parameters=rope(theta=1e3)),
        "every second": dict(no_rope_layer_interval=2),
    }),
    ("gemma", GemmaConfig, GEMMA, {
        "grouped-query": {},
        "multi-query": dict(num_key_value_heads=1, head_dim=16),
        "untied": dict(tie_word_embeddings=False),
        "attention bias": dict(attention_bias=True),
        "legacy gelu": dict(hidden_act="gelu"),
        "silu": dict(hidden_act="silu"),
        "rope linear": dict(rope_parameters=rope("linear", factor=3.0)),
    }),
    ("gemma3", Gemma3TextConfig, GEMMA3, {
        "grouped-query": {},
        "multi-query": dict(num_key_value_heads=1),
        "untied, attention bias": dict(tie_word_embeddings=False, attention_bias=True),
        "rope by layer type": dict(rope_parameters={
            "full_attention": rope("linear", 1e5, factor=8.0), "sliding_attention": rope(theta=500.0)}),
        "all full": dict(layer_types=["full_attention"] * 4),
        "all sliding": dict(layer_types=["sliding_attention"] * 4),
    }),
    ("gpt_neox", GPTNeoXConfig, {}, {
        "parallel": {},
        "sequential": dict(use_parallel_residual=False),
        "tied": dict(tie_word_embeddings=True),
        "no attention bias": dict(attention_bias=False),
        "gelu_fast": dict(hidden_act="gelu_fast"),
        "eps": dict(layer_norm_eps=0.1),
        "half rotated": dict(rope_parameters=rope(theta=1e3, partial_rotary_factor=0.5)),
        "all rotated, linear": dict(rope_parameters=rope("linear", factor=2.0, partial_rotary_factor=1.0)),
    }),
]
# The same, and the key by which it must be refused.
UNSUPPORTED = [
    ("llama relu", LlamaConfig, LLAMA | dict(hidden_act="relu"), "hidden_act"),
    ("llama rope dynamic", LlamaConfig, LLAMA | dict(rope_parameters=rope("dynamic", factor=4.0)), "rope_type"),
    ("llama rope yarn", LlamaConfig, LLAMA | dict(rope_parameters=rope("yarn", factor=4.0)), "rope_type"),
    ("llama partly rotated", LlamaConfig, LLAMA | dict(rope_parameters=rope(partial_rotary_factor=0.5)),
     "partial_rotary_factor"),
    ("qwen2 sliding", Qwen2Config, LLAMA | dict(use_sliding_window=True, sliding_window=9, max_window_layers=1),
     "layer_types"),
    ("gemma bidirectional", GemmaConfig, GEMMA | dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("gemma3 softcapping", Gemma3TextConfig, GEMMA3 | dict(attn_logit_softcapping=20.0), "attn_logit_softcapping"),
    ("gemma3 final softcapping", Gemma3TextConfig, GEMMA3 | dict(final_logit_softcapping=3.0), "final_logit_softcapping"),
    ("gemma3 bidirectional", Gemma3TextConfig, GEMMA3 | dict(use_bidirectional_attention=True),
     "use_bidirectional_attention"),
]


def save(config, folder, seed):
    """Writes a model of random numbers, large enough that a wrong operation shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            else:
                tensor.normal_(std=0.7 if "embed_" in name else 1.3 / math.sqrt(tensor.shape[1]))
    # Half of them in several files.
    model.save_pretrained(folder, max_shard_size=["5GB", "100KB"][seed % 2])
    shutil.copy(TOKENIZER, folder)


def logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits[0].double()


def depthwise(*arguments):
    return subprocess.run([DEPTHWISE, *map(str, arguments)], capture_output=True, text=True, check=True)


def loss(folder, work):
    (work / "text.txt").write_text(TEXT)
    depthwise("evaluate", folder, "--text", work / "text.txt", "--seq", 500, "--out", work / "evaluation")
    with open(work / "evaluation/loops.csv") as file:
        return float(list(csv.DictReader(file))[-1]["loss_nats_per_token"])


def compare(config, seed, work):
    """The relative errors of the loss, and of the logits of a model converted at full rank and exported."""
    save(config, work / "model", seed)
    tokens = torch.tensor([Tokenizer.from_file(str(TOKENIZER)).encode(TEXT).ids])
    original = logits(work / "model", tokens)
    expected = torch.nn.functional.cross_entropy(original[:-1], tokens[0, 1:]).item()
    loops, init = [1, 2, 4][seed % 3], ["stepwise", "average", "lower", "random"][seed % 4]
    depthwise("convert", work / "model", "--loops", loops, "--init", init, "--rank", "full", "--out", work / "recursive")
    depthwise("export", work / "recursive", "--out", work / "plain")
    error = (logits(work / "plain", tokens) - original).abs().max() / original.abs().max()
    return abs(loss(work / "model", work) / expected - 1), error.item(), f"{init}, {loops} loops"


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = lambda name: not sys.argv[1:] or any(part in name for part in sys.argv[1:])
    models = [(f"{family}: {name}", config, common | own)
              for family, config, common, named in FAMILIES for name, own in named.items()]
    failed = 0
    for seed, (name, config, options) in enumerate(models):
        if wanted(name):
            with tempfile.TemporaryDirectory() as work:
                of_loss, of_logits, conversion = compare(config(**SIZES | options), seed, Path(work))
            fails = not (of_loss < LOSS_TOLERANCE and of_logits < LOGIT_TOLERANCE)
            failed += fails
            print(f"{name:32} loss {of_loss:.0e}  exported logits {of_logits:.0e} ({conversion}){'  FAILS' * fails}", flush=True)
    for name, config, options, key in UNSUPPORTED:
        if wanted(name):
            with tempfile.TemporaryDirectory() as work:
                save(config(**SIZES | options), work, 0)
                refused = subprocess.run([DEPTHWISE, "export", work, "--out", f"{work}/out"], capture_output=True, text=True)
            fails = refused.returncode == 0 or f"{key}`" not in refused.stderr
            failed += fails
            print(f"{name:32} {refused.stderr.strip().rpartition('config.json: ')[2]}{'  FAILS' * fails}", flush=True)
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()

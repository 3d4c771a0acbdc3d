#!/usr/bin/env python3
"""Writes what llama.cpp makes of texts by small GGUF tokenizers of every kind that the engine reads: the table
engine/tests/checkpoints/llama_cpp_tokens.json, to which a test holds the engine.

    python3 -m venv VENV && VENV/bin/pip install numpy gguf xllamacpp tokenizers
    VENV/bin/python scripts/llama_cpp_tokens.py

xllamacpp is llama.cpp with its server, as a wheel for Python. Names of pre-tokenizers are those of
engine/src/checkpoint/pre_tokenizers.rs. Merges are trained across words, so that every boundary that a pre-tokenizer draws
shows in the tokens.
"""
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
NAMES = ROOT / "engine/src/checkpoint/pre_tokenizers.rs"
TABLE = ROOT / "engine/tests/checkpoints/llama_cpp_tokens.json"
TEXTS = [
    "Hello world", "  two  spaces\n\n next\tline ", "it's 1234567 o'clock, I'LL pay $99.95!!",
    "naïve ÉCOLE Straße ☃ 日本語 한국어 мир", "def f(x):\n    return x**2  # comment\r\n",
    "don't CamelCaseWORDs a1b2 c_d", "...wait—what?! (yes) [no] {x}\n\n\n", "", "١٢٣ ²³ 12345678901",
    "a<|end|>b </s> c", " leading", "trail   ", "abc ab  cab",
]
WIDTH = 32
KEYS = "tokenizer.ggml."


def byte_level():
    """Tokens and merges, of pieces of five characters so that no text becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    texts = [text for text in TEXTS if "</s>" not in text]
    tokenizer.train_from_iterator([text[i:i + 5] for text in texts for i in range(len(text)) for _ in range(3)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    kinds = [1] * len(tokens) + [3, 3, 1]
    return tokens + ["<|begin|>", "<|end|>", "</s>"], kinds, merges


def write(path, values):
    """A model of one layer whose weights are zero, with the tokenizer that `values` are."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(KEYS + key, value)
        elif isinstance(value, int):
            writer.add_uint32(KEYS + key, value)
        elif isinstance(value, str):
            writer.add_string(KEYS + key, value)
        else:
            writer.add_array(KEYS + key, value)
    shapes = {"token_embd": (len(values["tokens"]), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ["attn_norm", "ffn_norm"]}
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in matrices}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.zeros(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path):
    """The tokens of texts from standard input, by a server that ends with its process."""
    import os

    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port, params.n_parallel = path, 64, False, 18180, 1
    server = xllamacpp.Server(params)
    found = []
    for text in json.load(sys.stdin):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        found.append(json.load(urllib.request.urlopen(request))["tokens"])
    print("TOKENS" + json.dumps(found), flush=True)
    os._exit(0)


def ask(values):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.gguf"
        write(path, values)
        run = subprocess.run([sys.executable, __file__, "--serve", path], input=json.dumps(TEXTS), capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("TOKENS")]
    return json.loads(lines[0][6:]) if lines else sys.exit(run.stderr)


def main():
    tokens, kinds, merges = byte_level()
    bytes_ = {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": merges, "bos_token_id": len(tokens) - 3}
    pieces = [("▁", -5.0), ("a", -6.0), ("b", -7.0), ("c", -8.0), ("▁a", -2.0), ("ab", -1.0), ("▁▁", -9.0), ("bc", -1.5),
              ("abc", -1.2)]
    named = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces_ = {
        "model": "llama", "tokens": named + [piece for piece, _ in pieces], "bos_token_id": 1, "unknown_token_id": 0,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces), "scores": [0.0] * len(named) + [score for _, score in pieces],
    }
    names = re.findall(r'"([a-z][a-z0-9_.-]+)"', NAMES.read_text())
    cases = [("bytes", {"pre": name}, []) for name in dict.fromkeys(names)]
    cases += [("bytes", {"pre": "llama-bpe", **more}, without) for more, without in [
        ({}, ["token_type"]), ({}, ["bos_token_id"]), ({"bos_token_id": 9999}, []), ({"add_bos_token": False}, []),
        ({"add_eos_token": True, "eos_token_id": len(tokens) - 2}, [])]]
    cases += [("bytes", {"pre": "gpt-2", "add_bos_token": True}, without) for without in [[], ["bos_token_id"]]]
    cases += [("bytes", {}, [])]
    cases += [("pieces", more, without) for more, without in [
        ({}, []), ({}, ["bos_token_id"]), ({}, ["unknown_token_id"]), ({}, ["token_type"]), ({"bos_token_id": 9999}, []),
        ({"add_space_prefix": False}, []), ({"add_bos_token": False}, []),
        ({"add_eos_token": True, "eos_token_id": 2}, [])]]
    kinds_ = {"bytes": bytes_, "pieces": pieces_}
    rows = []
    for kind, more, without in cases:
        values = {key: value for key, value in (kinds_[kind] | more).items() if key not in without}
        found = ask(values)
        print(kind, more, without)
        same = [row for row in rows if row["tokens"] == found and row["kind"] == kind]
        if same:
            same[0]["cases"].append({"with": more, "without": without})
        else:
            rows.append({"kind": kind, "cases": [{"with": more, "without": without}], "tokens": found})
    table = {"texts": TEXTS, "kinds": kinds_, "rows": rows}
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()

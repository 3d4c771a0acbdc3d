#!/usr/bin/env python3
"""Writes what transformers makes of the keys about rotary embeddings, old and new: the table
engine/tests/checkpoints/transformers_rope.json, to which a test holds the engine.

    python3 -m venv VENV && VENV/bin/pip install transformers
    VENV/bin/python scripts/transformers_rope.py
"""
import json
from pathlib import Path

import transformers
from transformers import Gemma3TextConfig, GemmaConfig, GPTNeoXConfig, LlamaConfig

TABLE = Path(__file__).resolve().parent.parent / "engine/tests/checkpoints/transformers_rope.json"
SIZES = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=64)
LINEAR, OLD = dict(rope_type="linear", factor=2.0), dict(type="linear", factor=2.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
FLAT = [
    {}, dict(rope_theta=5e5), dict(rope_scaling=dict(rope_theta=5e5, rope_type="default")),
    dict(rope_theta=1e4, rope_scaling=dict(rope_theta=5e5, rope_type="default")), dict(rope_scaling=OLD),
    dict(rope_scaling=dict(rope_theta=5e5)), dict(rope_theta=3e4, rope_scaling=dict(OLD, rope_theta=5e5)),
    dict(rope_theta=3e4, rope_scaling=LINEAR), dict(rope_theta=3e4, rope_parameters=LINEAR),
    dict(rope_parameters=dict(rope_type="default", rope_theta=7e4)),
    dict(rope_theta=3e4, rope_parameters=dict(LINEAR, rope_theta=7e4)),
    dict(rope_scaling=OLD, rope_parameters=dict(rope_type="default", rope_theta=7e4)),
    dict(rope_theta=3e4, rope_scaling=LINEAR, rope_parameters=dict(rope_type="default", rope_theta=7e4)),
    dict(rope_scaling={}, rope_parameters=dict(rope_type="default", rope_theta=7e4)),
    dict(rope_scaling=dict(LLAMA3, original_max_position_embeddings=16)), dict(rope_scaling=LLAMA3),
    dict(rope_parameters=dict(LLAMA3, rope_theta=5e5, original_max_position_embeddings=16)),
    dict(rope_scaling=dict(OLD, rope_type="default")),
]
GPT_NEOX = [
    {}, dict(rotary_emb_base=5e5), dict(rotary_emb_base=5e5, rotary_pct=1.0), dict(rope_scaling=dict(OLD, rope_theta=7e4)),
    dict(rope_parameters=dict(rope_theta=7e4, rope_type="default", partial_rotary_factor=0.5), rotary_pct=1.0, rotary_emb_base=9.0),
    dict(rope_scaling=LINEAR, rotary_emb_base=9e3), dict(rope_parameters=dict(partial_rotary_factor=0.5, **LINEAR)),
]
FULL, SLIDING = dict(rope_type="default", rope_theta=5e5), dict(rope_type="default", rope_theta=50.0)
GEMMA3 = [
    {}, dict(rope_theta=5e5, rope_local_base_freq=77.0, rope_scaling=LINEAR), dict(rope_scaling=dict(LINEAR, rope_theta=7e4)),
    dict(rope_parameters=dict(full_attention=FULL, sliding_attention=SLIDING)), dict(rope_scaling=LINEAR),
    dict(rope_theta=9e5, rope_parameters=dict(full_attention=dict(rope_type="default"))),
    dict(rope_local_base_freq=77.0, rope_parameters=dict(full_attention=FULL)),
    dict(rope_scaling=LINEAR, rope_parameters=dict(full_attention=FULL, sliding_attention=SLIDING)),
    dict(rope_theta=9e5, rope_local_base_freq=77.0, rope_parameters=dict(full_attention=FULL, sliding_attention=SLIDING)),
]


def main():
    rows = []
    for kind, cases in [(LlamaConfig, FLAT), (GemmaConfig, FLAT), (GPTNeoXConfig, GPT_NEOX), (Gemma3TextConfig, GEMMA3)]:
        for keys in cases:
            written = json.loads(json.dumps(keys))
            found = kind(**SIZES, **json.loads(json.dumps(keys))).rope_parameters
            rows.append({"model_type": kind.model_type, "keys": written, "rope_parameters": found})
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    TABLE.write_text(f'{{"transformers": "{transformers.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes what transformers computes on small random models of Llama's relatives: the cases that
`cargo test -p engine --test checkpoints stored` reads. Not part of CI.

    python3 -m venv VENV && VENV/bin/pip install torch transformers
    VENV/bin/python scripts/transformers_cases.py

Each case is a folder as `save_pretrained` writes it, with `expected.json`: `tokens`, and `logits` by loop (one), sequence,
position and token.
"""
import json
from pathlib import Path

import torch
from transformers import MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config, AutoModelForCausalLM

CASES = Path(__file__).resolve().parent.parent / "engine/tests/checkpoints/stored"
SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=None)
MODELS = {
    "mistral": MistralConfig(**SIZES, num_hidden_layers=2, head_dim=8, sliding_window=4, rope_theta=1e3),
    "mistral_full": MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=None, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, num_hidden_layers=2, rope_theta=1e3),
    "qwen3": Qwen3Config(**SIZES, num_hidden_layers=2, head_dim=8, rms_norm_eps=0.02),
    "smollm3": SmolLM3Config(**SIZES, num_hidden_layers=5, rope_theta=1e3),
    "smollm3_listed": SmolLM3Config(**SIZES, num_hidden_layers=2, no_rope_layers=[0, 1], attention_bias=True),
}


def main():
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.4 * noise)
            tokens = torch.randint(config.vocab_size, (2, 12))
            # Numbers of the file are those of the case: in single precision, computed in double.
            logits = model.double()(tokens, use_cache=False).logits
        folder = CASES / name
        model.float().save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        rounded = [[[float(f"{x:.7g}") for x in row] for row in sequence] for sequence in logits.tolist()]
        (folder / "expected.json").write_text(json.dumps(dict(tokens=tokens.tolist(), logits=[rounded])) + "\n")
        print(name, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes small random models of three public looped families with what their reference code computes: the cases in
engine/tests/checkpoints/stored, to which a test holds the engine.

    python3 -m venv VENV && VENV/bin/pip install torch==2.7.1 transformers==4.54.1
    VENV/bin/python scripts/looped_references.py --ouro modeling_ouro.py --raven raven_modeling_minimal.py \\
        --nanbeige modeling_nanbeige.py

Each FILE is the reference's own modeling file, with its configuration file beside it. No part of it is kept here:
    --ouro      modeling_ouro.py, configuration_ouro.py: ByteDance/Ouro-1.4B (model repository). Copies that run under
                transformers 4.54.1 are in Eagle4398/ouro-nixpkgs (the first) and LoopedLMs/ouro_rl (the second).
    --raven     raven_modeling_minimal.py, raven_config_minimal.py: seal-rg/recurrent-pretraining, folder recpre
    --nanbeige  modeling_nanbeige.py, configuration_nanbeige.py: Nanbeige/Nanbeige4.2-3B (model repository). Copies are
                in johnhalloran321/Nanbeige4.2-3B-mps-fix, folder patch (take the file named `original`).
A family without its argument is left as it is.

A case is config.json and model.safetensors, as the reference saves them, and expected.json. `logits` and `gates` are
[loop][sequence][position], computed in float32; `logits` at a loop are those of a model with no more loops than that.
"""
import argparse
import copy
import importlib
import json
import math
import sys
import types
from pathlib import Path

import torch
import transformers

CASES = Path(__file__).resolve().parent.parent / "engine/tests/checkpoints/stored"
POSITIONS, PROMPT, GENERATED = 10, 5, 12
THRESHOLDS = [0.5, 0.8, 0.95]
# A choice between two numbers closer than this could come out otherwise in other arithmetic.
MARGIN = 2e-3
# How far logits in float64 may be from those in float32. Loops enlarge rounding errors, in some models without end.
NOISE = 2e-5


class Unsuitable(Exception):
    """A random model that is not taken, and the next is tried."""


class Ouro:
    config, model = "OuroConfig", "OuroForCausalLM"
    common = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, max_position_embeddings=64, rope_theta=1e6,
                  hidden_act="silu", tie_word_embeddings=False, early_exit_threshold=1.0, head_dim=8)
    cases = {
        "ouro": dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=2, total_ut_steps=4),
        "ouro_grouped_query": dict(vocab_size=32, hidden_size=24, intermediate_size=20, num_hidden_layers=3,
                                   num_attention_heads=4, num_key_value_heads=2, total_ut_steps=3, rms_norm_eps=0.02),
    }

    @staticmethod
    def logits(model, tokens, loop):
        return model(tokens, exit_at_step=loop, use_cache=False).logits

    @staticmethod
    def loops(model):
        return model.config.total_ut_steps

    @staticmethod
    def more(model, tokens, logits):
        """The gates, and where the reference exits: the loop whose logits it returns."""
        gates = torch.stack(model.model(tokens, use_cache=False)[2]).squeeze(-1).sigmoid()
        reached = 1 - (1 - gates[:-1]).cumprod(0)
        exits = {}
        for threshold in THRESHOLDS:
            require_margin((reached - threshold).abs().min())
            found = model(tokens, exit_threshold=threshold, use_cache=False).logits
            distance = (logits - found).abs().amax(-1)
            assert distance.amin(0).max() < 1e-5
            exits[str(threshold)] = distance.argmin(0).tolist()
        # Every loop is an exit at one threshold or another, and at each there are two.
        loops = [{loop for sequence in found for loop in sequence} for found in exits.values()]
        if set.union(*loops) != set(range(len(logits))) or min(map(len, loops)) < 2:
            raise Unsuitable
        return {"gates": rounded(gates), "exits": exits}


class Raven:
    config, model = "RavenConfig", "RavenForCausalLM"
    common = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, n_embd=16, n_heads=2, block_size=32,
                  padding_multiple=8, torch_dtype="float32", transformers_version=transformers.__version__)
    cases = {
        # By its configuration the initial state is random: zeros are given.
        "raven": dict(vocab_size=40, intermediate_size=10, n_layers_in_prelude=2, n_layers_in_recurrent_block=3,
                      n_layers_in_coda=2, n_layers=7, mean_recurrence=4),
        # By its configuration the initial state is zero.
        "raven_no_qk_bias": dict(vocab_size=32, intermediate_size=20, n_layers_in_prelude=1, n_layers_in_coda=1,
                                 n_layers_in_recurrent_block=2, n_layers=4, mean_recurrence=5, qk_bias=False,
                                 tie_embeddings=False, norm_eps=0.02, rope_base=1e4,
                                 init_values=dict(std=0.0, out_proj=0.0, embedding=0.0, embed_scale=4.0)),
    }

    @staticmethod
    def logits(model, tokens, loop):
        state = torch.zeros(*tokens.shape, model.config.n_embd) if model.config.init_values["std"] else None
        return model(tokens, input_states=state, num_steps=loop + 1).logits

    @staticmethod
    def loops(model):
        return model.config.mean_recurrence

    @staticmethod
    def more(model, tokens, logits):
        return {}


class Nanbeige:
    config, model = "NanbeigeConfig", "NanbeigeForCausalLM"
    common = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, max_position_embeddings=64, rope_theta=7e7,
                  vocab_size=40, hidden_size=16, intermediate_size=28, num_hidden_layers=2, head_dim=8, kv_channels=8)
    cases = {
        "nanbeige": dict(num_attention_heads=2, num_key_value_heads=1, num_loops=2, rms_norm_eps=1e-5),
        "nanbeige_skip_norm": dict(num_attention_heads=4, num_key_value_heads=2, num_loops=3, rms_norm_eps=0.02,
                                   skip_loop_final_norm=True),
    }

    @staticmethod
    def logits(model, tokens, loop):
        loops, model.config.num_loops = model.config.num_loops, loop + 1
        logits = model(tokens, use_cache=False).logits
        model.config.num_loops = loops
        return logits

    @staticmethod
    def loops(model):
        return model.config.num_loops

    @staticmethod
    def more(model, tokens, logits):
        return {}


FAMILIES = {"ouro": Ouro, "raven": Raven, "nanbeige": Nanbeige}


def require_margin(distance):
    if distance < MARGIN:
        raise Unsuitable


def rounded(tensor):
    """Nested lists of numbers of seven significant digits, which is what float32 holds."""
    return json.loads(json.dumps(tensor.double().tolist()), parse_float=lambda number: float(f"{float(number):.7g}"))


def load(family, file):
    """The modules of a modeling file, which imports its configuration from the same folder."""
    package = types.ModuleType(f"reference_{family}")
    package.__path__ = [str(file.resolve().parent)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{file.stem}")


def randomize(model):
    """Weights by which a wrong operation shows: no norm is one, no bias zero, and no loop leaves a state as it was."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            elif "bias" in name:
                tensor.normal_(std=0.5)
            elif "embed" in name or "wte" in name:
                tensor.normal_(std=0.7)
            else:
                tensor.normal_(std=1 / math.sqrt(tensor.shape[1]))


def greedy(family, model, prompt):
    tokens = list(prompt)
    for _ in range(GENERATED):
        best = family.logits(model, torch.tensor([tokens]), family.loops(model) - 1)[0, -1].topk(2)
        require_margin(best.values[0] - best.values[1])
        tokens.append(best.indices[0].item())
    generated = tokens[len(prompt):]
    if len(set(generated)) < GENERATED // 2:
        raise Unsuitable
    return generated


def make(family, reference, options, seed):
    """A model, its logits, and what is expected of it."""
    torch.manual_seed(seed)
    config = getattr(reference, family.config)(**family.common | options)
    config.auto_map = {"AutoConfig": f"{type(config).__module__.rpartition('.')[2]}.{family.config}",
                       "AutoModelForCausalLM": f"{reference.__name__.rpartition('.')[2]}.{family.model}"}
    model = getattr(reference, family.model)(config).eval()
    randomize(model)
    vocabulary = config.vocab_size
    tokens, prompt = torch.randint(vocabulary, (2, POSITIONS)), torch.randint(vocabulary, (PROMPT,)).tolist()
    with torch.no_grad():
        logits, exact = (torch.stack([family.logits(model, tokens, loop) for loop in range(family.loops(model))])
                         for model in (model, copy.deepcopy(model).double()))
        if (logits - exact).abs().max() > NOISE:
            raise Unsuitable
        expected = {"tokens": tokens.tolist(), "logits": rounded(logits), **family.more(model, tokens, logits),
                    "prompt": prompt, "greedy": greedy(family, model, prompt)}
    return model, logits, expected


def write(family, reference, name, options):
    for seed in range(1000):
        try:
            model, logits, expected = make(family, reference, options, seed)
            break
        except Unsuitable:
            continue
    folder = CASES / name
    # Each tensor a copy: a tied model is saved with its head too, as Huginn-0125 is.
    model.save_pretrained(folder, state_dict={key: tensor.clone() for key, tensor in model.state_dict().items()})
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    lines = ",\n".join(f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in expected.items())
    (folder / "expected.json").write_text(f"{{\n{lines}\n}}\n")
    moved = ((logits[1:] - logits[:-1]).abs().amax((1, 2, 3)) / logits.abs().max()).tolist()
    print(f"{name:20} seed {seed:3}, largest change of a logit by a loop, relative to the largest logit:",
          *(f"{change:.2f}" for change in moved))


def main():
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for family in FAMILIES:
        parser.add_argument(f"--{family}", type=Path, metavar="FILE")
    for name, file in vars(parser.parse_args()).items():
        if file is not None:
            reference = load(name, file)
            for case, options in FAMILIES[name].cases.items():
                write(FAMILIES[name], reference, case, options)


if __name__ == "__main__":
    main()

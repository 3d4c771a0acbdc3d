#!/usr/bin/env python3
"""Tokens a second through HTTP against `depthwise replay` of the same requests, in turn.

    cargo build --release
    python3 scripts/serve-overhead.py [--rounds 5] [--requests 256] [--users 32] [--exit margin:0.05]

Both serve models/kjv to the same number of users, who each send the next request when the last one is answered, with the
same prompts, output lengths and scheduling. A round is a replay, a run over HTTP with streams, and one with whole answers.
The client is this script, on the same machine: its share of the processors is part of what HTTP costs here. Printed is the
median of each, and the ratio to the replay of the same round with its range.
"""

import argparse
import asyncio
import csv
import json
import statistics
import subprocess
import tempfile
import time
import pathlib

from serve_common import BINARY, ROOT, complete, server

TOKENS = 64
POLICIES = ["--batching", "depth", "--max-batch", "32", "--token-budget", "256"]


def replay(folder, prompts, args):
    """Tokens a second of a replay."""
    out = folder / "replay"
    command = [
        BINARY, "replay", "--model", "models/kjv", "--prompts", prompts, "--requests", folder / "requests.csv",
        "--users", str(args.users), "--exit", args.exit, *POLICIES, "--out", out,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with open(out / "summary.csv", newline="") as lines:
        return float(next(csv.DictReader(lines))["throughput_tok_s"])


async def over_http(address, texts, args, stream):
    """Tokens a second of the same requests over HTTP."""
    waiting = iter(texts)

    async def user():
        tokens = 0
        for text in waiting:
            body = {"prompt": text, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}
            tokens += (await complete(address, body))[1]
        return tokens

    begun = time.perf_counter()
    tokens = sum(await asyncio.gather(*(user() for _ in range(args.users))))
    seconds = time.perf_counter() - begun
    assert tokens == len(texts) * TOKENS, f"{tokens} tokens"
    return tokens / seconds


def main():
    """Measures in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--exit", default="margin:0.05")
    args = parser.parse_args()
    words = (ROOT / "models/kjv/prompts.txt").read_text().split()
    texts = [" ".join(words[7 * number :][:24]) for number in range(args.requests)]
    found = {"replay": [], "streamed": [], "whole": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        lines = [f"{number},0,1,{TOKENS}\n" for number in range(args.requests)]
        (folder / "requests.csv").write_text("request,arrival_us,prompt_tokens,output_tokens\n" + "".join(lines))
        with server("--exit", args.exit, *POLICIES) as address:
            for _ in range(args.rounds):
                found["replay"].append(replay(folder, prompts, args))
                found["streamed"].append(asyncio.run(over_http(address, texts, args, True)))
                found["whole"].append(asyncio.run(over_http(address, texts, args, False)))
    for way, rates in found.items():
        ratios = [rate / base for rate, base in zip(rates, found["replay"])]
        line = f"{way:9} {statistics.median(rates):8,.0f} tokens/s"
        print(line + (f", {statistics.median(ratios):.3f} of the replay ({min(ratios):.3f} to {max(ratios):.3f})" if way != "replay" else ""))


if __name__ == "__main__":
    main()

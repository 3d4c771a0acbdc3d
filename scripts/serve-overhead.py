#!/usr/bin/env python3
"""Tokens a second through HTTP against `depthwise replay` of the same requests, in turn.

    cargo build --release
    python3 scripts/serve-overhead.py [--rounds 5] [--requests 256] [--users 32] [--model models/kjv] [--exit margin:0.05]

Both serve a model to the same number of users, who each send the next request when the last one is answered, with the same
prompts, output lengths and scheduling. A round is a replay, and for each server a run over HTTP with streams and one with whole
answers: a server that sends a chunk for each token, and one with --stream-interval-ms 20. With --before BINARY, the round has the
same of another build. The client is this script, on the same machine. It reads an answer at its end, so its share of the
processors is small. Printed is the median of each, the ratio to the replay of the same round with its range, and the processor
time of the server's threads that read and write.
"""

import argparse
import asyncio
import contextlib
import csv
import json
import statistics
import subprocess
import tempfile
import time
import pathlib

from serve_common import BINARY, ROOT, fetch, seconds_of_http, server, tokens_of

POLICIES = ["--batching", "depth", "--max-batch", "32", "--token-budget", "256"]


def replay(folder, prompts, args):
    """Tokens a second of a replay."""
    out = folder / "replay"
    command = [
        BINARY, "replay", "--model", args.model, "--weights", args.weights, "--prompts", prompts, "--requests",
        folder / "requests.csv", "--users", str(args.users), "--exit", args.exit, *POLICIES, "--out", out,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with open(out / "summary.csv", newline="") as lines:
        return float(next(csv.DictReader(lines))["throughput_tok_s"])


async def over_http(address, texts, args, stream):
    """Tokens a second of the same requests over HTTP, and microseconds of the server's threads for it per token."""
    waiting, answers = iter(texts), []

    async def user():
        for text in waiting:
            body = {"prompt": text, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
            answers.append(await fetch(address, body))

    begun, http_before = time.perf_counter(), seconds_of_http(address.process)
    await asyncio.gather(*(user() for _ in range(args.users)))
    seconds, http = time.perf_counter() - begun, seconds_of_http(address.process) - http_before
    tokens = sum(tokens_of(answer) for answer in answers)
    assert tokens == len(texts) * args.tokens, f"{tokens} tokens"
    return tokens / seconds, 1e6 * http / tokens


def main():
    """Measures in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default="models/kjv")
    parser.add_argument("--weights", default="f32")
    parser.add_argument("--exit", default="margin:0.05")
    parser.add_argument("--before", type=pathlib.Path)
    args = parser.parse_args()
    words = (ROOT / "models/kjv/prompts.txt").read_text().split()
    texts = [" ".join(words[7 * number :][:24]) for number in range(args.requests)]
    serving = ["--exit", args.exit, "--weights", args.weights, *POLICIES]
    builds = {"": BINARY} | ({" before": args.before} if args.before else {})
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as servers:
        folder = pathlib.Path(name)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        lines = [f"{number},0,1,{args.tokens}\n" for number in range(args.requests)]
        (folder / "requests.csv").write_text("request,arrival_us,prompt_tokens,output_tokens\n" + "".join(lines))
        start = lambda *arguments: servers.enter_context(server(*serving, *arguments[1:], model=args.model, binary=arguments[0]))
        addresses = {build: start(binary) for build, binary in builds.items()}
        ways = {f"{kind}{build}": (addresses[build], kind == "streamed") for build in builds for kind in ("streamed", "whole")}
        ways["streamed, 20 ms"] = (start(BINARY, "--stream-interval-ms", "20"), True)
        found, costs = {way: [] for way in ["replay", *ways]}, {way: [] for way in ways}
        for _ in range(args.rounds):
            found["replay"].append(replay(folder, prompts, args))
            for way, (address, stream) in ways.items():
                rate, cost = asyncio.run(over_http(address, texts, args, stream))
                found[way].append(rate)
                costs[way].append(cost)
    for way, rates in found.items():
        ratios = [rate / base for rate, base in zip(rates, found["replay"])]
        line = f"{way:16} {statistics.median(rates):8,.0f} tokens/s"
        if way != "replay":
            line += f", {statistics.median(ratios):.3f} of the replay ({min(ratios):.3f} to {max(ratios):.3f})"
            line += f", HTTP {statistics.median(costs[way]):.1f} µs a token ({min(costs[way]):.1f} to {max(costs[way]):.1f})"
        print(line)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time to first token with and without prefix caching, in turn.

    cargo build --release
    python3 scripts/prefix-caching.py [--rounds 7] [--prefix 512] [--own 32] [--requests 96] [--rate 20] [--num-blocks N]

`depthwise replay` serves models/kjv the same requests twice in each round, without and with `--prefix-caching`. The prompts of
a family have their first --prefix tokens in common; requests of --families families arrive in turn, at --rate a second with
exponential gaps. Printed are medians over the rounds with their range, and the ratio of the medians.
"""

import argparse
import csv
import pathlib
import random
import statistics
import subprocess
import tempfile

from serve_common import BINARY, ROOT

BLOCK = 16
COLUMNS = {"ttft_p50_ms": "TTFT p50, ms", "ttft_p99_ms": "TTFT p99, ms", "e2e_p50_ms": "latency p50, ms"}
SAME = ["output_tokens", "mean_depth", "token_agreement"]


def write_requests(path, args):
    """Writes a request trace whose prefix hashes say which prompts begin alike."""
    draw, arrival_us, lines = random.Random(1), 0.0, []
    for number in range(args.requests):
        shared = [1000 * (number % args.families) + block for block in range(args.prefix // BLOCK)]
        own = [1_000_000 + 1000 * number + block for block in range(args.own // BLOCK)]
        hashes = " ".join(map(str, shared + own))
        lines.append(f"{number},{arrival_us:.3f},{args.prefix + args.own},{args.output},{BLOCK},{hashes}\n")
        arrival_us += 1e6 * draw.expovariate(args.rate)
    path.write_text("request,arrival_us,prompt_tokens,output_tokens,hash_block_tokens,hash_ids\n" + "".join(lines))


def replay(folder, args, more):
    """The summary of a replay."""
    command = [
        BINARY, "replay", "--model", "models/kjv", "--prompts", "models/kjv/prompts.txt",
        "--requests", folder / "requests.csv", "--batching", args.batching, "--exit", args.exit,
        "--max-batch", "16", "--token-budget", "256", "--num-blocks", str(args.num_blocks), *more, "--out", folder / "out",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with open(folder / "out/summary.csv", newline="") as lines:
        return next(csv.DictReader(lines))


def main():
    """Measures in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("rounds", 7), ("prefix", 512), ("own", 32), ("output", 16), ("requests", 96), ("families", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--batching", default="depth")
    parser.add_argument("--exit", default="margin:0.05")
    args = parser.parse_args()
    found = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_requests(folder / "requests.csv", args)
        for _ in range(args.rounds):
            found["without"].append(replay(folder, args, []))
            found["with"].append(replay(folder, args, ["--prefix-caching"]))
    for column in SAME:
        values = {run[column] for runs in found.values() for run in runs}
        assert len(values) == 1, f"{column} differs: {values}"
    print(f"found: {float(found['with'][0]['prefix_hit_rate']):.3f} of the prompt tokens; {SAME} are the same")
    for column, title in COLUMNS.items():
        values = {way: [float(run[column]) for run in runs] for way, runs in found.items()}
        medians = {way: statistics.median(of_way) for way, of_way in values.items()}
        shown = [f"{way} {medians[way]:.2f} ({min(of_way):.2f} to {max(of_way):.2f})" for way, of_way in values.items()]
        print(f"{title}: {', '.join(shown)}, {medians['without'] / medians['with']:.2f} times as short")


if __name__ == "__main__":
    main()

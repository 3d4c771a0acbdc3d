#!/usr/bin/env python3
"""Observe, predict, switch, measure: what the simulator says of other policies from a recording, and what they then do.

    cargo build --release
    python3 scripts/serve-loop.py [--rounds 3] [--requests 256] [--in-flight 32]

1. `serve` records models/chains under sequence-wise batching without exits, while `bench` sends requests.
2. `profile` measures the model; `simulate` predicts every policy from the recording, with as many requests in flight, and at
   the arrivals of the recording at a lower load.
3. Each policy is served, without recording, and measured by `bench` with the same requests; in turn, round by round.

Printed are predicted and measured tokens a second and latencies, and the speed-up over the policy that was recorded. Server
and client share this machine: all times of HTTP and of the client are in what is measured, and in none of the predictions.
"""

import argparse
import csv
import json
import pathlib
import statistics
import subprocess
import tempfile

from serve_common import BINARY, ROOT, server

MODEL = "models/chains"
LIMITS = ["--max-batch", "32", "--token-budget", "256"]
GATE = "confidence:gate:0.95"
RECORDED = ("sequence", "none")
POLICIES = [RECORDED, ("sequence", GATE), ("depth", "none"), ("depth", GATE)]
LATENCIES = ["ttft_p50_ms", "tpot_p50_ms", "e2e_p50_ms", "e2e_p99_ms"]


def run(*command):
    """Runs a command of depthwise."""
    subprocess.run([BINARY, *command], cwd=ROOT, check=True, capture_output=True)


def summary(folder):
    """The lines of a summary.csv, by batching and exit."""
    with open(folder / "summary.csv", newline="") as lines:
        return {(line["batching"], line["exit_policy"]): line for line in csv.DictReader(lines)}


def requests(count, arrivals):
    """A YAML file of requests."""
    lengths = "prompt_tokens: {fixed: 24}\n  output_tokens: {log_normal: {median: 96, sigma: 0.4}}"
    return f"generate:\n  count: {count}\n  seed: 1\n  arrivals: {arrivals}\n  {lengths}\nmax_output_tokens: 192\n"


def bench(address, folder, file, *load):
    """The line that bench measures."""
    run(
        "bench", "--url", f"http://{address[0]}:{address[1]}", "--text", folder / "words.txt", "--tokens-per-word", "8",
        "--requests", file, *load, "--out", folder / "bench",
    )
    return next(iter(summary(folder / "bench").values()))


def serving(policy, *more):
    """A server under a policy."""
    batching, exit = policy
    return server("--batching", batching, "--exit", exit, *LIMITS, *more, model=MODEL)


def show(title, metric, predicted, measured):
    """Prints a metric of every policy, predicted and measured."""
    print(f"\n{title}")
    for policy in POLICIES:
        said = float(predicted[policy][metric])
        found = [float(line[metric]) for line in measured[policy]]
        ratio = said / statistics.median(found)
        spread = f"{min(found):,.2f} to {max(found):,.2f}"
        print(f"  {' '.join(policy):28} predicted {said:,.2f}, measured {statistics.median(found):,.2f} ({spread}), ratio {ratio:.2f}")


def main():
    """Goes round the loop once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--stream-interval-ms", type=int, default=0)
    args = parser.parse_args()
    closed, users = ["--in-flight", str(args.in_flight)], ["--users", str(args.in_flight)]
    interval = ["--stream-interval-ms", str(args.stream_interval_ms)]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prompts = (ROOT / MODEL / "prompts.jsonl").read_text().splitlines()
        (folder / "words.txt").write_text(" ".join(word for line in prompts for word in json.loads(line)["prompt"].split()))
        (folder / "closed.yaml").write_text(requests(args.requests, "all_at_once"))
        with serving(RECORDED, *interval, "--record", folder / "observed") as address:
            recording = bench(address, folder, folder / "closed.yaml", *closed)
        with serving(RECORDED, *interval) as address:
            line = bench(address, folder, folder / "closed.yaml", *closed)
            rate = 0.6 * float(line["requests"]) / float(line["makespan_s"])
        arrivals = f"{{poisson: {{rate_per_s: {rate:.3f}}}}}"
        (folder / "open.yaml").write_text(requests(args.requests, arrivals))
        with serving(RECORDED, *interval, "--record", folder / "observed-open") as address:
            bench(address, folder, folder / "open.yaml")
        print(f"recorded with {args.in_flight} in flight at {float(recording['throughput_tok_s']):,.0f} tokens/s, and at {rate:.1f} requests/s")

        run("profile", "--model", MODEL, *LIMITS, "--max-tokens", "256", "--out", folder / "profile")
        policies = ["--batching", "sequence,depth", "--exit", f"none,{GATE}"]
        predicted = []
        for trace, load in [("observed", users), ("observed-open", [])]:
            run(
                "simulate", "--requests", folder / trace / "requests.csv", "--exits", folder / trace, "--profile",
                folder / "profile", *policies, *LIMITS, *load, "--out", folder / f"simulated-{trace}",
            )
            predicted.append(summary(folder / f"simulated-{trace}"))

        measured = [{policy: [] for policy in POLICIES} for _ in predicted]
        for _ in range(args.rounds):
            for policy in POLICIES:
                with serving(policy, *interval) as address:
                    measured[0][policy].append(bench(address, folder, folder / "closed.yaml", *closed))
                    measured[1][policy].append(bench(address, folder, folder / "open.yaml"))

    show(f"{args.in_flight} in flight: tokens a second", "throughput_tok_s", predicted[0], measured[0])
    print("\nspeed-up over the recorded policy")
    rate_of = lambda line: float(line["throughput_tok_s"])
    for policy in POLICIES[1:]:
        said = rate_of(predicted[0][policy]) / rate_of(predicted[0][RECORDED])
        found = [rate_of(of) / rate_of(to) for of, to in zip(measured[0][policy], measured[0][RECORDED])]
        print(
            f"  {' '.join(policy):28} predicted {said:.2f}, measured {statistics.median(found):.2f} "
            f"({min(found):.2f} to {max(found):.2f}), ratio {said / statistics.median(found):.2f}"
        )
    for metric in LATENCIES:
        show(f"{rate:.1f} requests a second: {metric}", metric, predicted[1], measured[1])


if __name__ == "__main__":
    main()

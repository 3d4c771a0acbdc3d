"""What calls from Python cost beside the command line: import time, 1,000 simulations, memory over 10,000 calls, callbacks.

Times of processors are given beside those of the clock, since other work on the machine does not change them much.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

import depthwise

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "configs/paper/profiles/gemma-2-loops-rank-64"
EXITS = ROOT / "configs/gpu/exits/2-loops"


def seconds(call):
    """Seconds of the clock, and of the processors in this process and in those that it has started."""

    def used():
        times = os.times()
        return np.array([perf_counter(), times.user + times.system + times.children_user + times.children_system])

    began = used()
    call()
    return used() - began


def compared(what, python, command):
    """Prints medians of both, and of the ratios turn by turn."""
    python, command = np.array(python), np.array(command)
    for unit, place in [("s", 0), ("s of processors", 1)]:
        ratios = python[:, place] / command[:, place]
        print(
            f"{what}: {np.median(python[:, place]):.2f} {unit} from Python, {np.median(command[:, place]):.2f} on the command "
            f"line; ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        )


def import_time():
    code = "from time import perf_counter as now; began = now(); import depthwise; print(now() - began)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(9)]
    print(f"import: {1e3 * statistics.median(times):.0f} ms ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})")


def thousand_simulations(folder, program):
    """A sweep of 1,000 simulations, in turn by the command line and from Python."""
    config = folder / "thousand.yaml"
    config.write_text(
        f"""schema_version: 1
title: a thousand
requests: {{generate: {{count: 300, arrivals: {{poisson: {{rate_per_s: 40}}}}, prompt_tokens: {{fixed: 1}},
  output_tokens: {{log_normal: {{median: 60, sigma: 0.4}}}}}}}}
serving: {{batching: [sequence, depth], exit: [none, 'margin:0.05'], max_batch: 41, token_budget: 41}}
systems: [{{name: one, profile: {PROFILE}, exits: {EXITS}}}]
grid: {{seed: [{", ".join(map(str, range(250)))}]}}
"""
    )
    command, python = [], []
    for turn in range(5):
        out = folder / f"command-{turn}"
        arguments = [program, "sweep", config, "--out", out]
        command.append(seconds(lambda: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)))
        python.append(seconds(lambda: depthwise.sweep(config, folder / f"python-{turn}")))
    compared("1,000 simulations in a sweep", python, command)


def thousand_calls(folder, program):
    """1,000 calls of `simulate` beside 1,000 runs of the program."""
    requests = depthwise.RequestTrace.generate(
        count=300, arrivals="all_at_once", prompt_tokens={"fixed": 1}, output_tokens={"fixed": 60}
    )
    requests.write(folder / "requests.csv")
    arguments = [program, "simulate", "--requests", folder / "requests.csv", "--profile", PROFILE, "--exits", EXITS]
    arguments += ["--batching", "depth", "--exit", "margin:0.05", "--max-batch", "41", "--token-budget", "41"]
    profile, exits = depthwise.LatencyProfile.read(PROFILE), depthwise.ExitTrace.read(EXITS)

    def call():
        return depthwise.simulate(requests, profile, exits, exit="margin:0.05", max_batch=41, token_budget=41)

    command = seconds(lambda: [subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True) for _ in range(1000)])
    compared("1,000 runs", [seconds(lambda: [call() for _ in range(1000)])], [command])


def memory():
    """Resident memory after 1,000, 5,500 and 10,000 calls, in MiB."""
    requests = depthwise.RequestTrace.generate(
        count=20, arrivals="all_at_once", prompt_tokens={"fixed": 1}, output_tokens={"fixed": 10}
    )
    profile, exits = depthwise.LatencyProfile.read(PROFILE), depthwise.ExitTrace.read(EXITS)

    @depthwise.exit_policy("half", reads="margin")
    def half(rows):
        return rows["signals"][:, 0] > 0.5

    sizes = []
    for count in range(1, 10_001):
        runs = depthwise.simulate(requests, profile, exits, exit=["half", "none"][count % 2], max_batch=8, token_budget=8)
        runs.summary
        if count in (1_000, 5_500, 10_000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * resource.getpagesize() / 2**20)
    print("memory after 1,000, 5,500 and 10,000 calls: " + ", ".join(f"{size:.1f}" for size in sizes) + " MiB")


def callbacks():
    """Microseconds that each call of a policy and of times in Python takes."""
    requests = depthwise.RequestTrace.generate(
        count=2000, arrivals="all_at_once", prompt_tokens={"fixed": 1}, output_tokens={"fixed": 60}
    )
    profile, exits = depthwise.LatencyProfile.read(PROFILE), depthwise.ExitTrace.read(EXITS)
    calls = [0]

    @depthwise.exit_policy("measured-margin:0.05", reads="margin")
    def margin(rows):
        calls[0] += 1
        return rows["signals"][:, 0] >= 0.05

    def time_us(work):
        calls[0] += 1
        return 100.0 + work.rows

    def simulate(**keys):
        calls[0] = 0
        limits = {"max_batch": 41, "token_budget": 41}
        keys = {"exit": "margin:0.05", **limits, **keys}
        return seconds(lambda: depthwise.simulate(requests, profile, exits, **keys))[1]

    for what, keys in [("exit policy", {"exit": "measured-margin:0.05"}), ("latency", {"latency": time_us})]:
        costs = []
        for _ in range(5):
            ours = simulate(**keys)
            count = calls[0]
            costs.append(1e6 * (ours - simulate()) / count)
        print(f"{what} in Python, time of processors: {statistics.median(costs):.1f} us a call ({min(costs):.1f} to {max(costs):.1f})")


if __name__ == "__main__":
    import_time()
    memory()
    callbacks()
    if program := os.environ.get("DEPTHWISE"):
        with tempfile.TemporaryDirectory() as folder:
            thousand_simulations(Path(folder), program)
            thousand_calls(Path(folder), program)

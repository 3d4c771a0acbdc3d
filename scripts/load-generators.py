#!/usr/bin/env python3
"""Two load generators of others, aiperf and guidellm, against `depthwise serve models/kjv`.

    cargo build --release
    python3 scripts/load-generators.py [--requests 48] [--concurrency 8]

Each comes from PyPI into a virtual environment of its own under target/ (together 2 GB, without torch) and sends a short load
of streamed completions to a new server. The script fails if a generator does, or if its counts of requests and tokens are not
those of the server's /metrics.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv

from serve_common import BINARY, ROOT, server

# Later versions of guidellm need torch with all libraries of CUDA.
VERSIONS = {"aiperf": "aiperf==0.13.0", "guidellm": "guidellm==0.3.1"}
PROMPT_TOKENS, OUTPUT_TOKENS = 48, 24


def installed(name):
    """The program of a package, in an environment of its own."""
    folder = ROOT / "target/load-generators" / name
    if not (folder / "bin" / name).exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", VERSIONS[name]], check=True)
    return folder / "bin" / name


def tokenizer(folder):
    """The model's tokenizer, as Python's transformers library loads it."""
    path = folder / "tokenizer"
    path.mkdir()
    shutil.copy(ROOT / "models/kjv/tokenizer.json", path)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


def aiperf(url, folder, args):
    """Runs aiperf; its counts of requests, prompt tokens and output tokens."""
    subprocess.run([
        installed("aiperf"), "profile", "--model", "kjv", "--url", url, "--endpoint-type", "completions", "--streaming",
        "--tokenizer", tokenizer(folder), "--use-server-token-count", "--concurrency", str(args.concurrency),
        "--request-count", str(args.requests), "--isl", str(PROMPT_TOKENS), "--osl", str(OUTPUT_TOKENS),
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{OUTPUT_TOKENS}", "--random-seed", "1",
        "--ui", "none", "--artifact-dir", folder / "aiperf",
    ], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    lines = (folder / "aiperf/profile_export.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["metrics"] for line in lines]
    count = lambda key: sum(int(metric[key]["value"]) for metric in metrics)
    return len(metrics), count("input_sequence_length"), count("output_sequence_length")


def guidellm(url, folder, args):
    """Runs guidellm; its counts of requests, prompt tokens and output tokens."""
    data = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    subprocess.run([
        installed("guidellm"), "benchmark", "run", "--target", url, "--model", "kjv", "--processor", tokenizer(folder),
        "--data", json.dumps(data), "--rate-type", "concurrent", "--rate", str(args.concurrency),
        "--max-requests", str(args.requests), "--random-seed", "1", "--disable-progress", "--disable-console-outputs",
        "--output-path", folder / "guidellm.json",
    ], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    benchmark = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]
    requests = benchmark["requests"]["successful"]
    count = lambda key: sum(request[key] for request in requests)
    # Before the load, each of its processes tries the server with one token, which is not among its counts. One more trial
    # tells how many tokens its prompt has.
    tokens = trial(url)
    trials = served(url)[0] - len(requests)
    if not 1 < trials <= args.concurrency + 2:
        sys.exit(f"{trials} requests are neither counted nor trials")
    return len(requests) + trials, count("prompt_tokens") + trials * tokens, count("output_tokens") + trials


def trial(url):
    """Sends what guidellm tries a server with; its prompt tokens."""
    body = json.dumps({"prompt": "Test connection", "max_tokens": 1}).encode()
    with urllib.request.urlopen(f"{url}/v1/completions", body) as answer:
        return json.loads(answer.read())["usage"]["prompt_tokens"]


def served(url):
    """The server's counts of requests that ended by themselves, prompt tokens and output tokens."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    count = lambda *words: sum(float(line.split()[-1]) for line in lines if all(word in line for word in words))
    requests = count("vllm:request_success_total{", '"length"') + count("vllm:request_success_total{", '"stop"')
    return int(requests), int(count("vllm:prompt_tokens_total{")), int(count("vllm:generation_tokens_total{"))


def main():
    """Runs both, each against a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=8)
    args = parser.parse_args()
    if not BINARY.exists():
        sys.exit(f"no {BINARY}: cargo build --release")
    differing = False
    for name, run in [("aiperf", aiperf), ("guidellm", guidellm)]:
        with tempfile.TemporaryDirectory() as folder, server("--exit", "margin:0.05") as address:
            url = f"http://{address[0]}:{address[1]}"
            counted, of_server = run(url, pathlib.Path(folder), args), served(url)
        differing |= counted != of_server
        for who, (requests, prompts, outputs) in [(VERSIONS[name], counted), ("  /metrics", of_server)]:
            print(f"{who}: {requests} requests, {prompts} prompt tokens, {outputs} output tokens")
    if differing:
        sys.exit("the counts differ")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Batched decode of SmolLM2-135M: depthwise's engine beside llama.cpp, run by run in turn.

    python3 benches/compare_llama_cpp.py [--runs 5] [--batches 1,8,16,32] [--threads 2] [--out results/llama_cpp] [--llama benches/.llama]

Every sequence has a prompt of 64 tokens and generates 72, so contexts grow from 64 to 136; what counts is the time from
the first generated token of the last sequence to the end, as in engine/benches/decode.rs, which is the engine's side of
this. llama.cpp is told what each next token is, so that it is charged for logits but not for sampling; the engine is
charged for both.

llama.cpp comes as llama-cpp-python, which pip builds for this machine into a folder of its own (once, about 10 minutes on
two idle cores); where that build dies of an illegal instruction, as it does on machines whose tiles (AMX) the system does
not let it use, it is built again for AVX-512 without them. The model comes by scripts/fetch-models.sh. F32, Q8_0 and Q4_0
files are made of the Q4_1 file by llama.cpp itself: the numbers lose accuracy, but take as long as any.
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ["llama-cpp-python==0.3.36", "numpy"]
SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Types of files, as llama.h numbers them (LLAMA_FTYPE_...).
FILE_TYPES = {"F32": 0, "Q8_0": 7, "Q4_0": 2}
# What a build for this machine finds out by itself, but for AMX: CMake's names by those of /proc/cpuinfo.
WITHOUT_TILES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "bmi2": "BMI2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_bf16": "AVX512_BF16",
}
ENGINE_WEIGHTS = ["f32", "bf16", "q8_0", "q4k"]
PROMPT, OUTPUT = 64, 72


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, of which the median counts")
    parser.add_argument("--batches", default="1,8,16,32", help="sequences at once, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "llama_cpp", help="folder for the tables")
    parser.add_argument(
        "--llama", type=pathlib.Path, default=ROOT / "benches" / ".llama", help="folder for llama.cpp and its files"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.threads)
    if arguments.runs < 1 or arguments.threads < 1:
        sys.exit("--runs and --threads: expected at least 1")
    compare(arguments)


def compare(arguments):
    batches = [int(batch) for batch in arguments.batches.split(",")]
    folder = arguments.llama.resolve()
    python, bench = install(folder), build_bench()
    files = make_files(folder, python, fetch_model())
    if dies(python, files["Q8_0"]):
        print("llama.cpp as built for this machine dies: building it again without AMX", file=sys.stderr)
        flags = pathlib.Path("/proc/cpuinfo").read_text().split()
        options = ["NATIVE=OFF", *(f"{name}=ON" for flag, name in WITHOUT_TILES.items() if flag in flags)]
        build(python, "--force-reinstall", "--no-cache-dir", CMAKE_ARGS=" ".join(f"-DGGML_{o}" for o in options))
        if dies(python, files["Q8_0"]):
            sys.exit("llama.cpp dies without AMX as well")
    servers = {name: Llama(python, file, arguments.threads) for name, file in files.items()}
    samples = {}
    for run in range(arguments.runs):
        for batch in batches:
            print(f"run {run + 1} of {arguments.runs}, batch {batch}", file=sys.stderr)
            for name, server in servers.items():
                samples.setdefault((batch, "llama.cpp", name), []).append(server.throughput(batch))
            for name, throughput in engine_throughputs(bench, files["F32"], batch, arguments.threads).items():
                samples.setdefault((batch, "depthwise", name), []).append(throughput)
    for server in servers.values():
        server.stop()
    report(samples, batches, arguments)


def install(folder):
    """A Python with llama.cpp in a folder of its own."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    installed = subprocess.run([python, "-c", "import llama_cpp, numpy"], capture_output=True).returncode == 0
    if not installed:
        print("building llama-cpp-python", file=sys.stderr)
        build(python)
    return python


def build(python, *options, **environment):
    command = [python, "-m", "pip", "install", "--quiet", *options, *PACKAGES]
    subprocess.run(command, check=True, env={**os.environ, **environment})


def dies(python, file):
    """Whether llama.cpp is killed when it decodes."""
    command = [python, __file__, "--serve", file]
    return subprocess.run(command, input="1\n", text=True, capture_output=True).returncode < 0


def fetch_model():
    subprocess.run([ROOT / "scripts" / "fetch-models.sh"], check=True, stdout=subprocess.DEVNULL)
    return ROOT / "models" / "fetched" / SOURCE


def make_files(folder, python, source):
    """The model in every type, by name."""
    files = {name: folder / f"SmolLM2-135M.{name}.gguf" for name in FILE_TYPES}
    for name, file in files.items():
        if file.exists():
            continue
        partial = file.with_suffix(".partial")
        program = f"""
import ctypes, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = {FILE_TYPES[name]}, True, 2
failed = llama_cpp.llama_model_quantize({str(source)!r}.encode(), {str(partial)!r}.encode(), ctypes.byref(params))
raise SystemExit(failed)
"""
        subprocess.run([python, "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.rename(file)
    return files


class Llama:
    """A process that holds one file in memory and times runs when asked."""

    def __init__(self, python, file, threads):
        command = [python, __file__, "--serve", file, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def throughput(self, batch):
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"llama.cpp ended with status {self.process.wait()}")
        return float(line)

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def serve(file, threads):
    """Loads a file; for each batch size on standard input, prints generated tokens a second."""
    import time

    import llama_cpp as llama
    import numpy

    # Whatever llama.cpp prints must not stand among the numbers.
    numbers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(file.encode(), model_params)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    tokens = numpy.random.default_rng(1).integers(100, vocab, size=1 << 16)

    def run(batch_size):
        params = llama.llama_context_default_params()
        params.n_ctx = batch_size * (PROMPT + OUTPUT)
        params.n_seq_max = batch_size
        params.n_batch = params.n_ubatch = max(512, batch_size)
        params.n_threads = params.n_threads_batch = threads
        context = llama.llama_init_from_model(model, params)
        batch = llama.llama_batch_init(max(PROMPT, batch_size), 0, 1)

        def decode(rows):
            batch.n_tokens = len(rows)
            for place, (sequence, position, logits) in enumerate(rows):
                batch.token[place] = int(tokens[(sequence * 977 + position) % len(tokens)])
                batch.pos[place] = position
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = logits
            if llama.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            llama.llama_synchronize(context)

        for sequence in range(batch_size):
            decode([(sequence, position, position == PROMPT - 1) for position in range(PROMPT)])
        start = time.perf_counter()
        for position in range(PROMPT, PROMPT + OUTPUT - 1):
            decode([(sequence, position, True) for sequence in range(batch_size)])
        seconds = time.perf_counter() - start
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        return batch_size * (OUTPUT - 1) / seconds

    for line in sys.stdin:
        print(run(int(line)), file=numbers, flush=True)


def build_bench():
    """The engine's bench, built; the path of its binary."""
    command = ["cargo", "bench", "--workspace", "--bench", "decode", "--no-run", "--message-format", "json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    built = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "decode"]
    return built[-1]


def engine_throughputs(bench, file, batch, threads):
    """One run of the engine under every weight type: tokens a second by its name."""
    command = [bench, file, "--batch", str(batch), "--runs", "1", "--weights", ",".join(ENGINE_WEIGHTS)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    throughputs = {row[1]: float(row[2]) for row in rows if row[0] == str(batch)}
    if set(throughputs) != set(ENGINE_WEIGHTS):
        sys.exit(f"{bench} printed no line for some of {ENGINE_WEIGHTS}:\n{output}")
    return throughputs


def report(samples, batches, arguments):
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["batch", "software", "weights", "run", "throughput_tok_s"])
        for (batch, software, weights), values in samples.items():
            writer.writerows([batch, software, weights, run, value] for run, value in enumerate(values))
    medians = {key: statistics.median(values) for key, values in samples.items()}
    table = "\n".join(lines(medians, batches, arguments)) + "\n"
    (arguments.out / "table.md").write_text(table)
    print(table)


def lines(medians, batches, arguments):
    load = " ".join(pathlib.Path("/proc/loadavg").read_text().split()[:3])
    yield f"Generated tokens a second, medians of {arguments.runs} runs in turn, {arguments.threads} threads, {cpu()}; load {load}"
    yield ""
    llama = [("llama.cpp", name) for name in FILE_TYPES]
    ours = [("depthwise", name) for name in ENGINE_WEIGHTS]
    ratios = ["f32 / F32", "q8_0 / Q8_0", "best quantized / best quantized"]
    yield "| batch | " + " | ".join(f"{software} {name}" for software, name in llama + ours) + " | " + " | ".join(ratios) + " |"
    yield "| ---: |" + " ---: |" * (len(llama) + len(ours) + len(ratios))
    for batch in batches:
        of = lambda software, *names: max(medians[batch, software, name] for name in names)
        cells = [f"{medians[batch, software, name]:.0f}" for software, name in llama + ours]
        cells += [
            f"{of('depthwise', 'f32') / of('llama.cpp', 'F32'):.2f}",
            f"{of('depthwise', 'q8_0') / of('llama.cpp', 'Q8_0'):.2f}",
            f"{of('depthwise', 'q8_0', 'q4k') / of('llama.cpp', 'Q8_0', 'Q4_0'):.2f}",
        ]
        yield f"| {batch} | " + " | ".join(cells) + " |"


def cpu():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else "a CPU"


if __name__ == "__main__":
    main()

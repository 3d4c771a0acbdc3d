#!/usr/bin/env python3
"""Opens a timeline in Perfetto's own trace processor, and counts its slices against the simulated run.

    cargo build --release
    python3 scripts/perfetto-timeline.py [--trace-processor FILE]

The same run is simulated twice: `depthwise simulate` writes its summary, `depthwise timeline` its timeline. In Perfetto there must
be a slice for every pass, every token and every stay of a request, passes must take the time that the summary says, and no event
may be dropped as an error. Perfetto's client comes from PyPI into a virtual environment under target/. It downloads the trace
processor, a binary, from Perfetto's own site, unless --trace-processor names one. Where neither is to be had, the script says so and
ends with status 77: nothing was checked in Perfetto then, only the counts in the file.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLIENT = "perfetto==0.59.1"
NOT_CHECKED = 77
RUN = [
    "--requests", "configs/requests.yaml",
    "--profile", "configs/paper/profiles/gemma-2-loops-rank-64", "--exits", "configs/gpu/exits/2-loops",
    "--batching", "depth", "--exit", "margin:0.05", "--max-batch", "8", "--token-budget", "32",
]

# Runs in the virtual environment: counts in Perfetto, as JSON.
IN_PERFETTO = r"""
import json, sys
from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

trace, binary = sys.argv[1], sys.argv[2] or None
with TraceProcessor(trace=trace, config=TraceProcessorConfig(bin_path=binary)) as processor:
    def value(query):
        return [row.value for row in processor.query(query)][0]
    of = "from slice join thread_track on slice.track_id = thread_track.id join thread using (utid) where "
    found = {
        "passes": value(f"select count(*) as value {of} thread.name = 'passes'"),
        "tokens": value(f"select count(*) as value {of} slice.name glob 'exit *'"),
        "stays": value(f"select count(*) as value {of} slice.name glob 'request *'"),
        "busy_us": value(f"select sum(slice.dur) / 1000.0 as value {of} thread.name = 'passes'"),
        "errors": value("select coalesce(sum(value), 0) as value from stats where severity = 'error'"),
        "counters": value("select count(distinct name) as value from counter_track"),
    }
print(json.dumps(found))
"""


def depthwise(*arguments):
    subprocess.run([ROOT / "target/release/depthwise", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def in_file(timeline):
    """The same counts by the file itself, without Perfetto."""
    events = json.loads(timeline.read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    slices = [event for event in events if event["ph"] == "X"]
    passes = [event for event in slices if threads[event["tid"]] == "passes"]
    return {
        "passes": len(passes),
        "tokens": sum(event["name"].startswith("exit ") for event in slices),
        "stays": sum(event["name"].startswith("request ") for event in slices),
        "busy_us": sum(event["dur"] for event in passes),
        "counters": len({name for event in events if event["ph"] == "C" for name in event["args"]}),
    }


def in_perfetto(timeline, binary):
    """The counts by the trace processor, or None if it cannot be had."""
    environment = ROOT / "target/perfetto"
    python = environment / "bin/python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", CLIENT], check=True)
    done = subprocess.run(
        [python, "-c", IN_PERFETTO, str(timeline), binary or ""], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    if binary is None and ("'curl'" in done.stderr or "URLError" in done.stderr):
        print("the trace processor cannot be downloaded here; --trace-processor names one", file=sys.stderr)
        return None
    raise SystemExit(done.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace-processor", metavar="FILE", help="trace_processor_shell to use instead of a download")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results, timeline = pathlib.Path(folder, "simulated"), pathlib.Path(folder, "timeline.json")
        depthwise("simulate", *RUN, "--out", str(results))
        depthwise("timeline", *RUN, "--keep-s", "0", "1e8", "--out", str(timeline))
        with open(results / "summary.csv", newline="") as file:
            [summary] = csv.DictReader(file)
        expected = {
            "passes": int(summary["passes"]),
            "tokens": int(summary["output_tokens"]),
            "stays": int(summary["requests"]) + int(summary["preemptions"]),
            "busy_us": float(summary["busy"]) * float(summary["makespan_s"]) * 1e6,
            "errors": 0,
            "counters": 2,  # a depth each
        }
        perfetto = in_perfetto(timeline, arguments.trace_processor)
        problems = 0
        for where, found in [("file", in_file(timeline)), ("Perfetto", perfetto)]:
            if found is None:
                continue
            for name, count in found.items():
                same = abs(count - expected[name]) <= 1e-6 * abs(expected[name])
                problems += not same
                print(f"{where}: {name} {count}, expected {expected[name]}{'' if same else ': DIFFERENT'}")
    if problems:
        raise SystemExit(1)
    if perfetto is None:
        print("SKIPPED: not opened in Perfetto")
        raise SystemExit(NOT_CHECKED)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Tests `depthwise.ray.sweep` on a real Ray of two nodes on this machine: a sweep of 5,000 points, a worker killed in the
middle, merged and compared byte by byte with one run. Needs the packages `depthwise` and `ray`.

    python scripts/check-ray.py
"""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    raise SystemExit("SKIPPED: ray is not installed")

import depthwise
import depthwise.ray

ROOT = Path(__file__).resolve().parent.parent
SWEEP = {
    "schema_version": 1,
    "title": "five thousand points",
    "requests": {
        "generate": {
            "count": 60,
            "arrivals": {"poisson": {"rate_per_s": 40}},
            "prompt_tokens": {"fixed": 1},
            "output_tokens": {"log_normal": {"median": 30, "sigma": 0.4}},
        }
    },
    "serving": {
        "batching": ["sequence", "depth"],
        "exit": ["none", "oracle", "margin:0.05", "margin:0.1", "top1:0.3"],
        "max_batch": 41,
        "token_budget": 41,
    },
    "systems": [
        {
            "name": "relaxed",
            "profile": ROOT / "configs/paper/profiles/gemma-2-loops-rank-64",
            "exits": ROOT / "configs/gpu/exits/2-loops",
        }
    ],
    "grid": {"seed": list(range(1, 501))},
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_a_worker(folder, killed):
    """Kills the process that holds the lock of a shard which has begun."""
    while not killed:
        for lines in folder.glob("*/sweep.csv"):
            whole = lines.parent / "depthwise-results.json"
            if lines.stat().st_size == 0 or '"complete": true' in whole.read_text():
                continue
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    held = any(link.resolve() == lines.resolve() for link in (process / "fd").iterdir())
                    mine = int(process.name) != os.getpid()
                except OSError:
                    continue
                if held and mine:
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append((process.name, lines.parent.name))
                    return
        time.sleep(0.005)


def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        print(f"{len([node for node in ray.nodes() if node['Alive']])} nodes")
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            depthwise.sweep(SWEEP, folder / "whole")
            killed = []
            killer = threading.Thread(target=kill_a_worker, args=(folder / "merged-shards", killed), daemon=True)
            killer.start()
            depthwise.ray.sweep(SWEEP, folder / "merged", shards=20, progress=lambda *told: print(*told, flush=True))
            assert killed, "no worker was killed"
            print("killed process {} in shard {}".format(*killed[0]))
            assert contents(folder / "merged") == contents(folder / "whole")
            depthwise.ray.sweep(SWEEP, folder / "own", shards=5, shared=False)
            assert contents(folder / "own") == contents(folder / "whole")
            lines = (folder / "merged/sweep.csv").read_text().count("\n") - 1
            print(f"PASSED: {lines} points on two nodes, merged, equal one run byte by byte, with and without a shared folder")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()

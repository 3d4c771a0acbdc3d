"""What Python gets is what the command line gives. DEPTHWISE names the program to compare with; without it, that is skipped."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import depthwise

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "configs/paper/profiles/gemma-2-loops-rank-64"
EXITS = ROOT / "configs/gpu/exits/2-loops"
CHAINS = ROOT / "models/chains"
LIMITS = {"max_batch": 41, "token_budget": 41}
GENERATE = {
    "count": 200,
    "arrivals": {"poisson": {"rate_per_s": 40}},
    "prompt_tokens": {"fixed": 1},
    "output_tokens": {"log_normal": {"median": 30, "sigma": 0.4}},
}
SWEEP = {
    "schema_version": 1,
    "title": "small",
    "requests": {"generate": GENERATE},
    "serving": {"batching": ["sequence", "depth"], "exit": ["none", "margin:0.05"], **LIMITS},
    "systems": [{"name": "one", "profile": PROFILE, "exits": EXITS}],
    "grid": {"seed": [1, 2, 3]},
}


@pytest.fixture(scope="module")
def requests():
    return depthwise.RequestTrace.generate(**GENERATE)


@pytest.fixture(scope="module")
def engine():
    return depthwise.Engine.load(CHAINS)


def simulate(requests, **keys):
    return depthwise.simulate(requests, PROFILE, EXITS, **{**LIMITS, **keys})


def row(runs):
    (line,) = runs.summary.to_pandas().to_dict("records")
    return line


def program():
    path = os.environ.get("DEPTHWISE")
    if not path:
        pytest.skip("DEPTHWISE names no program to compare with")
    return path


def test_simulate_gives_the_bytes_of_the_command_line(requests, tmp_path):
    requests.write(tmp_path / "requests.csv")
    policies = {"batching": ["sequence", "depth"], "exit": ["baselines", "margin:0.05", "oracle"]}
    simulate(tmp_path / "requests.csv", **policies, out=tmp_path / "python")
    arguments = ["--requests", tmp_path / "requests.csv", "--profile", PROFILE, "--exits", EXITS]
    arguments += ["--batching", "sequence,depth", "--exit", "baselines,margin:0.05,oracle"]
    arguments += ["--max-batch", "41", "--token-budget", "41", "--out", tmp_path / "command"]
    subprocess.run([program(), "simulate", *arguments], check=True, stdout=subprocess.DEVNULL)
    for name in ("summary.csv", "requests.csv"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()


def test_sweeps_give_the_bytes_of_the_command_line_whole_and_in_shards(tmp_path):
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"""schema_version: 1
title: small
requests: {{generate: {{count: 50, arrivals: all_at_once, prompt_tokens: {{fixed: 1}}, output_tokens: {{fixed: 20}}}}}}
serving: {{batching: [depth], exit: [none, oracle], max_batch: 8, token_budget: 8}}
systems: [{{name: one, profile: {PROFILE}, exits: {EXITS}}}]
grid: {{seed: [1, 2, 3]}}
"""
    )
    files = lambda folder: {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    swept = depthwise.sweep(config, tmp_path / "python")
    assert swept.points.num_rows == 6 and swept.summary.num_rows == 2
    in_memory = depthwise.sweep(config)
    assert in_memory.folder is None
    assert in_memory.points.to_pyarrow().equals(swept.points.to_pyarrow())
    folders = [tmp_path / f"shard-{number}" for number in (1, 2)]
    counts = [depthwise.sweep_shard(config, f"{number}/2", folder) for number, folder in enumerate(folders, 1)]
    assert counts == [3, 3]
    depthwise.merge_shards(config, folders, tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "python")
    with pytest.raises(depthwise.DepthwiseError, match="missing shards: 2/2"):
        depthwise.merge_shards(config, folders[:1], tmp_path / "other")
    subprocess.run([program(), "sweep", config, "--out", tmp_path / "command"], check=True, stdout=subprocess.DEVNULL)
    assert files(tmp_path / "command") == files(tmp_path / "python")


def test_a_sweep_is_described_by_a_mapping(tmp_path):
    swept = depthwise.sweep(SWEEP)
    assert swept.points.num_rows == 12
    assert swept.summary.to_pandas().seeds.tolist() == [3] * 4
    with pytest.raises(depthwise.DepthwiseError, match="serving.max_batch: invalid type: string"):
        depthwise.sweep({**SWEEP, "serving": {**SWEEP["serving"], "max_batch": "many"}})


@pytest.mark.parametrize("library", ["pyarrow", "polars", "pandas"])
def test_tables_of_every_library_are_given_and_taken(library, requests, engine, tmp_path):
    def through(table):
        found = getattr(table, f"to_{library}")()
        assert len(found) == table.num_rows and list(pa.table(found).column_names) == table.column_names
        return found

    def same(ours, again):
        assert ours.table().to_pyarrow().equals(again.table().to_pyarrow())

    same(requests, depthwise.RequestTrace.from_table(through(requests.table())))
    exits = depthwise.ExitTrace.read(EXITS)
    again = depthwise.ExitTrace.from_table(through(exits.table()), num_loops=exits.num_loops)
    same(exits, again)
    again.write(tmp_path / "exits")
    same(exits, depthwise.ExitTrace.read(tmp_path / "exits"))
    profile = depthwise.LatencyProfile.read(PROFILE)
    same(profile, depthwise.LatencyProfile.from_table(through(profile.table()), **profile.meta))
    _, passes = engine.profile(max_batch=2, token_budget=4, max_tokens=16, prefill_chunk=4, rounds=1)
    same(passes, depthwise.PassLog.from_table(through(passes.table()), model="chains", num_loops=6, device="here"))
    passes.write(tmp_path / "passes.parquet")
    same(passes, depthwise.PassLog.read(tmp_path / "passes.parquet"))


def test_columns_are_shared_without_copies():
    table = depthwise.ExitTrace.read(EXITS).table()
    address = lambda table: pa.table(table).column("margin").chunk(0).buffers()[1].address
    assert address(table) == address(table)


def test_profiles_that_ship_are_read_by_name(requests):
    profile = depthwise.LatencyProfile.read("xeon-2-cores/chains")
    assert profile.meta["num_loops"] == 6
    by_name = depthwise.simulate(requests, "xeon-2-cores/chains")
    pd.testing.assert_frame_equal(by_name.summary.to_pandas(), depthwise.simulate(requests, profile).summary.to_pandas())
    with pytest.raises(OSError, match="the nearest are xeon-2-cores/chains"):
        depthwise.LatencyProfile.read("xeon-2-cores/chain")


def test_errors_have_the_message_of_the_library(requests, tmp_path):
    with pytest.raises(depthwise.DepthwiseError, match="static exit depth 9 is outside"):
        simulate(requests, exit="static:9")
    with pytest.raises(depthwise.DepthwiseError, match="unknown field `max_bach`"):
        simulate(requests, max_bach=3)
    with pytest.raises(OSError, match="nowhere"):
        depthwise.LatencyProfile.read(tmp_path / "nowhere")
    table = pa.table({"request": [0], "arrival_us": [0.0], "prompt_tokens": [0], "output_tokens": [3]})
    with pytest.raises(depthwise.DepthwiseError, match=r"^requests.csv:2: prompt_tokens: found `0`"):
        depthwise.RequestTrace.from_table(table)
    with pytest.raises(depthwise.DepthwiseError, match="found list, expected a table with the Arrow C stream"):
        depthwise.RequestTrace.from_table([1])
    with pytest.raises(depthwise.DepthwiseError, match="num_loops"):
        depthwise.ExitTrace.from_table(table)


def test_requests_are_kept_when_asked_for(requests):
    assert simulate(requests).requests is None
    kept = simulate(requests, keep_requests=True).requests.to_pandas()
    assert len(kept) == len(requests)


def test_a_policy_in_python_decides_as_the_built_in_one_does(requests):
    calls = []

    @depthwise.exit_policy("python-margin:0.05", reads="margin")
    def margin(rows):
        calls.append(len(rows))
        return rows["signals"][np.arange(len(rows)), rows["depth"]] >= np.float32(0.05)

    ours, theirs = row(simulate(requests, exit="python-margin:0.05")), row(simulate(requests, exit="margin:0.05"))
    for key in ("throughput_tok_s", "mean_depth", "token_agreement", "ttft_p99_ms"):
        assert ours[key] == theirs[key], key
    assert max(calls) > 1, "it is asked about all rows of a pass at once"


def test_a_policy_in_python_remembers_by_sequence(requests):
    @depthwise.exit_policy("every-other", reads="none")
    def every_other(rows):
        assert rows["signals"].shape == (len(rows), 2) and (rows["depth"] == 0).all()
        rows["memory"][:, 0] += 1
        return rows["memory"][:, 0] % 2 == 1

    line = row(simulate(requests, exit="every-other"))
    tokens = requests.table().to_pandas().output_tokens
    # Tokens 0, 2, 4, ... of each request exit after the first of two loops.
    expected = (2 * tokens - (tokens + 1) // 2).sum() / tokens.sum()
    assert line["mean_depth"] == pytest.approx(expected, abs=1e-9)


def test_exceptions_of_callbacks_end_the_run(requests):
    @depthwise.exit_policy("failing", reads="margin")
    def failing(rows):
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        simulate(requests, exit=["none", "failing"])
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        depthwise.sweep({**SWEEP, "serving": {**SWEEP["serving"], "exit": ["failing"]}})

    @depthwise.exit_policy("few-answers", reads="margin")
    def few(rows):
        return [True]

    with pytest.raises(ValueError, match="expected one for each of"):
        simulate(requests, exit="few-answers")
    with pytest.raises(ValueError, match="latency: found -1 us, expected 0 or more"):
        simulate(requests, latency=lambda work: -1.0)

    def progress(done, steps, message):
        raise KeyError("progress")

    with pytest.raises(KeyError, match="progress"):
        depthwise.sweep(SWEEP, progress=progress)


def test_names_of_policies_are_checked(requests):
    with pytest.raises(depthwise.DepthwiseError, match="another policy's name already"):
        depthwise.exit_policy("oracle", reads="margin")(lambda rows: rows["depth"] > 0)
    with pytest.raises(depthwise.DepthwiseError, match="unknown exit signal `warmth`"):
        depthwise.exit_policy("warm", reads="warmth")(lambda rows: rows["depth"] > 0)


def test_times_in_python_replace_those_of_the_profile(requests):
    seen = []

    def latency(work):
        seen.append(work.rows)
        return 100.0 + 2.0 * work.rows

    at_once = depthwise.RequestTrace.generate(
        count=1, arrivals="all_at_once", prompt_tokens={"fixed": 1}, output_tokens={"fixed": 10}
    )
    line = row(simulate(at_once, latency=latency))
    # Two loops for each of ten tokens, one row a pass.
    assert line["makespan_s"] == pytest.approx(20 * 102e-6)
    assert set(seen) == {1}


def test_progress_is_told_and_warnings_are_warnings():
    told = []
    depthwise.sweep(SWEEP, progress=lambda done, steps, message: told.append((done, steps)))
    assert told[-1] == (12, 12)
    with pytest.warns(depthwise.DepthwiseWarning, match="longer than the recorded generation"):
        simulate({"generate": {**GENERATE, "count": 2, "output_tokens": {"fixed": 3000}}}, exit="margin:0.05")


def test_ctrl_c_ends_a_long_simulation_at_once():
    code = f"""
import depthwise
print("began", flush=True)
depthwise.simulate(
    {{"generate": {{"count": 5_000_000, "arrivals": "all_at_once", "prompt_tokens": {{"fixed": 1}},
                  "output_tokens": {{"fixed": 200}}}}}},
    {str(PROFILE)!r}, {str(EXITS)!r}, max_batch=41, token_budget=41)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "began\n"
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and child.returncode != 0, errors


def test_other_threads_run_meanwhile(requests):
    moved = 0
    done = threading.Event()

    def count():
        nonlocal moved
        while not done.is_set():
            moved += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    simulate({"generate": {**GENERATE, "count": 20_000}})
    done.set()
    thread.join()
    assert moved > 10


def test_the_engine_generates_records_and_obeys_a_policy_in_python(engine, tmp_path):
    prompt = "->^+^7=7 ^5="
    (full,) = engine.generate([prompt], max_tokens=8)
    assert len(full) == 8 and {token.depth for token in full} == {engine.num_loops - 1}
    (first,) = engine.generate([prompt], max_tokens=8, exit="static:0")
    assert {token.depth for token in first} == {0}

    @depthwise.exit_policy("third-loop", reads="none")
    def third(rows):
        return rows["depth"] >= 2

    texts = engine.generate([prompt, prompt + "1"], max_tokens=8, exit="third-loop")
    assert {token.depth for text in texts for token in text} == {2}
    assert "".join(token.text for token in texts[0]) == "".join(
        token.text for token in engine.generate([prompt], max_tokens=8, exit="static:2")[0]
    )
    exits = engine.record([prompt, prompt], max_tokens=8, out=tmp_path / "exits")
    assert (exits.num_generations, exits.num_tokens, exits.num_loops) == (2, 16, 6)
    last = exits.table().to_pandas().query("generation == 0 and depth == 5").prediction.tolist()
    assert last == [token.id for token in full]
    assert depthwise.ExitTrace.read(tmp_path / "exits").num_tokens == 16
    requests = depthwise.RequestTrace.generate(
        count=3, arrivals="all_at_once", prompt_tokens={"fixed": 1}, output_tokens={"fixed": 4}
    )
    under = engine.record(CHAINS / "prompts.jsonl", requests=requests, under=["gate:0.9"])
    assert under.num_tokens == 12 and under.meta["recording"]["policies"] == ["confidence:gate:0.9"]
    with pytest.raises(depthwise.DepthwiseError, match="expected a request trace"):
        engine.record(CHAINS / "prompts.jsonl")
    with pytest.raises(depthwise.DepthwiseError, match="exit: unknown|exit: .*"):
        engine.generate([prompt], exit="sideways")

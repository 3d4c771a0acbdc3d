"""Sweeps on a Ray cluster: one task for each shard, merged to the bytes of one run.

    >>> import ray, depthwise.ray
    >>> ray.init(address="auto")
    >>> depthwise.ray.sweep("configs/sweep.yaml", "/shared/results/sweep", shards=64)

Ray schedules, retries and counts; `depthwise` simulates a shard, goes on with one that was interrupted, and merges.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

import depthwise
from depthwise import PathLike, Progress, Spec, Sweep

__all__ = ["sweep"]


def sweep(
    spec: Spec,
    out: PathLike,
    *,
    shards: int,
    num_cpus: int = 1,
    retries: int = 3,
    shared: bool = True,
    restart: bool = False,
    progress: Progress = None,
) -> Sweep:
    """Simulates a sweep on the Ray cluster that this process is connected to.

    Args:
        spec: As for `depthwise.sweep`. The files that it names must be there on every node, at the same paths; paths are
            relative to what they are relative to here.
        out: The folder of the merged results. Those of shards are in a folder beside it whose name ends in `-shards`, and
            finished ones are not simulated again.
        shards: Number of shards: a few for each core, and at most one for each point. A point is never divided.
        num_cpus: Cores of each task.
        retries: How often a shard is started again whose worker or node has died.
        shared: Whether all nodes see `out` at the same path. A shard that is started again then goes on where it was.
            Otherwise shards come back by Ray's object store.
        restart: Whether earlier results are removed.
        progress: `True` for a bar of tqdm, or a function of the shards done, their number and a message.

    Raises:
        DepthwiseError: If a shard or the merge is refused.
        ray.exceptions.RayError: If a worker dies more often than it may.
    """
    folder = Path(out).resolve()
    parts = folder.with_name(f"{folder.name}-shards")
    folders = [parts / f"{number}-of-{shards}" for number in range(1, shards + 1)]
    if not isinstance(spec, Mapping):
        spec = os.fspath(spec)
    task = ray.remote(_shared_shard if shared else _own_shard).options(
        num_cpus=num_cpus,
        max_retries=retries,
        runtime_env={"env_vars": {"RAYON_NUM_THREADS": str(num_cpus)}},
    )
    directory = os.getcwd()
    with depthwise._Bar(progress) as report:
        tasks = {
            task.remote(spec, f"{number}/{shards}", str(shard), directory, restart): shard
            for number, shard in enumerate(folders, 1)
        }
        waiting = list(tasks)
        while waiting:
            done, waiting = ray.wait(waiting)
            for ended in done:
                _keep(_result(ended, waiting), tasks[ended])
            if report is not None:
                report(shards - len(waiting), shards, "shards")
    return depthwise.merge_shards(spec, folders, folder, restart=restart)


def _result(task: Any, others: list[Any]) -> dict[str, bytes]:
    """The files of a shard, if they are not in their place; the first failure ends the others."""
    try:
        files: dict[str, bytes] = ray.get(task)
        return files
    except ray.exceptions.RayTaskError as error:
        for other in others:
            ray.cancel(other)
        # With the exception that the task raised, where there is one.
        raise error.cause or error from None


def _keep(files: dict[str, bytes], shard: Path) -> None:
    for name, content in files.items():
        shard.mkdir(parents=True, exist_ok=True)
        (shard / name).write_bytes(content)


def _shared_shard(spec: Spec, shard: str, out: str, directory: str, restart: bool) -> dict[str, bytes]:
    os.chdir(directory)
    depthwise.sweep_shard(spec, shard, out, restart=restart)
    return {}


def _own_shard(spec: Spec, shard: str, out: str, directory: str, restart: bool) -> dict[str, bytes]:
    os.chdir(directory)
    with tempfile.TemporaryDirectory() as folder:
        depthwise.sweep_shard(spec, shard, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

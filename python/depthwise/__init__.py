"""Continuous depth-wise batching of recursive transformers: a simulator and an engine.

    >>> import depthwise
    >>> runs = depthwise.simulate(
    ...     {"generate": {"count": 100, "arrivals": "all_at_once", "prompt_tokens": {"fixed": 32},
    ...                   "output_tokens": {"fixed": 64}}},
    ...     "results/quickstart/profile", "results/quickstart/exits",
    ...     batching=["sequence", "depth"], exit=["none", "gate:0.98"], max_batch=16, token_budget=64,
    ... )
    >>> runs.summary.to_pandas()[["batching", "exit_policy", "throughput_tok_s"]]

| to | call |
| --- | --- |
| simulate requests under some policies | `simulate` |
| simulate every combination of lists of values, on all cores | `sweep` |
| divide a sweep among machines | `sweep_shard`, `merge_shards`, `depthwise.ray.sweep` |
| load a model, generate, record exits, measure a profile | `Engine` |
| read and write request traces, exit traces, profiles, pass logs | `RequestTrace`, `ExitTrace`, `LatencyProfile`, `PassLog` |
| write an exit policy in Python | `exit_policy` |

Times are in the units that names end in (`_us`, `_ms`, `_s`); depths count from 0. Tables have the Arrow PyCapsule interface,
so that pyarrow, polars and pandas read them without copies. What the libraries refuse raises `DepthwiseError`, with the message
of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from . import _depthwise
from ._depthwise import (
    DepthwiseError,
    DepthwiseWarning,
    Engine,
    ExitTrace,
    LatencyProfile,
    PassLog,
    PassWork,
    RequestTrace,
    Runs,
    Sweep,
    Table,
    Token,
    __version__,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DepthwiseError",
    "DepthwiseWarning",
    "Engine",
    "ExitTrace",
    "LatencyProfile",
    "PassLog",
    "PassWork",
    "RequestTrace",
    "Runs",
    "Sweep",
    "Table",
    "Token",
    "__version__",
    "exit_policy",
    "merge_shards",
    "simulate",
    "sweep",
    "sweep_shard",
]

PathLike: TypeAlias = "str | os.PathLike[str]"
Progress: TypeAlias = "bool | Callable[[int, int, str], object] | None"
Spec: TypeAlias = "PathLike | Mapping[str, Any]"
ExitFunction: TypeAlias = "Callable[[np.ndarray[Any, Any]], Any]"
_F = TypeVar("_F", bound="Callable[..., Any]")


def simulate(
    requests: RequestTrace | PathLike | Mapping[str, Any],
    profile: LatencyProfile | PathLike,
    exits: ExitTrace | PathLike | None = None,
    *,
    batching: str | Sequence[str] = "depth",
    exit: str | Sequence[str] = "none",
    kv_fill: str | Sequence[str] | None = None,
    max_batch: int = 64,
    token_budget: int = 512,
    replicas: int = 1,
    routing: str = "round-robin",
    spread: bool = False,
    seed: int = 1,
    objectives: Mapping[str, float] | None = None,
    latency: Callable[[PassWork], float] | None = None,
    keep_requests: bool = False,
    out: PathLike | None = None,
    progress: Progress = None,
    **serving: Any,
) -> Runs:
    """Simulates requests under every combination of batching policies, exit policies and KV fills, on all cores.

    Args:
        requests: A `RequestTrace`, the path of a request trace, or the keys of `requests` in a configuration, such as
            `{"file": "trace.csv", "first": 100}` or `{"generate": {...}}`.
        profile: A `LatencyProfile`, its folder, or the name of one that ships, as `depthwise profiles` lists them.
        exits: An `ExitTrace` or its folder; without one, every token runs every depth (`exit="none"`).
        batching: `vanilla`, `sequence` or `depth`, or several.
        exit: Exit policies by their names on the command line, such as `none`, `static:1`, `gate:0.98`, `oracle`, `baselines`,
            or the name of one registered by `exit_policy`.
        kv_fill: What later tokens find at depths that an exited token did not run; by default what the model is made for.
        max_batch: Most sequences that run at once.
        token_budget: Most rows of a pass (depth-wise) or of an iteration (lockstep).
        replicas: Identical machines.
        routing: How requests are spread over them.
        spread: Whether times are drawn from their measured spread.
        seed: Seed of everything that is drawn at random, but for generated requests, which have a seed of their own.
        objectives: Bounds that requests must meet to count for goodput: `ttft_ms`, `tpot_ms`, `e2e_ms`.
        latency: Times of passes in microseconds from their work, instead of the profile's. What exits add is the time
            beyond that of the same pass without them. It is called up to three times a pass; a call takes about 13
            microseconds of a processor.
        keep_requests: Whether `Runs.requests` has the times of every request.
        out: A folder for `summary.csv` and `requests.csv`, with the bytes of `depthwise simulate --out`.
        progress: `True` for a bar of tqdm, or a function of the steps done, their number and what is done.
        serving: Other keys of `serving` in a configuration, such as `prefill_chunk`, `num_blocks`, `device_memory`,
            `prefix_caching`, `exit_wait`, `machines`, `transfer`.

    Raises:
        DepthwiseError: If something contradicts itself or cannot be served.
        OSError: If a file cannot be read or written.
    """
    spec: Mapping[str, Any] = {}
    trace = None
    if isinstance(requests, RequestTrace):
        trace = requests
    elif isinstance(requests, Mapping):
        spec = requests
    else:
        spec = {"file": os.fspath(requests)}
    options = {
        "requests": spec,
        "serving": {
            "batching": _listed(batching),
            "exit": _listed(exit),
            "max_batch": max_batch,
            "token_budget": token_budget,
            **({} if kv_fill is None else {"kv_fill": _listed(kv_fill)}),
            **serving,
        },
        "replicas": replicas,
        "routing": routing,
        "spread": spread,
        "seed": seed,
        **({} if objectives is None else {"objectives": objectives}),
    }
    profile = profile if isinstance(profile, LatencyProfile) else LatencyProfile.read(profile)
    if exits is not None and not isinstance(exits, ExitTrace):
        exits = ExitTrace.read(exits)
    with _Bar(progress) as report:
        return _depthwise.simulate(trace, profile, exits, options, latency, keep_requests, out, report)


def sweep(spec: Spec, out: PathLike | None = None, *, restart: bool = False, progress: Progress = None) -> Sweep:
    """Simulates every combination of what a sweep lists, on all cores.

    Args:
        spec: The path of a sweep's YAML file, or a mapping with its keys (docs/reference/configuration.md#sweeps). Paths in a
            file are relative to its folder, those in a mapping to the current one.
        out: A folder for the results of `depthwise sweep`, byte for byte, with figures. What an earlier run of the same
            sweep left there is kept, and the rest is added. Without a folder nothing is written.
        restart: Whether earlier results in the folder are removed.
        progress: `True` for a bar of tqdm, or a function of the steps done, their number and what is done.
    """
    with _Bar(progress) as report:
        return _depthwise.sweep(_spec(spec), out, restart, report)


def sweep_shard(spec: Spec, shard: str, out: PathLike, *, restart: bool = False, progress: Progress = None) -> int:
    """Simulates one shard of a sweep into a folder, as `depthwise sweep --shard`, and returns its number of simulations.

    Args:
        spec: As for `sweep`.
        shard: `K/N`: every N-th combination, from the K-th on.
        out: The folder of the shard. What an earlier run of the same shard left there is kept.
        restart: Whether earlier results in the folder are removed.
        progress: As for `sweep`.
    """
    with _Bar(progress) as report:
        return _depthwise.sweep_one_shard(_spec(spec), shard, out, restart, report)


def merge_shards(
    spec: Spec, shards: Sequence[PathLike], out: PathLike, *, restart: bool = False, progress: Progress = None
) -> Sweep:
    """Merges the folders of all shards of a sweep to the bytes of one run, as `depthwise sweep --merge`.

    A shard that is missing, there twice, incomplete, or of another sweep raises `DepthwiseError`.
    """
    with _Bar(progress) as report:
        return _depthwise.merge_all_shards(_spec(spec), list(shards), out, restart, report)


def exit_policy(name: str, *, reads: str) -> Callable[[_F], _F]:
    """Registers a function as an exit policy, for simulator and engine: a decorator.

        @depthwise.exit_policy("two-margins:0.3", reads="margin")
        def two_margins(rows):
            deep = rows["depth"] > 0
            before = rows["signals"][np.arange(len(rows)), rows["depth"] - 1]
            now = rows["signals"][np.arange(len(rows)), rows["depth"]]
            return deep & (now > 0.3) & (before > 0.3)

        depthwise.simulate(..., exit="two-margins:0.3")

    The function is called once a pass with the rows that may exit, a structured numpy array of n rows, and returns n truth
    values. At the last depth, where all rows exit, it is not asked. Fields of a row:

    | field | type | meaning |
    | --- | --- | --- |
    | `signals` | float32, one for each loop | what was read of the token at each depth so far; NaN at deeper ones |
    | `depth` | uint32 | the depth that the row has just run, from 0 |
    | `token` | uint32 | index of the predicted token in the output, from 0 |
    | `position` | uint32 | position of the row in its sequence, from 0 |
    | `running`, `waiting` | uint32 | sequences that hold a slot, requests that wait for one |
    | `memory` | float32, 4 | what the policy remembers of the sequence: zeros at first; what is written here is kept |

    A call takes about 50 microseconds of a processor, and one call runs at a time, whatever the number of threads. The
    answers may depend on the rows only: then a simulation gives the same result each time. An exception ends the run. The
    same name again replaces the function.

    Args:
        name: The name in settings and files: ASCII letters, digits and `-_.:`.
        reads: The signal: `top1`, `margin`, `entropy`, `similarity`, `difference`, `kl`, `gate`, `oracle` or `none`. Signals of
            the exit head are paid for at every depth.
    """

    def register(function: _F) -> _F:
        _depthwise.register_exit_policy(name, reads, function)
        return function

    return register


def _listed(items: str | Sequence[str]) -> list[str]:
    return [items] if isinstance(items, str) else list(items)


def _spec(spec: Spec) -> str | dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else os.fspath(spec)


class _Bar:
    """The function that progress is told to: of the caller, or that of a bar of tqdm."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: Any = None

    def __enter__(self) -> Callable[[int, int, str], object] | None:
        if self._progress is True:
            from tqdm.auto import tqdm

            self._bar = tqdm()
            return self._move
        return self._progress or None

    def _move(self, done: int, steps: int, message: str) -> None:
        self._bar.total = steps
        self._bar.n = done
        self._bar.set_description(message, refresh=False)
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

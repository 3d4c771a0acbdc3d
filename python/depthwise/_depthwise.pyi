"""The compiled part of `depthwise`."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final

import pandas
import polars
import pyarrow

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
    "merge_all_shards",
    "register_exit_policy",
    "simulate",
    "sweep",
    "sweep_one_shard",
]

_Path: TypeAlias = str | os.PathLike[str]
_Progress: TypeAlias = Callable[[int, int, str], object] | None

__version__: str

class DepthwiseError(ValueError):
    """What depthwise refuses, or cannot do."""

class DepthwiseWarning(UserWarning):
    """What makes results less trustworthy than they look."""

@final
class Table:
    """A table of columns, which pyarrow, polars and pandas read without copies."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def num_rows(self) -> int: ...
    def __len__(self) -> int: ...
    def to_pyarrow(self) -> pyarrow.Table: ...
    def to_polars(self) -> polars.DataFrame: ...
    def to_pandas(self) -> pandas.DataFrame: ...
    def __arrow_c_schema__(self) -> Any: ...
    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...

@final
class RequestTrace:
    """Arrival and lengths of each request, with sessions and prefix hashes where the file has them."""

    @staticmethod
    def read(path: _Path, **keys: Any) -> RequestTrace: ...
    @staticmethod
    def generate(**keys: Any) -> RequestTrace: ...
    @staticmethod
    def from_table(table: Any) -> RequestTrace: ...
    def table(self) -> Table: ...
    def write(self, path: _Path) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def warnings(self) -> list[str]: ...
    @property
    def rate_per_s(self) -> float | None: ...
    def __len__(self) -> int: ...

@final
class ExitTrace:
    """Exit signals and predictions of each generated token at each depth."""

    @staticmethod
    def read(folder: _Path) -> ExitTrace: ...
    @staticmethod
    def from_table(table: Any, **meta: Any) -> ExitTrace: ...
    def table(self) -> Table: ...
    def write(self, folder: _Path, csv: bool = False) -> None: ...
    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def num_loops(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_generations(self) -> int: ...

@final
class LatencyProfile:
    """Measured times of the components of a pass, on one device and for one model."""

    @staticmethod
    def read(folder: _Path) -> LatencyProfile: ...
    @staticmethod
    def from_table(table: Any, **meta: Any) -> LatencyProfile: ...
    def table(self) -> Table: ...
    def write(self, folder: _Path) -> None: ...
    @property
    def meta(self) -> dict[str, Any]: ...

@final
class PassLog:
    """Measured passes, with their work and their time."""

    @staticmethod
    def read(path: _Path) -> PassLog: ...
    @staticmethod
    def from_table(
        table: Any, *, model: str, num_loops: int, device: str, fingerprint: str = "any"
    ) -> PassLog: ...
    def table(self) -> Table: ...
    def write(self, path: _Path) -> None: ...
    @property
    def meta(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...

@final
class PassWork:
    """Everything that the time of a pass depends on."""

    @property
    def rows(self) -> int: ...
    @property
    def decode_rows(self) -> int: ...
    @property
    def decode_history(self) -> int: ...
    @property
    def squared_decode_history(self) -> float: ...
    @property
    def longest_decode_history(self) -> int: ...
    @property
    def chunks(self) -> list[tuple[int, int]]: ...
    @property
    def depths(self) -> int: ...
    @property
    def embed_rows(self) -> int: ...
    @property
    def head_rows(self) -> int: ...
    @property
    def exit_head_rows(self) -> int: ...
    @property
    def filled_depths(self) -> int: ...
    @property
    def before_rows(self) -> int: ...
    @property
    def before_head(self) -> bool: ...

@final
class Token:
    """A generated token."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def depth(self) -> int: ...

@final
class Engine:
    """A model on a device."""

    @staticmethod
    def load(
        model: _Path,
        *,
        loops: int | None = None,
        weights: str = "f32",
        device: str = "cpu",
        temperature: float = 0.0,
        seed: int = 1,
    ) -> Engine: ...
    @property
    def name(self) -> str: ...
    @property
    def num_loops(self) -> int: ...
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 128,
        exit: str = "none",
        batching: str = "depth",
        kv_fill: str | None = None,
        prefill_depth: int | None = None,
    ) -> list[list[Token]]: ...
    def record(
        self,
        prompts: Sequence[str] | _Path,
        *,
        max_tokens: int = 64,
        requests: RequestTrace | None = None,
        under: Sequence[str] | None = None,
        kv_fill: str | None = None,
        prefill_depth: int | None = None,
        out: _Path | None = None,
        progress: _Progress = None,
    ) -> ExitTrace: ...
    def profile(
        self,
        *,
        max_batch: int = 64,
        token_budget: int = 256,
        max_tokens: int = 512,
        prefill_chunk: int = 256,
        rounds: int = 3,
        progress: _Progress = None,
    ) -> tuple[LatencyProfile, PassLog]: ...

@final
class Runs:
    """The runs of a simulation, one for each combination of policies."""

    @property
    def summary(self) -> Table: ...
    @property
    def requests(self) -> Table | None: ...

@final
class Sweep:
    """What a sweep came to."""

    @property
    def points(self) -> Table: ...
    @property
    def summary(self) -> Table: ...
    @property
    def folder(self) -> pathlib.Path | None: ...

def register_exit_policy(name: str, reads: str, function: Callable[..., Any]) -> None: ...
def simulate(
    requests: RequestTrace | None,
    profile: LatencyProfile,
    exits: ExitTrace | None,
    options: Mapping[str, Any],
    latency: Callable[[PassWork], float] | None,
    keep_requests: bool,
    out: _Path | None,
    progress: _Progress,
) -> Runs: ...
def sweep(spec: str | Mapping[str, Any], out: _Path | None, restart: bool, progress: _Progress) -> Sweep: ...
def sweep_one_shard(
    spec: str | Mapping[str, Any], shard: str, out: _Path, restart: bool, progress: _Progress
) -> int: ...
def merge_all_shards(
    spec: str | Mapping[str, Any], shards: Sequence[_Path], out: _Path, restart: bool, progress: _Progress
) -> Sweep: ...

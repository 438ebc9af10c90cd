"""A device and what it allows: `profiles/<name>.toml`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgekd.records.margins import Margins
from edgekd.records.store import EdgeKDError, Record, read_toml, unknown

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self


Precision = Literal["fp32", "bf16", "fp16", "int8"]
Resolution = Annotated[int, Field(ge=32, le=1024)]


class Budget(Record):
    """What the device allows; an absent limit is not judged."""

    latency_ms: float | None = Field(default=None, gt=0)  # p95 at batch 1, host to host
    params_m: float | None = Field(default=None, gt=0)
    size_mb: float | None = Field(default=None, gt=0)  # 1e6 bytes, of the deployed files
    memory_mb: float | None = Field(
        default=None, gt=0
    )  # 1e6 bytes, peak resident of a fresh process


class Profile(Record):
    """A device and what it allows: `profiles/<name>.toml`, or any TOML file of this form."""

    name: str
    description: str = ""
    runtime: str  # a file in edgekd/runtimes
    device: str  # in the runtime's own words: "CPU", "NPU", "cuda:0"
    precisions: tuple[Precision, ...] = ("fp32",)
    space: str = "ofa-lite0"  # of the supernet that its student is cut from
    student: str = ""  # a named sub-net, trained alone; empty: searched for in the supernet
    resolutions: tuple[Resolution, ...] = Field(default=(128,), min_length=1)  # pixels a side
    static_batch: bool = False  # the runtime wants a fixed batch dimension
    threads: int = Field(default=0, ge=0, le=1024)  # 0: the runtime chooses
    hint: Literal["latency", "throughput"] = "latency"  # throughput: many images, in streams
    options: dict[str, str | int | float | bool] = {}  # passed to the runtime as they are
    peak_gflops: float | None = Field(default=None, gt=0)  # at its fastest precision; 1 MAC = 2
    bandwidth_gbs: float | None = Field(default=None, gt=0)  # 1e9 bytes/s of its memory
    latency_table: str = ""  # a file of `edgekd profiles calibrate --export`, beside the profile
    budget: Budget = Budget()
    margins: Margins = Margins()  # of explanations

    @property
    def pixels(self) -> int:
        """The largest resolution: what teachers see, when --size is not given."""
        return max(self.resolutions)

    @classmethod
    def read(cls, name: str) -> Self:
        """The profile called `name`, or in the TOML file at path `name`."""
        shipped = shipped_profiles()
        is_path = name.endswith(".toml") or os.sep in name
        path = Path(name) if is_path else shipped.get(name)
        if path is None:
            raise EdgeKDError(unknown("profile", name, shipped) + " or a path to a .toml file")
        table = read_toml(path, "profile")
        profile = cls.parse({"name": path.stem} | table, str(path))
        if not profile.latency_table:
            return profile
        beside = str(path.parent.resolve() / profile.latency_table)
        return profile.model_copy(update={"latency_table": beside})


def shipped_profiles() -> dict[str, Path]:
    """Name and file of every profile that comes with edgekd (in the wheel or beside the source)."""
    here = Path(__file__).parent
    folder = here / "profiles" if (here / "profiles").is_dir() else here.parents[1] / "profiles"
    return {p.stem: p for p in sorted(folder.glob("[!.]*.toml"))}

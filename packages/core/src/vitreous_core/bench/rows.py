"""Rows: one JSON object a line, appended, self-contained. Tables and plots are rendered from them alone."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
"""Raised when a field changes its meaning; rows of another schema are not rendered."""

Row = dict[str, Any]


def environment(device: torch.device, commit: str | None = None) -> Row:
    """What every row of a run says about where it was taken.

    Args:
        device: the device measured on.
        commit: the commit's hash, with `-dirty` behind it when files had changed; None asks git.
    """
    commit, dirty = _commit() if commit is None else (commit.removesuffix("-dirty"), commit.endswith("-dirty"))
    return {
        "schema": SCHEMA,
        "time": now(),
        "run": f"{datetime.now(UTC):%Y-%m-%d}-{(commit or 'unknown')[:7]}",
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cpu": _processor(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numba": version_of("numba"),
        "python": platform.python_version(),
    }


def now() -> str:
    """The time as rows have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def replays(facts: Mapping[str, Any]) -> bool:
    """Whether a row's steps replay CUDA graphs, whose memory PyTorch counts only while they are captured."""
    return bool(facts.get("graphed")) or facts.get("compile_mode") == "reduce-overhead"


def row_file(folder: Path, facts: Mapping[str, Any]) -> Path:
    """`<folder>/<device>/<run>.jsonl`."""
    device = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    return folder / device / f"{facts['run']}.jsonl"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row; an interrupted run keeps all rows before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> Iterator[Row]:
    """All rows of this schema below a folder, oldest file first.

    Raises:
        ValueError: naming file and line, where a line is no JSON object.
    """
    for path in sorted(folder.rglob("*.jsonl"), key=lambda path: (path.parent, path.name)):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is no row: {error}. Delete the line") from None
            if row.get("schema") == SCHEMA:
                yield row


def _commit() -> tuple[str | None, bool | None]:
    here = Path(__file__).parent
    head = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    if head is None:
        return None, None
    # Results that this very run writes do not make the code dirty.
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--", ":/packages"])
    return head, bool(changed)


def _driver() -> str | None:
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return None if found is None else found.splitlines()[0]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def version_of(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

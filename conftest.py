"""Rules for every test of the workspace: what a marker needs, and how torch behaves under test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this process cannot run; `nox` selects by marker, so this is for plain pytest."""
    lacks_gpu = pytest.mark.skip(reason="torch finds no GPU; `nox -s gpu_tests` runs these")
    lacks_interpreter = pytest.mark.skip(reason="TRITON_INTERPRET is not 1; `nox -s interpret` runs these")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(lacks_gpu)
        if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(lacks_interpreter)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that an element nobody wrote cannot look right by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def large_memory() -> Iterator[Callable[[int], None]]:
    """`large_memory(gibibytes)`: skip unless so much GPU memory is free.

    Tests that take this one wait for each other, in whatever process of this machine, and give back what they took.
    """

    def require(gibibytes: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gibibytes:
            pytest.skip(f"needs {gibibytes} GiB of GPU memory; {free:.1f} GiB are free. Run it alone, or with -n 1")

    with FileLock(Path(tempfile.gettempdir()) / "vitreous-large-memory.lock"):
        yield require
        torch.cuda.empty_cache()

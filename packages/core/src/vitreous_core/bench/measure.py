"""Clocks, memory and the roof of the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .case import Step, Work

TF32 = "tfloat32"
_MIB = 2**20
_LONGEST_FLUSH = 8
"""Times the first guess that a flush before a run may grow to."""
_LARGEST_RATIO_OF_COPY = 0.1
"""Share of the free memory that the copy measuring the bandwidth may take, per buffer."""


class Clock(Protocol):
    """Times a step a number of times, with cold caches where it can."""

    def samples_ms(self, step: Step, count: int) -> list[float]:
        """`count` timings."""


class WallClock:
    """What a caller waits for: host time with the device idle before and after.

    The caches are flushed before each run on a GPU; on a CPU they are as the last run left them.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = _FlushBuffer(device) if device.type == "cuda" else None

    def samples_ms(self, step: Step, count: int) -> list[float]:
        samples = []
        for _ in range(count):
            if self._flush is not None:
                self._flush.read()
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = step()
            if self._flush is not None:
                torch.cuda.synchronize()
            samples.append(1e3 * (time.perf_counter() - start))
            # Freeing what a step made is not part of it.
            del result
        return samples


class ProcessorClock:
    """Processor time of all threads together: what one core would need, however busy the machine is."""

    def samples_ms(self, step: Step, count: int) -> list[float]:
        samples = []
        for _ in range(count):
            start = time.process_time_ns()
            result = step()
            samples.append(1e-6 * (time.process_time_ns() - start))
            del result
        return samples


class DeviceClock:
    """GPU time between two events, with a cold L2 cache.

    The flush before each run is made long enough for the host to put the whole step into the queue meanwhile:
    launches then cost no provider anything, as in a captured graph, and what is timed is the work on the device. A run
    whose flush ended before the host was done is repeated behind a longer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = _FlushBuffer(device)
        self._flush_ms = self._measure_flush()

    def samples_ms(self, step: Step, count: int) -> list[float]:
        flushes = 1 + int(1.5 * self.host_ms(step) / self._flush_ms)
        # A step that waits for the device itself is late behind any flush.
        most = _LONGEST_FLUSH * flushes
        samples: list[float] = []
        while len(samples) < count:
            for _ in range(flushes):
                self._flush.read()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            is_late = start.query()
            stop.record()
            # The next run's flush must not wait behind this run's step, or the host falls behind.
            stop.synchronize()
            if is_late and flushes < most:
                flushes *= 2
            else:
                samples.append(start.elapsed_time(stop))
        return samples

    @staticmethod
    def host_ms(step: Step, runs: int = 3) -> float:
        """Time the host needs to put a step into the queue."""
        times = []
        for _ in range(runs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return sorted(times)[runs // 2]

    def _measure_flush(self) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.read()
        start.record()
        for _ in range(10):
            self._flush.read()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 10


class _FlushBuffer:
    """Several times the L2 cache: reading it leaves nothing else there.

    Read, not written: lines that a write leaves behind go to memory while the next kernel runs, and an H100 spends
    about 9 us on that, which are not the kernel's. Large, because the host must gain on the device with every flush:
    putting a reduction into the queue takes it as long as reading twice the cache takes an H100.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(8 * cache, 64 * _MIB) // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def read(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


def choose_clock(name: str, device: torch.device) -> Clock:
    """The clock of a case: see `Case.clock`."""
    if name == "processor":
        return ProcessorClock()
    return DeviceClock(device) if name == "device" and device.type == "cuda" else WallClock(device)


def peak_mib(step: Step, device: torch.device) -> float | None:
    """Most memory a step needs at once beyond what was there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = step()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / _MIB


@dataclass(frozen=True)
class Roof:
    """What this machine can do, measured in this run.

    Args:
        copy_bytes_per_s: a large device-to-device copy, bytes read plus bytes written.
        matmul_flops_per_s: a large square matrix product on random data, by dtype name; `"tfloat32"` is float32 whose
            factors are rounded to TF32.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]

    def milliseconds(self, work: Work, dtype: str) -> float:
        """The floor under any implementation: the larger of moving the bytes and doing the products."""
        return 1e3 * max(work.bytes / self.copy_bytes_per_s, work.flops / self.matmul_flops_per_s[dtype])


def measure_roof(device: torch.device, dtypes: Sequence[str]) -> Roof:
    """Measure both ceilings of a device.

    Args:
        device: where.
        dtypes: names of the dtypes whose matrix products are wanted, e.g. `"float16"` or `"tfloat32"`.
    """
    on_gpu = device.type == "cuda"
    size = 2**31 if on_gpu else 2**26
    if on_gpu:
        size = min(size, int(_LARGEST_RATIO_OF_COPY * torch.cuda.mem_get_info(device)[0]))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = _best_ms(lambda: target.copy_(source), device)
    side = 8192 if on_gpu else 512
    rates = {}
    for name in dtypes:
        dtype, precision = (torch.float32, "high") if name == TF32 else (getattr(torch, name), "highest")
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        with matmul_precision(precision):
            rates[name] = 2 * side**3 / (1e-3 * _best_ms(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
    return Roof(2 * size / (1e-3 * copy_ms), rates)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _best_ms(step: Step, device: torch.device) -> float:
    clock = choose_clock("device", device)
    clock.samples_ms(step, 3)
    return min(clock.samples_ms(step, 10))


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    values: Tensor = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    p20, p50, p80 = values.tolist()
    return p20, p50, p80

"""What a benchmark is made of. All of it is data: a case names its problem, its providers and its goals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch


class Unavailable(Exception):
    """A provider cannot take part here; the message says why and becomes a row."""


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do: what the roof is made of.

    Args:
        bytes: read or written once each.
        flops: floating-point operations of the matrix products.
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Gate:
    """Outcome of comparing a provider with the truth.

    Args:
        errors: relative error by tensor, `norm(got - truth) / norm(truth)`.
        limits: largest error allowed, for the same tensors.
        truth: what it was compared with.
    """

    errors: Mapping[str, float]
    limits: Mapping[str, float]
    truth: str

    @property
    def passed(self) -> bool:
        """Whether every error is within its limit; NaN never is."""
        return all(self.errors[name] <= limit for name, limit in self.limits.items())


Step = Callable[[], object]


@dataclass(frozen=True)
class Prepared:
    """A provider set up for one problem on one device.

    Args:
        steps: what is timed, by mode. A mode may be missing, with the reason in `missing`.
        gate: compares with the truth, given the modes that will be timed (a mode that ran out of memory will not be);
            None where there is nothing to compare (the reason belongs in `facts`).
        missing: modes this provider cannot do, and why.
        samples_ms: timings that the provider took itself (in a process of its own, say), by mode.
        facts: what a reader of the row must know, e.g. the token order or what is on the clock. `standing_mib` is what
            lies in memory before the clock starts and belongs to the peak: weights, or the inputs of an operation.
    """

    steps: Mapping[str, Step] = field(default_factory=dict)
    gate: Callable[[Collection[str]], Gate] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    samples_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem.

    Args:
        name: short, the same in every case: it becomes a column.
        prepare: sets up `problem` on a device. Raises `Unavailable` or `BackendUnsupported`, which become a row.
    """

    name: str
    prepare: Callable[[Any, torch.device], Prepared]


class Problem(Protocol):
    """What is computed. Any frozen dataclass with these methods will do."""

    def work(self, mode: str) -> Work | None:
        """Least work of a mode; None where a roof says nothing."""

    def facts(self) -> Mapping[str, Any]:
        """Sizes and settings for the rows.

        `series` and `side` place the case in the plots: a panel, and its place on the x axis. `axis` names another
        fact for the x axis, such as `"batch"`. `dtype` asks for a roof.
        """


@dataclass(frozen=True)
class Goal:
    """What a case's own provider must reach in a mode.

    Args:
        mode: the mode it is about.
        kind: `"speed-up"` (at least `bound` times as fast as provider `over`), `"milliseconds"` (at most `bound`),
            `"roof"` (at least `bound` per cent of the roof) or `"memory"` (a peak of at most `bound` times that of
            `over`, with the fact `standing_mib` of each).
        bound: see `kind`.
        over: the provider that a speed-up or a peak is against.
        mean: what the geometric mean of the speed-ups over all cases of the mark must reach as well.
    """

    mode: str
    kind: Literal["speed-up", "milliseconds", "roof", "memory"]
    bound: float
    over: str | None = None
    mean: float | None = None


@dataclass(frozen=True)
class Case:
    """One problem, who computes it, and what is asked of ours.

    Args:
        name: unique in its suite, starting with the mark: `"H1/wsa-8/64"`.
        mark: the mark of the ledger it belongs to, e.g. `"H1"`.
        problem: what is computed.
        providers: who computes it.
        modes: what is timed, e.g. `("fwd", "fwd+bwd")`.
        device: `"cuda"` or `"cpu"`. Cases for a GPU are left out where there is none.
        ours: the provider that the goals speak of.
        goals: what it must reach.
        clock: `"device"` times GPU work alone, the host's launches hidden behind the cache flush; `"wall"` times what
            a caller waits for, which is also what "device" means on a CPU; `"processor"` times what one core would
            need, the time of all threads added up.
    """

    name: str
    mark: str
    problem: Problem
    providers: tuple[Provider, ...]
    modes: tuple[str, ...]
    device: Literal["cuda", "cpu"] = "cuda"
    ours: str = "triton"
    goals: tuple[Goal, ...] = ()
    clock: Literal["device", "wall", "processor"] = "device"

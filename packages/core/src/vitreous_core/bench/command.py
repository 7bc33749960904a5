"""The command line of the benchmarks. Its imports are local so that `vitreous --help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..papers import papers

if TYPE_CHECKING:
    from .case import Case

CORE = "core"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m vitreous_core.bench", description="Measure what vitreous claims.")
    add_arguments(parser)
    try:
        bench(parser.parse_args(arguments))
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both `vitreous bench` and `python -m vitreous_core.bench` understand."""
    parser.add_argument("suite", metavar="PAPER|core", help=f"{', '.join(suites())}")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN",
                        help="only cases of such names, with * and ?; may be repeated")  # fmt: skip
    parser.add_argument("--provider", action="append", default=[], metavar="PATTERN",
                        help="only these providers; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="rows go to DIR/<device>/<date>-<commit>.jsonl (default: docs/results/bench in a "
                        "checkout, else bench)")  # fmt: skip
    parser.add_argument("--commit", metavar="SHA", help="recorded instead of what git says, e.g. 1a2b3c4-dirty")
    parser.add_argument("--list", action="store_true", help="show the cases and their providers, and run nothing")
    parser.add_argument(
        "--compile-only", action="store_true",
        help="fill the compilers' caches on disk and write no rows; such runs may go side by side",
    )  # fmt: skip
    parser.add_argument(
        "--lock", type=Path, metavar="FILE",
        help="hold FILE while a case is measured: several commands with one new FILE compile side by side, measure in "
        "turns and are one run",
    )  # fmt: skip


def bench(options: argparse.Namespace) -> None:
    """Do what the arguments say.

    Raises:
        UserError: for an unknown suite, a paper without cases, patterns that match nothing, or a GPU that is full.
    """
    import torch

    from .runner import run, select

    cases = cases_of(options.suite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.list:
        for case in cases:
            print(f"{case.name}  ({case.device}: {', '.join(provider.name for provider in case.providers)})")
        return
    chosen = select(cases, options.case, device)
    try:
        written = run(
            options.suite, chosen, folder=options.out or default_folder(), provider_patterns=options.provider,
            commit=options.commit, compile_only=options.compile_only, lock=options.lock,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        # A provider's own is a row; here it is a buffer of the clock's or the roof's that found no room.
        first_line = str(error).partition("\n")[0]
        raise UserError(f"no GPU memory is left to measure with; end what else runs there: {first_line}") from error
    for path in written:
        print(f"rows: {path}")


def suites() -> list[str]:
    """Core, and every paper that brings cases."""
    return [CORE, *(paper.name for paper in papers() if (paper.root / "bench.py").is_file())]


def cases_of(suite: str) -> Sequence[Case]:
    """The cases of core or of a paper.

    Raises:
        UserError: when there is no such suite.
    """
    if suite not in suites():
        raise UserError(f"no benchmarks named {suite!r}; there are {', '.join(suites())}")
    if suite == CORE:
        from . import core_cases

        return core_cases.cases()
    (paper,) = (paper for paper in papers() if paper.name == suite)
    cases: Sequence[Case] = paper.module("bench").cases()
    return cases


def default_folder() -> Path:
    """Where rows go when nothing is said: beside the other results in a checkout, else the folder `bench`."""
    results = Path("docs/results")
    return results / "bench" if results.is_dir() else Path("bench")

"""Every task of the workspace is one session here: `nox --list` shows them, `nox -s NAME` runs one.

A session makes an environment of its own (uv, or virtualenv where uv is missing) at the pins of constraints.txt.
With `--no-venv` it installs nothing: it runs the interpreter that runs nox, with packages/*/src on PYTHONPATH, so
that the same sessions work on a machine without a network. Members are found by their folder: a new paper needs no
edit here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "docs"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = ROOT / "constraints-oldest.txt"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
MEMBERS = {
    folder.name: nox.project.load_toml(folder / "pyproject.toml")
    for pattern in PYPROJECT["tool"]["uv"]["workspace"]["members"]
    for folder in sorted(ROOT.glob(pattern))
    if (folder / "pyproject.toml").is_file()
}
PAPERS = [name for name, member in MEMBERS.items() if "vitreous.papers" in member["project"].get("entry-points", {})]
EACH_PAPER = nox.parametrize("paper", [nox.param(paper, id=paper) for paper in PAPERS])
LOWEST_PYTHON = "3.11"
LARGE_EXTRAS = {"executorch", "coreml"}  # installed by `exports` alone
MIRROR = re.compile(r"^constraint-dependencies = \[.*?\]$", re.MULTILINE | re.DOTALL)
SKIP_WITHOUT_GPU = "--skip-without-gpu"
# What `sanitize` runs: by test, its cases and the kernels that each is there for (it launches others too).
SANITIZED = {
    "core/tests/test_block_sparse_kernels.py::test_on_gpu": {
        "window1d-shift-cells-gqa": ["_bsa_bwd_bias_kernel", "_bsa_bias_sum_kernel"],
        "neighborhood2d-cells": ["_bsa_bwd_closed_kernel", "_bsa_bias_fold_kernel"],
        "window2d-over-a-tile": ["_bsa_fwd_kernel", "_bsa_bwd_dq_kernel", "_bsa_bwd_dkv_kernel"],
        "bits-dense": ["_bsa_bwd_bias_kernel"],
    },
    "core/tests/test_sum_norm.py::test_on_gpu": {"ragged": ["_sum_norm_fwd_kernel", "_sum_norm_bwd_kernel"]},
    "flash_window/tests/test_window_kernels.py::test_on_gpu": {
        "9-single-table": ["_window_fwd_kernel", "_window_bwd_rows_kernel", "_fold_kernel"],
        "49-low": ["_window_fwd_kernel", "_window_bwd_rows_kernel"],
        "146-bias-pass": ["_window_bwd_keys_kernel", "_window_bwd_bias_kernel"],
        "20-channels": ["_channels_fwd_kernel", "_channels_bwd_kernel"],
    },
    "flash_window/tests/test_shifted_window_kernels.py::test_on_gpu": {
        "w7-15x17-padded": ["_shifted_fwd_kernel", "_shifted_bwd_closed_kernel", "_table_kernel"],
        "w7-15x17-padded-cosine": ["_shifted_fwd_kernel", "_shifted_bwd_closed_kernel"],
        "w9-single-cosine": ["_shifted_bwd_queries_kernel", "_shifted_bwd_keys_kernel", "_shifted_bwd_bias_kernel"],
    },
    "flash_window/tests/test_long_window_kernels.py::test_on_gpu": {
        "cut-289-flags-dropout-half": ["_prepare_bias_kernel", "_long_bwd_bias_kernel"],
        "image-6-D256-padded-shifted": ["_long_fwd_kernel", "_long_bwd_dq_kernel", "_long_bwd_dkv_kernel"],
        "image-17-cosine-half": ["_inverse_norm_kernel", "_spread_table_kernel", "_fold_table_kernel"],
    },
    "efficientvit/tests/test_ops.py::test_on_gpu": {
        "m2-stage3-padded": ["_attention_kernel"],
        "m0-stage1-ffn": ["_feed_forward_kernel"],
        "m4-image": ["_image_kernel"],
        "m4-stem4": ["_convolution_kernel"],
        "m0-merging": ["_depthwise_kernel"],
    },
    "efficientvit/tests/test_head_attention.py::test_on_gpu": {
        "m3-2-first": ["_head_fwd_kernel", "_head_bwd_kernel"],
    },
    "efficientvit/tests/test_convolution.py::test_on_gpu": {
        "depthwise-wide": ["_depthwise_bwd_kernel"],  # all taps at once
        "7x7": ["_depthwise_bwd_kernel"],  # a row of taps at a time
        "halved": ["_halved_bwd_kernel"],
        "image": ["_image_kernel", "_weight_gradient_kernel"],
        "dense-odd": ["_convolution_kernel", "_input_gradient_kernel", "_weight_gradient_kernel"],
    },
    "swiftformer/tests/test_additive_kernels.py::test_on_gpu": {
        "l1-1-one-image": ["_additive_fwd_kernel", "_additive_bwd_kernel"],  # each in two launches
        "l1-4": ["_additive_fwd_kernel", "_additive_bwd_kernel"],  # each in one
    },
    "swiftformer/tests/test_inference_kernels.py::test_mlps_on_gpu": {
        "48-local": ["_mlp_kernel"],  # keeps its weights on chip
        "168-strided": ["_mlp_kernel"],  # reads them for every tile
    },
    "swiftformer/tests/test_inference_kernels.py::test_halvings_on_gpu": {
        "pairs-bf16": ["_image_kernel"],
        "112": ["_halving_kernel"],
    },
}
# For each of several workers: threads that outnumber the cores make small products many times slower.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train one small model of every paper on real images and write one HTML page about it."""
    prepare(session, MEMBERS)
    python(session, "-m", "vitreous_core.mm.demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Test all packages together on the CPU, Triton's interpreter included (`-- ARGS` go to pytest)."""
    prepare(session, MEMBERS, groups=["test"])
    run_tests(session, ["packages", "tests"])


def add_member_tests(member: str) -> None:
    """Register the session `tests(member)`.

    A parametrised `tests` would make plain `nox -s tests` test the members one by one instead of together, so each
    of these is a session of its own that only carries such a name.
    """

    def member_tests(session: nox.Session) -> None:
        prepare(session, [member], groups=["test"])
        run_tests(session, [f"packages/{member}"])

    member_tests.__doc__ = f"Test {member} in a fresh environment with only its own dependencies."
    nox.session(member_tests, name=f"tests({member})", reuse_venv=False, default=False)


for _member in MEMBERS:
    add_member_tests(_member)


@nox.session(default=False, python=LOWEST_PYTHON)
def oldest(session: nox.Session) -> None:
    """Run `tests` on the lowest Python, torch and Triton that we support (constraints-oldest.txt).

    .ci/run leaves it out: it takes as long as `tests`.
    """
    if not session.virtualenv.is_sandboxed:
        session.error("oldest installs the lowest versions in an environment of its own: leave out --no-venv")
    # Elsewhere, because inside of the workspace uv adds the pins that pyproject.toml mirrors.
    with tempfile.TemporaryDirectory(prefix="vitreous-oldest-") as elsewhere, session.chdir(elsewhere):
        constraints = Path(elsewhere) / "constraints.txt"
        constraints.write_text("\n".join(oldest_pins()) + "\n")
        prepare(session, MEMBERS, groups=["test"], constraints=constraints)
    run_tests(session, ["packages", "tests"])


@nox.session(default=False)
def interpret(session: nox.Session) -> None:
    """Run the kernels' tests in Triton's interpreter, no GPU needed (`tests` does this too)."""
    prepare(session, MEMBERS, groups=["test"])
    run_interpreter_tests(session, ["packages", "tests"])


@nox.session(default=False)
def gpu_tests(session: nox.Session) -> None:
    """Run every package's GPU tests; no GPU is a failure (`-- --skip-without-gpu`: a skip)."""
    prepare(session, MEMBERS, groups=["test"])
    arguments = [argument for argument in session.posargs if argument != SKIP_WITHOUT_GPU]
    if not has_gpu(session):
        if SKIP_WITHOUT_GPU in session.posargs:
            session.skip(f"torch finds no GPU here, and {SKIP_WITHOUT_GPU} was given")
        session.error(f"torch finds no GPU here; `nox -s gpu_tests -- {SKIP_WITHOUT_GPU}` skips instead of failing")
    report = Path(session.create_tmp()) / "gpu_tests.xml"
    report.unlink(missing_ok=True)
    # Exit code 5 (nothing selected) is judged below, together with "all skipped", which pytest counts as success.
    # In parallel, because most of the time goes into compiling kernels.
    arguments = [*in_parallel(session), *arguments]
    python(session, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *arguments, success_codes=[0, 5])
    ran = Counter(
        case.get("classname", "").removeprefix("packages.").split(".")[0]
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    )
    session.log("GPU tests run: " + (", ".join(f"{count} of {name}" for name, count in sorted(ran.items())) or "none"))
    if not ran:
        session.error("no GPU test ran, so nothing was checked: is any test marked `gpu`, and does -k match one?")


@nox.session(default=False)
def sanitize(session: nox.Session) -> None:
    """Run one or two GPU tests of every kernel under compute-sanitizer: memory errors, then races."""
    prepare(session, MEMBERS, groups=["test"])
    if shutil.which("compute-sanitizer") is None:
        session.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    python_path = sys.executable if not session.virtualenv.is_sandboxed else "python"
    # Without the cache of PyTorch's allocator an overrun leaves its tensor's own allocation and is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [python_path, "-m", "pytest", *sanitized(), *session.posargs]
    options = ["--target-processes", "all", "--error-exitcode", "1"]
    session.run("compute-sanitizer", "--tool", "memcheck", *options, *pytest, env=environment, external=True)

    logs = Path(session.create_tmp()) / "racecheck"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    options = ["--target-processes", "all", "--log-file", str(logs / "%p.txt")]
    session.run("compute-sanitizer", "--tool", "racecheck", *options, *pytest, env=environment, external=True)
    log = "".join(path.read_text() for path in sorted(logs.iterdir()))
    session.log(log)
    if "RACECHECK SUMMARY" not in log:
        session.error("racecheck left no summary, so nothing was checked")
    if races(log):
        session.error(f"races in {', '.join(races(log))}")


def races(log: str) -> list[str]:
    """The kernels that racecheck names, without cuBLAS's: of its split products some race with themselves."""
    names = re.findall(r" access at ([^\s+]+)\+0x", log)
    return sorted({name for name in names if not name.startswith("nvjet_")})


@nox.session(default=False)
def exports(session: nox.Session) -> None:
    """Test `vitreous export` in every format: `tests` has PyTorch's and ONNX, this has ExecuTorch and Core ML too."""
    prepare(session, MEMBERS, groups=["test"], without=())
    files = ["packages/core/tests/test_export.py", "tests/test_exports.py"]
    python(session, "-m", "pytest", *files, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def record_exports(session: nox.Session) -> None:
    """Export the papers' deployable models (or `-- PAPER|NAME ...`) to every format and record it in docs/results/."""
    prepare(session, MEMBERS, groups=["test"], without=())
    python(session, "-m", "vitreous_core.export.record", *(session.posargs or ["efficientvit", "swiftformer"]))


@nox.session(default=False)
@EACH_PAPER
def reproduce(session: nox.Session, paper: str) -> None:
    """Train a paper's small-data configs (or `-- NAME ...`) and record each run in docs/results/repro/."""
    prepare(session, ["core", paper])
    python(session, "-m", "vitreous_core.mm.reproduce", paper, *session.posargs)


@nox.session(default=False, reuse_venv=False)
@EACH_PAPER
def standalone(session: nox.Session, paper: str) -> None:
    """Install one paper's wheel and core's, nothing else, and list, build, train and resume elsewhere."""
    with tempfile.TemporaryDirectory(prefix="vitreous-standalone-") as elsewhere:
        if session.virtualenv.is_sandboxed:
            install(session, *(build_wheel(session, member, Path(elsewhere)) for member in ("core", paper)))
        else:
            session.env["PYTHONPATH"] = source_path(["core", paper])
        with session.chdir(elsewhere):
            python(session, ROOT / "tests" / "standalone.py", paper)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff (`-- --fix` mends what can be mended)."""
    prepare(session, [], groups=["lint"])
    fix = "--fix" in session.posargs
    python(session, "-m", "ruff", "check", *(["--fix"] if fix else []))
    python(session, "-m", "ruff", "format", *([] if fix else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, strictly on core's public modules."""
    prepare(session, ["core"], groups=["types"])
    python(session, "-m", "mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation strictly into site/ (`-- serve` shows it while you write)."""
    prepare(session, [], groups=["docs"])
    # The theme advertises its successor on every run otherwise.
    env = {"NO_MKDOCS_2_WARNING": "1"}
    python(session, "-m", "mkdocs", *(session.posargs or ["build", "--strict", "--quiet"]), env=env)


@nox.session(default=False)
def tables(session: nox.Session) -> None:
    """Render the tables and plots of README.md and docs/results/ from the recorded runs, rows and claims."""
    prepare(session, MEMBERS)
    for program in (["-m", "vitreous_core.bench.render"], [ROOT / "docs" / "tables.py"]):
        python(session, *program, *session.posargs)


@nox.session(default=False)
def pins(session: nox.Session) -> None:
    """Resolve constraints.txt and its mirror in pyproject.toml (`-- --upgrade`: newest versions)."""
    if not session.virtualenv.is_sandboxed:
        session.error("pins asks the package index from an environment of its own: leave out --no-venv")
    session.install("uv")
    wanted = Path(session.create_tmp()) / "requirements.in"
    wanted.write_text("\n".join(sorted(third_party_requirements())) + "\n")
    resolve = ["uv", "pip", "compile", "--no-config", "--universal", "--python-version", LOWEST_PYTHON]
    output = ["--no-header", "--no-annotate", "--quiet", "--output-file", CONSTRAINTS]
    session.run(*resolve, *output, *session.posargs, wanted)
    pyproject = ROOT / "pyproject.toml"
    mirror = "".join(f"  {json.dumps(pin)},\n" for pin in CONSTRAINTS.read_text().splitlines())
    pyproject.write_text(MIRROR.sub(lambda _: f"constraint-dependencies = [\n{mirror}]", pyproject.read_text()))


# What the sessions share: preparing an environment, and running things in it.


def prepare(
    session: nox.Session,
    members: Iterable[str],
    *,
    groups: Sequence[str] = (),
    without: Collection[str] = LARGE_EXTRAS,
    constraints: Path = CONSTRAINTS,
) -> None:
    """Make members (editable, with their extras but some) and dependency groups importable in this session."""
    if not session.virtualenv.is_sandboxed:
        session.env["PYTHONPATH"] = source_path(MEMBERS)
        return
    editable: list[str] = []
    for member in members:
        extras = ",".join(
            extra for extra in MEMBERS[member]["project"].get("optional-dependencies", {}) if extra not in without
        )
        folder = ROOT / "packages" / member
        editable += ["-e", f"{folder}[{extras}]" if extras else str(folder)]
    if editable and "core" not in members:
        # pip, unlike uv, does not know workspace members and would look for core in the package index.
        editable += ["-e", str(ROOT / "packages" / "core")]
    install(session, *editable, *nox.project.dependency_groups(PYPROJECT, *groups), constraints=constraints)


def install(session: nox.Session, *requirements: str, constraints: Path = CONSTRAINTS) -> None:
    """Install at the committed pins, or others; build backends come at the committed ones either way."""
    session.install("-c", str(constraints), *requirements, env={"UV_BUILD_CONSTRAINT": str(CONSTRAINTS)})


def oldest_pins() -> list[str]:
    """The pins of constraints.txt with those of constraints-oldest.txt in place of its own.

    CUDA's libraries are left out: each torch demands their versions itself.
    """
    lowest = [line for line in OLDEST.read_text().splitlines() if not line.startswith("#")]
    replaced = {pin.split("==")[0] for pin in lowest}
    pins = [pin for pin in CONSTRAINTS.read_text().splitlines() if not pin.startswith(("cuda-", "nvidia-"))]
    return [*lowest, *(pin for pin in pins if pin.split("==")[0] not in replaced)]


def source_path(members: Iterable[str]) -> str:
    """A PYTHONPATH with the sources of these members and of no others, in front of what else is on it."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in given if path and not Path(path).resolve().is_relative_to(ROOT / "packages")]
    return os.pathsep.join([*(str(ROOT / "packages" / member / "src") for member in members), *others])


def python(session: nox.Session, *arguments: str | Path, **options: Any) -> Any:
    """Run the session's Python; without an environment, the interpreter that runs nox."""
    program = "python" if session.virtualenv.is_sandboxed else sys.executable
    return session.run(program, *arguments, **options)


def has_gpu(session: nox.Session) -> bool:
    """Whether this session's torch finds a GPU."""
    answer = python(session, "-c", "import torch; print(torch.cuda.is_available())", silent=True)
    return str(answer).strip().endswith("True")


def run_tests(session: nox.Session, folders: Sequence[str]) -> None:
    """Run the folders' CPU tests, then those for Triton's interpreter."""
    arguments = [*in_parallel(session), *session.posargs]
    chosen = "not gpu and not interpret and not exports"
    python(session, "-m", "pytest", "-m", chosen, *folders, *arguments, env=ONE_THREAD)
    run_interpreter_tests(session, folders)


def run_interpreter_tests(session: nox.Session, folders: Sequence[str]) -> None:
    """Run the tests marked `interpret`: in a process of their own, as Triton reads the switch when it is imported."""
    files = [
        str(file.relative_to(ROOT))
        for folder in folders
        for file in sorted((ROOT / folder).rglob("test_*.py"))
        if "mark.interpret" in file.read_text()
    ]
    if not files:
        session.log(f"no test in {', '.join(folders)} is marked `interpret`: nothing to run in Triton's interpreter")
        return
    environment = ONE_THREAD | {"TRITON_INTERPRET": "1"}
    arguments = [*in_parallel(session), *session.posargs]
    python(session, "-m", "pytest", "-m", "interpret", *files, *arguments, env=environment)


def sanitized() -> list[str]:
    """The tests of `SANITIZED` as pytest takes them: an unknown one is an error, which `-k` would pass over."""
    return [f"packages/{test}[{case}]" for test, cases in SANITIZED.items() for case in cases]


def in_parallel(session: nox.Session) -> list[str]:
    """Pytest's options for a few workers; `-- -n 0`, given after them, is one process again."""
    # pytest-xdist need not be on a machine that we did not set up.
    if not session.virtualenv.is_sandboxed and importlib.util.find_spec("xdist") is None:
        return []
    return ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal"]


def build_wheel(session: nox.Session, member: str, folder: Path) -> str:
    """Build one member's wheel into `folder` and return its path."""
    if session.virtualenv.venv_backend != "uv":
        session.install("uv")
    command = ["uv", "build", "--wheel", "--quiet", "--build-constraint", CONSTRAINTS, "--out-dir", folder]
    session.run(*command, ROOT / "packages" / member)
    distribution = MEMBERS[member]["project"]["name"].replace("-", "_")
    (wheel,) = folder.glob(f"{distribution}-*.whl")
    return str(wheel)


def third_party_requirements() -> set[str]:
    """Everything that any session installs, the workspace's own packages left out."""
    requirements = set(nox.project.dependency_groups(PYPROJECT, *PYPROJECT["dependency-groups"]))
    for member in MEMBERS.values():
        for listed in (member["project"]["dependencies"], *member["project"].get("optional-dependencies", {}).values()):
            requirements.update(requirement for requirement in listed if not requirement.startswith("vitreous-"))
    return requirements

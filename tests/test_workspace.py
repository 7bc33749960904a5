"""Rules that hold for every member of the workspace: pins, licences, who imports whom, what never gets committed."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MEMBERS = {file.parent.name: tomllib.loads(file.read_text()) for file in sorted(ROOT.glob("packages/*/pyproject.toml"))}
PAPERS = [name for name in MEMBERS if name != "core"]
SHARED_CONFIGS = ("digits.py", "imagenet.py", "default_runtime.py")
MM_STACK = {"mmengine", "mmpretrain", "mmcv"}
# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"PIL": "pillow", "mmcv": "mmcv-lite", "pkg_resources": "setuptools", "sklearn": "scikit-learn"}
DISTRIBUTIONS |= {"yaml": "pyyaml"}

each_member = pytest.mark.parametrize("member", MEMBERS)
each_paper = pytest.mark.parametrize("paper", PAPERS)


def package(member: str) -> Path:
    return ROOT / "packages" / member / "src" / f"vitreous_{member}"


# --- what every member brings


@each_member
def test_member_is_whole(member: str) -> None:
    project = MEMBERS[member]["project"]
    assert project["name"] == f"vitreous-{member.replace('_', '-')}"
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert (ROOT / "packages" / member / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project["requires-python"] == ">=3.11,<3.14"
    assert project["version"] == MEMBERS["core"]["project"]["version"]
    assert MEMBERS[member]["build-system"]["build-backend"] == "uv_build"
    assert (package(member) / "py.typed").is_file()
    assert len((ROOT / "packages" / member / project["readme"]).read_text().splitlines()) > 10


@each_paper
def test_paper_announces_itself_and_follows_core(paper: str) -> None:
    project = MEMBERS[paper]["project"]
    assert project["entry-points"]["vitreous.papers"] == {paper: f"vitreous_{paper}"}
    assert f"vitreous-core[mm]=={project['version']}" in project["dependencies"]


@each_paper
def test_shared_configs_are_the_same_in_every_package(paper: str) -> None:
    for name in SHARED_CONFIGS:
        shared = ROOT / "packages" / PAPERS[0] / "src" / f"vitreous_{PAPERS[0]}" / ".mim/configs/_base_" / name
        own = package(paper) / ".mim/configs/_base_" / name
        assert own.read_bytes() == shared.read_bytes(), (
            f"{own.relative_to(ROOT)} differs from {shared.relative_to(ROOT)}"
        )


def test_no_module_is_named_for_nothing() -> None:
    vague = {"utils.py", "util.py", "misc.py", "helpers.py", "common_utils.py"}
    assert [str(file) for member in MEMBERS for file in package(member).rglob("*.py") if file.name in vague] == []


# --- pins


def constraints(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by distribution; a package may be pinned once per Python version."""
    found: dict[str, list[Requirement]] = {}
    for line in constraints("constraints.txt"):
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def declared_requirements() -> Iterator[tuple[str, Requirement]]:
    for name, group in PYPROJECT["dependency-groups"].items():
        yield from ((f"group {name}", Requirement(line)) for line in group)
    for name, member in MEMBERS.items():
        extras = member["project"].get("optional-dependencies", {})
        for lines in (member["project"]["dependencies"], *extras.values(), member["build-system"]["requires"]):
            yield from ((name, Requirement(line)) for line in lines)


def test_constraints_and_their_mirror_agree() -> None:
    mirror = PYPROJECT["tool"]["uv"]["constraint-dependencies"]
    assert (ROOT / "constraints.txt").read_text().splitlines() == mirror, "run `nox -s pins`"


def test_everything_declared_is_pinned_within_its_bounds() -> None:
    known = pins()
    for owner, requirement in declared_requirements():
        if requirement.name.startswith("vitreous-"):
            continue
        pinned = known.get(canonicalize_name(requirement.name))
        assert pinned, f"{owner} needs {requirement}, which constraints.txt does not pin: run `nox -s pins`"
        for pin in pinned:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert Version(version) in requirement.specifier, f"{owner} needs {requirement}; constraints.txt has {pin}"


def test_bounds_found_by_trial_are_kept() -> None:
    """Each of these broke something when it was missing (mmengine's pkg_resources, mmpretrain's torchvision)."""
    extra = MEMBERS["core"]["project"]["optional-dependencies"]["mm"]
    assert {"mmengine==0.10.7", "mmpretrain==1.2.0", "mmcv-lite==2.2.0", "setuptools>=77,<82"} <= set(extra)
    assert any(line.startswith("torchvision") for line in extra)
    assert "torch>=2.11" in MEMBERS["core"]["project"]["dependencies"]


def test_the_oldest_versions_are_the_declared_ones() -> None:
    oldest = [Requirement(line) for line in constraints("constraints-oldest.txt")]
    versions = {pin.name: Version(next(iter(pin.specifier)).version) for pin in oldest}
    assert versions.keys() == {"torch", "torchvision", "triton", "numpy"}
    bounds = {name: set[str]() for name in versions}
    for owner, requirement in declared_requirements():
        if requirement.name in versions:
            assert versions[requirement.name] in requirement.specifier, f"{owner} needs {requirement}"
            bounds[requirement.name].update(part.version for part in requirement.specifier if part.operator == ">=")
    for name in versions.keys() - {"numpy"}:  # which Triton's interpreter bounds from above instead
        assert {Version(bound) for bound in bounds[name]} == {versions[name]}
    lowest_python = noxfile().LOWEST_PYTHON
    assert all(member["project"]["requires-python"].startswith(f">={lowest_python},") for member in MEMBERS.values())


# --- the sessions


@cache
def noxfile() -> ModuleType:
    specification = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_races_of_cublas_are_not_ours() -> None:
    report = (
        "========= Error: Race reported between Read access at {0}+0xaf0\n"
        "=========     and Write access at {0}+0x2eb0 [8 hazards]\n"
    )
    cublas, ours = "nvjet_sm90_hsh_64x8_64x16_1x1_h_bz_splitK_NNT", "_additive_fwd_kernel"
    summary = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    races = noxfile().races
    assert races(report.format(cublas) + summary) == []
    assert races(report.format(cublas) + report.format(ours) + summary) == [ours]


def test_sanitize_knows_its_tests() -> None:
    wanted = noxfile().sanitized()
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-m", "gpu", *wanted]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert [line for line in listed.stdout.splitlines() if "::" in line] == wanted


@each_member
def test_sanitize_has_a_case_of_every_kernel(member: str) -> None:
    kernels = {
        node.name
        for file in sources(member)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    tests = [cases for test, cases in noxfile().SANITIZED.items() if test.startswith(f"{member}/")]
    assert {kernel for cases in tests for launched in cases.values() for kernel in launched} == kernels


# --- what must never be committed


@cache
def committed_files() -> tuple[Path, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this copy of the sources is no git checkout, so there is no list of committed files")
    return tuple(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


# Written in pieces, so that this file does not match itself.
FORBIDDEN = {
    "an index URL": re.compile(r"https?://[^\s\"'/]+/simple\b"),
    "a package registry's host": re.compile(
        "|".join(["python" + "hosted", r"pypi\." + "org", r"npmjs\." + "(?:org|com)"])
    ),
    "an option that names an index": re.compile(r"--(?:extra-)?index-" + r"url|--find-" + "links"),
    "a path of somebody's machine": re.compile(r"(?:^|[^\w.~/-])/(?:" + "work|farm|root|home|Users" + r")/[A-Za-z.]"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_committed_file_names(what: str) -> None:
    found = []
    for file in committed_files():
        content = file.read_bytes()
        if b"\0" in content:  # binary
            continue
        for number, line in enumerate(content.decode().splitlines(), start=1):
            if FORBIDDEN[what].search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_lock_file_and_no_big_file_is_committed() -> None:
    assert not [file for file in committed_files() if file.name == "uv.lock"], "uv.lock names registry hosts"
    assert [str(file) for file in committed_files() if file.stat().st_size > 2**20] == []


# --- arrows


@cache
def imports_of(file: Path) -> tuple[tuple[str, bool], ...]:
    """Absolute imports of a module as (dotted name, whether it runs when the module is imported)."""
    tree = ast.parse(file.read_text())
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If) and not _runs_on_import(node)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module, node not in lazy))
    return tuple(found)


def _runs_on_import(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def sources(member: str) -> list[Path]:
    """The modules of a member; packaged configs are data, not modules."""
    return [file for file in sorted(package(member).rglob("*.py")) if ".mim" not in file.parts]


@each_member
def test_papers_import_core_only_and_core_no_paper(member: str) -> None:
    allowed = {f"vitreous_{member}", "vitreous_core"}
    for file in sources(member):
        ours = {name.split(".")[0] for name, _ in imports_of(file) if name.startswith("vitreous_")}
        assert ours <= allowed, f"{file.relative_to(ROOT)} imports {sorted(ours - allowed)}"


@each_paper
def test_only_mm_knows_mmpretrain(paper: str) -> None:
    for file in sources(paper):
        for name, on_import in imports_of(file):
            if name.split(".")[0] in MM_STACK or "vitreous_core.mm" in name:
                allowed = file.name == "mm.py" or (not on_import and file.name == "bench.py")
                assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_core_knows_mmengine_only_in_mm() -> None:
    for file in sources("core"):
        if "mm" in file.relative_to(package("core")).parts:
            continue
        for name, on_import in imports_of(file):
            if name.split(".")[0] in MM_STACK or "vitreous_core.mm" in name:
                assert (file.name, on_import) == ("cli.py", False), f"{file.relative_to(ROOT)} imports {name}"


@each_member
def test_every_import_is_declared(member: str) -> None:
    """A shared environment hides a missing dependency; this names it. What core declares, papers get with it."""
    declared = {canonicalize_name(Requirement(line).name) for line in MEMBERS[member]["project"]["dependencies"]}
    core = MEMBERS["core"]["project"]
    for line in core["dependencies"] + core["optional-dependencies"]["mm"]:
        declared.add(canonicalize_name(Requirement(line).name))
    extras = core["optional-dependencies"].values()
    optional = {canonicalize_name(Requirement(line).name) for lines in extras for line in lines}
    for file in sources(member):
        for name, on_import in imports_of(file):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top.startswith("vitreous_"):
                continue
            if top in {"pytest", "hypothesis"} and "testing" in file.parts:  # for those who write tests, who have both
                continue
            if not on_import and "bench" in file.relative_to(ROOT).with_suffix("").parts[4:]:
                continue  # what a measurement compares with
            if file.stem.startswith(f"{top}_"):  # named after a library: for those who have it, imported by nobody else
                continue
            distribution = canonicalize_name(DISTRIBUTIONS.get(top, top))
            if not on_import and "export" in file.relative_to(ROOT).parts[4:] and distribution in optional:
                continue  # what a format needs
            assert distribution in declared, f"{file.relative_to(ROOT)} imports {top}; declare {distribution}"


LIGHT_IMPORTS = """
import importlib, pkgutil, sys
for name in {blocked}:
    sys.modules[name] = None  # importing it now fails
for package in map(importlib.import_module, {packages}):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not {heavy} & set(module.name.split(".")):
            importlib.import_module(module.name)
"""
# What needs core's `mm` extra or a library of the user's, and what runs when it is imported.
HEAVY = {"mm", "pictures", "timm_blocks", "__main__"}


def test_everything_else_imports_without_the_training_stack() -> None:
    extra = [Requirement(line).name for line in MEMBERS["core"]["project"]["optional-dependencies"]["mm"]]
    names = {"mmcv-lite": "mmcv", "scikit-learn": "sklearn", "pillow": "PIL", "setuptools": "pkg_resources"}
    code = LIGHT_IMPORTS.format(
        blocked=[names.get(name, name) for name in extra],
        packages=[f"vitreous_{member}" for member in MEMBERS],
        heavy=HEAVY,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def importable_modules(member: str) -> Iterator[ModuleType]:
    """The package and its modules, those left out that need the training stack or a GPU's compiler."""
    root = importlib.import_module(f"vitreous_{member}")
    yield root
    for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if not (HEAVY | {"triton"}) & set(found.name.split(".")):
            yield importlib.import_module(found.name)


@each_member
def test_examples_in_docstrings_give_what_they_show(member: str) -> None:
    for module in importable_modules(member):
        failed, _ = doctest.testmod(module, report=True)
        assert failed == 0, module.__name__

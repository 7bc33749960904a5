"""What README.md, the pages and the cards tell people to type exists; their Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("packages/*/README.md"))]
PAGES += sorted(page for page in ROOT.glob("docs/*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SESSION = re.compile(r"nox (?:--no-venv )?-s ((?:\"[^\"]+\"|[\w()]+)(?: (?:\"[^\"]+\"|[a-z_]+(?=[ \n`]|$)))*)")
EXAMPLE_PAPER = "yours"  # the fifth paper of the page on adding one

each_page = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])


@cache
def sessions() -> set[str]:
    """Names of all nox sessions; of a parametrised one the name alone too, which runs them all."""
    command = [sys.executable, "-m", "nox", "-f", ROOT / "noxfile.py", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"^[*-] (\S+) ->", listed, re.MULTILINE))
    return names | {name.split("(")[0] for name in names}


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(page.read_text()) if language in languages]


def test_readme_gives_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert 'python3 -m pip install "nox[uv]" && python3 -m nox -s demo' in text
    assert "python3 -m nox -s tests" in text
    assert "nox -s gpu_tests" in text


def test_the_ci_script_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "for session in tests lint types docs; do" in script
    assert 'nox -s "$session"' in script


def test_nox_has_every_session_that_was_promised() -> None:
    promised = {"demo", "tests", "interpret", "gpu_tests", "reproduce", "standalone", "lint", "types", "docs"}
    assert promised <= sessions()
    members = {file.parent.name for file in ROOT.glob("packages/*/pyproject.toml")}
    assert {f"tests({member})" for member in members} <= sessions()
    for session in ("reproduce", "standalone"):
        assert {f"{session}({paper})" for paper in members - {"core"}} <= sessions()


@each_page
def test_named_sessions_exist(page: Path) -> None:
    for match in SESSION.finditer(page.read_text()):
        for name in re.findall(r"\"([^\"]+)\"|(\S+)", match[1]):
            named = "".join(name)
            if named in {"NAME", f"tests({EXAMPLE_PAPER})", f"standalone({EXAMPLE_PAPER})"}:
                continue
            assert named in sessions(), f"{page.name} says `nox -s {named}`"


@each_page
def test_command_lines_are_understood_and_their_models_exist(page: Path) -> None:
    from vitreous_core.cli import _build_parser
    from vitreous_core.zoo import models

    names = {card.name for card in models()}
    for block in blocks(page, "bash"):
        for line in re.findall(r"^vitreous (.*)$", block, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words == ["--help"]:
                continue
            _build_parser().parse_args(words)  # a mistake ends in SystemExit, its message in the captured output
            for word in words:
                if re.fullmatch(r"[\w.-]+_\d+xb\d+_[\w-]+", word):
                    assert word in names, f"{page.name} names the model {word}"


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(body, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, body in enumerate(blocks(page, "python"), start=1)
        if not body.startswith("# config:")
    ],
)
def test_python_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {"__name__": "example"})

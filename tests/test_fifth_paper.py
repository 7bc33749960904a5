"""A fifth paper needs no edit outside its own folder: a minimal one is found, listed, built and given sessions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "pyproject.toml": """
        [project]
        name = "vitreous-fifth"
        version = "0.1.0"
        dependencies = ["vitreous-core[mm]==0.1.0"]
        [project.entry-points."vitreous.papers"]
        fifth = "vitreous_fifth"
        """,
    "src/vitreous_fifth/__init__.py": "",
    "src/vitreous_fifth/mm.py": """
        import torch
        from mmpretrain.models.backbones.base_backbone import BaseBackbone
        from mmpretrain.registry import MODELS
        from vitreous_core.mm import BackboneAdapter, register_paper

        class Fifth(torch.nn.Module):
            def __init__(self, width=8):
                super().__init__()
                self.stem = torch.nn.Conv2d(3, width, 8, 8)

            def forward(self, images):
                return (self.stem(images),)

        @MODELS.register_module(name="Fifth")
        class MMFifth(BackboneAdapter, Fifth, BaseBackbone):
            pass

        register_paper("fifth")
        """,
    "src/vitreous_fifth/.mim/model-index.yml": "Import: [configs/fifth/metafile.yml]",
    "src/vitreous_fifth/.mim/configs/fifth/metafile.yml": """
        Collections:
          - Name: Fifth
            Paper: {Title: A fifth paper, URL: https://arxiv.org/abs/0000.00000}
        Models:
          - Name: fifth_1xb64_digits
            In Collection: Fifth
            Metadata: {FLOPs: 24576, Parameters: 1640}
            Results: [{Task: Image Classification, Dataset: Digits, Metrics: null}]
            Weights: null
            Config: configs/fifth/fifth_1xb64_digits.py
        """,
    "src/vitreous_fifth/.mim/configs/fifth/fifth_1xb64_digits.py": """
        _base_ = ['../_base_/digits.py', '../_base_/default_runtime.py']
        custom_imports = dict(imports=['vitreous_fifth.mm'], allow_failed_imports=False)
        model = dict(
            type='ImageClassifier',
            backbone=dict(type='Fifth', width=8),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=8))
        """,
}
SHARED = "packages/swiftformer/src/vitreous_swiftformer/.mim/configs/_base_"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workspace's own files, with links to its packages and one more package beside them."""
    root = tmp_path_factory.mktemp("workspace")
    for name in ("noxfile.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    (root / "packages").mkdir()
    for package in (ROOT / "packages").iterdir():
        (root / "packages" / package.name).symlink_to(package)
    for name, text in FILES.items():
        file = root / "packages" / "fifth" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    bases = root / "packages/fifth/src/vitreous_fifth/.mim/configs/_base_"
    bases.mkdir()
    for base in ("digits.py", "default_runtime.py"):
        shutil.copy(ROOT / SHARED / base, bases)
    return root


def run(workspace: Path, *arguments: str) -> str:
    source = workspace / "packages" / "fifth" / "src"
    path = os.pathsep.join([str(source), *(str(ROOT / "packages" / name / "src") for name in ("core",)), *sys.path])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nox_gives_it_sessions(workspace: Path) -> None:
    names = set(re.findall(r"^[*-] (\S+) ->", run(workspace, "-m", "nox", "--list"), re.MULTILINE))
    assert {"tests(fifth)", "reproduce(fifth)", "standalone(fifth)"} <= names
    assert {"tests(core)", "tests(swiftformer)"} <= names


def test_the_command_line_lists_it(workspace: Path) -> None:
    assert "fifth_1xb64_digits" in run(workspace, "-m", "vitreous_core.cli", "list")


def test_mmpretrain_builds_it(workspace: Path) -> None:
    code = """
        import torch, vitreous_fifth.mm
        from mmpretrain import get_model, list_models
        assert 'fifth_1xb64_digits' in list_models()
        print(tuple(get_model('fifth_1xb64_digits')(torch.zeros(2, 3, 32, 32)).shape))
        """
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    assert run(workspace, "-c", lines).strip().endswith("(2, 10)")

"""Export: every format that is installed here runs the model's own results; mistakes are one line and leave no file."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vitreous_core import cli
from vitreous_core.errors import UserError
from vitreous_core.export.api import export_model
from vitreous_core.export.formats import FORMATS, Format
from vitreous_core.export.program import MOST_IMAGES, capture, operators, simplify


class Backbone(nn.Module):
    """Splits its channels, as attention does, and can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deploy = False

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norm(self.conv(x)).chunk(2, dim=1)
        return first.relu() * second.flatten(2).softmax(-1).view_as(second)

    def switch_to_deploy(self) -> None:
        self.norm = nn.Identity()
        self.deploy = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def skip_without(kind: Format) -> None:
    missing = [name for name in kind.modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: --format {kind.name} is NOT TESTED here")


each_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
each_batch = pytest.mark.parametrize("batch", [None, 2], ids=["dynamic", "fixed"])


@each_batch
@each_format
def test_the_file_runs_as_the_model(kind: Format, batch: int | None, model: nn.Module, tmp_path: Path) -> None:
    skip_without(kind)
    path = tmp_path / f"model{kind.suffix}"
    exported = export_model(model, path, kind.name, size=(9, 12), batch=batch, about={"model": "a test's"})
    assert exported.path == path
    assert path.exists()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert 100 < exported.bytes < 200_000
    assert exported.folded
    assert not model.backbone.deploy, "the model itself stays as it is"
    assert exported.batch == (batch or 1)
    names = ["PyTorch, as trained", "PyTorch, deploy mode"]
    assert [runner.name for runner in exported.runners] == names + ([kind.runtime] if kind.open else [])
    for runner in exported.runners:
        assert runner.error < 1e-5
        assert 0 < runner.latency_ms[0] <= runner.latency_ms[1] <= runner.latency_ms[2]
    if kind.open is None:
        assert "not run here" in exported.facts["parity"]
    # Beyond the command's own check: other images, and the largest batch.
    elif batch is None:
        images = torch.randn(MOST_IMAGES, 3, 9, 12)
        with torch.no_grad():
            torch.testing.assert_close(kind.open(path, 1)(images), model(images), rtol=1e-4, atol=1e-5)


@each_format
def test_facts_are_in_the_file(kind: Format, model: nn.Module, tmp_path: Path) -> None:
    skip_without(kind)
    path = tmp_path / f"model{kind.suffix}"
    export_model(model, path, kind.name, size=(8, 8), batch=1, about={"pixels": "RGB, 0 to 255"})
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert any(b"RGB, 0 to 255" in file.read_bytes() for file in files)


def test_wrong_results_leave_what_was_there(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("older")
    kind = FORMATS["pt2"]
    assert kind.open is not None
    broken = Format(**{**vars(kind), "open": lambda path, threads: lambda images: model(images) * 1.0001})
    monkeypatch.setitem(FORMATS, "pt2", broken)
    with pytest.raises(UserError, match=r"torch\.export disagrees with the model: relative error 1\.\de-04, allowed"):
        export_model(model, path, "pt2", size=(8, 8))
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_refusals_are_one_line(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    path = tmp_path / "model.pt2"
    with pytest.raises(UserError, match=r"^torch\.export makes no graph of this model: [^\n]+$"):
        export_model(Branching(), path, "pt2", size=(8, 8))
    with pytest.raises(UserError, match="no format is named 'tflite'; there are onnx, coreml, executorch, pt2"):
        export_model(model, path, "tflite", size=(8, 8))

    def fail(*_: object) -> None:
        raise NotImplementedError("no such operator\nand ten lines more")

    for part, words in (
        ("write", "--format pt2 cannot take this model"),
        ("open", r"torch\.export cannot run this model"),
    ):
        monkeypatch.setitem(FORMATS, "pt2", Format(**{**vars(FORMATS["pt2"]), part: fail}))
        with pytest.raises(UserError, match=rf"^{words}: NotImplementedError: no such operator$"):
            export_model(model, path, "pt2", size=(8, 8))
        monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@each_format
def test_a_missing_extra_is_named(
    kind: Format, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if kind.extra is None:
        kind.require()
        return
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tmp_path / "config.py"
    config.touch()
    assert cli.main(["export", str(config), "--format", kind.name]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"vitreous: error: --format {kind.name} needs {', '.join(kind.modules)}" in message
    assert f"install vitreous-core[{kind.extra}]" in message


def test_splits_become_slices(model: nn.Module) -> None:
    program = capture(model, torch.randn(2, 3, 8, 8), dynamic=True)
    simple = simplify(program)
    assert operators(program) > 5
    assert not [node for node in simple.graph.nodes if "split" in str(node.target) or "alias" in str(node.target)]
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(simple.module()(images), model(images))


def test_command(tiny_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "tiny.py", tmp_path / "tiny.pt2"
    config.write_text(tiny_config)
    assert cli.main(["export", str(config), "--format", "pt2", "--out", str(out), "--image-size", "8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert out.is_file()
    assert "tiny (it has no deploy mode: nothing to fold)" in text
    assert "initial ones: give --checkpoint" in text
    assert "float32 [1 to 64, 3, 8, 8]: BGR, 0 to 255, minus (127.5, 127.5, 127.5), divided by (127.5" in text
    assert re.search(r"torch\.export \d\.\de-\d\d \d+\.\d\d", text)
    assert torch.export.load(out).module()(torch.zeros(7, 3, 8, 8)).shape == (7, 10)
    assert cli.main(["export", str(config), "--format", "pt2", "--out", str(tmp_path / "no" / "x.pt2")]) == 2
    assert f"vitreous: error: no folder is at {tmp_path / 'no'}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(config), "--format", "pt2", "--batch", "0"])
    assert "must be a positive integer; got '0'" in capsys.readouterr().err


def test_command_loads_weights(tiny_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.py"
    config.write_text(tiny_config)
    import vitreous_core.mm  # noqa: F401
    from vitreous_core.mm.models import build_model
    from vitreous_core.mm.train import load_config

    torch.manual_seed(7)
    model = build_model(load_config(config))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    out = tmp_path / "tiny.pt2"
    arguments = ["--format", "pt2", "--out", str(out), "--batch", "2"]
    assert cli.main(["export", str(config), "--checkpoint", str(tmp_path / "weights.pth"), *arguments]) == 0
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(images), model(images), rtol=1e-5, atol=1e-6)
    assert cli.main(["export", str(config), "--checkpoint", "none.pth", *arguments]) == 2
    assert "no checkpoint is at none.pth" in capsys.readouterr().err


def test_nothing_of_a_format_is_imported_early() -> None:
    code = (
        "import sys, vitreous_core.export.api as _; print({'onnx', 'executorch', 'coremltools'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

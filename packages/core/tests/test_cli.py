"""The command line, but training: names, conversion, prediction, pictures, and how mistakes are told."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitreous_core import cli, zoo
from vitreous_core.papers import Paper


@dataclass(frozen=True)
class _Paper(Paper):
    """A paper whose official release calls the head `fc` and stores `backbone` bare."""

    def module(self, name):
        assert name == "convert"
        return SimpleNamespace(from_official=_from_official, to_official=_to_official)


def _from_official(state):
    return {f"head.{key}" if key.startswith("fc.") else f"backbone.{key}": value for key, value in state.items()}


def _to_official(state):
    return {key.removeprefix("head.").removeprefix("backbone."): value for key, value in state.items()}


@pytest.fixture
def vitreous(capfd):
    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def model(tmp_path, tiny_config, monkeypatch):
    """The tiny model under the name `tiny_digits`, and an ImageNet entry."""
    path = tmp_path / "tiny_digits.py"
    path.write_text(tiny_config)
    paper = _Paper("core", "vitreous_core")
    cards = (
        zoo.ModelCard("tiny_digits", paper, path, "Tiny", "A paper", "https://arxiv.org/", 3210, 98765, 99.0, None),
        zoo.ModelCard("tiny_8xb8_in1k", paper, path, "Tiny", "A paper", "", 28_288_354, 4_490_566_656, 81.18, None),
    )  # fmt: skip
    monkeypatch.setattr(zoo, "models", lambda: cards)
    return cards[0]


@pytest.fixture
def official(model, tmp_path):
    """An official checkpoint of the tiny model."""
    import vitreous_core.mm  # noqa: F401
    from vitreous_core.mm.models import build_model
    from vitreous_core.mm.train import load_config

    torch.manual_seed(0)
    state = build_model(load_config(model.config)).state_dict()
    path = tmp_path / "official.pth"
    torch.save({"model": _to_official(state), "epoch": 300}, path)
    return path


def _refused(result, *parts):
    code, _, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err
    return True


def test_help_and_list_import_nothing_heavy():
    code = (
        "import sys; from vitreous_core import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'mmengine', 'mmpretrain', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for command in ("list", "info", "config", "train", "test", "convert", "predict", "export", "show"):
        assert f"\n    {command} " in out


def test_missing_extra_is_one_line():
    code = """
import sys
sys.modules["matplotlib"] = None  # as if it were not installed
from vitreous_core.cli import main
sys.exit(main(["show", "curve", "4x4", "--out", "curve.png"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("vitreous: error: this command needs matplotlib")
    assert "install vitreous-core[mm]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_list(vitreous, model):
    code, out, _ = vitreous("list")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["tiny_8xb8_in1k", "core", "28.3", "M", "4.49", "G", "81.2"] in lines
    assert ["tiny_digits", "core", "3.21", "k", "98.8", "k"] in lines
    assert "tiny_digits" not in vitreous("list", "*in1k")[1]
    assert _refused(vitreous("list", "zzz"), "no model's name matches 'zzz'")


@pytest.mark.parametrize("command", [["info"], ["config"], ["train"], ["test", None], ["predict", None]])
def test_unknown_model_says_what_is_close(vitreous, model, command, tmp_path):
    arguments = {"test": ["x.pth"], "predict": ["x.png", "--checkpoint", "x.pth"]}.get(command[0], [])
    assert _refused(
        vitreous(command[0], "tiny_digit", *arguments), "no model is named 'tiny_digit'", "did you mean tiny_digits?"
    )


def test_suggestions_are_close_or_absent(vitreous, model):
    assert _refused(vitreous("info", "tyni_8xb8_in1k"), "did you mean tiny_8xb8_in1k")
    assert "did you mean" not in vitreous("info", "resnet50")[2]


def test_info_counts_the_real_model(vitreous, model):
    code, out, _ = vitreous("info", "Tiny_Digits")
    assert code == 0
    text = " ".join(out.split())
    # Patches 784, class token 16, five positions 80, one layer 2224, three norms beside it 64, head 170.
    assert "parameters 3,338" in text
    # Four patches of 768, five tokens of 2048 in the layer's maps, attention 2 * 25 * 16, head 160.
    assert "MACs 14,272 as traced here, 98,765 as the card counts, one image of 8 x 8" in text
    assert "WARNING" not in out
    assert str(model.config) in "".join(out.split())


def test_info_card_is_the_package_readme(vitreous, model):
    code, out, _ = vitreous("info", "tiny_digits", "--card")
    assert code == 0
    title = (model.paper.root.parents[1] / "README.md").read_text().splitlines()[0].lstrip("# ")
    assert title in out


def test_config_prints_path_or_text(vitreous, model):
    assert vitreous("config", "tiny_digits") == (0, f"{model.config}\n", "")
    code, out, _ = vitreous("config", "tiny_digits", "--text")
    assert code == 0
    assert "type='VisionTransformer'" in out


def test_convert_there_and_back(vitreous, model, official, tmp_path):
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    assert vitreous("convert", "tiny_digits", official, ours)[0] == 0
    assert vitreous("convert", "tiny_digits", ours, back, "--reverse")[0] == 0
    given, returned = (torch.load(path)["model"] for path in (official, back))
    assert given.keys() == returned.keys()
    assert all(torch.equal(given[key], returned[key]) for key in given)
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == []


def test_convert_names_missing_surplus_and_misshapen_keys(vitreous, model, official, tmp_path):
    state = torch.load(official)["model"]
    state["fc.bogus"] = torch.ones(1)
    state["fc.bias"] = torch.ones(1000)
    del state["cls_token"]
    torch.save({"model": state}, official)
    out = tmp_path / "out.pth"
    assert _refused(
        vitreous("convert", "tiny_digits", official, out),
        "missing: backbone.cls_token", "surplus: head.fc.bogus", "head.fc.bias (needs (10,), got (1000,))",
    )  # fmt: skip
    assert not out.exists()


def test_convert_refuses_what_is_no_checkpoint(vitreous, model, tmp_path):
    out = tmp_path / "out.pth"
    assert _refused(vitreous("convert", "tiny_digits", tmp_path / "absent.pth", out), "no checkpoint is at")
    torch.save({"model": {"a": 1}}, tmp_path / "odd.pth")
    assert _refused(vitreous("convert", "tiny_digits", tmp_path / "odd.pth", out), "names to tensors")


def test_convert_to_a_folder_that_is_absent(vitreous, model, official, tmp_path):
    assert _refused(vitreous("convert", "tiny_digits", official, tmp_path / "no" / "out.pth"), "no")


def test_predict_shows_the_five_best_classes(vitreous, model, official, tmp_path):
    ours, images = tmp_path / "ours.pth", [tmp_path / "grey.png", tmp_path / "colour.jpg"]
    vitreous("convert", "tiny_digits", official, ours)
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(images[0])
    Image.fromarray(np.zeros((50, 30, 3), np.uint8)).save(images[1])
    code, out, _ = vitreous("predict", "tiny_digits", *images, "--checkpoint", ours)
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:]]
    assert len(rows) == 10
    scores = [float(row[-1]) for row in rows[:5]]
    assert scores == sorted(scores, reverse=True)
    assert 0.5 < sum(scores) <= 1.001
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert all(row[-2] in names for row in rows)


def test_predict_refuses_what_is_no_image(vitreous, model, official, tmp_path):
    ours, text = tmp_path / "ours.pth", tmp_path / "text.png"
    vitreous("convert", "tiny_digits", official, ours)
    text.write_text("no image")
    assert _refused(vitreous("predict", "tiny_digits", text, "--checkpoint", ours), "text.png is no image")
    assert _refused(vitreous("predict", "tiny_digits", tmp_path / "a.png", "--checkpoint", ours), "no image is at")
    assert _refused(vitreous("predict", "tiny_digits", tmp_path, "--checkpoint", ours), "no image is at")


SHOWN = [
    ["curve", "9x14"],
    ["curve", "8x8", "--order", "window", "--tile", "4"],
    ["curve", "8x8", "--order", "tile", "--tile", "2x4"],
    ["pattern", "window1d", "8x8", "--size", "16", "--shift", "4"],
    ["pattern", "slide1d", "8x8", "--size", "7"],
    ["pattern", "neighborhood1d", "8x8", "--order", "morton"],
    ["pattern", "window2d", "8x8", "--size", "4", "--shift", "2"],
    ["pattern", "slide2d", "8x8", "--size", "3", "--dilation", "2"],
    ["pattern", "neighborhood2d", "80x80", "--block", "64x16"],
]


@pytest.mark.parametrize("arguments", SHOWN, ids=" ".join)
def test_show_draws(vitreous, tmp_path, arguments):
    out = tmp_path / "picture.png"
    code, printed, err = vitreous("show", *arguments, "--out", out)
    assert code == 0, err
    assert printed.strip() == str(out)
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[0] > 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_show_names_the_file_itself(vitreous, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vitreous("show", "curve", "4x6")[:2] == (0, "hilbert_4x6.png\n")
    assert Path("hilbert_4x6.png").stat().st_size > 1000


def test_show_pictures_differ_where_orders_do(vitreous, tmp_path):
    for order in ("hilbert", "row_major"):
        vitreous("show", "pattern", "slide1d", "16x16", "--order", order, "--out", tmp_path / f"{order}.png")
    assert (tmp_path / "hilbert.png").read_bytes() != (tmp_path / "row_major.png").read_bytes()


REFUSED = {
    "even kernel": (["pattern", "slide2d", "8x8", "--size", "4"], "kernel must be odd"),
    "shift beyond window": (["pattern", "window2d", "8x8", "--size", "4", "--shift", "4"], "shift"),
    "foreign setting": (["pattern", "slide2d", "8x8", "--shift", "1"], "slide2d takes no --shift"),
    "window without side": (["curve", "8x8", "--order", "window"], "side for 'window'"),
    "too large to see": (["curve", "1024x1024"], "at most"),
    "unwritable": (["curve", "8x8", "--out", "/no/such/folder/a.png"], "/no/such/folder/a.png"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_show_refuses(vitreous, arguments, message):
    assert _refused(vitreous("show", *arguments), message)


@pytest.mark.parametrize("size", ["0x8", "8x", "axb", "1x2x3", "-4x4"])
def test_malformed_sizes_are_usage_errors(capfd, size):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", "curve", size])
    assert "HEIGHTxWIDTH" in capfd.readouterr().err

"""The demo and the reproduction records, on a model that trains in a second."""

import json
import re
from dataclasses import dataclass

import pytest
from mmengine.config import Config
from rich.console import Console

from vitreous_core.errors import UserError
from vitreous_core.mm import demo, page, reproduce
from vitreous_core.mm import train as training
from vitreous_core.papers import Paper
from vitreous_core.zoo import ModelCard


@pytest.fixture
def card(tmp_path, tiny_config):
    path = tmp_path / "tiny_digits.py"
    path.write_text(tiny_config)
    return _card(path.stem, path)


def _card(name, config, paper=None):
    paper = paper or Paper("core", "vitreous_core")
    return ModelCard(name, paper, config, "Tiny", "A <paper> & more", "https://arxiv.org/abs/0", 1, 1, None, None)


@pytest.fixture
def run(card, tmp_path, monkeypatch, capfd):
    """Run the demo; returns exit code and standard output."""
    monkeypatch.setattr(demo, "demo_models", lambda: [card])
    monkeypatch.setattr(demo, "write_page", _write_stub_page)

    def call(*options):
        code = demo.main(["--out", str(tmp_path / "out"), *options])
        return code, capfd.readouterr().out

    return call


def _write_stub_page(path, runs, **_):
    path.write_text("page")
    return path


def test_below_the_goal_fails_and_the_page_comes_last(run, tmp_path):
    code, out = run()
    assert code == 1
    assert "below 93 %: tiny_digits" in out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "index.html")
    assert re.search(r"tiny_digits +[\d,]+ +torch +2 +\d+ +\d+\.\d\d", out)


def test_started_again_it_trains_nothing(run, monkeypatch):
    monkeypatch.setattr(demo, "GOAL", 0.0)
    first_code, first = run()
    monkeypatch.setattr(demo, "train", None)
    code, out = run()
    assert (first_code, code) == (0, 0)
    assert "done before" in out
    row = re.compile(r"^tiny_digits .*", re.M)
    assert row.findall(out)[-1] == row.findall(first)[-1]


def test_interrupted_it_resumes(run, monkeypatch, card):
    monkeypatch.setattr(demo, "GOAL", 0.0)

    def one_epoch(config, **arguments):
        training.train(training.load_config(card.config, {"train_cfg.max_epochs": 1}), **arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", one_epoch)
    assert run()[0] == 130
    monkeypatch.setattr(demo, "train", training.train)
    code, out = run()
    assert code == 0
    assert "(1 epochs done)" in out
    assert "in 2 epochs" in out


def test_fresh_and_changed_configs_train_again(run, monkeypatch, card):
    monkeypatch.setattr(demo, "GOAL", 0.0)
    run()
    _, fresh = run("--fresh")
    assert "iteration 6/6" in fresh
    card.config.write_text(card.config.read_text().replace("max_epochs=2", "max_epochs=1"))
    _, changed = run()
    assert "its config changed" in changed
    assert "iteration 3/3" in changed


def test_first_digits_model_of_each_family(monkeypatch):
    cards = [_card("a_digits", None), _card("b_digits", None), _card("c_in1k", None)]
    monkeypatch.setattr(demo, "models", lambda: cards)
    assert [card.name for card in demo.demo_models()] == ["a_digits"]
    monkeypatch.setattr(demo, "models", lambda: cards[2:])
    with pytest.raises(UserError, match="no paper is installed"):
        demo.demo_models()


def test_page_holds_everything_itself(card, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    result = demo._train_one(card, folder, Console(quiet=True))
    assert [epoch for epoch, _ in result.scores] == [1, 2]
    assert len(result.losses) == 2
    assert len(result.samples) == 64
    wrong = sum(sample.prediction != sample.label for sample in result.samples)
    # The page's predictions are those of the checkpoint whose accuracy the table states.
    assert 100 * (1 - wrong / 64) == pytest.approx(result.best, abs=0.01)

    monkeypatch.setattr(page, "save_png", lambda figure: b"png")
    text = page.write_page(tmp_path / "new" / "index.html", [result], goal=93, machine={"device": "x"}).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|https://arxiv.org/abs/0")', text)
    assert text.count("<img") == 2 + 2 + 3 + 3 + len(page._choose_samples([result]))
    assert "A &lt;paper&gt; &amp; more" in text
    assert f"{result.best:.2f} %" in text
    assert 'class="wrong"' in text


def test_record_of_a_reproduction(card, tmp_path):
    out, work = tmp_path / "results", tmp_path / "work"
    record = reproduce.reproduce(card, out, work, console=Console(quiet=True))
    assert record.parent == out / "core" / "tiny_digits"
    assert sorted(path.name for path in record.iterdir()) == ["config.py", "metrics.jsonl", "run.json"]
    details = json.loads((record / "run.json").read_text())
    assert details["epochs"] == 2
    assert details["seed"] == 0
    assert details["metric"] == "accuracy/top1"
    rows = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    scores = [row["accuracy/top1"] for row in rows if row["split"] == "val"]
    assert len(scores) == 2
    assert details["best"] == pytest.approx(max(scores))
    assert str(tmp_path) not in "".join(path.read_text() for path in record.iterdir())
    resolved = Config.fromfile(record / "config.py")
    assert resolved.train_dataloader.dataset.type == "DigitsDataset"
    assert resolved.work_dir == record.name

    again = reproduce.reproduce(card, out, work, console=Console(quiet=True))
    assert again.name == f"{record.name}-2"


def test_variants_of_a_reproduction(card, tmp_path, monkeypatch):
    trained = []

    def train(config, **options):
        trained.append((config.randomness.seed, config.model.backbone.get("backend"), config.train_cfg.max_epochs))
        raise UserError("enough")

    monkeypatch.setattr(reproduce, "train", train)
    for variant, expected in (
        (reproduce.Variant(), (0, None, 3)),
        (reproduce.Variant(seed=4, backend="triton"), (4, "triton", 3)),
    ):
        with pytest.raises(UserError, match="enough"):
            reproduce.reproduce(card, tmp_path, tmp_path, variant, settings={"train_cfg.max_epochs": 3})
        assert trained.pop() == expected
    names = [reproduce._name_run(tmp_path, "0123456789", v)[10:] for v in (reproduce.Variant(), reproduce.Variant(1))]
    assert names == ["-01234567", "-01234567-seed1"]
    assert reproduce.Variant(0, "torch").label == "torch-seed0"


def test_choice_of_reproduction_configs(monkeypatch):
    @dataclass(frozen=True)
    class Other(Paper):
        pass

    mine, theirs = Paper("core", "vitreous_core"), Paper("other", "vitreous_other")
    cards = [_card("a_digits", None, mine), _card("a_in1k", None, mine), _card("b_digits", None, theirs)]
    monkeypatch.setattr(reproduce, "models", lambda: cards)
    monkeypatch.setattr("vitreous_core.zoo.models", lambda: tuple(cards))
    assert [card.name for card in reproduce.choose_configs(mine, [])] == ["a_digits"]
    assert [card.name for card in reproduce.choose_configs(mine, ["A_in1k"])] == ["a_in1k"]
    with pytest.raises(UserError, match="b_digits belongs to another paper than core"):
        reproduce.choose_configs(mine, ["b_digits"])


def test_unknown_paper_is_one_line(capfd):
    assert reproduce.main(["nonsense"]) == 2
    assert "no paper is named 'nonsense'" in capfd.readouterr().err

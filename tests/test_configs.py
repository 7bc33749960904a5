"""Every packaged config, metafile and model card agree, and every model builds."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vitreous_core.papers import Paper, papers

PAPERS = {paper.name: paper for paper in papers()}
NAME = re.compile(r"[a-z0-9.-]+_\d+xb\d+_[a-z0-9-]+")


def config_files(paper: Paper) -> list[Path]:
    """Those of classifiers: `downstream` is for other projects, and tested in test_downstream.py."""
    others = {"_base_", "downstream"}
    return [file for file in sorted(paper.configs.rglob("*.py")) if not others & set(file.parts)]


@cache
def metafile_entries(paper: str) -> dict[str, dict[str, Any]]:
    """The models that a paper's index names, with `Collection` resolved."""
    index = PAPERS[paper].model_index
    entries: dict[str, dict[str, Any]] = {}
    for imported in yaml.safe_load(index.read_text())["Import"]:
        metafile = yaml.safe_load((index.parent / imported).read_text())
        collections = {collection["Name"]: collection for collection in metafile["Collections"]}
        for entry in metafile["Models"]:
            assert entry["Name"] not in entries, f"{entry['Name']} is listed twice"
            entries[entry["Name"]] = entry | {"Collection": collections[entry["In Collection"]]}
    return entries


each_paper = pytest.mark.parametrize("paper", PAPERS)
each_config = pytest.mark.parametrize(
    ("paper", "config"),
    [pytest.param(name, config, id=config.stem) for name, paper in PAPERS.items() for config in config_files(paper)],
)


def test_all_papers_of_the_workspace_are_found() -> None:
    folders = {file.parents[1].name for file in Path(__file__).parents[1].glob("packages/*/src/vitreous_*/")}
    assert set(PAPERS) == folders - {"core"}


@each_paper
def test_index_and_config_files_name_the_same_models(paper: str) -> None:
    entries = metafile_entries(paper)
    listed = {name: PAPERS[paper].root / ".mim" / entry["Config"] for name, entry in entries.items()}
    assert set(listed.values()) == set(config_files(PAPERS[paper]))
    for name, config in listed.items():
        assert NAME.fullmatch(name), f"{name} is not <model>_<gpus>xb<batch>_<dataset>"
        assert config.stem == name
        assert config.parent == PAPERS[paper].configs / config.parent.name, "configs stand in one folder per family"


@each_paper
def test_every_variant_has_the_papers_recipe_and_some_digits_config(paper: str) -> None:
    datasets = [name.rsplit("_", 1)[1] for name in metafile_entries(paper)]
    assert any(dataset.startswith("in1k") for dataset in datasets)
    assert "digits" in datasets


@each_paper
def test_card_names_every_model_and_links_the_paper(paper: str) -> None:
    card = (Path(__file__).parents[1] / "packages" / paper / "README.md").read_text()
    missing = [name for name in metafile_entries(paper) if name not in card]
    assert not missing, f"packages/{paper}/README.md does not name {missing}"
    for entry in metafile_entries(paper).values():
        arxiv = entry["Collection"]["Paper"]["URL"].rsplit("/", 1)[1]
        assert arxiv in card
        assert "Weights" in entry, f"{entry['Name']}: write `Weights: null` where none are released by us"
        tasks = [result["Task"] for result in entry["Results"]]
        assert tasks == ["Image Classification"] * len(tasks)
        assert tasks, f"{entry['Name']}: MMPretrain finds no inferencer without a task"


@each_config
def test_config_builds_the_model_that_the_metafile_describes(paper: str, config: Path) -> None:
    from mmengine.config import Config
    from mmpretrain.registry import MODELS

    parsed = Config.fromfile(config)
    assert f"vitreous_{paper}.mm" in parsed.custom_imports["imports"]
    PAPERS[paper].module("mm")
    with torch.device("meta"):  # shapes only: a large model costs no time and no memory
        model = MODELS.build(parsed.model)
    trained = [parameter for name, parameter in model.named_parameters() if not name.startswith("teacher.")]
    entry = metafile_entries(paper)[config.stem]
    assert entry["Metadata"]["Parameters"] == sum(parameter.numel() for parameter in trained)
    assert entry["Metadata"]["FLOPs"] > 0
    assert parsed.optim_wrapper
    assert parsed.train_dataloader.batch_size == int(config.stem.split("_")[-2].split("xb")[1])


@each_paper
def test_mmpretrain_lists_the_models_by_name(paper: str) -> None:
    from mmpretrain import list_models

    PAPERS[paper].module("mm")
    assert set(metafile_entries(paper)) <= set(list_models())

"""The models that the papers' packages bring, read from their metafiles without importing MMPretrain."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from .errors import UserError
from .papers import Paper, papers

_DIGITS = "_digits"


@dataclass(frozen=True)
class ModelCard:
    """One entry of a paper's metafile.

    Args:
        name: what `mmpretrain.get_model` takes, e.g. `"swiftformer-xs_16xb128_in1k"`.
        paper: whose package it is in.
        config: its config file.
        family: name of its collection.
        paper_title: title of the paper.
        paper_url: where the paper is.
        parameters: count as the metafile states it.
        macs: multiply-accumulate operations as the metafile states them (`FLOPs` there).
        top1: quoted ImageNet top-1 accuracy in per cent, or None.
        weights: path or address of released weights, or None.
    """

    name: str
    paper: Paper
    config: Path
    family: str
    paper_title: str
    paper_url: str
    parameters: int | None
    macs: int | None
    top1: float | None
    weights: str | None

    @property
    def is_digits(self) -> bool:
        """Whether it is a small-data config that trains on scikit-learn's digits."""
        return self.name.endswith(_DIGITS)


@cache
def models() -> tuple[ModelCard, ...]:
    """All packaged models, by paper and in the order of the metafiles."""
    return tuple(card for paper in papers() for card in _read_index(paper))


def find_model(name: str) -> ModelCard:
    """The packaged model of that name; upper and lower case are the same, as in MMPretrain.

    Raises:
        UserError: for an unknown name, naming what is close.
    """
    known = {card.name: card for card in models()}
    card = known.get(name.lower())
    if card is None:
        raise UserError(f"no model is named {name!r}; {_suggest(name, known)}")
    return card


def find_config(target: str) -> Path:
    """The config file that a model name or a path stands for.

    Raises:
        UserError: when it is neither.
    """
    path = Path(target).expanduser()
    if path.is_file():
        return path
    if path.suffix == ".py" or "/" in target:
        raise UserError(f"no config file is at {target!r}; give a path to one, or the name of a model")
    return find_model(target).config


def find_paper(name: str) -> Paper:
    """The paper of that short name; `-` and `_` are the same.

    Raises:
        UserError: for an unknown paper, naming those that are here.
    """
    known = {paper.name: paper for paper in papers()}
    paper = known.get(name.lower().replace("-", "_"))
    if paper is None:
        raise UserError(f"no paper is named {name!r}; here are: {', '.join(known) or 'none'}")
    return paper


def read_card(paper: Paper) -> str:
    """The paper's model card: its package's README, from the source tree or from the installed distribution."""
    source = paper.root.parents[1] / "README.md"
    if source.is_file():
        return source.read_text(encoding="utf-8")
    return str(metadata(paper.package.replace("_", "-")).json["description"])


def _suggest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    if not names:
        return "no paper is installed: install one, e.g. vitreous-swiftformer"
    wanted = name.lower()
    close = [other for other in names if other.startswith(wanted)] or difflib.get_close_matches(
        wanted, names, cutoff=0.5
    )
    if not close:
        # A model without the batch and data set of its recipe.
        families = {other.partition("_")[0]: other for other in reversed(names)}
        close = [families[family] for family in difflib.get_close_matches(wanted, families)]
    if close:
        return f"did you mean {' or '.join(close[:3])}? `vitreous list` shows all"
    return "`vitreous list` shows all"


def _read_index(paper: Paper) -> list[ModelCard]:
    cards = []
    for imported in _read_yaml(paper.model_index)["Import"]:
        metafile = _read_yaml(paper.model_index.parent / imported)
        collections = {collection["Name"]: collection for collection in metafile["Collections"]}
        cards += [_read_model(paper, entry, collections) for entry in metafile["Models"]]
    return cards


def _read_model(paper: Paper, entry: dict[str, Any], collections: dict[str, Any]) -> ModelCard:
    collection = collections[entry["In Collection"]]
    details = entry.get("Metadata") or {}
    accuracies = [(result.get("Metrics") or {}).get("Top 1 Accuracy") for result in entry.get("Results") or ()]
    return ModelCard(
        name=entry["Name"],
        paper=paper,
        config=paper.root / ".mim" / entry["Config"],
        family=collection["Name"],
        paper_title=collection.get("Paper", {}).get("Title", ""),
        paper_url=collection.get("Paper", {}).get("URL", ""),
        parameters=details.get("Parameters"),
        macs=details.get("FLOPs"),
        top1=next((accuracy for accuracy in accuracies if accuracy is not None), None),
        weights=entry.get("Weights"),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"a paper's package is incomplete: {path} is missing; reinstall it") from None
    assert isinstance(content, dict), path
    return content

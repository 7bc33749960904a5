"""How a paper's plain-torch backbone becomes an MMPretrain one, and how its models get their names."""

from __future__ import annotations

import copy
from typing import Any

from ..papers import papers

_registered: set[str] = set()


class BackboneAdapter:
    """Gives a plain backbone MMEngine's `init_cfg` argument. Goes first in the bases:

        class MMSwiftFormer(BackboneAdapter, SwiftFormer, BaseBackbone): ...

    The plain class keeps its own arguments and calls `super().__init__()` without any, which reaches
    `BaseBackbone` there and `nn.Module` when it is used alone.

    Args:
        init_cfg: MMEngine's initialization config, e.g.
            `dict(type="Pretrained", checkpoint=path, prefix="backbone.")`.
    """

    def __init__(self, *args: Any, init_cfg: dict | list[dict] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_cfg = copy.deepcopy(init_cfg)


def register_paper(name: str) -> None:
    """Make a paper's models known by name to `mmpretrain.get_model`, `list_models` and the inferencers.

    Calling it again is harmless. Config paths in the metafiles are relative to the package's `.mim` folder.

    Args:
        name: short name of an importable paper, e.g. `"swiftformer"`.

    Raises:
        ValueError: when no such paper is here.
    """
    paper = next((paper for paper in papers() if paper.name == name), None)
    if paper is None:
        known = ", ".join(paper.name for paper in papers()) or "none"
        raise ValueError(f"name must be an importable paper; got {name!r}, here are: {known}")
    if name in _registered:
        return
    from mmpretrain.apis import ModelHub

    ModelHub.register_model_index(paper.model_index, config_prefix=paper.root / ".mim")
    _registered.add(name)

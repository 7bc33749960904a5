"""Which paper packages are here: the one list that the CLI, nox, the docs and the tests read."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

GROUP = "vitreous.papers"
PREFIX = "vitreous_"


@dataclass(frozen=True, order=True)
class Paper:
    """One paper's package. Everything else follows from the layout that all of them share.

    Args:
        name: short name, e.g. `"flash_window"`.
        package: import name, e.g. `"vitreous_flash_window"`.
    """

    name: str
    package: str

    @property
    def root(self) -> Path:
        """Folder of the import package, found without importing it."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"paper {self.name!r} announces {self.package!r}, which is not importable")
        return Path(spec.origin).parent

    @property
    def model_index(self) -> Path:
        """`.mim/model-index.yml` of the package."""
        return self.root / ".mim" / "model-index.yml"

    @property
    def configs(self) -> Path:
        """Folder of the packaged MMPretrain configs."""
        return self.root / ".mim" / "configs"

    def module(self, name: str) -> ModuleType:
        """Import one of the package's modules: `"mm"` (registers), `"convert"`, `"bench"`."""
        return importlib.import_module(f"{self.package}.{name}")


@cache
def papers() -> tuple[Paper, ...]:
    """All papers on this machine, sorted by name.

    Installed packages announce themselves in the entry-point group `vitreous.papers`. A source checkout on
    PYTHONPATH has no entry points, so importable `vitreous_*` packages that carry a `.mim` folder count too.
    """
    found = {point.name: Paper(point.name, point.value) for point in entry_points(group=GROUP)}
    for module in pkgutil.iter_modules():
        if module.ispkg and module.name.startswith(PREFIX):
            paper = Paper(module.name.removeprefix(PREFIX), module.name)
            if paper.name not in found and (paper.root / ".mim").is_dir():
                found[paper.name] = paper
    return tuple(sorted(found.values()))

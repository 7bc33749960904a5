"""MkDocs hook: the model cards and the reference pages, made from what is in packages/, and the list of results."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
# What a reader may import: modules named in the order in which the reference shows them.
CORE_MODULES = [
    *("curves", "patterns", "layout", "indexing", "ops.block_sparse_attention"),
    *("errors", "fold", "state", "papers", "zoo", "testing", "bench", "mm"),
]
PAPER_MODULES = ["ops", "attention", "model", "convert"]


def papers() -> list[str]:
    """Folder names of the paper packages."""
    return [file.parents[2].name for file in sorted(ROOT.glob("packages/*/src/vitreous_*/.mim"))]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of the navigation that depend on which packages and results are here."""
    cards = [{title(paper): f"papers/{paper}.md"} for paper in papers()]
    reference = [{f"vitreous_{member}": f"reference/{member}.md"} for member in ("core", *papers())]
    results = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.glob("results/**/*.md"))
    filled = {"Papers": cards, "Results": results, "Reference": reference}
    config.nav = [
        {key: filled.get(key, value) for key, value in entry.items()} if isinstance(entry, dict) else entry
        for entry in config.nav or []
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that exist only in the built site."""
    for paper in papers():
        card = (ROOT / "packages" / paper / "README.md").read_text(encoding="utf-8")
        files.append(generated(config, f"papers/{paper}.md", relink(card, f"packages/{paper}", "papers")))
        files.append(generated(config, f"reference/{paper}.md", reference_page(f"vitreous_{paper}", PAPER_MODULES)))
    files.append(generated(config, "reference/core.md", reference_page("vitreous_core", CORE_MODULES)))
    return files


def generated(config: MkDocsConfig, path: str, content: str) -> File:
    """A page with no file behind it."""
    return File.generated(config, path, content=content)


def title(paper: str) -> str:
    """The first heading of the paper's card."""
    first = (ROOT / "packages" / paper / "README.md").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def reference_page(package: str, modules: list[str]) -> str:
    """A page that lets mkdocstrings describe a package's public modules, as far as they exist."""
    root = ROOT / "packages" / package.removeprefix("vitreous_") / "src" / package
    lines = [f"# {package}", ""]
    for module in modules:
        path = root.joinpath(*module.split("."))
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            lines += [
                f"## {module}",
                "",
                f"::: {package}.{module}",
                "    options:",
                "      show_root_heading: false",
                "",
            ]
    return "\n".join(lines)


def relink(card: str, source: str, target: str) -> str:
    """Make a card's relative links hold on the site: pages are linked, other files of the repository only named."""

    def replace(match: re.Match[str]) -> str:
        image, text, address, anchor = match.groups()
        if "://" in address or address.startswith("mailto:"):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(source, address))
        card_of = re.fullmatch(r"packages/(\w+)(?:/README\.md)?", path)
        if path.startswith("docs/"):
            page = path.removeprefix("docs/")
        elif card_of and card_of[1] in papers():
            page = f"papers/{card_of[1]}.md"
        else:
            return text if "`" in text or image else f"{text} (`{path}`)"
        return f"{image}[{text}]({posixpath.relpath(page, target)}{anchor or ''})"

    return LINK.sub(replace, card)

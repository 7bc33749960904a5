"""Papers are found by entry point, or on PYTHONPATH by their `.mim` folder; importing core stays light."""

import subprocess
import sys
import textwrap

import pytest

from vitreous_core.papers import papers


def run_python(code, *args):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, check=True
    ).stdout


def test_a_package_on_the_path_is_found(tmp_path):
    root = tmp_path / "vitreous_fifth"
    (root / ".mim").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (tmp_path / "vitreous_not_a_paper").mkdir()
    (tmp_path / "vitreous_not_a_paper" / "__init__.py").touch()
    found = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from vitreous_core.papers import papers
        for paper in papers():
            print(paper.name, paper.package, paper.model_index)
        """,
        str(tmp_path),
    ).splitlines()
    assert f"fifth vitreous_fifth {root / '.mim' / 'model-index.yml'}" in found
    assert not any("not_a_paper" in line for line in found)


def test_found_papers_are_whole():
    if not papers():
        pytest.skip("no paper package is installed beside core")
    for paper in papers():
        assert paper.model_index.is_file()
        assert paper.configs.is_dir()
        assert paper.package == f"vitreous_{paper.name}"


@pytest.mark.parametrize(
    "module", ["vitreous_core", "vitreous_core.papers", "vitreous_core.ops.block_sparse_attention"]
)
def test_core_imports_without_the_mmpretrain_stack(module):
    heavy = run_python(
        """
        import importlib, sys
        importlib.import_module(sys.argv[1])
        print([name for name in ("mmengine", "mmpretrain", "mmcv", "matplotlib") if name in sys.modules])
        """,
        module,
    )
    assert heavy.strip() == "[]"

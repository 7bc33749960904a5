"""Prove that one paper works alone: `python standalone.py PAPER`, run by `nox -s standalone` outside the repository.

Lists the paper's models, builds one, trains one epoch of its digits config through the command line, and resumes.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def main(paper: str) -> None:
    """Run every check; an AssertionError or a failed command says which one did not hold."""
    from vitreous_core.papers import papers

    found = [other.name for other in papers()]
    assert found == [paper], f"only {paper} may be here; found {found}"
    spec = importlib.util.find_spec(f"vitreous_{paper}")
    assert spec is not None
    assert spec.origin is not None
    print(f"standalone: {paper} from {Path(spec.origin).parent}", flush=True)
    digits = list_and_build(paper)
    work_dir = Path("work").resolve()
    for epochs, resume in ((1, []), (2, ["--resume"])):
        # The config's schedule warms up for longer than this; without it the learning rate stays as it is.
        options = ["--cfg-options", f"train_cfg.max_epochs={epochs}", "param_scheduler=None"]
        vitreous("train", digits, "--work-dir", work_dir, *resume, *options)
        assert (work_dir / f"epoch_{epochs}.pth").is_file()
    print(f"standalone: {paper} lists, builds, trains and resumes on its own")


def list_and_build(paper: str) -> str:
    """Check that MMPretrain finds the paper's models by name; return the name of a digits config."""
    import torch
    from mmpretrain import get_model, list_models

    importlib.import_module(f"vitreous_{paper}.mm")
    digits = sorted(name for name in list_models() if name.endswith("_digits"))
    assert digits, f"list_models() shows no digits config of {paper}"
    assert isinstance(get_model(digits[0]), torch.nn.Module)
    return digits[0]


def vitreous(*arguments: str | Path) -> None:
    """Run the installed command, or its module in a source checkout."""
    command = Path(sys.executable).with_name("vitreous")
    program = [str(command)] if command.is_file() else [sys.executable, "-m", "vitreous_core.cli"]
    print("$ vitreous", *arguments, flush=True)
    subprocess.run([*program, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main(sys.argv[1])

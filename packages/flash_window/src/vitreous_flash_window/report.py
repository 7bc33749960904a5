"""What `nox -s tables` renders about this paper: whether models train with the kernels as with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vitreous_core.loss_curves import curves_figure, curves_table, read_loss_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RECORDS = Path("docs/results/repro/flash_window")


def pages() -> Mapping[str, str]:
    """Markdown by name of the page."""
    curves = read_loss_curves(_RECORDS)
    return {"training": _PAGE.format(table=curves_table(curves))} if curves else {}


def figures() -> Mapping[str, Callable[[], Figure]]:
    """What draws each figure, by its name."""
    curves = read_loss_curves(_RECORDS)
    return {"training": partial(curves_figure, curves)} if curves else {}


_PAGE = """
# Training with the kernels

```bash
nox -s "reproduce(flash_window)" -- flash-swin-tiny_1xb64_digits --seed 0 1 2 --backend torch triton --jobs 6 \\
    --cfg-options default_hooks.logger.interval=10
```

The same configs with `backend="torch"` and `backend="triton"`, the same seeds for both: first weights and data order
agree, what differs is rounding, which training amplifies until two runs are as far apart as two seeds.

{table}
*mean loss difference*: between the two mean curves, averaged over the steps. *expected of equals*: what that would be
between two sets of runs of the same backend with other seeds, from the *seed noise*, the standard deviation between
torch's runs. A backend trains as the reference does when the first does not exceed the second.

![training](../figures/flash_window-training.png)
"""

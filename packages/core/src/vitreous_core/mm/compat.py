"""What MMEngine 0.10.7 and MMPretrain 1.2.0 need to work with current PyTorch, setuptools and Python.

* `torch.load` refuses MMEngine's own checkpoints since PyTorch 2.6: `weights_only=True` is the default, and
  the message hub is stored beside the weights. The default stays; what such checkpoints really hold is allowed.
* MMEngine asks `pkg_resources` for installed packages, which setuptools 82 removed, and
  `pkgutil.find_loader`, which Python 3.14 removed.
* Both print warnings on every run that no user can act on.

`vitreous_core.mm` installs all of it when it is imported, which must be before a config is parsed: a config's
`custom_imports` come too late for its `_base_`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import pickle
import pkgutil
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PLAIN_DTYPES = "?bhilqBHILQefd"  # bool, signed and unsigned integers, floats


@functools.cache
def install() -> None:
    """Install everything; the second call does nothing."""
    _silence_warnings()
    _restore_find_loader()
    _replace_package_queries()
    _silence_file_client()
    _allow_mmengine_checkpoints()


def allow_in_checkpoints(*types: type | Callable | tuple[Callable, str]) -> None:
    """Allow more types in checkpoints, for hooks or heads that put objects of their own into the message hub.

    Loading a checkpoint may then create such objects and call `__setstate__` on them, whoever wrote the file.

    Args:
        types: classes or functions, or pairs of one and the full name under which files know it.
    """
    torch.serialization.add_safe_globals(list(types))


def _allow_mmengine_checkpoints() -> None:
    from mmengine.logging.history_buffer import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    reconstruct: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    allow_in_checkpoints(
        HistoryBuffer,
        OneCycleParamScheduler,
        (_getattr_of_checkpoints, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in _PLAIN_DTYPES},
        # numpy 2 writes `numpy._core`, numpy 1 wrote `numpy.core`.
        *((function, f"numpy.{core}.multiarray.{function.__name__}")
          for function in (reconstruct, scalar) for core in ("_core", "core")),
    )  # fmt: skip


def _getattr_of_checkpoints(owner: object, name: str) -> object:
    """Stands in for `getattr` while a checkpoint loads; the real one reaches any object from any class."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    if owner is HistoryBuffer and name in ("min", "max", "mean", "current"):
        return getattr(HistoryBuffer, name)
    if owner is OneCycleParamScheduler and name in ("_annealing_cos", "_annealing_linear"):
        return getattr(OneCycleParamScheduler, name)
    raise pickle.UnpicklingError(f"checkpoint asks for attribute {name!r} of {owner!r}, which is not allowed")


def _replace_package_queries() -> None:
    for name in (
        "mmengine.utils.package_utils",
        "mmengine.utils",
        "mmengine.config.config",
        "mmengine.hub.hub",
    ):
        module = importlib.import_module(name)
        for query in (is_installed, get_installed_path):
            if hasattr(module, query.__name__):
                setattr(module, query.__name__, query)


def is_installed(package: str) -> bool:
    """Whether a distribution or an importable regular package of that name is here. Replaces MMEngine's."""
    try:
        distribution(package)
        return True
    except PackageNotFoundError:
        spec = _find_spec(package)
        return spec is not None and spec.origin is not None


def get_installed_path(package: str) -> str:
    """Folder of the import package that a distribution or import name stands for. Replaces MMEngine's.

    Raises:
        PackageNotFoundError: when nothing of that name is here.
        RuntimeError: for a namespace package, which has no single folder.
    """
    spec = _find_spec(package)
    if spec is None:
        spec = _find_spec(_import_name(package))
    if spec is None:
        raise PackageNotFoundError(package)
    if spec.origin is None:
        raise RuntimeError(f"package must be a regular package; got the namespace package {package!r}")
    return str(Path(spec.origin).parent)


def _import_name(distribution_name: str) -> str:
    wanted = _normalize(distribution_name)
    for module, distributions in packages_distributions().items():
        if any(_normalize(name) == wanted for name in distributions):
            return module
    raise PackageNotFoundError(distribution_name)


def _normalize(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None


def _restore_find_loader() -> None:
    if not hasattr(pkgutil, "find_loader"):
        pkgutil.find_loader = _find_loader  # type: ignore[assignment]


def _find_loader(module: str) -> Any:
    spec = _find_spec(module)
    return None if spec is None else spec.loader


def _silence_warnings() -> None:
    ignore = functools.partial(warnings.filterwarnings, "ignore")
    # mmcv-lite says at every import that it lacks an operator that nothing here uses.
    ignore(message="Fail to import ``MultiScaleDeformableAttention``", category=UserWarning)
    # Invalid escapes in MMPretrain's sources, when Python first compiles them.
    for category in (SyntaxWarning, DeprecationWarning):
        ignore(message=r'(invalid escape sequence|"\\." is an invalid)', category=category, module=".*mmpretrain")
    # Deprecated calls inside MMEngine.
    ignore(message=r"'pkgutil\.find_loader' is deprecated", category=DeprecationWarning)
    ignore(
        message=r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated",
        category=FutureWarning,
        module="mmengine",
    )


def _silence_file_client() -> None:
    """`CheckpointHook` asks for MMEngine's deprecated `FileClient` itself, which then warns in every run."""
    module: Any = importlib.import_module("mmengine.fileio.file_client")
    module.print_log = functools.partial(_print_log_but_deprecations, module.print_log)


def _print_log_but_deprecations(print_log: Callable, message: str, *args: Any, **kwargs: Any) -> None:
    if kwargs.get("level") == logging.WARNING and message.startswith(('"FileClient"', '"HardDiskBackend"')):
        return
    print_log(message, *args, **kwargs)

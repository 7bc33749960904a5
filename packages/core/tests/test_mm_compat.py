"""Each repair of `vitreous_core.mm.compat`: the thing fails without it and works with it; attacks stay blocked."""

import importlib.util
import logging
import os
import pickle
import pkgutil
import subprocess
import sys
import zipfile
from functools import partial

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import FileClient
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.optim import OneCycleLR
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from vitreous_core.mm import compat
from vitreous_core.mm.checkpoints import CheckpointError, load_checkpoint


@pytest.fixture
def nothing_allowed():
    """torch's own state: no global allowed beyond its defaults."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture
def one_cycle():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    return OneCycleLR(optimizer, eta_max=0.1, total_steps=5).state_dict()


@pytest.fixture
def checkpoint(tmp_path, one_cycle):
    """What MMEngine stores beside the weights."""
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    state = {
        "state_dict": {"weight": torch.ones(2)},
        "message_hub": {"log_scalars": {"train/loss": buffer}, "runtime_info": {"best_score": np.float64(9)}},
        "param_schedulers": [one_cycle],
    }
    path = tmp_path / "epoch_1.pth"
    torch.save(state, path)
    return path


def test_message_hub_fails_without(checkpoint, nothing_allowed):
    with pytest.raises(CheckpointError, match=r"HistoryBuffer while loading.*Nothing in it was executed"):
        load_checkpoint(checkpoint)


def test_message_hub_loads_with(checkpoint):
    state = load_checkpoint(checkpoint)
    buffer = state["message_hub"]["log_scalars"]["train/loss"]
    assert buffer.statistics("mean") == 1.5
    assert state["message_hub"]["runtime_info"]["best_score"] == 9


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "uint8", "uint64", "float16", "float32", "float64"])
def test_plain_arrays_load(tmp_path, dtype):
    torch.save({"array": np.ones(3, dtype)}, tmp_path / "a.pth")
    np.testing.assert_array_equal(load_checkpoint(tmp_path / "a.pth")["array"], np.ones(3, dtype))


def test_files_of_numpy_1_load(checkpoint, tmp_path, nothing_allowed):
    old = tmp_path / "numpy1.pth"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(name, content)
    compat._allow_mmengine_checkpoints()
    assert load_checkpoint(old)["message_hub"]["log_scalars"]["train/loss"].statistics("max") == 2.0
    kept = [entry for entry in torch.serialization.get_safe_globals()
            if not (isinstance(entry, tuple) and entry[1].startswith("numpy.core."))]  # fmt: skip
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)
    with pytest.raises(CheckpointError, match=r"numpy\.core\.multiarray"):
        load_checkpoint(old)


def test_extending_the_list(tmp_path, nothing_allowed):
    path = tmp_path / "own.pth"
    torch.save({"fraction": _Own()}, path)
    with pytest.raises(CheckpointError, match="_Own"):
        load_checkpoint(path)
    compat.allow_in_checkpoints(_Own)
    assert isinstance(load_checkpoint(path)["fraction"], _Own)


class _Own:
    pass


class _Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_system_call_is_refused(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save({"state_dict": _Call(os.system, f"touch {marker}")}, path)
    with pytest.raises(CheckpointError, match=r"refused: it asks for \w+\.system .*Nothing in it was executed"):
        load_checkpoint(path)
    assert not marker.exists()


GETATTR_ATTACKS = {
    "init": (HistoryBuffer, "__init__"),
    "setstate": (HistoryBuffer, "__setstate__"),
    "scheduler": (OneCycleParamScheduler, "__init__"),
    "foreign": (np.ndarray, "tofile"),
    "module": (torch.Tensor, "__class__"),
}


@pytest.mark.parametrize("target", GETATTR_ATTACKS.values(), ids=GETATTR_ATTACKS)
def test_getattr_reaches_nothing_else(tmp_path, target):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": _Call(getattr, *target)}, path)
    with pytest.raises(CheckpointError, match=rf"attribute '{target[1]}' .*Nothing in it was executed"):
        load_checkpoint(path)


def test_the_real_getattr_would_have_opened_the_door(tmp_path, nothing_allowed):
    """The attack is real: with the unrestricted getattr it reaches the globals of a module."""
    path = tmp_path / "evil.pth"
    torch.save({"globals": _Call(getattr, _Call(getattr, HistoryBuffer, "__init__"), "__globals__")}, path)
    with torch.serialization.safe_globals([HistoryBuffer, getattr]):
        assert "np" in torch.load(path, weights_only=True)["globals"]
    compat._allow_mmengine_checkpoints()
    with pytest.raises(CheckpointError, match="attribute '__init__'"):
        load_checkpoint(path)


def test_allowed_attributes_are_the_methods_themselves():
    assert compat._getattr_of_checkpoints(HistoryBuffer, "mean") is HistoryBuffer.mean
    cosine = compat._getattr_of_checkpoints(OneCycleParamScheduler, "_annealing_cos")
    assert cosine is OneCycleParamScheduler._annealing_cos
    with pytest.raises(pickle.UnpicklingError):
        compat._getattr_of_checkpoints(HistoryBuffer(), "mean")


@pytest.fixture
def original_queries():
    """MMEngine's own `package_utils`, as on disk."""
    path = os.path.join(os.path.dirname(mmengine.__file__), "utils", "package_utils.py")
    spec = importlib.util.spec_from_file_location("original_package_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config_on_mmpretrain(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("_base_ = 'mmpretrain::_base_/default_runtime.py'\n")
    return path


def test_cross_package_base_without_pkg_resources(monkeypatch, original_queries, config_on_mmpretrain):
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    assert Config.fromfile(config_on_mmpretrain).default_scope == "mmpretrain"
    for name in ("is_installed", "get_installed_path"):
        monkeypatch.setattr(f"mmengine.config.config.{name}", getattr(original_queries, name))
    with pytest.raises(ImportError, match="pkg_resources"):
        Config.fromfile(config_on_mmpretrain)


def test_package_queries():
    assert compat.is_installed("mmpretrain")
    assert compat.is_installed("mmcv-lite")
    assert not compat.is_installed("no-such-package")
    assert not compat.is_installed("no_such.package")
    home = os.path.dirname(importlib.util.find_spec("mmcv").origin)
    assert compat.get_installed_path("mmcv-lite") == compat.get_installed_path("mmcv") == home
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        compat.get_installed_path("no-such-package")
    assert mmengine.utils.is_installed is compat.is_installed
    assert mmengine.hub.hub.get_installed_path is compat.get_installed_path


def test_find_loader_where_python_lacks_it(monkeypatch):
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    monkeypatch.delattr(pkgutil, "find_loader", raising=False)
    with pytest.raises(AttributeError, match="find_loader"):
        mmcv_full_available()
    compat._restore_find_loader()
    assert mmcv_full_available() is False  # mmcv-lite has no compiled operators
    assert pkgutil.find_loader("mmengine") is not None
    monkeypatch.delattr(pkgutil, "find_loader")


def test_file_client_no_longer_warns(monkeypatch):
    logger = MMLogger.get_instance("test-file-client")
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logger, "handlers", [handler])
    FileClient.infer_client(None, "folder")
    assert records == []

    module = sys.modules["mmengine.fileio.file_client"]
    module.print_log("a real warning", logger="current", level=logging.WARNING)
    assert [record.getMessage() for record in records] == ["a real warning"]
    assert isinstance(module.print_log, partial)
    monkeypatch.setattr(module, "print_log", module.print_log.args[0])
    monkeypatch.setattr(FileClient, "_instances", {})
    FileClient.infer_client(None, "folder")
    assert any("FileClient" in record.getMessage() for record in records)


def _stderr_of(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr


def test_imports_without_are_noisy():
    assert "MultiScaleDeformableAttention" in _stderr_of("import mmcv.cnn.bricks.transformer")


def test_imports_with_are_silent():
    assert _stderr_of("import vitreous_core.mm, mmpretrain.models, mmpretrain.evaluation") == ""

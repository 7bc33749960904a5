"""Training through the Runner: what it reports, what it refuses, and how it is taken up again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmpretrain.registry import HOOKS
from rich.console import Console

from vitreous_core import cli
from vitreous_core.mm import train as training
from vitreous_core.mm.checkpoints import CheckpointError, find_checkpoints, find_resume_point, load_checkpoint

ITERATIONS = 3  # per epoch


@HOOKS.register_module()
class PoisonHook(Hook):
    """Makes the weights NaN after the iteration number `at` (from 1), as a diverging step would."""

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            runner.model.head.fc.weight.data.fill_(float("nan"))


@pytest.fixture
def config_file(tmp_path, tiny_config):
    path = tmp_path / "tiny.py"
    path.write_text(tiny_config)
    return path


@pytest.fixture
def work_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def vitreous(config_file, work_dir, capfd):
    """Run `vitreous train` on the tiny config; returns exit code, standard output and standard error."""

    def run(*options, command="train", target=config_file):
        code = cli.main([command, str(target), "--work-dir", str(work_dir), *map(str, options)])
        out, err = capfd.readouterr()
        return code, " ".join(out.split()), err

    return run


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.py").write_text(tiny_config)
    training.train(training.load_config(folder / "tiny.py"), work_dir=folder / "run", console=Console(quiet=True))
    return folder / "run"


@pytest.fixture
def finished(finished_once, work_dir):
    """A finished run of two epochs."""
    shutil.copytree(finished_once, work_dir)


def _options(**values):
    return ["--cfg-options", *(f"{key.replace('__', '.')}={value}" for key, value in values.items())]


def _refused(result, *parts):
    """One readable line on standard error, exit code 2."""
    code, _, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("vitreous: error: ")
    for part in parts:
        assert part in err
    return True


def test_ends_with_the_score_and_the_checkpoint(vitreous, work_dir):
    code, out, _ = vitreous()
    assert code == 0
    best = next(work_dir.glob("best_*.pth"))
    score = load_checkpoint(work_dir / "epoch_2.pth")["message_hub"]["runtime_info"]["best_score"]
    assert f"iteration {2 * ITERATIONS}/{2 * ITERATIONS}" in out  # progress
    assert f"best accuracy/top1 {score:.2f} in 2 epochs" in out
    assert str(best) in out.replace(" ", "")
    logs = [path.read_text() for path in work_dir.glob("*/*.log")]
    assert "Epoch(train)" in logs[0]
    assert "Epoch(train)" not in out


def test_reports_the_same_score_as_test(vitreous, finished, work_dir):
    code, out, _ = vitreous(next(work_dir.glob("best_*.pth")), command="test")
    assert code == 0
    score = load_checkpoint(work_dir / "epoch_2.pth")["message_hub"]["runtime_info"]["best_score"]
    assert f"accuracy/top1 {score:.4f}" in out


def test_second_run_in_the_same_folder_is_refused(vitreous, finished):
    assert _refused(vitreous(), "already holds a run (epoch_2.pth)", "--resume", "--work-dir")


def test_resume_of_a_finished_run_says_so(vitreous, finished, work_dir):
    before = (work_dir / "epoch_2.pth").read_bytes()
    code, out, _ = vitreous("--resume")
    assert code == 0
    assert "holds a finished run of 2 epochs; nothing to train" in out
    assert "best accuracy/top1" in out
    assert (work_dir / "epoch_2.pth").read_bytes() == before


def test_resume_goes_on_where_it_stopped(vitreous, finished, work_dir):
    code, out, _ = vitreous("--resume", *_options(train_cfg__max_epochs=3))
    assert code == 0
    assert "(2 epochs done)" in out
    assert "in 3 epochs" in out
    training_records, validation_records = training.read_history(work_dir)
    assert [record["step"] for record in validation_records] == [1, 2, 3]
    assert training_records[-1]["step"] == 3 * ITERATIONS


def test_resume_without_a_checkpoint_begins(vitreous):
    code, out, _ = vitreous("--resume", *_options(train_cfg__max_epochs=1))
    assert code == 0
    assert "holds no checkpoint yet; starting from the beginning" in out


def test_resume_falls_back_to_the_last_whole_checkpoint(vitreous, finished, work_dir):
    last = work_dir / "epoch_2.pth"
    last.write_bytes(last.read_bytes()[:1000])
    code, out, _ = vitreous("--resume")
    assert code == 0
    assert f"{last.name} is not whole" in out
    assert "epoch_1.pth (1 epochs done)" in out
    assert load_checkpoint(last)["meta"]["epoch"] == 2


def test_resume_when_last_checkpoint_names_a_missing_file(finished, work_dir):
    (work_dir / "epoch_2.pth").unlink()
    point = find_resume_point(work_dir)
    assert (point.path.name, point.epoch) == ("epoch_1.pth", 1)
    assert point.skipped == ("last_checkpoint names epoch_2.pth, which is missing",)


def test_resume_skips_a_checkpoint_that_would_run_code(vitreous, finished, work_dir, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"state_dict": _Command(f"touch {marker}")}, work_dir / "epoch_3.pth")
    code, out, _ = vitreous("--resume")
    assert code == 0
    assert "epoch_3.pth was refused" in out
    assert "2 epochs" in out
    assert not marker.exists()


def test_resume_without_any_whole_checkpoint_is_refused(vitreous, finished, work_dir):
    for path in find_checkpoints(work_dir):
        path.write_bytes(b"")
    assert _refused(vitreous("--resume"), "no checkpoint in", "epoch_2.pth", "epoch_1.pth", "another --work-dir")


def test_resume_from_a_named_checkpoint_never_falls_back(vitreous, finished, work_dir, tmp_path):
    (tmp_path / "cut.pth").write_bytes((work_dir / "epoch_2.pth").read_bytes()[:500])
    assert _refused(vitreous("--resume", tmp_path / "cut.pth"), "cut.pth is not whole")
    best = next(work_dir.glob("best_*.pth"))
    assert _refused(vitreous("--resume", best), "cannot be resumed from: it holds no optimizer")
    code, out, _ = vitreous("--resume", work_dir / "epoch_1.pth")
    assert code == 0
    assert "in 2 epochs" in out


class _Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("content", ["missing", "empty", "text", "truncated", "command", "list"])
def test_bad_checkpoints_are_refused(vitreous, finished, work_dir, tmp_path, content):
    path, marker = tmp_path / "given.pth", tmp_path / "executed"
    expected = "is not whole, or no PyTorch checkpoint"
    match content:
        case "missing":
            expected = "no checkpoint is at"
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("hello")
        case "truncated":
            path.write_bytes((work_dir / "epoch_2.pth").read_bytes()[:-200])
        case "command":
            torch.save({"state_dict": _Command(f"touch {marker}")}, path)
            expected = "Nothing in it was executed"
        case "list":
            torch.save([1], path)
            expected = "must hold a dictionary"
    assert _refused(vitreous(path, command="test"), expected)
    assert not marker.exists()


def test_checkpoint_of_another_class_count_is_refused(vitreous, finished, work_dir):
    best = next(work_dir.glob("best_*.pth"))
    refused = vitreous(best, *_options(model__head__num_classes=7), command="test")
    assert _refused(refused, "head.fc.weight (needs (7, 16), got (10, 16))")


def test_head_of_another_class_count_is_refused(vitreous):
    assert _refused(
        vitreous(*_options(model__head__num_classes=7)),
        "must be the 10 classes of the training data; got 7", "model.head.num_classes=10",
    )  # fmt: skip


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(vitreous, work_dir, config_file, tiny_config):
    config_file.write_text(tiny_config + "custom_hooks = [dict(type='PoisonHook', at=4)]\n")
    assert _refused(vitreous(), "loss became nan at epoch 2, iteration 5 of 6", "epoch_1.pth")
    assert [path.name for path in find_checkpoints(work_dir)] == ["epoch_1.pth"]
    weights = load_checkpoint(work_dir / "epoch_1.pth")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_nan_weights_are_never_written(vitreous, work_dir, config_file, tiny_config):
    """The last step of an epoch diverges: its loss was finite, the weights are not."""
    config_file.write_text(tiny_config + f"custom_hooks = [dict(type='PoisonHook', at={2 * ITERATIONS})]\n")
    assert _refused(vitreous(), "head.fc.weight holds NaN or infinity", "nothing was written", "epoch_1.pth")
    assert [path.name for path in find_checkpoints(work_dir)] == ["epoch_1.pth"]


def test_unwritable_work_dir_is_refused(config_file, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    code = cli.main(["train", str(config_file), "--work-dir", str(tmp_path / "file" / "run")])
    assert _refused((code, "", capfd.readouterr().err), "cannot be written", "choose another with --work-dir")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_one_line(vitreous, work_dir):
    work_dir.mkdir()
    for epoch in (1, 2):
        (work_dir / f"best_accuracy_top1_epoch_{epoch}.pth").symlink_to("/dev/full")
    assert _refused(vitreous(), "cannot write", "No space left on device", "continue with --resume")
    assert find_resume_point(work_dir).epoch >= 1


def test_two_runs_in_one_process_do_not_warn(config_file, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("first", "second"):
            config = training.load_config(config_file, {"train_cfg.max_epochs": 1})
            training.train(config, work_dir=tmp_path / name, console=Console(quiet=True))
    assert not [str(warning.message) for warning in caught if "has been created" in str(warning.message)]


def test_amp_on_a_cpu_is_bfloat16(config_file, work_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = training.load_config(config_file, {"train_cfg.max_epochs": 1})
    seen = []
    monkeypatch.setattr(training.ProgressHook, "after_train_iter", lambda *_, **__: seen.append(_autocast()))
    before = config.pretty_text
    training.train(config, work_dir=work_dir, amp=True, console=Console(quiet=True))
    assert config.pretty_text == before
    text = next(work_dir.glob("tiny.py")).read_text()
    assert "type='CPUAmpOptimWrapper'" in text
    assert len(seen) == ITERATIONS


def _autocast():
    return torch.is_autocast_enabled("cpu")


def test_amp_names_the_wrappers_it_knows(vitreous):
    assert _refused(vitreous("--amp", *_options(optim_wrapper__type="ApexOptimWrapper")), "AGCOptimWrapper")


@pytest.mark.compile
def test_a_compiled_backbone_trains_alike(config_file, work_dir, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs, **_):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(training, "CompileHook", partial(training.CompileHook, backend=backend))
    config = training.load_config(config_file, {"train_cfg.max_epochs": 1})
    losses = {}
    for name, mode in (("plain", None), ("compiled", "reduce-overhead")):
        training.train(config, work_dir=tmp_path / name, compile_mode=mode, console=Console(quiet=True))
        train_records, _ = training.read_history(tmp_path / name)
        losses[name] = [record["loss"] for record in train_records]
    assert graphs
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)
    names = [load_checkpoint(tmp_path / name / "epoch_1.pth")["state_dict"].keys() for name in losses]
    assert names[0] == names[1]


def test_graphs_and_accumulated_gradients_are_refused(vitreous):
    result = vitreous("--compile", "reduce-overhead", *_options(optim_wrapper__accumulative_counts=2))
    assert _refused(result, "accumulative_counts=2", "mode 'default'")


def test_mistakes_in_configs_are_one_line(vitreous, tmp_path, config_file):
    assert _refused(vitreous(*_options(model__backbone__type="NoSuchNet")), "'NoSuchNet'", "custom_imports")
    assert _refused(vitreous(*_options(model__head__nclasses=3)), "nclasses")
    assert _refused(vitreous("--cfg-options", "model"), "KEY=VALUE", "'model'")
    assert _refused(vitreous(target=tmp_path / "absent.py"), "no config file is at")
    config_file.write_text("_base_ = ['./absent.py']")
    assert _refused(vitreous(), "cannot be read", "absent.py")
    config_file.write_text("model = dict(")
    assert _refused(vitreous(), "cannot be read")


def test_missing_data_says_where_to_put_it(vitreous, tmp_path):
    imagenet = _options(
        train_dataloader__dataset__type="ImageNet", train_dataloader__dataset__data_root=tmp_path / "in"
    )
    refused = vitreous(*imagenet)
    assert _refused(refused, f"the data is not at {tmp_path}/in", "train_dataloader.dataset.data_root=FOLDER")


def test_launcher_without_a_gpu_is_refused(vitreous, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _refused(vitreous("--launcher", "pytorch"), "needs GPUs")


def test_unexpected_errors_keep_their_traceback(vitreous, monkeypatch):
    monkeypatch.setattr(training, "build_runner", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        vitreous()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_resumes(config_file, work_dir, vitreous, signal_number):
    arguments = ["train", str(config_file), "--work-dir", str(work_dir), *_options(train_cfg__max_epochs=1000)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitreous_core.cli", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (work_dir / "epoch_2.pth").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"continue with vitreous train {config_file} --work-dir {work_dir} --resume" in err
    assert "Traceback" not in err

    done = find_resume_point(work_dir).epoch
    assert done >= 2
    code, out, _ = vitreous("--resume", *_options(train_cfg__max_epochs=done + 1))
    assert code == 0
    assert f"in {done + 1} epochs" in out


def test_resuming_a_copy_leaves_the_original_alone(finished_once, finished, vitreous):
    before = sorted(path.name for path in finished_once.iterdir())
    code, _, _ = vitreous("--resume", *_options(train_cfg__max_epochs=12))
    assert code == 0
    assert sorted(path.name for path in finished_once.iterdir()) == before


def test_history_keeps_the_later_record_of_a_step_and_whole_lines(tmp_path):
    for run, score in (("20240101_000000", 1.0), ("20240101_000001", 2.0)):
        path = tmp_path / run / "vis_data" / "scalars.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"accuracy/top1": score, "step": 1}) + '\n{"accuracy/to')
    assert training.read_history(tmp_path) == ([], [{"accuracy/top1": 2.0, "step": 1}])


def test_resume_point_needs_what_a_run_needs(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"holds no meta, message_hub, optimizer"):
        find_resume_point(tmp_path)

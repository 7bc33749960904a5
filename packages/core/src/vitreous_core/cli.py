"""The command `vitreous`. Its imports are local so that `vitreous --help` and `vitreous list` answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import command as bench_command
from .errors import BackendUnsupported, StateMismatch, UserError

if TYPE_CHECKING:
    from mmengine.config import Config
    from rich.console import Console

    from .curves import Order
    from .export.api import Exported
    from .patterns import Pattern

_ORDERS = ("hilbert", "morton", "row_major", "window", "tile")
_PATTERNS = ("window1d", "slide1d", "neighborhood1d", "window2d", "slide2d", "neighborhood2d")
_FORMATS = ("onnx", "coreml", "executorch", "pt2")
_FAILED, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a mistake of the user, 130 when interrupted."""
    options = _build_parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"\nvitreous: interrupted{_after_colon(interrupt)}", file=sys.stderr)
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        if not _is_in_an_extra(error):
            raise
        print(
            f"vitreous: error: this command needs {error.name}; install vitreous-core[mm], or any paper's package",
            file=sys.stderr,
        )
        return _FAILED
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"vitreous: error: {error}", file=sys.stderr)
        return _FAILED


def _is_for_the_user(error: Exception) -> bool:
    """Whether one line says it all: a named mistake, the disk's word, or a check of vitreous itself."""
    if isinstance(error, UserError | StateMismatch | BackendUnsupported | OSError):
        return True
    if not isinstance(error, TypeError | ValueError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("vitreous_")


def _is_in_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether a dependency is missing that core alone does not install, rather than a part of vitreous."""
    return error.name is not None and not error.name.startswith("vitreous_")


def _after_colon(error: BaseException) -> str:
    return f": {error}" if str(error) else ""


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitreous", description="Efficient vision attention, reproduced.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[Any], None] | None, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("list", _list, "list the models of the installed papers")
    command.add_argument("pattern", nargs="?", help="only names that contain this, or match it with * and ?")

    command = add("info", _info, "parameters, multiply-adds, recipe and model card of one model")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--card", action="store_true", help="print the paper's whole model card")

    command = add("config", _config, "print the path of a model's config")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--text", action="store_true", help="print the resolved config instead")

    command = add("train", _train, "train a model by name, or a config of your own")
    _add_run_options(command)
    command.add_argument("--resume", nargs="?", const=True, default=False, metavar="CHECKPOINT",
                         help="continue from the work dir's last whole checkpoint, or from this one")  # fmt: skip
    command.add_argument("--amp", action="store_true", help="mixed precision (bfloat16 on a CPU)")
    command.add_argument("--compile", nargs="?", const="default", choices=["default", "reduce-overhead"],
                         help="compile the backbone; reduce-overhead replays it as CUDA graphs")  # fmt: skip

    command = add("test", _test, "evaluate a checkpoint on the config's test data")
    _add_run_options(command)
    command.add_argument("checkpoint", metavar="CHECKPOINT")

    command = add("convert", _convert, "turn an official checkpoint into one of MMPretrain's layout, or back")
    command.add_argument("name", metavar="NAME")
    command.add_argument("source", metavar="OFFICIAL", help="the checkpoint to read")
    command.add_argument("target", metavar="OUT", help="the checkpoint to write")
    command.add_argument("--reverse", action="store_true", help="from MMPretrain's layout to the official one")

    command = add("predict", _predict, "classify images")
    command.add_argument("name", metavar="NAME", help="a model's name, or a config")
    command.add_argument("images", metavar="IMAGE", nargs="+")
    command.add_argument("--checkpoint", required=True, help="weights, from training or from `vitreous convert`")
    command.add_argument("--device", help="e.g. cuda or cpu; default: the first GPU, or the CPU")

    _add_export(add("export", _export, "write a model in deploy mode as a file for another runtime, and check it"))

    bench_command.add_arguments(add("bench", bench_command.bench, "measure core's or a paper's speed claims here"))

    _add_show(add("show", None, "draw a token order or an attention pattern"))
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG|NAME", help="a config file or the name of a model")
    command.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    command.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", default=[],
                         help="override parts of the config, e.g. train_cfg.max_epochs=5")  # fmt: skip
    command.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="a model's name, or a config")
    command.add_argument("--format", required=True, choices=_FORMATS)
    command.add_argument("--out", type=Path, metavar="FILE", help="default: NAME with the format's suffix, here")
    command.add_argument(
        "--checkpoint", help="weights, from training or from `vitreous convert`; default: initial ones"
    )
    command.add_argument("--image-size", type=_parse_size, metavar="N or HEIGHTxWIDTH",
                         help="of the images that the file takes (default: of the config's test images)")  # fmt: skip
    command.add_argument("--batch", type=_parse_batch, default=None, metavar="dynamic|N",
                         help="images in a call: any number up to 64 (the default), or N")  # fmt: skip
    command.add_argument("--threads", type=_parse_count, default=1, metavar="N",
                         help="for the timed calls (default 1; ExecuTorch here always uses its own pool)")  # fmt: skip
    command.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", default=[],
                         help="override parts of the config, e.g. model.backbone.img_size=384")  # fmt: skip


def _add_show(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(metavar="KIND", required=True)
    curve = kinds.add_parser("curve", help="a token order as a path over the image")
    pattern = kinds.add_parser("pattern", help="what an attention pattern sees, its mask and its blocks")
    curve.set_defaults(run=_show_curve)
    pattern.set_defaults(run=_show_pattern)
    pattern.add_argument("pattern", choices=_PATTERNS, metavar="PATTERN", help=", ".join(_PATTERNS))
    for kind in (curve, pattern):
        kind.add_argument("size", type=_parse_size, metavar="HEIGHTxWIDTH")
        kind.add_argument("--order", choices=_ORDERS, default="hilbert")
        kind.add_argument("--tile", type=_parse_size, metavar="N or ROWSxCOLUMNS",
                          help="side of a window for --order window, rows and columns for --order tile")  # fmt: skip
        kind.add_argument("--out", type=Path, metavar="PNG")
    pattern.add_argument("--size", dest="extent", type=int, default=None, metavar="N",
                         help="window or kernel: tokens in 1-D (default 49), side in 2-D (default 7)")  # fmt: skip
    pattern.add_argument("--shift", type=int, default=0, help="of window patterns")
    pattern.add_argument("--dilation", type=int, default=1, help="of slide2d and neighborhood2d")
    pattern.add_argument("--block", type=_parse_size, default=(64, 64), metavar="N or QUERYxKEY",
                         help="tokens per block (default 64)")  # fmt: skip


def _parse_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def _parse_batch(text: str) -> int | None:
    return None if text == "dynamic" else _parse_count(text)


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be N or HEIGHTxWIDTH with positive integers; got {text!r}")
    return int(sides[0]), int(sides[-1])


def _list(options: argparse.Namespace) -> None:
    from fnmatch import fnmatch

    from rich.console import Console
    from rich.table import Table

    from .zoo import models

    wanted = options.pattern
    cards = [card for card in models() if wanted is None or wanted in card.name or fnmatch(card.name, wanted)]
    if not cards:
        raise UserError("no paper is installed" if wanted is None else f"no model's name matches {wanted!r}")
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    for column in ("params", "MACs", "top-1 %,\nquoted"):
        table.add_column(column, justify="right", no_wrap=True)
    for card in cards:
        top1 = "" if card.top1 is None or card.is_digits else f"{card.top1:.1f}"
        table.add_row(card.name, card.paper.name, _short(card.parameters), _short(card.macs), top1)
    Console().print(table)


def _info(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    from .zoo import find_model, read_card

    card = find_model(options.name)
    console = Console()
    if options.card:
        console.print(Markdown(read_card(card.paper)))
        return
    config = _load(card.config)
    from .mm.models import build_model, complexity, input_size

    height, width = input_size(config)
    parameters, macs = complexity(build_model(config), (height, width))
    stated = "" if card.macs in (None, macs) else f" as traced here, {card.macs:,} as the card counts"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("model", card.name),
        ("paper", f"{card.paper_title} ({card.paper_url})"),
        ("parameters", f"{parameters:,}"),
        ("MACs", f"{macs:,}{stated}, one image of {height} x {width}"),
        ("top-1, quoted", "none" if card.top1 is None else f"{card.top1} %"),
        ("weights", card.weights or "none released; `vitreous convert` reads official checkpoints"),
        ("config", str(card.config)),
        ("card", f"vitreous info {card.name} --card"),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


def _config(options: argparse.Namespace) -> None:
    from .zoo import find_config

    path = find_config(options.name)
    print(_load(path).pretty_text if options.text else path)


def _train(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .zoo import find_config

    config = _load(find_config(options.config), options.cfg_options)
    from mmengine.dist import is_main_process

    from .mm.train import find_work_dir, train

    try:
        result = train(
            config, work_dir=options.work_dir, resume=options.resume, amp=options.amp, compile_mode=options.compile,
            launcher=options.launcher,
        )  # fmt: skip
    except KeyboardInterrupt:
        work_dir = find_work_dir(config, options.work_dir)
        again = f"vitreous train {options.config} --work-dir {work_dir} --resume"
        raise KeyboardInterrupt(f"continue with {again}") from None
    if not is_main_process():
        return
    console = Console(highlight=False, soft_wrap=True)
    if result.best is not None:
        console.print(f"best {result.metric} {result.best:.2f} in {result.epochs} epochs")
    console.print(f"checkpoint {result.best_checkpoint}")


def _test(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .zoo import find_config

    config = _load(find_config(options.config), options.cfg_options)
    from mmengine.dist import is_main_process

    from .mm.train import evaluate

    metrics = evaluate(config, options.checkpoint, work_dir=options.work_dir, launcher=options.launcher)
    if is_main_process():
        table = Table("metric", "value", box=None, pad_edge=False)
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4f}")
        Console().print(table)


def _convert(options: argparse.Namespace) -> None:
    import os

    from .state import check_state, unwrap_state
    from .zoo import find_model

    card = find_model(options.name)
    config = _load(card.config)
    import torch

    from .mm.checkpoints import load_checkpoint
    from .mm.models import build_model

    state = unwrap_state(load_checkpoint(options.source))
    expected = build_model(config).state_dict()
    rules = card.paper.module("convert")
    if options.reverse:
        check_state(expected, state)
        converted = {"model": rules.to_official(state)}
    else:
        state = rules.from_official(state)
        check_state(expected, state)
        converted = {"state_dict": state}
    partial = Path(f"{options.target}.partial")
    with open(partial, "wb") as file:
        torch.save(converted, file)
    os.replace(partial, options.target)
    print(f"{len(state)} tensors of {card.name} written to {options.target}")


def _predict(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .zoo import find_config

    config = _load(find_config(options.name))
    import torch

    from .mm.models import build_model, predict

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, options.checkpoint, device)
    table = Table("image", "class", box=None, pad_edge=False)
    table.add_column("probability", justify="right")
    for image, prediction in zip(options.images, predict(model, options.images), strict=True):
        names = prediction.names or tuple(str(label) for label in prediction.labels)
        for rank, (name, score) in enumerate(zip(names, prediction.scores, strict=True)):
            table.add_row(image if rank == 0 else "", name, f"{score:.4f}")
    Console().print(table)


def _export(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .export.formats import FORMATS
    from .zoo import find_config

    path = find_config(options.name)
    kind = FORMATS[options.format]
    kind.require()
    config = _load(path, options.cfg_options)
    from .export.api import export_model
    from .mm.models import Logits, build_model, input_size, preprocessing

    model = build_model(config, options.checkpoint)
    pixels = preprocessing(model)
    out = options.out or Path(f"{path.stem}{kind.suffix}")
    console = Console()
    with console.status(f"{path.stem} to {out}"):
        exported = export_model(
            Logits(model).eval(), out, options.format, size=options.image_size or input_size(config),
            batch=options.batch, threads=options.threads, about={"model": path.stem, "pixels": pixels},
        )  # fmt: skip
    weights = options.checkpoint or "initial ones: give --checkpoint for trained ones"
    batch = "1 to 64" if options.batch is None else str(options.batch)
    height, width = exported.size
    _print_export(console, exported, {
        "model": path.stem + ("" if exported.folded else " (it has no deploy mode: nothing to fold)"),
        "weights": weights,
        "file": f"{exported.path}, {exported.bytes / 1e6:.1f} MB",
        "input": f"images, float32 [{batch}, 3, {height}, {width}]: {pixels}",
        "output": "logits, before softmax",
        **exported.facts,
    })  # fmt: skip


def _print_export(console: Console, exported: Exported, facts: dict[str, str]) -> None:
    from rich.table import Table

    summary = Table(box=None, show_header=False, pad_edge=False)
    summary.add_column(no_wrap=True)
    summary.add_column(overflow="fold")
    for name, value in facts.items():
        summary.add_row(f"[bold]{name}[/]", value)
    console.print(summary)
    figures = Table("run by", box=None, pad_edge=False)
    for column in (
        "relative error",
        f"ms, {exported.batch} image{'s' * (exported.batch > 1)}",
        "p20 to p80",
        "images/s",
    ):
        figures.add_column(column, justify="right", no_wrap=True)
    for runner in exported.runners:
        low, median, high = runner.latency_ms
        figures.add_row(runner.name, f"{runner.error:.1e}", f"{median:.2f}", f"{low:.2f} to {high:.2f}",
                        f"{1e3 * exported.batch / median:.0f}")  # fmt: skip
    console.print()
    console.print(figures)


def _show_curve(options: argparse.Namespace) -> None:
    from .pictures import draw_curve, save_png

    height, width = options.size
    title = f"{options.order} order of {height} x {width}"
    picture = draw_curve(_order(options), height, width, title=title)
    out = options.out or Path(f"{options.order}_{height}x{width}.png")
    save_png(picture, out)
    print(out)


def _show_pattern(options: argparse.Namespace) -> None:
    from .pictures import draw_pattern, save_png

    height, width = options.size
    pattern = _pattern(options)
    query_block, key_block = options.block
    picture = draw_pattern(
        pattern, height, width, _order(options), title=f"{pattern}\n{options.order} order",
        query_block=query_block, key_block=key_block,
    )  # fmt: skip
    out = options.out or Path(f"{options.pattern}_{options.order}_{height}x{width}.png")
    save_png(picture, out)
    print(out)


def _order(options: argparse.Namespace) -> Order:
    from .indexing import build_order

    tile = options.tile
    if options.order == "window" and tile is not None and tile[0] == tile[1]:
        tile = tile[0]
    height, width = options.size
    return build_order(options.order, height, width, tile)


def _pattern(options: argparse.Namespace) -> Pattern:
    from . import patterns

    kind = getattr(patterns, options.pattern[0].upper() + options.pattern[1:])
    is_window, is_flat = options.pattern.startswith("window"), options.pattern.endswith("1d")
    extent = options.extent or (49 if is_flat else 7)
    settings = {}
    if options.shift:
        settings["shift"] = options.shift
    if options.dilation != 1:
        settings["dilation"] = options.dilation
    allowed = {"shift"} if is_window else set() if is_flat else {"dilation"}
    if surplus := settings.keys() - allowed:
        raise UserError(f"{options.pattern} takes no --{', --'.join(sorted(surplus))}")
    return kind(extent, **settings)


def _load(path: Path, options: Sequence[str] = ()) -> Config:
    """The config at a path, after the one import that must come before any parsing."""
    import vitreous_core.mm  # noqa: F401

    from .mm.train import load_config, parse_options, quiet_log

    quiet_log()
    return load_config(path, parse_options(options))


def _short(count: int | None) -> str:
    if count is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


if __name__ == "__main__":
    sys.exit(main())

"""The kinds of files: how each is written from a graph, and how its runtime is asked here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import UserError
from .program import simplify

INPUT, OUTPUT = "images", "logits"
ONNX_OPSET = 20
"""The first with GELU as one operator."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        name: what `--format` takes.
        suffix: of its files.
        runtime: who runs them.
        extra: the extra of vitreous-core that brings what it needs; None where torch is enough.
        modules: what must be importable.
        write: write a graph, and facts about the model, to a path that does not exist.
        open: load a file for a number of threads; None where the runtime does not run on this kind of machine.
        inspect: what a written file says about itself.
    """

    name: str
    suffix: str
    runtime: str
    extra: str | None
    modules: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], None]
    open: Callable[[Path, int], Run] | None
    inspect: Callable[[Path], Mapping[str, str]]

    def require(self) -> None:
        """Raise where the extra is missing.

        Raises:
            UserError: naming what is missing and what to install.
        """
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--format {self.name} needs {', '.join(missing)}; install vitreous-core[{self.extra}]")


def _write_pt2(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    torch.export.save(program, path, extra_files={f"{name}.txt": text for name, text in facts.items()})


def _open_pt2(path: Path, threads: int) -> Run:
    run: Run = torch.export.load(path).module()
    return run


def _inspect_pt2(path: Path) -> Mapping[str, str]:
    nodes = torch.export.load(path).graph.nodes
    return {"graph": _most_common(str(node.target) for node in nodes if node.op == "call_function")}


def _write_onnx(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    exported = torch.onnx.export(
        program, (), input_names=[INPUT], output_names=[OUTPUT], opset_version=ONNX_OPSET, dynamo=True, verbose=False
    )
    assert exported is not None
    exported.model.metadata_props.update(facts)
    exported.save(path)


def _open_onnx(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _inspect_onnx(path: Path) -> Mapping[str, str]:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    return {
        "opset": str(model.opset_import[0].version),
        "graph": _most_common(node.op_type for node in model.graph.node),
    }


def _write_executorch(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    lowered = to_edge_transform_and_lower(
        simplify(program),
        partitioner=[XnnpackPartitioner()],
        constant_methods={f"about_{name}": text for name, text in facts.items()},
    )
    # Memory is planned for the largest batch, not for the example's.
    config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
    with path.open("wb") as file:
        lowered.to_executorch(config).write_to_file(file)


def _open_executorch(path: Path, threads: int) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    # The result lies in memory of the method, which the next call writes anew.
    return lambda images: method.execute([images.contiguous()])[0].clone()


def _inspect_executorch(path: Path) -> Mapping[str, str]:
    from executorch.exir._serialize._program import deserialize_pte_binary

    plan = deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
    calls = Counter(type(step.instr_args).__name__ for chain in plan.chains for step in chain.instructions)
    backends = ", ".join(sorted({delegate.id for delegate in plan.delegates}))
    return {"graph": f"{calls['DelegateCall']} parts by {backends}, {calls['KernelCall']} operators beside them"}


def _write_coreml(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    import coremltools

    package = coremltools.convert(
        simplify(program),
        outputs=[coremltools.TensorType(name=OUTPUT)],
        minimum_deployment_target=coremltools.target.iOS17,
        skip_model_load=True,
    )
    package.user_defined_metadata.update(facts)
    package.save(str(path))


def _inspect_coreml(path: Path) -> Mapping[str, str]:
    import coremltools

    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    kinds = [operation.type for operation in block.operations if operation.type != "const"]
    shapes = spec.description.input[0].type.multiArrayType
    sides = [f"{one.lowerBound} to {one.upperBound}" for one in shapes.shapeRange.sizeRanges[:1]]
    return {
        "program": _most_common(kinds),
        "batch in it": sides[0] if sides else str(shapes.shape[0]),
        "precision": "float16, Core ML's default",
    }


def _most_common(kinds: Any) -> str:
    counts = Counter(kinds)
    shown = ", ".join(f"{count} {kind.removeprefix('aten.')}" for kind, count in counts.most_common(5))
    return f"{counts.total()} operators: {shown}" + (" ..." if len(counts) > 5 else "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters say about themselves: all warn of their own insides, some draw progress bars."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


FORMATS = {
    one.name: one
    for one in (
        Format("onnx", ".onnx", "ONNX Runtime", "onnx", ("onnx", "onnxruntime", "onnxscript"),
               _write_onnx, _open_onnx, _inspect_onnx),
        Format("coreml", ".mlpackage", "Core ML", "coreml", ("coremltools",), _write_coreml, None, _inspect_coreml),
        Format("executorch", ".pte", "ExecuTorch, XNNPACK", "executorch", ("executorch",),
               _write_executorch, _open_executorch, _inspect_executorch),
        Format("pt2", ".pt2", "torch.export", None, (), _write_pt2, _open_pt2, _inspect_pt2),
    )
}  # fmt: skip

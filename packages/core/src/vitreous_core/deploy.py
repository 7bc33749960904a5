"""Deploy mode: what the backbones and heads that fold themselves for inference have in common.

`switch_to_deploy()` of a part folds what is a fixed affine map in evaluation mode into the linear maps beside it, in
place and exactly. From then on the part is for inference only: it has no training mode, no gradients, and takes state
dicts of parts that are switched as well. Here is what all of them check, and the switch for a whole classifier.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def check_evaluating(module: nn.Module) -> None:
    """Require evaluation mode, for folding batch norms.

    Raises:
        RuntimeError: in training mode, where batch norms are no fixed maps.
    """
    if module.training:
        raise RuntimeError("switch_to_deploy folds running statistics and needs evaluation mode; call eval() first")


def check_trainable(deploy: bool, mode: bool) -> None:
    """Refuse training mode to a model whose batch norms are folded away.

    Args:
        deploy: whether it is folded.
        mode: the mode asked for, as in `nn.Module.train`.

    Raises:
        RuntimeError: for training mode.
    """
    if deploy and mode:
        raise RuntimeError(
            "this model is switched to deploy and cannot train; build a new one and load the original weights"
        )


def seal(module: nn.Module) -> None:
    """Close a folded part: evaluation mode, no gradients, and no state dict but that of a folded part.

    Folded and unfolded weights share names. Loaded without `strict`, as MMEngine does, the ones would silently take the
    place of the others.
    """
    module.eval().requires_grad_(False)
    module.register_load_state_dict_pre_hook(_check_folded_state)


def switch_to_deploy(model: nn.Module, **options: Any) -> bool:
    """Fold a classifier for inference, in place: its backbone, and its head together with what the backbone leaves.

    The logits stay; the backbone's own last map may change where the head takes over its norm. Who wants the maps calls
    the backbone's `switch_to_deploy()` instead.

    Args:
        model: in evaluation mode and with its weights, a `backbone` and perhaps a `head` as attributes.
        options: of the parts' own `switch_to_deploy`, such as the `backend` of EfficientViT.

    Returns:
        Whether there was anything to fold: False for models that know no deploy mode.

    Raises:
        RuntimeError: in training mode.
    """
    backbone: Any = getattr(model, "backbone", None)
    head: Any = getattr(model, "head", None)
    if not hasattr(backbone, "switch_to_deploy"):
        return False
    if hasattr(head, "switch_to_deploy"):
        head.switch_to_deploy(backbone, **options)
    else:
        backbone.switch_to_deploy(**options)
    return True


def _check_folded_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    given = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    if surplus := sorted(given - set(module.state_dict())):
        raise RuntimeError(
            f"this model is switched to deploy and takes the state of a switched one only; got {surplus[0]}, among "
            f"{len(surplus)} that it has no more. Load the weights before switch_to_deploy()"
        )

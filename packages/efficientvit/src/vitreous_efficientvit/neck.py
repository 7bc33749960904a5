"""Finer maps for detectors, whose smallest objects a stride of 16 would miss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FinerMaps(nn.Module):
    """Maps at twice, four times ... the resolution of the finest one, by transposed convolutions, in front of all maps.

    The official detectors do the like inside their pyramid: RetinaNet has one finer level (stride 8), Mask R-CNN two
    (strides 4 and 8). Goes between `EfficientViTMSRA` and a detector's own FPN; every finer map has the channels of the
    map that it comes from.

    Args:
        in_channels: channels of the finest map that comes in.
        levels: how many finer maps to add.

    Raises:
        ValueError: for a number that is not positive.
    """

    def __init__(self, in_channels: int, levels: int = 1) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("levels", levels)):
            if value < 1:
                raise ValueError(f"{name} must be positive; got {value}")
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(in_channels, in_channels, kernel_size=2, stride=2) for _ in range(levels)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All maps, finest first.

        Args:
            maps: `[B, C, height, width]` each, finest first.

        Returns:
            `levels` more maps than came in.
        """
        finer = [maps[0]]
        for layer in self.layers:
            finer.insert(0, layer(finer[0]))
        return (*finer, *maps[1:])

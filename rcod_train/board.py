"""TensorBoard's log of a training: every row of the loss log, the validation's figures and grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcod_train.errors import MissingPackage


class Board:
    """The events of one stage, in a folder of its own.

    The steps count what is done: the row of step 0 stands at 1, like a validation after it. What a
    killed run wrote after the checkpoint that a resumed one starts from is purged.

    Raises:
        MissingPackage: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise MissingPackage(
                '--tensorboard: the package tensorboard is missing. pip install "rcod[tensorboard]"'
            ) from exc
        self._make, self._folder, self._writer = SummaryWriter, folder, None

    def row(self, row: Mapping[str, float]) -> None:
        """A step's losses, gradient norms, learning rate and times."""
        step = int(row["step"]) + 1
        writer = self._open(step)
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(f"train/{name}", value, step)

    def validation(
        self,
        step: int,
        levels: Mapping[str, Mapping[str, float | None]],
        grid_hwc_u8: NDArray[np.uint8],
    ) -> None:
        writer = self._open(step)
        for level, figures in levels.items():
            for name, value in figures.items():
                if value is not None:
                    writer.add_scalar(f"validation_{name}/{level}", value, step)
        writer.add_image("validation/grid", grid_hwc_u8, step, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        return self._writer

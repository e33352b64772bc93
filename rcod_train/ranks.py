"""The processes of one training: alone, or several that accelerate launch or torchrun started.

Every process takes its own batches and all make the same step, with the mean of their gradients:
two processes are one process that accumulates twice as many batches. Only the first writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from rcod_train.errors import ConfigError


class Ranks:
    """This process among those of the training.

    Args:
        rank: of this process, 0 being the one that writes.
        world: how many there are.
        local_rank: of this process on its machine: the index of its GPU.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank

    @property
    def writes(self) -> bool:
        return self.rank == 0

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor]) -> None:
        """The mean over all processes in the place of each tensor. One transfer for each dtype."""
        if self.world == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        for same in kinds.values():
            flat = torch.cat([t.flatten() for t in same])
            torch.distributed.all_reduce(flat)
            flat /= self.world
            parts = flat.split([t.numel() for t in same])
            for tensor, part in zip(same, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true in any process."""
        if self.world == 1:
            return flag
        count = torch.tensor([float(flag)], device=device)
        torch.distributed.all_reduce(count)
        return bool(count.item() > 0)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order."""
        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            torch.distributed.barrier()


def is_first() -> bool:
    """Whether this process is the one that writes, before or after the others are known."""
    return os.environ.get("RANK", "0") == "0"


def join(device: str) -> Ranks:
    """The processes that the environment speaks of, connected by accelerate; ``device`` as
    ``resolve_device`` takes it.

    Raises:
        ConfigError: they can't be connected.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    # Without a GPU accelerate would leave each of them alone, as the first of one.
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    from accelerate import PartialState

    try:
        state = PartialState(cpu=on_cpu)
    except (RuntimeError, ValueError) as exc:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} processes could not be connected ({exc}). Start them with "
            "accelerate launch or torchrun, one for each GPU."
        ) from exc
    atexit.register(state.destroy_process_group)
    return Ranks(state.process_index, state.num_processes, state.local_process_index)

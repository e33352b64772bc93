"""The processes of one training: alone, or several that accelerate launch or torchrun started.

Every process takes its own batches and all make the same step, with the mean of their gradients:
two processes are one process that accumulates twice as many batches. Only the first writes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from rcod_train.errors import ConfigError
from rcod_train.stopping import is_one_of_several

# What one process does alone, validation and writing above all, has to fit in it.
PATIENCE = datetime.timedelta(hours=2)


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

    def threads_each(self) -> int:
        """Of several processes on CPUs: what each has of the machine's cores, where torchrun allows
        one; 0, PyTorch's choice, for one alone."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return 0 if self.world == 1 else max(1, (os.cpu_count() or 1) // here)

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

    def first(self, value: Any) -> Any:
        """That of the first process: what is measured differs in its last bits between kinds of
        GPU, and all must go on with the same."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            torch.distributed.barrier()


def is_first() -> bool:
    """Whether this process is the one that writes, before or after the others are known."""
    return os.environ.get("RANK", "0") == "0"


def leave(exit_code: int, together: bool) -> None:
    """At the end of a command that is one of several. Where all end here ``together`` they part;
    where this one alone fails it is gone at once, so that the launcher stops the others: with NCCL
    parting waits for them, and they wait for this one."""
    if together and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not together:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full or None
                stream.flush()
        os._exit(exit_code)


def join(device: str) -> Ranks:
    """The processes that the environment speaks of, connected by accelerate; ``device`` as
    ``resolve_device`` takes it.

    Raises:
        ConfigError: they can't be connected.
    """
    if not is_one_of_several():
        return Ranks()
    # Without a GPU accelerate would leave each of them alone, as the first of one.
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    from accelerate import PartialState

    try:
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    except (RuntimeError, ValueError) as exc:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} processes could not be connected ({exc}). Start them with "
            "accelerate launch or torchrun, one for each GPU."
        ) from exc
    return Ranks(state.process_index, state.num_processes, state.local_process_index)

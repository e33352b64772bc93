"""Memory of the device and pinned memory of the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

POISON = 0xFF  # four of them are NaN as a float32
ALIGNMENT = 256
GAP = 4096  # between two blocks: an overrun hits nothing


class Violation(Exception):
    """Something that a GPU would answer with garbage or a crash."""


class DeviceMemory:
    """Blocks at made-up addresses, which no host pointer can be."""

    def __init__(self) -> None:
        self._next = 0x7_0000_0000_00
        self._blocks: dict[int, Bytes] = {}
        self._freed: dict[int, int] = {}

    @property
    def live(self) -> int:
        return len(self._blocks)

    def allocate(self, nbytes: int) -> int:
        address = self._next
        self._next += -(-nbytes // ALIGNMENT) * ALIGNMENT + GAP
        self._blocks[address] = np.full(nbytes, POISON, np.uint8)
        return address

    def free(self, address: int) -> None:
        if address not in self._blocks:
            raise Violation(f"free of {address:#x}, which is no live block")
        block = self._blocks.pop(address)
        block[:] = POISON
        self._freed[address] = len(block)

    def view(self, address: int, nbytes: int, aligned: bool = False) -> Bytes:
        """The bytes at an address, all inside one live block."""
        for start, block in self._blocks.items():
            if start <= address < start + len(block):
                if address + nbytes > start + len(block):
                    raise Violation(f"{nbytes} bytes at {address:#x} run over their block's end")
                if aligned and address % ALIGNMENT:
                    raise Violation(f"{address:#x} is not aligned to {ALIGNMENT} bytes")
                return block[address - start : address - start + nbytes]
        for start, length in self._freed.items():
            if start <= address < start + length:
                raise Violation(f"{address:#x} is freed memory")
        raise Violation(f"{address:#x} is no address of the device")


class PinnedMemory:
    """Blocks of the host, at their real addresses."""

    def __init__(self) -> None:
        self._blocks: dict[int, Bytes] = {}
        # Freed blocks are kept, poisoned: who still reads them gets NaN and not a crash.
        self._graves: list[Bytes] = []

    @property
    def live(self) -> int:
        return len(self._blocks)

    def allocate(self, nbytes: int) -> int:
        block = np.full(nbytes, POISON, np.uint8)
        self._blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        if address not in self._blocks:
            raise Violation(f"cudaFreeHost of {address:#x}, which is no live block")
        block = self._blocks.pop(address)
        block[:] = POISON
        self._graves.append(block)

    def view(self, address: int, nbytes: int) -> Bytes:
        for start, block in self._blocks.items():
            if start <= address < start + len(block):
                if address + nbytes > start + len(block):
                    raise Violation(f"{nbytes} bytes at {address:#x} run over their pinned block")
                return block[address - start : address - start + nbytes]
        raise Violation(
            f"{address:#x} is no pinned memory; a copy from it would not be asynchronous"
        )

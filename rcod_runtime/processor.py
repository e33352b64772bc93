"""What the processor is, as Linux tells it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Processor:
    """Fields are empty where the system doesn't tell them."""

    name: str = ""
    vendor: str = ""
    flags: frozenset[str] = frozenset()

    @property
    def gains_from_bf16(self) -> bool:
        """Whether one that multiplies bf16 does so faster than fp32.

        Intel's with AVX512_BF16 and no AMX don't: nano takes 1.4 times as long there. AMD's with
        AVX512_BF16 take half the time, Arm's are believed. One that the system doesn't tell does
        not count.
        """
        return self.vendor == "AuthenticAMD" or not self.flags.isdisjoint({"amx_bf16", "bf16"})

    @property
    def gains_from_winograd(self) -> bool:
        """Whether wide convolutions in fp32 are faster with fewer products and more copies.

        With AVX2 they are, with AVX-512 the widest are; others were not measured.
        """
        return "avx2" in self.flags


@functools.cache
def read_processor() -> Processor:
    """The first one of this machine."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Processor()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    return Processor(
        fields.get("model name", ""), fields.get("vendor_id", ""), frozenset(flags.split())
    )

"""Freed memory stays with a training's process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from rcod_train.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(5):  # the first ones cut the heap into pieces that fit
    before = faults()
    tensors = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
    found = faults() - before
    del tensors
print(found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_memory_that_was_freed_is_not_mapped_again() -> None:
    def faults(choice: str) -> int:
        command = [sys.executable, "-c", SCRIPT, choice]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < 0.1 * faults("default")

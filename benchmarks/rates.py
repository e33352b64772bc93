"""What this CPU can do at best, measured: matrix products and copies, as calls to be timed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rcod_runtime.parallel import cpus_available

SIDE = 2048  # of square matrices: large enough that products, not copies, take the time
MACS = SIDE**3
COPY_BYTES = 256 * 2**20  # beyond every cache; read once and written once

Call = Callable[[], object]


def matmul_calls(threads: int, precisions: tuple[str, ...]) -> dict[str, dict[str, Call]]:
    """Precision -> library -> one product of two SIDE x SIDE matrices (MACS of work).

    numpy chooses its own threads, so it takes part only where all CPUs do.
    """
    a = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    out = np.empty_like(a)
    calls: dict[str, dict[str, Call]] = {}
    for precision in precisions:
        calls[precision] = {"openvino": _openvino(a, precision, threads)}
    if "fp32" in calls and threads == cpus_available():
        calls["fp32"]["numpy"] = lambda: np.matmul(a, a, out=out)
    try:
        import torch
    except ImportError:
        return calls
    torch.set_num_threads(threads)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for precision in precisions:
        matrix = torch.from_numpy(a).to(kinds[precision])
        calls[precision]["torch"] = _product(matrix, torch)
    return calls


def copy_call(threads: int) -> Call:
    """One copy of COPY_BYTES, by that many threads."""
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    pool = ThreadPoolExecutor(threads)

    def copy() -> None:
        list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

    return copy


def _product(matrix: Any, torch: Any) -> Call:
    out = torch.empty_like(matrix)
    return lambda: torch.mm(matrix, matrix, out=out)


def _openvino(a: Any, precision: str, threads: int) -> Call:
    import openvino
    from openvino import opset13 as ops

    from rcod_runtime.backends.openvino_backend import shared_core

    left = ops.parameter(list(a.shape), np.float32)
    model = openvino.Model([ops.matmul(left, ops.constant(a), False, False)], [left], "matmul")
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    request = shared_core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(a))
    return request.infer

"""How large the values between a model's operators become: fp16 ends at 65504.

ONNX Runtime's CPU provider, which graphs are compared on, computes fp16 graphs in fp32. What would
overflow in an engine is finite there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rcod_runtime.errors import ParityError
from rcod_runtime.manifest import Precision

FP16_LARGEST = 65504.0
MARGIN = 2  # other photos may go further than those that are looked at


@contextmanager
def checked_magnitudes(precision: Precision) -> Iterator[None]:
    """Inside, PyTorch computes what a graph of ``precision`` will.

    Raises:
        ParityError: fp16, and a value came within ``MARGIN`` of what it can hold.
    """
    if precision is not Precision.FP16:
        yield
        return
    with _Largest() as largest:
        yield
    limit = FP16_LARGEST / MARGIN
    if not largest.value <= limit:  # NaN neither
        raise ParityError(
            f"{largest.operator} gives values up to {largest.value:.4g}, expected at most "
            f"{limit:.4g} for fp16, which ends at {FP16_LARGEST:g}: an engine would make infinite "
            "ones of them. The bundle was not written. Export with --precision bf16 or fp32."
        )


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest magnitude among all that operators have made, and the operator.

    Scores of attention are never made by PyTorch's operator for all of it, but by those that it is
    exported to: they are computed here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value, self.operator = 0.0, ""

    def __torch_dispatch__(
        self,
        func: Any,  # an OpOverload
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if not func.is_view:  # weights for one, turned for each product
            for value in tree_leaves(results):
                self._look(func, value)
        if "scaled_dot_product" in str(func):
            query, key = args[:2]
            scale = kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
            for q, k in zip(query.flatten(0, -3), key.flatten(0, -3), strict=True):
                self._look(func, q @ k.T * scale)
        return results

    def _look(self, func: Any, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            magnitude = max(abs(float(end)) for end in torch.aminmax(value))
            if not (magnitude <= self.value or math.isnan(self.value)):
                self.value, self.operator = magnitude, str(func)

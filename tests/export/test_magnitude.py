"""Values that fp16 can't hold are found before a bundle in fp16 is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rcod_export.bundle import ExportConfig, build_bundle
from rcod_export.magnitude import checked_magnitudes
from rcod_runtime.errors import ParityError
from rcod_runtime.manifest import Precision
from rcod_train.checkpoint import save_merged
from tests.tiny import tiny_info, tiny_parts


@pytest.mark.parametrize("sign", [1, -1])
def test_what_fp16_can_hold_passes_and_what_it_cannot_is_refused(sign: int) -> None:
    x = torch.full((2, 3), sign * 30_000.0)
    with checked_magnitudes(Precision.FP16):
        x.abs()
    refused = pytest.raises(ParityError, match=r"mul.* up to 6e\+04.*fp16, which ends at 65504")
    with refused, checked_magnitudes(Precision.FP16):
        (x * 2) / 100
    with checked_magnitudes(Precision.BF16):
        x * 1e9


def test_a_value_that_is_none_is_refused() -> None:
    with pytest.raises(ParityError, match="up to nan"), checked_magnitudes(Precision.FP16):
        torch.zeros(2).log().sub(torch.zeros(2).log()).nan_to_num()


def test_scores_of_attention_count_though_no_operator_returns_them() -> None:
    query = torch.full((1, 2, 4, 16), 100.0)  # 16 * 100 * 100 / 4
    refused = pytest.raises(ParityError, match=r"scaled_dot_product.* up to 4e\+04")
    with refused, checked_magnitudes(Precision.FP16):
        F.scaled_dot_product_attention(query, query, torch.ones(1, 2, 4, 16))


@torch.no_grad()
def test_a_checkpoint_of_such_values_gets_no_bundle_in_fp16(
    tiny_config: ExportConfig, tmp_path: Path
) -> None:
    """ONNX Runtime's CPU provider would compute its fp16 graphs in fp32 and agree."""
    parts = tiny_parts()
    first, second = parts.vae.decoder[1].conv1, parts.vae.decoder[1].conv2
    for value in (first.weight, first.bias):
        value.mul_(3e5)
    second.weight.mul_(1e-5)
    save_merged(tmp_path / "checkpoint", parts, tiny_info())
    config = dataclasses.replace(tiny_config, precision=Precision.FP16)
    with pytest.raises(ParityError, match="convolution.*Export with --precision bf16 or fp32"):
        build_bundle(tmp_path / "checkpoint", tmp_path / "bundle", config)
    assert not (tmp_path / "bundle").exists()

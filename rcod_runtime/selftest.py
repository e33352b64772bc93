"""A backend against the sample that a bundle carries."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from rcod_runtime.errors import BackendError
from rcod_runtime.image_io import read_image
from rcod_runtime.manifest import sha256_file
from rcod_runtime.upscaler import Upscaler

MIN_BF16_PSNR_DB = 35.0  # against the fp32 sample, 8 bit


def self_test(folder: Path, backend: str, precision: str) -> str:
    """Upscale the bundle's sample and compare; returns a line for the report.

    Args:
        precision: fp32 is held to the manifest's largest difference, bf16 to a PSNR.

    Raises:
        BackendError: the image differs by more than that, or a file of the sample was changed.
    """
    with Upscaler(folder, backend=backend, precision=precision) as upscaler:
        sample = upscaler.manifest.sample
        if sample is None:
            return f"{upscaler.backend}, loads; the bundle has no sample to test on"
        files = {sample.lq: sample.lq_sha256, sample.sr: sample.sr_sha256}
        for name, digest in files.items():
            if sha256_file(folder / name) != digest:
                raise BackendError(f"{folder / name}: the self-test's file was changed.")
        lq, sr = (read_image(folder / name).pixels for name in files)
        upscaler(lq, realism=sample.realism)
        started = time.perf_counter()
        found = upscaler(lq, realism=sample.realism)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        difference = np.abs(found.astype(np.float64) - sr)
        worst = int(difference.max())
        psnr_db = 10 * np.log10(255.0**2 / max(1e-9, float(np.square(difference).mean())))
        if precision == "fp32" and worst > sample.max_abs_diff_u8:
            raise BackendError(
                f"backend {backend}: the sample's image differs by {worst} of 255, "
                f"expected at most {sample.max_abs_diff_u8}."
            )
        if psnr_db < MIN_BF16_PSNR_DB:
            raise BackendError(
                f"backend {backend}, {precision}: the sample's image is {psnr_db:.1f} dB from the "
                f"bundle's, expected at least {MIN_BF16_PSNR_DB}. Use --precision fp32."
            )
        size = f"{lq.shape[1]}x{lq.shape[0]} -> {sr.shape[1]}x{sr.shape[0]}"
        return (
            f"{upscaler.backend}, self-test passed ({size} in {elapsed_ms:.0f} ms, off by {worst})"
        )

"""A backend against the sample that a bundle carries."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from rcod_runtime.backends import BackendName, installed
from rcod_runtime.bundle import Bundle
from rcod_runtime.colour import SAMPLE_COLOUR_MATCH
from rcod_runtime.errors import BackendError, BundleError, HashMismatch
from rcod_runtime.files import read_bounded
from rcod_runtime.image_io import MAX_INPUT_PIXELS, Pixels, decode_image
from rcod_runtime.manifest import Manifest
from rcod_runtime.upscaler import Upscaler

MAX_SAMPLE_BYTES = 2**26
MAX_SAMPLE_PIXELS = 2**20  # of the photo: the test runs twice with each backend
MIN_BF16_PSNR_DB = 35.0  # against the fp32 sample, 8 bit


def cpu_obstacle(manifest: Manifest, backend: BackendName) -> str | None:
    """Why a CPU backend can't run a bundle on this machine, or None."""
    if not installed(backend):
        return "not installed"
    if backend == "onnxruntime" and manifest.has_bf16:
        return "has no bf16 convolutions on a CPU, which this bundle needs"
    return None


def self_test(
    bundle: Bundle,
    backend: str,
    precision: str,
    require_signature: Path | None = None,
    device: str = "auto",
) -> str:
    """Upscale the bundle's sample and compare; returns a line for the report.

    Args:
        precision: fp32 is held to the manifest's largest difference; bf16, and engines in what
            they have (auto), to a PSNR.
        require_signature: public key; the bundle is opened once more for the test.

    Raises:
        BackendError: the image differs by more than that.
        BundleError: a file of the sample is missing or was changed.
    """
    with Upscaler(
        bundle.folder,
        device,
        backend,
        precision=precision,
        require_signature=require_signature,
    ) as upscaler:
        sample = upscaler.manifest.sample
        if sample is None:
            return f"{upscaler.backend}, loads; the bundle has no sample to test on"
        lq, sr = (
            _sample_image(bundle.path(name), digest, max_pixels)
            for name, digest, max_pixels in (
                (sample.lq, sample.lq_sha256, MAX_SAMPLE_PIXELS),
                (sample.sr, sample.sr_sha256, MAX_INPUT_PIXELS),
            )
        )
        # In the tiles that it was made in, which no backend makes smaller.
        options: Any = {"colour_match": SAMPLE_COLOUR_MATCH, "tile_px": upscaler._tile_px(None)}
        upscaler(lq, sample.realism, **options)
        started = time.perf_counter()
        found = upscaler(lq, sample.realism, **options)
        if found.shape != sr.shape:
            raise BundleError(
                f"{bundle.folder / sample.sr}: expected {found.shape}, as {sample.lq} upscaled "
                f"has, found {sr.shape}. Export the bundle again."
            )
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


def _sample_image(path: Path, digest: str, max_pixels: int) -> Pixels:
    """An image of the bundle, decoded from the bytes that were checked."""
    try:
        data = read_bounded(path, MAX_SAMPLE_BYTES)
    except OSError as exc:
        raise BundleError(f"{path}: can't be read ({exc.strerror or exc}).") from exc
    if hashlib.sha256(data).hexdigest() != digest:
        raise HashMismatch(
            f"{path}: the sample was changed after the export. Copy the bundle again, or export it "
            "again."
        )
    return decode_image(data, str(path), max_pixels).pixels

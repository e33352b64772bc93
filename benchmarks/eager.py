"""The baseline: a checkpoint in PyTorch as it was trained, module by module, without export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError, MissingPackage
from rcod_runtime import UsageError
from rcod_runtime.colour import DEFAULT_COLOUR_MATCH, match_colour
from rcod_runtime.manifest import Manifest
from rcod_runtime.resample import resize_for_tokens, upsample

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Mode:
    """A way to run the checkpoint in PyTorch. ``channels_last``: weights and activations NHWC."""

    name: str
    channels_last: bool = False
    autocast: bool = False  # products in bf16, weights stay fp32
    compiled: bool = False  # torch.compile as it comes


# The baseline of all ratios: PyTorch as it comes.
EAGER = "pytorch eager fp32"
MODES = (
    Mode(EAGER),
    Mode(f"{EAGER}, NHWC", channels_last=True),
    Mode("pytorch compile fp32", compiled=True),
    Mode("pytorch autocast bf16", autocast=True),
    Mode("pytorch autocast bf16, NHWC", channels_last=True, autocast=True),
)

NO_GUIDE = (
    "--checkpoint: expected a model without a guide, found one of rcod-s, whose guide the PyTorch "
    "baseline doesn't run. Leave --checkpoint out: the bundle is then measured by itself."
)


class ModeMissing(BenchmarkError):
    """A mode of PyTorch that this machine doesn't have; the message says why."""


def check_mode(mode: Mode) -> None:
    """Whether this machine has what a mode needs.

    Raises:
        ModeMissing: no C++ compiler for torch.compile, no bf16 products in the CPU.
    """
    if mode.compiled:
        compilers = [os.environ.get("CXX", "g++"), "clang++"]
        if not any(map(shutil.which, compilers)):
            raise ModeMissing(f"no C++ compiler ({' or '.join(compilers)}), which it needs")
    if mode.autocast:
        from rcod_train.precision import resolve_precision

        if resolve_precision("auto") != "bf16":
            raise ModeMissing("this CPU does not multiply bf16")


class EagerPipeline:
    """One image through a merged checkpoint: PyTorch, on the CPU, in one tile, or in several beside
    each other that run as one batch.

    Around the network it does what the runtime does, with the runtime's own functions, so that
    the two differ in how the network is run and in nothing else.

    Args:
        checkpoint: folder of a merged checkpoint.
        manifest: of the bundle it is compared with, whose levels may be at other timesteps.
        level: name of a level of that bundle.
        threads: compute threads of PyTorch, for the whole process.
        mode: how PyTorch runs it.

    Raises:
        MissingPackage: PyTorch is not installed.
        ModeMissing: this machine can't run that mode.
        BenchmarkError: the checkpoint can't be read.
        UsageError: the checkpoint has a guide, or the bundle no such level.
    """

    def __init__(
        self,
        checkpoint: Path,
        manifest: Manifest,
        level: str,
        threads: int,
        mode: Mode = MODES[0],
    ) -> None:
        try:
            import torch

            from rcod_train.checkpoint import load_merged
            from rcod_train.errors import RcodTrainError
        except ImportError as exc:
            raise MissingPackage(
                f"the PyTorch baseline needs what training needs ({exc.name} is missing): "
                'pip install "rcod[train]"'
            ) from exc

        check_mode(mode)
        torch.set_num_threads(threads)
        self._torch = torch
        self._contract = manifest.image
        self._mode = mode
        self._order = torch.channels_last if mode.channels_last else torch.contiguous_format
        try:
            self._parts, _ = load_merged(checkpoint)
        except RcodTrainError as exc:
            raise BenchmarkError(str(exc)) from exc
        if self._parts.guide is not None:
            raise UsageError(NO_GUIDE)
        for module in (self._parts.vae, self._parts.unet, self._parts.vpim):
            module.to(memory_format=self._order)
        levels = {entry.name: entry for entry in manifest.levels}
        if level not in levels:
            raise UsageError(f"level {level!r}: expected one of {', '.join(levels)}.")
        self._level = levels[level]
        as_it_is: Callable[[Any], Any] = lambda call: call  # noqa: E731
        self._adapt = torch.compile if mode.compiled else as_it_is
        self._tokens = self._adapt(self._parts.vpim)
        self._encode = self._adapt(self._parts.vae.encode_with_skip)
        self._denoise = self._adapt(self._eps_and_step)
        self._decode = self._adapt(self._decoded)

    def __call__(self, lq: Image, batch: int = 1) -> Image:
        """lq (h, w, 3) uint8 -> sr (H, W, 3) uint8, in ``batch`` tiles of W / batch."""
        with self._torch.inference_mode(), self._precision():
            image, thumbnail = self._inputs(lq, batch)
            tokens = self._tokens(thumbnail).expand(batch, -1, -1)
            decoded = self._decode(self._denoise(self._encode(image), tokens)).float()
            wide = decoded.permute(1, 2, 0, 3).flatten(2)  # (3, H, batch, W / batch) -> (3, H, W)
            sr = ((wide.permute(1, 2, 0) + 1.0) * 127.5).numpy()
        pixels: Image = np.rint(np.clip(sr, 0.0, 255.0)).astype(np.uint8)
        match_colour(pixels, lq.astype(np.float32), DEFAULT_COLOUR_MATCH)
        return pixels

    def stages(self, lq: Image) -> dict[str, Callable[[], object]]:
        """Each graph's counterpart as a call on inputs that are ready."""
        with self._torch.inference_mode(), self._precision():
            image, thumbnail = self._inputs(lq)
            tokens = self._tokens(thumbnail)
            z_lq = self._encode(image)
            z_sr = self._denoise(z_lq, tokens)

        def inferring(call: Callable[[], Any]) -> Callable[[], object]:
            def inside() -> object:
                with self._torch.inference_mode(), self._precision():
                    return call()

            return inside

        return {
            "vpim": inferring(lambda: self._tokens(thumbnail)),
            "encoder": inferring(lambda: self._encode(image)),
            "denoiser": inferring(lambda: self._denoise(z_lq, tokens)),
            "decoder": inferring(lambda: self._decode(z_sr)),
        }

    def _inputs(self, lq: Image, batch: int = 1) -> tuple[Any, Any]:
        scale = self._contract.scale
        enlarged = upsample(lq, (lq.shape[0] * scale, lq.shape[1] * scale))
        thumbnail = resize_for_tokens(lq, self._contract.tokens_px)
        return self._tensor(enlarged, batch), self._tensor(thumbnail, 1)

    def _tensor(self, image: npt.NDArray[np.float32], batch: int) -> Any:
        chw = self._torch.from_numpy(image).permute(2, 0, 1)
        nchw = chw.unflatten(2, (batch, -1)).permute(2, 0, 1, 3)
        return (nchw / 127.5 - 1.0).contiguous(memory_format=self._order)

    def _precision(self) -> AbstractContextManager[Any]:
        if not self._mode.autocast:
            return nullcontext()
        context: AbstractContextManager[Any] = self._torch.autocast("cpu", self._torch.bfloat16)
        return context

    def _eps_and_step(self, z_lq: Any, tokens: Any) -> Any:
        from rcod_train.network import denoise

        t = self._torch.full((len(z_lq),), self._level.timestep)
        return denoise(self._parts.unet, z_lq, t, tokens, self._level.alpha, self._level.sigma)

    def _decoded(self, z_sr: Any) -> Any:
        return self._parts.vae.decode(z_sr).clamp(-1.0, 1.0)

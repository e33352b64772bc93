"""The baseline: a checkpoint in PyTorch as it was trained, module by module, without export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError, MissingPackage
from rcod_runtime import UsageError
from rcod_runtime.colour import match_colour
from rcod_runtime.manifest import ImageContract
from rcod_runtime.resample import resize_for_tokens, upsample

Image = npt.NDArray[np.uint8]


class EagerPipeline:
    """One image through a merged checkpoint: PyTorch eager, fp32, on the CPU, in one tile.

    Around the network it does what the runtime does, with the runtime's own functions, so that
    the two differ in how the network is run and in nothing else.

    Args:
        checkpoint: folder of a merged checkpoint.
        contract: image contract of the bundle it is compared with.
        level: name of a level of the checkpoint.
        threads: compute threads of PyTorch, for the whole process.
        channels_last: keep weights and activations in NHWC order.

    Raises:
        MissingPackage: PyTorch is not installed.
        BenchmarkError: the checkpoint can't be read.
        UsageError: the checkpoint has no such level.
    """

    def __init__(
        self,
        checkpoint: Path,
        contract: ImageContract,
        level: str,
        threads: int,
        channels_last: bool = False,
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

        torch.set_num_threads(threads)
        self._torch = torch
        self._contract = contract
        self._order = torch.channels_last if channels_last else torch.contiguous_format
        try:
            self._parts, info = load_merged(checkpoint)
        except RcodTrainError as exc:
            raise BenchmarkError(str(exc)) from exc
        for module in (self._parts.vae, self._parts.unet, self._parts.vpim):
            module.to(memory_format=self._order)
        names = [entry.name for entry in info.levels]
        if level not in names:
            raise UsageError(
                f"level {level!r}: expected one of {', '.join(names)} of {checkpoint}."
            )
        self._level = info.levels[names.index(level)]

    def __call__(self, lq: Image) -> Image:
        """lq (h, w, 3) uint8 -> sr (H, W, 3) uint8."""
        with self._torch.inference_mode():
            image, thumbnail = self._inputs(lq)
            tokens = self._parts.vpim(thumbnail)
            decoded = self._decode(self._denoise(self._parts.vae.encode(image), tokens))
            sr = ((decoded[0].permute(1, 2, 0) + 1.0) * 127.5).numpy()
        pixels: Image = np.rint(np.clip(sr, 0.0, 255.0)).astype(np.uint8)
        match_colour(pixels, lq.astype(np.float32), "wavelet")
        return pixels

    def stages(self, lq: Image) -> dict[str, Callable[[], object]]:
        """Each graph's counterpart as a call on inputs that are ready."""
        with self._torch.inference_mode():
            image, thumbnail = self._inputs(lq)
            tokens = self._parts.vpim(thumbnail)
            z_lq = self._parts.vae.encode(image)
            z_sr = self._denoise(z_lq, tokens)

        def inferring(call: Callable[[], Any]) -> Callable[[], object]:
            wrapped: Callable[[], object] = self._torch.inference_mode()(call)
            return wrapped

        return {
            "vpim": inferring(lambda: self._parts.vpim(thumbnail)),
            "encoder": inferring(lambda: self._parts.vae.encode(image)),
            "denoiser": inferring(lambda: self._denoise(z_lq, tokens)),
            "decoder": inferring(lambda: self._decode(z_sr)),
        }

    def _inputs(self, lq: Image) -> tuple[Any, Any]:
        scale = self._contract.scale
        enlarged = upsample(lq, (lq.shape[0] * scale, lq.shape[1] * scale))
        return self._tensor(enlarged), self._tensor(resize_for_tokens(lq, self._contract.tokens_px))

    def _tensor(self, image: npt.NDArray[np.float32]) -> Any:
        nchw = self._torch.from_numpy(image).permute(2, 0, 1)[None]
        return (nchw / 127.5 - 1.0).contiguous(memory_format=self._order)

    def _denoise(self, z_lq: Any, tokens: Any) -> Any:
        from rcod_train.network import predict_eps
        from rcod_train.schedule import one_step

        t = self._torch.full((len(z_lq),), self._level.timestep)
        eps = predict_eps(self._parts.unet, z_lq, t, tokens)
        return one_step(z_lq, eps, self._level.alpha, self._level.sigma)

    def _decode(self, z_sr: Any) -> Any:
        return self._parts.vae.decode(z_sr).clamp(-1.0, 1.0)

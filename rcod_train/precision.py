"""Where a training runs, and which arithmetic its matrix products are in."""

from __future__ import annotations

import torch

from rcod_train.errors import ConfigError
from rcod_train.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(choice: str, ranks: Ranks | None = None) -> torch.device:
    """auto | cpu | cuda | cuda:N -> a device that is there; auto prefers a GPU. Of several
    processes each gets the GPU of its own index.

    Raises:
        ConfigError: it isn't, or PyTorch was built without CUDA.
    """
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = choice.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device {choice!r}: expected auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and ranks is not None and ranks.world > 1:
        if index:
            raise ConfigError(
                f"device {choice!r}: expected auto or cuda for {ranks.world} processes, each of "
                "which takes a GPU of its own; CUDA_VISIBLE_DEVICES chooses among them."
            )
        index = str(ranks.local_rank)
        choice = f"cuda:{index}"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {choice!r}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} "
            "GPUs. Use --device cpu, or install a PyTorch build for CUDA."
        )
    device = torch.device(choice)
    if device.type == "cuda":  # what PyTorch is asked without naming one is asked of this one
        torch.cuda.set_device(int(index or 0))
    return device


def resolve_precision(choice: str, device: torch.device | None = None) -> str:
    """auto | fp32 | bf16 | fp16 -> fp32 | bf16 | fp16; auto: bf16 where it is native and faster."""
    if choice == "auto":
        if device is not None and device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = _multiplies_bf16() and not _is_bf16_slow()
        return "bf16" if native else "fp32"
    if choice not in DTYPES:
        raise ConfigError(f"precision {choice!r}: expected auto, fp32, bf16 or fp16.")
    return choice


def _multiplies_bf16() -> bool:
    """A build without oneDNN doesn't know the question."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _is_bf16_slow() -> bool:
    """Intel's processors with AVX512_BF16 and no AMX multiply it at half the rate of fp32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch
        return False
    known = torch.cpu.get_capabilities()
    return "Intel" in known.get("cpu_name", "") and not known.get("amx_bf16", False)


class Autocast:
    """``with autocast():`` runs matrix products in the chosen precision; trained weights stay
    fp32, and with fp16 the loss is scaled (``scaler``)."""

    def __init__(self, precision: str, device: torch.device | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.precision, self.dtype = precision, DTYPES[precision]

    def __call__(self) -> torch.autocast:
        enabled = self.precision != "fp32"
        dtype = self.dtype if enabled else torch.bfloat16  # autocast takes no float32
        return torch.autocast(self.device.type, dtype, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

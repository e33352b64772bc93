"""What rcod-o trains, by itself, in PEFT's files: written beside the merged checkpoint, and merged
again with a base model.

unet/ vae/          PEFT's adapter_config.json and adapter_model.safetensors
full.safetensors    what is trained in full: unet.conv_in.*, vpim.align.*, perhaps vae.decoder.*
mem/ rcod.json      as in a merged checkpoint; "training" has the fingerprint of the base model
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcod_train.adapted import LoraModel
from rcod_train.bases import base_fingerprint, check_base, load_diffusion, load_vpim
from rcod_train.checkpoint import CheckpointInfo, info_text, read_info, rounded
from rcod_train.errors import CheckpointError, TrainError
from rcod_train.files import reason_of, written_whole
from rcod_train.models.mem import Mem
from rcod_train.network import Parts

NAME = "generator"
FULL = "full.safetensors"
BASE = "base_sha256"  # in the training record; older ones haven't it
PREFIX = "base_model.model."  # parameters carry it in PEFT's files, whatever the network


def save_adapters(folder: Path, model: LoraModel, info: CheckpointInfo) -> None:
    """Before ``model`` is merged.

    Raises:
        TrainError: the folder can't be written; what was there before is left.
    """
    conv_in, align = model.unet.conv_in_generator, model.parts.vpim.align
    full = {f"unet.conv_in.{n}": p for n, p in conv_in.named_parameters()}
    full |= {f"vpim.align.{n}": p for n, p in align.named_parameters()}
    full |= {f"vae.{n}": p for n, p in model.decoder_parameters().items()}
    try:
        with written_whole(folder) as partial:
            for name, network in (("unet", model.parts.unet), ("vae", model.parts.vae)):
                state = get_peft_model_state_dict(network, adapter_name=NAME)
                state = {f"{PREFIX}{k}": v.contiguous() for k, v in state.items()}
                (partial / name).mkdir()
                network.peft_config[NAME].save_pretrained(partial / name)
                save_file(state, partial / name / "adapter_model.safetensors")
            state = {name: value.detach().contiguous() for name, value in full.items()}
            save_file(state, partial / FULL)
            if model.parts.mem is not None:
                model.parts.mem.save_pretrained(partial / "mem", safe_serialization=True)
            (partial / "rcod.json").write_text(info_text(info), encoding="utf-8")
    except (OSError, SafetensorError) as exc:
        raise TrainError(
            f"{folder}: the adapters could not be written ({reason_of(exc)}). "
            "Free space and run again with --resume."
        ) from exc


def are_adapters(folder: Path) -> bool:
    """Whether this is such a folder and not a merged checkpoint."""
    return (folder / FULL).is_file()


def load_adapters(folder: Path, base: str, clip: str) -> tuple[Parts, CheckpointInfo]:
    """Adapters merged with the base model they were trained on, as ``load_merged`` gives a merged
    checkpoint: rounded to fp16, in fp32, in eval mode.

    Args:
        base, clip: folders or hub ids, as in the training.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another base model.
        DataError: see ``load_diffusion`` and ``load_vpim``.
    """
    info = read_info(folder / "rcod.json")
    vae, unet = load_diffusion(base)
    check_base(base, vae, unet)
    vpim = load_vpim(clip, int(unet.config.cross_attention_dim))
    parts = Parts(vae, unet, vpim)
    if BASE in info.training and info.training[BASE] != base_fingerprint(parts):
        raise _misfit(folder, f"they were trained on other weights than those of {base} and {clip}")
    full = _tensors(folder / FULL)
    for name, network in (("unet", unet), ("vae", vae)):
        _add(folder / name, network)
    wholes = {"unet.conv_in": unet.conv_in.base_layer, "vpim.align": vpim.align}
    if any(name.startswith("vae.decoder.") for name in full):
        wholes["vae.decoder"] = vae.decoder
    for name, module in wholes.items():
        own = {k.removeprefix(f"{name}."): v for k, v in full.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as exc:
            raise _misfit(folder / FULL, exc) from exc
    for network in (unet, vae):
        network.fuse_lora(adapter_names=[NAME])
        network.unload_lora()
    if (folder / "mem").is_dir():
        parts.mem = Mem.from_pretrained(folder / "mem", local_files_only=True)
    for module in (unet, vae, vpim, parts.mem):
        if module is not None:
            rounded(module).float().eval().requires_grad_(False)
    return parts, info


def _add(folder: Path, network: Any) -> None:
    """Put an adapter's layers on a network and fill them."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, json.JSONDecodeError) as exc:
        raise CheckpointError(f"{folder}: no adapter of PEFT ({exc}).") from exc
    state = _tensors(folder / "adapter_model.safetensors")
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    try:
        network.add_adapter(config, adapter_name=NAME)
        result = set_peft_model_state_dict(network, state, adapter_name=NAME)
    except (RuntimeError, ValueError) as exc:
        raise _misfit(folder, exc) from exc
    lost = [name for name in result.missing_keys if "lora_" in name] + result.unexpected_keys
    if lost:
        raise _misfit(folder, f"{len(lost)} tensors, e.g. {lost[0]}")


def _misfit(path: Path, why: object) -> CheckpointError:
    reason = str(why).strip().splitlines()[0]
    return CheckpointError(
        f"{path}: does not fit the base model ({reason}). Give the --base and --clip that it was "
        "trained on."
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path}: not readable ({exc}). The adapters are damaged.") from exc

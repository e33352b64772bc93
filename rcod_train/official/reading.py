"""Files of tensors from others: read without running anything in them, and checked.

Every error is a CheckpointError that names the file, the field, what was expected and found.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rcod_train.errors import CheckpointError
from rcod_train.models.sd import FixedTokens
from rcod_train.official.layouts import EXPECTED, LAYOUTS, Adapter, Layout, is_kind

TOKENS = "the last hidden state that the base model's text encoder gives for one prompt"
NESTED = "state_embeddings"  # a dict of states; its inner fields are read as "state_embeddings.x"


def _read_dict(path: Path, expected: str) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":  # which torch.load reads since PyTorch 2.13 alone
            raw: Any = load_file(path)
        else:
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: not found. Expected {expected}.") from exc
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError,
            SafetensorError) as exc:  # fmt: skip
        raise CheckpointError(
            f"{path}: not a whole file of tensors and plain values ({exc}). Expected {expected}."
        ) from exc
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path}: expected a dict, found {type(raw).__name__}. Expected {expected}."
        )
    return raw


def read_official(path: Path) -> tuple[dict[str, Any], Layout]:
    """The dict in a published file, and which of the layouts it has, told by its fields.

    Raises:
        CheckpointError: not readable, or the fields are not those of a published file.
    """
    raw = _read_dict(path, "one of " + ", ".join(layout.file for layout in LAYOUTS))
    if isinstance(raw.get(NESTED), dict):
        raw |= {f"{NESTED}.{field}": state for field, state in raw.pop(NESTED).items()}
    layout = min(LAYOUTS, key=lambda layout: len(layout.fields.keys() ^ raw.keys()))
    missing = sorted(layout.fields.keys() - raw.keys())
    unexpected = sorted(map(str, raw.keys() - layout.fields.keys()))
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: missing fields {missing}, unexpected fields {unexpected}. The nearest "
            f"layout is that of {layout.file}; others: "
            f"{', '.join(other.file for other in LAYOUTS if other is not layout)}."
        )
    for field, kind in layout.fields.items():
        if not is_kind(raw[field], kind):
            raise CheckpointError(
                f'{path}: "{field}": expected {EXPECTED[kind]}, found {type(raw[field]).__name__}.'
            )
    return raw, layout


def read_state(path: Path, expected: str, field: str | None = None) -> dict[str, Tensor]:
    """A state dict in a file of its own, or in one ``field`` of it; ``expected`` is what it is."""
    raw = _read_dict(path, expected)
    state = raw if field is None else raw.get(field)
    if not is_kind(state, "state"):
        where = f"{path}:" if field is None else f'{path}: "{field}":'
        raise CheckpointError(f"{where} expected a dict of tensors. Expected {expected}.")
    return state


def read_tokens(path: Path) -> Tensor:
    """The embedding of a prompt, ``tokens`` (N, D), alone in a safetensors file."""
    try:
        state = load_file(path)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: not found. Expected {TOKENS}.") from exc
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path}: not readable as safetensors ({exc}).") from exc
    tokens = state.get("tokens")
    fits = len(state) == 1 and tokens is not None and tokens.ndim == 2 and len(tokens) > 0
    if not fits or not torch.isfinite(tokens).all():
        found = {name: tuple(value.shape) for name, value in state.items()}
        raise CheckpointError(
            f'{path}: expected one finite tensor "tokens" (N, D), found {found}. It is {TOKENS}.'
        )
    return tokens


def fixed_tokens(tokens: Tensor, cross_attention_dim: int, source: str) -> FixedTokens:
    """The tokens (N, D) as a module, if D is the width of the base model's cross-attention."""
    if tokens.shape[1] != cross_attention_dim:
        raise CheckpointError(
            f'{source}: "tokens": expected (N, {cross_attention_dim}) as in the base model, found '
            f"{tuple(tokens.shape)}. It is {TOKENS}."
        )
    module = FixedTokens(*tokens.shape)
    module.tokens.copy_(tokens)
    return module


def check_keys(found: dict[str, Tensor], expected: set[str], where: str) -> None:
    """``where``: the file and the field, for the message."""
    missing, unexpected = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: {len(missing)} keys missing {missing[:5]}, {len(unexpected)} unexpected "
            f"{unexpected[:5]}."
        )


@torch.no_grad()
def load_exactly(module: nn.Module, state: dict[str, Tensor], where: str, hint: str) -> None:
    """Load a state dict of exactly the module's tensors; ``hint`` says what may be wrong."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_keys(state, set(expected), where)
    for name, value in state.items():
        if tuple(value.shape) != expected[name]:
            raise CheckpointError(
                f"{where}: {name}: expected {expected[name]}, found {tuple(value.shape)}. {hint}"
            )
    module.load_state_dict(state)


def low_rank(
    raw: dict[str, Any], adapter: Adapter, module: str, source: str
) -> tuple[Tensor, Tensor]:
    """A (r, in, ...) and B (out, r, ...) of a module, in fp32, of the rank that the file names."""
    state, rank = raw[adapter.state], raw[adapter.rank]
    a, b = state[adapter.key(module, "A")].float(), state[adapter.key(module, "B")].float()
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f'{source}: {module}: expected "{adapter.rank}" {rank}, found matrices of rank '
            f"{a.shape[0]} and {b.shape[1]}."
        )
    return a, b


@torch.no_grad()
def replace_conv_in(unet: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """conv_in as the file has it, in full; the keys are checked already."""
    for field, parameter in unet.conv_in.named_parameters():
        value = state.get(f"conv_in.{field}", state.get(f"conv_in.base_layer.{field}"))
        if value is None or value.shape != parameter.shape:
            found = None if value is None else tuple(value.shape)
            raise CheckpointError(
                f"{source}: conv_in.{field}: expected {tuple(parameter.shape)} as in the base "
                f"model, found {found}."
            )
        parameter.copy_(value)

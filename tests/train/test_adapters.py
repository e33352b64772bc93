"""One set of base weights in three roles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter

from rcod_train.adapters import SwitchedUnet, SwitchedVae
from rcod_train.network import predict_eps
from tests.tiny import tiny_parts

Forward = Callable[[UNet2DConditionModel], Tensor]


@pytest.fixture
def forward() -> Forward:
    torch.manual_seed(7)
    z_t, tokens, t = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16), torch.tensor([250, 750])

    def run(unet: UNet2DConditionModel) -> Tensor:
        with torch.no_grad():
            return predict_eps(unet, z_t, t, tokens)

    return run


def disturb(parameters: dict[str, Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_new_adapters_change_nothing(forward: Forward) -> None:
    expected = forward(tiny_parts().unet)
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    for role in ("base", "generator", "regulariser"):
        with switched.use(role) as unet:
            torch.testing.assert_close(forward(unet), expected, atol=0, rtol=0)


def test_the_base_is_bit_for_bit_itself_whatever_the_adapters_learned(forward: Forward) -> None:
    expected = forward(tiny_parts().unet)
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    disturb(switched.parameters_of("generator"))
    disturb(switched.parameters_of("regulariser"))
    outputs = {}
    for role in ("base", "generator", "regulariser"):
        with switched.use(role) as unet:
            outputs[role] = forward(unet)
    assert torch.equal(outputs["base"], expected)
    assert not torch.allclose(outputs["generator"], expected, atol=1e-3)
    assert not torch.allclose(outputs["regulariser"], expected, atol=1e-3)
    assert not torch.allclose(outputs["regulariser"], outputs["generator"], atol=1e-3)
    assert torch.equal(forward(switched.unet), outputs["generator"])  # the role between uses


def test_a_role_is_left_even_when_its_use_fails() -> None:
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    with pytest.raises(RuntimeError), switched.use("base"):
        raise RuntimeError
    assert (
        switched.role == "generator"
        and switched.unet.conv_in.base_layer is switched.conv_in_generator
    )


@pytest.mark.parametrize("role", ["generator", "regulariser"])
def test_a_step_of_one_role_moves_its_own_parameters_alone(role: str) -> None:
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    disturb(switched.parameters_of("generator"))
    disturb(switched.parameters_of("regulariser"))
    own = switched.parameters_of(role)
    other = switched.parameters_of("regulariser" if role == "generator" else "generator")
    with switched.use(role) as unet:
        noise = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 16)
        predict_eps(unet, *noise).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
    assert all(p.grad is None for p in other.values())
    assert not own.keys() & other.keys()
    ids = {id(p) for p in (*own.values(), *other.values())}
    for name, parameter in switched.unet.named_parameters():
        assert id(parameter) in ids or parameter.grad is None, name


def test_conv_in_is_trained_in_full_and_is_the_generators_alone(forward: Forward) -> None:
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    named = switched.parameters_of("generator")
    assert {"conv_in.weight", "conv_in.bias"} < named.keys()
    regulariser = [n for n in switched.parameters_of("regulariser") if "conv_in" in n]
    assert all("lora" in n for n in regulariser)
    with switched.use("base") as unet:
        before = forward(unet)
    disturb({"conv_in.weight": named["conv_in.weight"]})
    with switched.use("base") as unet:
        assert torch.equal(forward(unet), before)


def test_names_do_not_depend_on_the_current_role() -> None:
    """Checkpoints are keyed by them."""
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    with switched.use("base"):
        inside = switched.parameters_of("generator").keys()
    assert inside == switched.parameters_of("generator").keys()


def test_the_merged_unet_is_the_generator_without_an_adapter(forward: Forward) -> None:
    switched = SwitchedUnet(tiny_parts().unet, 4, 4)
    disturb(switched.parameters_of("generator"))
    disturb(switched.parameters_of("regulariser"))
    expected = forward(switched.unet)
    merged = switched.merge()
    torch.testing.assert_close(forward(merged), expected, atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert merged.state_dict().keys() == tiny_parts().unet.state_dict().keys()


@pytest.mark.parametrize("train_decoder", [True, False])
def test_the_vae_has_a_lora_on_its_encoder_and_merges(train_decoder: bool) -> None:
    image = torch.randn(1, 3, 32, 32)
    plain = tiny_parts().vae
    switched = SwitchedVae(tiny_parts().vae, 4, train_decoder)
    assert bool(switched.decoder_parameters()) == train_decoder
    disturb(switched.encoder_parameters())
    with torch.no_grad():
        adapted = switched.vae.encode(image)
        with switched.base() as vae:
            torch.testing.assert_close(vae.encode(image), plain.encode(image), atol=0, rtol=0)
        assert not torch.allclose(adapted, plain.encode(image), atol=1e-3)
        merged = switched.merge()
        torch.testing.assert_close(merged.encode(image), adapted, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == plain.state_dict().keys()

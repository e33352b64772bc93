"""``rcod-train import-official``: files of the published layout, written here by PEFT itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from rcod_train.bases import load_base
from rcod_train.checkpoint import load_merged
from rcod_train.errors import CheckpointError, DataError
from rcod_train.main import main
from rcod_train.official import OfficialImport, import_official
from rcod_train.official.reading import read_official
from tests.tiny_sd import save_base

RANK = 4
UNET_NAMES = (
    "to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_in", "conv_shortcut",
    "conv_out", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


class Published:
    """The networks of the published inference: base weights with PEFT's adapters on them."""

    def __init__(self, base: Path) -> None:
        torch.manual_seed(11)
        self.unet = UNet2DConditionModel.from_pretrained(base / "sd", subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(base / "sd", subfolder="vae")
        self.align = nn.Linear(20, 24)
        named = [n for n, m in self.unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        chosen = [n for n in named if n.endswith(UNET_NAMES) and "time_emb" not in n]
        down = [n for n in chosen if n.startswith(("down_blocks", "conv_in"))]
        up = [n for n in chosen if n.startswith(("up_blocks", "conv_out"))]
        others = [n for n in chosen if n not in down and n not in up]
        encoder = [
            n
            for n, m in self.vae.named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear)) and n.startswith(("encoder.", "quant_conv"))
        ]
        self.lists = {
            "unet_lora_encoder_modules": down,
            "unet_lora_decoder_modules": up,
            "unet_lora_others_modules": others,
            # The published loop appends a name for each of its patterns that fit.
            "vae_lora_encoder_modules": [
                n for n in encoder for _ in range(10 if n == "quant_conv" else 2)
            ],
        }
        for name, modules in (("encoder", down), ("decoder", up), ("others", others)):
            self.unet.add_adapter(lora(modules), adapter_name=f"default_{name}")
        self.unet.set_adapter(["default_encoder", "default_decoder", "default_others"])
        self.vae.add_adapter(lora(encoder), adapter_name="default_encoder")
        with torch.no_grad():
            for network in (self.unet, self.vae):
                for name, parameter in network.named_parameters():
                    if "lora" in name or name.startswith("conv_in.base_layer"):
                        parameter.add_(0.05 * torch.randn_like(parameter))

    def file(self) -> dict[str, Any]:
        return {
            **self.lists,
            "rank_unet": RANK,
            "rank_vae": RANK,
            "state_dict_unet": {
                k: v for k, v in self.unet.state_dict().items() if "lora" in k or "conv_in" in k
            },
            "state_dict_vae": {k: v for k, v in self.vae.state_dict().items() if "lora" in k},
            "state_dict_proj": dict(self.align.state_dict()),
        }


def lora(modules: list[str]) -> LoraConfig:
    return LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=modules)


@pytest.fixture(scope="module")
def published(base: Path) -> Published:
    with warnings.catch_warnings():  # several adapters are what the published code has
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        return Published(base)


@pytest.fixture
def raw(published: Published) -> dict[str, Any]:
    return {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in published.file().items()
    }


def command(file: Path, base: Path, out: Path) -> list[str]:
    sources = ["--base", str(base / "sd"), "--clip", str(base / "clip")]
    return ["import-official", str(file), *sources, "--out", str(out)]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rcod_o", "osediff"])
def test_the_merged_networks_compute_what_the_adapters_do(
    base: Path, published: Published, raw: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    if layout == "osediff":
        del raw["state_dict_proj"]
        prompt = {"tokens": torch.randn(5, 24)}
        save_file(prompt, tmp_path / "tokens.safetensors")
        given: dict[str, Any] = {"tokens": tmp_path / "tokens.safetensors"}
    else:
        given = {"clip": str(base / "clip")}
    torch.save(raw, tmp_path / "weights.pkl")  # what it is, its content says
    request = OfficialImport(tmp_path / "weights.pkl", str(base / "sd"), **given)
    parts, _ = import_official(request)
    torch.manual_seed(0)
    z, t, tokens = torch.randn(2, 4, 16, 16), torch.tensor([249, 749]), torch.randn(2, 5, 24)
    expected = published.unet(z, t, encoder_hidden_states=tokens).sample
    found = parts.unet(z, t, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    image = torch.randn(2, 3, 64, 64)
    posterior = published.vae.encode(image).latent_dist
    scale = published.vae.config.scaling_factor
    z_lq = parts.vae.encode(image)
    torch.testing.assert_close(z_lq, posterior.mean * scale, atol=1e-5, rtol=1e-5)
    decoded = published.vae.decode(z_lq / scale).sample
    torch.testing.assert_close(parts.vae.decode(z_lq), decoded, atol=1e-5, rtol=1e-5)
    if layout == "osediff":
        found = parts.vpim(torch.zeros(2, 3, parts.vpim.tokens_px, parts.vpim.tokens_px))
        assert torch.equal(found, prompt["tokens"].expand(2, -1, -1))
        return
    thumbnail = torch.randn(2, 3, 28, 28)
    states = parts.vpim.encoder(thumbnail).last_hidden_state
    torch.testing.assert_close(parts.vpim(thumbnail), published.align(states))


def test_the_command_writes_a_checkpoint_with_the_published_constants(
    base: Path, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(raw, tmp_path / "rcod_o.pkl")
    assert main(command(tmp_path / "rcod_o.pkl", base, tmp_path / "out")) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    parts, info = load_merged(tmp_path / "out")
    assert info.family == "rcod-o" and parts.mem is None
    assert [(x.name, x.timestep) for x in info.levels] == [
        ("fidelity", 249), ("neutral", 499), ("realism", 749),
    ]  # fmt: skip
    assert all(x.alpha**2 == pytest.approx(0.7537) for x in info.levels)
    assert all(x.alpha**2 + x.sigma**2 == pytest.approx(1.0) for x in info.levels)


def test_an_import_replaces_a_checkpoint_alone(
    base: Path, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out of a training holds its checkpoint beside all that it was trained from."""
    torch.save(raw, tmp_path / "rcod_o.pkl")
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "rcod").mkdir(parents=True)
    assert main(command(tmp_path / "rcod_o.pkl", base, run)) == 2
    assert "run: expected a new folder, or a merged checkpoint to replace, found rcod" in (
        capsys.readouterr().err
    )
    assert (run / "rcod").is_dir()
    out.mkdir()
    for _ in range(2):  # into an empty folder, then in the place of what that made
        assert main(command(tmp_path / "rcod_o.pkl", base, out)) == 0
    (out / "notes.txt").write_text("mine")
    assert main(command(tmp_path / "rcod_o.pkl", base, out)) == 2
    assert "found notes.txt" in capsys.readouterr().err and (out / "notes.txt").exists()


def test_osediff_becomes_one_level_with_the_tokens_of_a_prompt(
    base: Path, raw: dict[str, Any], tmp_path: Path
) -> None:
    del raw["state_dict_proj"]
    torch.save(raw, tmp_path / "osediff.pkl")
    tokens = torch.randn(7, 24)
    save_file({"tokens": tokens}, tmp_path / "prompt.safetensors")
    arguments = ["--base", str(base / "sd"), "--tokens", str(tmp_path / "prompt.safetensors")]
    out = tmp_path / "out"
    file = str(tmp_path / "osediff.pkl")
    assert main(["import-official", file, *arguments, "--out", str(out)]) == 0
    parts, info = load_merged(out)
    assert (info.family, info.name) == ("rcod-o", "osediff")
    assert [(x.name, x.timestep) for x in info.levels] == [("neutral", 999)]
    assert info.levels[0].alpha ** 2 == pytest.approx(0.0047, abs=5e-5)
    assert torch.equal(parts.vpim(torch.zeros(1, 3, 1, 1))[0], tokens)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"tokens": torch.zeros(7, 23)}, r'"tokens": expected \(N, 24\) .* found \(7, 23\)'),
        ({"prompt": torch.zeros(7, 24)}, r'one finite tensor "tokens" .*prompt'),
        ({"tokens": torch.full((7, 24), torch.nan)}, "one finite tensor"),
        ({"tokens": torch.zeros(24)}, "one finite tensor"),
        (None, "not readable as safetensors"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    base: Path,
    raw: dict[str, Any],
    tmp_path: Path,
    tensors: dict[str, torch.Tensor] | None,
    words: str,
) -> None:
    del raw["state_dict_proj"]
    torch.save(raw, tmp_path / "osediff.pkl")
    path = tmp_path / "prompt.safetensors"
    if tensors is None:
        path.write_bytes(b"no")
    else:
        save_file(tensors, path)
    request = OfficialImport(tmp_path / "osediff.pkl", str(base / "sd"), tokens=path)
    with pytest.raises(CheckpointError, match=f"prompt.safetensors: .*{words}"):
        import_official(request)


def test_a_file_for_which_an_option_is_missing_or_too_much_says_which(
    base: Path, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(raw, tmp_path / "rcod_o.pkl")
    too_much = [*command(tmp_path / "rcod_o.pkl", base, tmp_path / "out"), "--mem", "x.pkl"]
    assert main(too_much) == 2
    assert re.search("--mem: .*layout of rcod_o.pkl, which has no use", capsys.readouterr().err)
    del raw["state_dict_proj"]
    torch.save(raw, tmp_path / "osediff.pkl")
    bare = ["import-official", str(tmp_path / "osediff.pkl"), "--base", str(base / "sd")]
    assert main([*bare, "--out", str(tmp_path / "out")]) == 2
    words = "layout of osediff.pkl, which needs --tokens: .*text prompts.*text encoder"
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_eq_5_with_the_imported_range_gives_the_published_bins(
    base: Path, raw: dict[str, Any], tmp_path: Path
) -> None:
    from rcod_train.grouping import Grouping
    from rcod_train.official.layouts import M_MAX, M_MIN, K

    grouping = Grouping(M_MIN, M_MAX, 3, K)
    m = torch.tensor([-0.5, 0.49, 0.51, 0.69, 0.71, 1.0], dtype=torch.float64)
    assert grouping.timestep(m).tolist() == [750, 750, 500, 500, 250, 250]


def damaged(raw: dict[str, Any], how: str) -> dict[str, Any]:
    first = raw["unet_lora_encoder_modules"][1]
    key = f"{first}.lora_A.default_encoder.weight"
    if how == "field":
        del raw["rank_unet"]
        raw["colour"] = 1
    elif how == "keys":
        raw["state_dict_unet"]["extra.lora_A"] = raw["state_dict_unet"].pop(key)
    elif how == "rank":
        raw["rank_unet"] = 8
    elif how == "shape":
        raw["state_dict_unet"][key] = torch.zeros(RANK, 7)
    elif how == "module":
        raw["unet_lora_others_modules"] = ["nowhere"]
        raw["state_dict_unet"] = {
            k: v for k, v in raw["state_dict_unet"].items() if "default_others" not in k
        }
        for side in "AB":
            raw["state_dict_unet"][f"nowhere.lora_{side}.default_others.weight"] = torch.zeros(4, 4)
    elif how == "conv_in":
        raw["state_dict_unet"]["conv_in.base_layer.bias"] = torch.zeros(3)
    elif how == "proj":
        raw["state_dict_proj"]["weight"] = torch.zeros(3, 3)
    elif how == "not tensors":
        raw["state_dict_vae"] = {"a": 1}
    elif how == "names":
        raw["vae_lora_encoder_modules"] = [1]
    return raw


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("field", r"missing fields \['rank_unet'\], unexpected fields \['colour'\]"),
        ("keys", r"1 keys missing \['.*lora_A.*1 unexpected \['extra.lora_A'\]"),
        ("rank", 'expected "rank_unet" 8, found matrices of rank 4'),
        ("shape", "the matrices make .* the base model has"),
        ("module", "the base model has no module nowhere"),
        ("conv_in", r"conv_in.bias: expected \(16,\) as in the base model, found \(3,\)"),
        ("proj", r'"state_dict_proj": weight: expected \(24, 20\), found \(3, 3\).*CLIP ViT-L/14'),
        ("names", '"vae_lora_encoder_modules": expected a list of module names'),
        ("not tensors", '"state_dict_vae": expected a dict of tensors'),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_nothing_is_written(
    base: Path,
    raw: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    words: str,
) -> None:
    torch.save(damaged(raw, how), tmp_path / "rcod_o.pkl")
    assert main(command(tmp_path / "rcod_o.pkl", base, tmp_path / "out")) == 9
    assert re.search(words, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["rcod_o.pkl"]


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.folder / "owned"),))


def test_a_pickle_that_is_not_a_dict_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path), tmp_path / "evil.pkl")
    with pytest.raises(CheckpointError, match="not a whole file of tensors"):
        read_official(tmp_path / "evil.pkl")
    assert not (tmp_path / "owned").exists()
    torch.save([1, 2], tmp_path / "list.pkl")
    with pytest.raises(CheckpointError, match="expected a dict, found list"):
        read_official(tmp_path / "list.pkl")
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "list.pkl").read_bytes()[:50])
    with pytest.raises(CheckpointError, match="not a whole file"):
        read_official(tmp_path / "cut.pkl")
    with pytest.raises(CheckpointError, match="not found"):
        read_official(tmp_path / "none.pkl")


@pytest.mark.parametrize("missing", ["sd", "clip"])
def test_a_missing_base_names_layout_and_hub_id(base: Path, tmp_path: Path, missing: str) -> None:
    folders = {"sd": str(base / "sd"), "clip": str(base / "clip")}
    folders[missing] = str(tmp_path)
    with pytest.raises(DataError, match="Give a local folder with .*config.json.* hub id such as"):
        load_base(folders["sd"], folders["clip"])


@pytest.mark.parametrize(("spacing", "warned"), [("leading", False), ("trailing", True)])
def test_models_of_the_same_geometry_are_told_by_their_configurations(
    base: Path, raw: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    spacing: str, warned: bool,
) -> None:  # fmt: skip
    """SD-Turbo in the place of Stable Diffusion, and a CLIP for larger images, would load."""
    torch.save(raw, tmp_path / "rcod_o.pkl")
    shutil.copytree(base / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "scheduler").mkdir()
    scheduler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing}
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    import_official(
        OfficialImport(tmp_path / "rcod_o.pkl", str(tmp_path / "sd"), str(base / "clip"))
    )
    words = "by its scheduler this is not Stable Diffusion 2.1-base, which rcod_o.pkl belongs to"
    assert (words in caplog.text) == warned
    assert "expected CLIP ViT-L/14 for images of 224 px, found one for 28 px" in caplog.text


def test_what_was_trained_here_is_no_base_to_import_onto(
    base: Path, raw: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(raw, tmp_path / "rcod_o.pkl")
    shutil.copytree(base / "sd", tmp_path / "merged")
    (tmp_path / "merged" / "rcod.json").write_text("{}")
    request = OfficialImport(tmp_path / "rcod_o.pkl", str(tmp_path / "merged"), str(base / "clip"))
    with pytest.raises(DataError, match="expected a base model, found rcod.json"):
        import_official(request)

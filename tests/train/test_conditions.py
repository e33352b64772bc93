"""What regulariser and base are conditioned on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcod_train.conditions import HqTokens, TextEmbeddings
from rcod_train.config import RcodStageConfig
from rcod_train.data import Batch
from rcod_train.errors import CheckpointError, DataError
from rcod_train.grouping import Grouping
from rcod_train.photos import Photo
from rcod_train.precision import Autocast
from rcod_train.stages.rcod import RcodStage
from tests.tiny import tiny_parts

PHOTOS = [Photo(Path("photos", name), name) for name in ("a/1.png", "2.png", "3.png")]
TEXT = {"negative": torch.zeros(5, 8), "prompt": torch.ones(5, 8), "a/1.png": torch.full((5, 8), 7)}


def batch(*photos: int) -> Batch:
    image = torch.randint(0, 256, (len(photos), 3, 32, 32), dtype=torch.uint8)
    return Batch(image, image, image, image, torch.tensor(photos))


def saved(path: Path, **changes: torch.Tensor) -> Path:
    save_file({k: v.float() for k, v in {**TEXT, **changes}.items()}, path)
    return path


def test_every_photo_has_its_own_text_or_the_common_one(tmp_path: Path) -> None:
    condition = TextEmbeddings(saved(tmp_path / "t"), PHOTOS, 8)
    tokens, negative = condition(batch(0, 2, 0))
    assert tokens[:, 0, 0].tolist() == [7.0, 1.0, 7.0]
    assert tokens.shape == negative.shape == (3, 5, 8) and not negative.any()


def test_a_photo_without_text_is_named(tmp_path: Path) -> None:
    save_file({"negative": TEXT["negative"], "2.png": TEXT["prompt"]}, tmp_path / "t")
    with pytest.raises(DataError, match=r'2 of 3 photos have no embedding \("a/1.png"'):
        TextEmbeddings(tmp_path / "t", PHOTOS, 8)


def test_one_text_is_not_shared_by_two_photos_of_a_name(tmp_path: Path) -> None:
    """The files below two --data folders may have the same names; the common text is for all."""
    file = saved(tmp_path / "t")
    others = [Photo(Path("more", name), name) for name in ("2.png", "a/1.png")]
    keys = TextEmbeddings(file, [*PHOTOS, PHOTOS[0], others[0]], 8).keys
    assert keys == ["a/1.png", "prompt", "prompt", "a/1.png", "prompt"]
    with pytest.raises(DataError, match="two photos, photos/a/1.png and more/a/1.png, and an"):
        TextEmbeddings(file, [*PHOTOS, *others], 8)


def test_files_of_another_layout_are_named(tmp_path: Path) -> None:
    save_file({"prompt": TEXT["prompt"]}, tmp_path / "a")
    with pytest.raises(DataError, match='no "negative". Expected a safetensors file'):
        TextEmbeddings(tmp_path / "a", PHOTOS, 8)
    with pytest.raises(DataError, match=r'"negative": expected \(N, 16\) as in the base'):
        TextEmbeddings(saved(tmp_path / "b"), PHOTOS, 16)
    odd = {"a/1.png": torch.zeros(4, 8)}
    with pytest.raises(DataError, match=r'"a/1.png": .* found \(4, 8\)'):
        TextEmbeddings(saved(tmp_path / "c", **odd), PHOTOS, 8)
    (tmp_path / "d").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not readable"):
        TextEmbeddings(tmp_path / "d", PHOTOS, 8)


def test_the_tokens_of_the_hq_image_do_not_follow_the_training() -> None:
    vpim = tiny_parts().vpim
    condition, one = HqTokens(vpim), batch(0, 1)
    before, negative = condition(one)
    with torch.no_grad():
        vpim.align.weight.add_(1.0)
    assert torch.equal(condition(one)[0], before)
    assert not negative.any() and not before.requires_grad


def test_a_run_goes_on_with_the_texts_that_it_began_with(tmp_path: Path) -> None:
    texts = {name: torch.full((5, 16), i) for i, name in enumerate(TEXT)}
    config = RcodStageConfig(rank_unet=2, rank_vae=2, rank_regulariser=2)

    def rcod(name: str, **changes: torch.Tensor) -> RcodStage:
        condition = TextEmbeddings(saved(tmp_path / name, **texts, **changes), PHOTOS, 16)
        return RcodStage(
            tiny_parts(), config, Grouping(0.2, 0.9), Autocast("fp32"), condition=condition
        )

    state = rcod("a").extra_state()
    rcod("b").load_extra_state(state)
    other = rcod("c", **{"2.png": torch.full((5, 16), 9)})  # it had the common one
    with pytest.raises(CheckpointError, match="conditioned on other texts. Give the same --text"):
        other.load_extra_state(state)
    del state["text"]  # of a run before it was kept
    other.load_extra_state(state)

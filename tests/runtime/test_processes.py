"""One Upscaler and several processes: refused after a fork, made again from a pickle."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.errors import UsageError

Photo = Callable[..., np.ndarray]


def _called(upscaler: Upscaler, image: np.ndarray, answer: object) -> None:
    try:
        result: object = upscaler(image)
    except UsageError as error:
        result = str(error)
    upscaler.close()  # must not wait for threads that are not here
    answer.send(result)  # type: ignore[attr-defined]


def in_a_child(method: str, upscaler: Upscaler, image: np.ndarray) -> object:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_called, args=(upscaler, image, there))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads: meant
        process.start()
    there.close()
    try:
        assert here.poll(60), "the child doesn't answer"
        return here.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_forks_child_is_told_and_the_parent_goes_on(upscaler: Upscaler, photo: Photo) -> None:
    before = upscaler(photo())
    assert "made before a fork" in str(in_a_child("fork", upscaler, photo()))
    np.testing.assert_array_equal(upscaler(photo()), before)


def test_a_spawned_process_takes_a_pickled_one(upscaler: Upscaler, photo: Photo) -> None:
    found = in_a_child("spawn", upscaler, photo())
    np.testing.assert_array_equal(found, upscaler(photo()))


def test_a_pickle_holds_arguments_and_opens_the_bundle_again(
    own_bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(own_bundle.parent)
    with Upscaler(own_bundle.name, backend="onnxruntime", threads=1) as upscaler:
        data = pickle.dumps(upscaler)
        expected = upscaler(photo())
    monkeypatch.chdir(tmp_path.parent)  # a relative path must not be taken from elsewhere
    assert len(data) < 1000
    with pickle.loads(data) as again:
        assert again.backend == upscaler.backend
        np.testing.assert_array_equal(again(photo()), expected)
        with copy.copy(again) as copied:
            np.testing.assert_array_equal(copied(photo()), expected)


def test_a_closed_one_is_not_pickled(bundle: Path) -> None:
    upscaler = Upscaler(bundle)
    upscaler.close()
    with pytest.raises(UsageError, match="closed"):
        pickle.dumps(upscaler)

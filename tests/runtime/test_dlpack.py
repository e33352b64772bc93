"""Capsules of DLPack, read and made with ctypes: NumPy's, torch's, and broken ones."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.dlpack import CPU, CUDA, Borrowed, make_capsule
from rcod_runtime.errors import UsageError
from tests.runtime.simulated.arrays import Lent

VERSIONS = [None, (1, 0)]
SHAPE = (2, 3, 4)


@pytest.mark.parametrize("max_version", VERSIONS)
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "u1", "c8", "?"])
def test_numpys_capsules_are_read_as_they_are(dtype: str, max_version: Any) -> None:
    whole = np.zeros((3, 4, 5), dtype)
    for array in (whole, whole[1:], whole[:, ::2], whole.transpose(2, 0, 1), whole[0, 0, 0, None]):
        borrowed = Borrowed(array.__dlpack__(max_version=max_version), "image")
        assert borrowed.address == array.ctypes.data
        assert (borrowed.shape, borrowed.typestr) == (array.shape, array.dtype.str)
        assert borrowed.strides == array.strides
        assert borrowed.device == (CPU, 0) and not borrowed.read_only
        borrowed.close()


def test_read_only_is_what_a_versioned_capsule_says() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    borrowed = Borrowed(array.__dlpack__(max_version=(1, 0)), "image")
    assert borrowed.read_only
    borrowed.close()


@pytest.mark.parametrize("max_version", VERSIONS)
def test_torchs_capsules_are_read_as_they_are(max_version: Any) -> None:
    whole = torch.zeros(3, 4, 5)
    for tensor in (whole, whole[1:], whole[:, ::2], whole.permute(2, 0, 1), whole[:1]):
        borrowed = Borrowed(tensor.__dlpack__(max_version=max_version), "image")
        assert borrowed.address == tensor.data_ptr()
        assert (borrowed.shape, borrowed.typestr) == (tuple(tensor.shape), "<f4")
        expected = zip(tensor.shape, tensor.stride(), strict=True)
        for (side, stride), found in zip(expected, borrowed.strides, strict=True):
            assert side == 1 or found == 4 * stride
        assert borrowed.device == (CPU, 0) and not borrowed.read_only
        borrowed.close()
    borrowed = Borrowed(whole.bfloat16().__dlpack__(max_version=max_version), "image")
    assert borrowed.typestr == "bfloat16"
    borrowed.close()


@pytest.mark.parametrize("max_version", VERSIONS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_is_borrowed_lives_until_it_is_given_back(library: str, max_version: Any) -> None:
    array = np.zeros(SHAPE, np.float32)
    count = sys.getrefcount(array)
    alive = weakref.ref(array)
    lender: Any = array if library == "numpy" else torch.from_numpy(array)
    borrowed = Borrowed(lender.__dlpack__(max_version=max_version), "image")
    assert sys.getrefcount(array) > count
    del lender, array
    gc.collect()
    assert alive() is not None
    borrowed.close()
    borrowed.close()
    assert alive() is None


@pytest.mark.parametrize("max_version", VERSIONS)
def test_a_thousand_capsules_leave_no_reference(max_version: Any) -> None:
    array = np.zeros(SHAPE, np.float32)
    count = sys.getrefcount(array)
    for _ in range(1000):
        Borrowed(array.__dlpack__(max_version=max_version), "image").close()
    assert sys.getrefcount(array) == count


@pytest.mark.parametrize("max_version", VERSIONS)
def test_a_capsule_is_taken_once(max_version: Any) -> None:
    array = np.zeros(SHAPE, np.float32)
    capsule = array.__dlpack__(max_version=max_version)
    Borrowed(capsule, "image").close()
    for other in (capsule, "text", None):
        with pytest.raises(UsageError, match="image: expected __dlpack__ to give a new capsule"):
            Borrowed(other, "image")
    with pytest.raises(Exception, match="(?i)capsule"):
        torch.from_dlpack(capsule)


@pytest.mark.parametrize("versioned", [True, False])
def test_the_deleter_is_called_once(versioned: bool) -> None:
    lent = Lent(4096, SHAPE, versioned, byte_offset=256)
    borrowed = Borrowed(lent.capsule, "image")
    assert lent.returned == 0
    assert (borrowed.address, borrowed.shape, borrowed.strides) == (4096 + 256, SHAPE, None)
    borrowed.close()
    borrowed.close()
    assert lent.returned == 1


def test_a_tensor_without_a_deleter_is_nobodys_to_give_back() -> None:
    lent = Lent(4096, SHAPE, deleter=False)
    Borrowed(lent.capsule, "image").close()
    assert lent.returned == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": (2, 1)}, "out: expected DLPack 1.x or older, found 2.1.*cuda_array_interface"),
        ({"ndim": 65}, "out: expected at most 64 axes, found 65"),
        ({"ndim": -1}, "found -1"),
    ],
)
def test_what_cannot_be_read_is_given_back(change: dict[str, Any], match: str) -> None:
    lent = Lent(4096, SHAPE, **change)
    with pytest.raises(UsageError, match=match):
        Borrowed(lent.capsule, "out")
    assert lent.returned == 1


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ((2, 32, 1), "<f4"),
        ((2, 32, 4), "<f4 in lanes of 4"),
        ((1, 8, 1), "|u1"),
        ((4, 16, 1), "bfloat16"),
        ((0, 4, 1), "type 0 of bits 4"),
        ((7, 8, 1), "type 7 of bits 8"),
    ],
)
def test_types_have_names(dtype: tuple[int, int, int], name: str) -> None:
    borrowed = Borrowed(Lent(4096, SHAPE, dtype=dtype).capsule, "image")
    assert borrowed.typestr == name
    borrowed.close()


# Capsules of our own.


class Owner:
    pass


def made(max_version: Any) -> tuple[Any, Callable[[], Owner | None]]:
    """A capsule of an address that nothing of the host may touch, and whether its owner lives."""
    owner = Owner()
    return make_capsule(owner, 0x7000, SHAPE, 1, max_version), weakref.ref(owner)


@pytest.mark.parametrize("max_version", VERSIONS)
def test_a_capsule_of_ours_says_where_the_array_lies(max_version: Any) -> None:
    capsule, owner = made(max_version)
    borrowed = Borrowed(capsule, "ours")
    assert (borrowed.address, borrowed.shape, borrowed.device) == (0x7000, SHAPE, (CUDA, 1))
    assert (borrowed.typestr, borrowed.strides) == ("<f4", (48, 16, 4))
    assert not borrowed.read_only
    del capsule
    assert owner() is not None
    borrowed.close()
    assert owner() is None


@pytest.mark.parametrize("max_version", VERSIONS)
def test_a_capsule_of_ours_that_nobody_takes_frees_the_array(max_version: Any) -> None:
    capsule, owner = made(max_version)
    assert owner() is not None
    del capsule
    assert owner() is None


@pytest.mark.parametrize("max_version", VERSIONS)
def test_a_library_may_give_ours_back_from_a_thread_without_the_interpreters_lock(
    max_version: Any,
) -> None:
    capsule, owner = made(max_version)
    borrowed = Borrowed(capsule, "ours")
    pointer, borrowed._pointer = borrowed._pointer, None
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(borrowed._managed.deleter)  # releases it
    del capsule
    thread = threading.Thread(target=deleter, args=(pointer,))
    thread.start()
    thread.join()
    assert owner() is None


def test_libraries_of_the_host_refuse_ours_and_leave_it_whole() -> None:
    """NumPy drops the capsule while its error is pending: no code of Python may run then."""

    class Ours:
        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA, 1

        def __dlpack__(self, **options: Any) -> Any:
            return make_capsule(self, 0x7000, SHAPE, 1, options.get("max_version"))

    ours = Ours()
    count = sys.getrefcount(ours)
    with pytest.raises((BufferError, RuntimeError), match="(?i)device"):
        np.from_dlpack(ours)
    assert sys.getrefcount(ours) == count


# Tensors of the host in a plain call.


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_tensor_of_the_host_is_an_image(
    upscaler: Upscaler, photo: Callable[..., np.ndarray], channels: int
) -> None:
    lq = photo(8, 12, channels)
    tensor = torch.from_numpy(lq)
    found = upscaler(tensor)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, upscaler(lq))
    window = tensor[2:, 1:-1].transpose(0, 1)
    np.testing.assert_array_equal(upscaler(window), upscaler(window.numpy().copy()))


def test_tensors_that_are_no_images_say_why(upscaler: Upscaler) -> None:
    for tensor, match in (
        (torch.zeros(8, 8, 3), "expected dtype uint8 or uint16, found float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"found \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3, requires_grad=True), "Tensor does not give one: .*gradient"),
        (torch.zeros(8, 8, 3, device="meta"), "image: expected an array in the host's memory"),
    ):
        with pytest.raises(UsageError, match=match):
            upscaler(tensor)

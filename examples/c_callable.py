"""An Upscaler as a function that C code can call: pointers in, pixels written where C wants them.

  from examples.c_callable import c_function
  function = c_function(Upscaler())
  library.set_upscale(function)     # a ctypes library; in C: void set_upscale(upscale_t function);

In C:

  typedef int (*upscale_t)(const uint8_t *lq, int32_t height, int32_t width, float realism,
                           uint8_t *sr);

lq is height x width x 3 RGB bytes, sr has room for the result, scale times as high and wide.
Neither is copied: both become numpy arrays over C's memory. 0 is success; otherwise the exit code
of rcod-upscale for that error, and the message is logged. C may call it from any thread, from
several at once too, each with an sr of its own, which is worked on in place; the interpreter's lock
is free while the graphs run. Keep a reference to the function for as long as C may call it.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np

from rcod_runtime import RcodError, Upscaler, UsageError

log = logging.getLogger(__name__)

UPSCALE_T = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
)
UNEXPECTED = 1


class Pixels:
    """C's memory as ``np.asarray`` takes it, in place. ``np.ctypeslib.as_array`` would make a type
    for every new shape and keep it for good."""

    def __init__(self, address: int, height: int, width: int) -> None:
        shape, data = (height, width, 3), (address, False)  # not read-only
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": data}


def c_function(upscaler: Upscaler) -> Any:
    """The upscaler as a C function pointer of the type in this file's head."""
    scale = upscaler.manifest.image.scale

    def upscale(lq: int | None, height: int, width: int, realism: float, sr: int | None) -> int:
        try:
            if lq is None or sr is None:
                raise UsageError(f"{'lq' if lq is None else 'sr'}: expected pixels, found NULL.")
            if height < 1 or width < 1:
                raise UsageError(f"{height} x {width} px: expected at least 1 x 1.")
            source = np.asarray(Pixels(lq, height, width))
            result = np.asarray(Pixels(sr, height * scale, width * scale))
            upscaler(source, realism, out=result)
        except RcodError as error:
            log.error("%s: %s", type(error).__name__, error)
            return error.exit_code
        except BaseException:  # nothing may be raised into C, Ctrl-C neither
            log.exception("upscale")
            return UNEXPECTED
        return 0

    return UPSCALE_T(upscale)

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

from rcod_runtime import RcodError, Upscaler

log = logging.getLogger(__name__)

BYTES = ctypes.POINTER(ctypes.c_uint8)
UPSCALE_T = ctypes.CFUNCTYPE(
    ctypes.c_int, BYTES, ctypes.c_int32, ctypes.c_int32, ctypes.c_float, BYTES
)
UNEXPECTED = 1


def c_function(upscaler: Upscaler) -> Any:
    """The upscaler as a C function pointer of the type in this file's head."""
    scale = upscaler.manifest.image.scale

    def upscale(lq: Any, height: int, width: int, realism: float, sr: Any) -> int:
        try:
            source = np.ctypeslib.as_array(lq, shape=(height, width, 3))
            result = np.ctypeslib.as_array(sr, shape=(height * scale, width * scale, 3))
            upscaler(source, realism, out=result)
        except RcodError as error:
            log.error("%s: %s", type(error).__name__, error)
            return error.exit_code
        except BaseException:  # nothing may be raised into C, Ctrl-C neither
            log.exception("upscale")
            return UNEXPECTED
        return 0

    return UPSCALE_T(upscale)

"""manifest.json: what is in a bundle, what it can do, and the evidence for it.

The same classes write and read it. Every value is checked when an object is made; an unknown field
or a newer version is refused. Paths are POSIX, relative to the bundle, and can't leave it.
"""

from __future__ import annotations

import errno
import hashlib
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, cast

from rcod_runtime.contract import ALL_GRAPHS, GUIDE, check_graphs
from rcod_runtime.errors import BundleError, ManifestError
from rcod_runtime.files import open_regular, read_bounded
from rcod_runtime.schema import Record, parse_json, record_from_json, record_to_json

VERSION = 1
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20  # a real one has a few kilobytes
MAX_GUIDE_PX = 512  # sides of what the guide looks at: the centre of a larger photo
MAX_SIDE = 2**20  # of any tensor
MAX_DATA_FILES = 16  # of one graph
MAX_ENGINES = 1024
MAX_ENGINE_BYTES = 2**35

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_AXIS = re.compile(r"batch|(height|width)(/[1-9][0-9]{0,3})?")


class Precision(str, Enum):
    """A number format: of arithmetic, or of stored weights. int8: of the convolutions' products."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True)
class _Checked(Record):
    """Checks that several records need."""

    def require_file(self, field: str, path: str) -> None:
        if not (_FILE.fullmatch(path) and len(path) <= 240):
            raise ManifestError(
                field, "a relative POSIX path inside the bundle (letters, digits, . _ - /)", path
            )

    def require_sha256(self, field: str, digest: str) -> None:
        if not _SHA256.fullmatch(digest):
            raise ManifestError(field, "a SHA-256 in 64 lower-case hexadecimal digits", digest)

    def require_range(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        self.require(field, low <= value <= high, f"a value in {low}..{high}")


@dataclass(frozen=True)
class Identity(_Checked):
    """Who made what from which data. ``licence`` is an SPDX expression."""

    name: str
    family: Literal["nano", "rcod-o", "rcod-s"]
    summary: str
    licence: str
    sources: tuple[str, ...]

    def check(self) -> None:
        good = bool(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name))
        self.require("name", good, "1 to 64 letters, digits, dots, - and _")


@dataclass(frozen=True)
class Level(_Checked):
    """A step of the realism control: its timestep and the constants of Eq. 3 at it."""

    name: str
    timestep: int
    alpha: float
    sigma: float

    def check(self) -> None:
        good = bool(re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", self.name)) and self.name != "adaptive"
        self.require("name", good, 'a lower-case word other than "adaptive"')
        self.require("timestep", 1 <= self.timestep <= 1000, "an integer in 1..1000")
        self.require("alpha", 0 < self.alpha <= 1, "a number in (0, 1]")
        one = self.alpha**2 + self.sigma**2
        self.require("sigma", self.sigma >= 0 and abs(one - 1) <= 1e-5, "alpha^2 + sigma^2 = 1")


@dataclass(frozen=True)
class MetricRange(_Checked):
    """Eq. 5's constants: the range of M in the training data, and the interval of timesteps."""

    m_min: float
    m_max: float
    k: int

    def check(self) -> None:
        self.require_range("m_min", -1, 1)
        self.require("m_max", self.m_min < self.m_max <= 1, f"a number in ({self.m_min}, 1]")
        self.require_range("k", 1, 1000)


@dataclass(frozen=True)
class ImageContract(_Checked):
    """What the graphs take and give. Tiles and overlaps are counted in output pixels."""

    scale: int
    channels: int
    value_min: float
    value_max: float
    size_multiple: int
    tile_px: int
    overlap_px: int
    tokens_px: int

    def check(self) -> None:
        self.require_range("scale", 1, 8)
        self.require("channels", self.channels == 3, "3")
        self.require("value_min", self.value_min == -1, "-1")
        self.require("value_max", self.value_max == 1, "1")
        self.require_range("size_multiple", 1, 256)
        whole = 0 < self.tile_px <= 4096 and self.tile_px % self.size_multiple == 0
        self.require("tile_px", whole, f"a multiple of {self.size_multiple}, at most 4096")
        self.require("overlap_px", 0 <= self.overlap_px <= self.tile_px // 2, "0..tile_px/2")
        self.require_range("tokens_px", 1, 1024)


@dataclass(frozen=True)
class Tensor(_Checked):
    """An input or output of a graph. A text in ``shape`` names an axis that may vary."""

    name: str
    dtype: Literal["float32"]
    shape: tuple[int | str, ...]
    layout: Literal["NCHW", "NLC", "NK", "N", "NKRR"]

    def check(self) -> None:
        self.require("shape", len(self.shape) == len(self.layout), f"axes {self.layout}")
        for index, side in enumerate(self.shape):
            if not _is_side(side):
                raise ManifestError(
                    f"shape[{index}]", "a length, or batch, height or width or a part of them", side
                )

    def sized(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        """The shape with numbers for its axes: batch, height and width, or parts of them."""
        sides = {"batch": batch, "height": height, "width": width}
        shape = []
        for axis in self.shape:
            name, _, divisor = (axis if isinstance(axis, str) else "").partition("/")
            shape.append(sides[name] // int(divisor or 1) if isinstance(axis, str) else axis)
        return tuple(shape)


def _is_side(side: int | str) -> bool:
    return bool(_AXIS.fullmatch(side)) if isinstance(side, str) else 1 <= side <= MAX_SIDE


@dataclass(frozen=True)
class Graph(_Checked):
    """An ONNX file. ``precision`` is of the arithmetic, ``weights`` of the stored weights;
    ``data_files`` maps files with external data to their SHA-256."""

    file: str
    data_files: dict[str, str]
    sha256: str
    bytes: int
    opset: int
    precision: Precision
    weights: Precision
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def check(self) -> None:
        self.require_file("file", self.file)
        # Libraries tell formats by the suffix, and others come with files of their own.
        self.require("file", self.file.endswith(".onnx"), "a file that ends in .onnx")
        self.require_sha256("sha256", self.sha256)
        few = len(self.data_files) <= MAX_DATA_FILES and self.file not in self.data_files
        self.require("data_files", few, f"at most {MAX_DATA_FILES} files beside {self.file}")
        for path, digest in self.data_files.items():
            self.require_file("data_files", path)
            self.require_sha256(f"data_files.{path}", digest)
        self.require_range("bytes", 1, 2**31)  # protobuf ends there
        self.require_range("opset", 17, 64)
        for field in ("inputs", "outputs"):
            names = [tensor.name for tensor in getattr(self, field)]
            self.require(field, len(set(names)) == len(names), "every tensor with its own name")

    @property
    def content_sha256(self) -> str:
        """Of the graph with its weights: the file's, or of all its files' where it has several."""
        if not self.data_files:
            return self.sha256
        digests = [self.sha256, *(self.data_files[name] for name in sorted(self.data_files))]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class Engine(_Checked):
    """A TensorRT engine of one graph. ``profile``: input -> (min, opt, max) shape; ``options``:
    settings of the builder that differ from its defaults; ``onnx_sha256``: the content_sha256 of
    the graph it was built from."""

    file: str
    sha256: str
    bytes: int
    graph: str
    target: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    sm: tuple[int, ...]
    os: str
    profile: dict[str, tuple[tuple[int, ...], ...]]
    precision: Precision
    options: dict[str, str]
    onnx_sha256: str
    scratch_bytes: int

    def check(self) -> None:
        self.require_file("file", self.file)
        self.require_sha256("sha256", self.sha256)
        self.require_sha256("onnx_sha256", self.onnx_sha256)
        self.require_range("bytes", 1, MAX_ENGINE_BYTES)
        self.require("graph", self.graph in ALL_GRAPHS, f"one of {', '.join(ALL_GRAPHS)}")
        self.require("sm", all(50 <= sm <= 999 for sm in self.sm), "numbers such as 89 for sm_89")
        for name, shapes in self.profile.items():
            same = len(shapes) == 3 and len({len(shape) for shape in shapes}) == 1
            rising = same and all(
                0 < a <= b <= c <= MAX_SIDE for a, b, c in zip(*shapes, strict=True)
            )
            if not rising:
                raise ManifestError(f"profile.{name}", "min <= opt <= max shapes", shapes)
        known = -1 <= self.scratch_bytes <= MAX_ENGINE_BYTES
        self.require("scratch_bytes", known, f"a number up to {MAX_ENGINE_BYTES}, or -1: not known")


@dataclass(frozen=True)
class Sample(_Checked):
    """A photo and its upscaled image, made with ``realism``, colour match wavelet and otherwise
    default settings; backends may differ from it by ``max_abs_diff_u8``."""

    lq: str
    sr: str
    realism: str | float
    lq_sha256: str
    sr_sha256: str
    max_abs_diff_u8: int

    def check(self) -> None:
        self.require_file("lq", self.lq)
        self.require_file("sr", self.sr)
        self.require_sha256("lq_sha256", self.lq_sha256)
        self.require_sha256("sr_sha256", self.sr_sha256)
        self.require_range("max_abs_diff_u8", 0, 255)


@dataclass(frozen=True)
class Parity(_Checked):
    """A graph (at a level, or one of its outputs) against PyTorch in fp32, and what was allowed."""

    graph: str
    level: str | None
    precision: Precision
    max_abs: float
    cosine: float
    limit_max_abs: float
    limit_cosine: float

    def check(self) -> None:
        self.require("graph", self.graph in ALL_GRAPHS, f"one of {', '.join(ALL_GRAPHS)}")


@dataclass(frozen=True)
class Evidence(_Checked):
    """What was measured at export. ``sample_psnr_db``: sample against PyTorch, 8 bit."""

    parity: tuple[Parity, ...]
    sample_psnr_db: float | None


@dataclass(frozen=True)
class Manifest(_Checked):
    """The whole description of a bundle. ``levels`` run from fidelity to realism."""

    version: int
    identity: Identity
    levels: tuple[Level, ...]
    metric: MetricRange
    image: ImageContract
    graphs: dict[str, Graph]
    engines: tuple[Engine, ...]
    sample: Sample | None
    evidence: Evidence

    def check(self) -> None:
        _check_version(self.version)
        self.require("levels", 1 <= len(self.levels) <= 16, "1 to 16 levels")
        for i, (low, high) in enumerate(zip(self.levels, self.levels[1:], strict=False), start=1):
            if low.timestep >= high.timestep:
                raise ManifestError(
                    f"levels[{i}].timestep", f"more than {low.timestep}", high.timestep
                )
        names = [level.name for level in self.levels]
        self.require("levels", len(set(names)) == len(names), "every level with its own name")
        check_graphs(self.graphs, self.image, self.identity.family, len(self.levels))
        if self.sample is not None:
            self._check_realism(self.sample.realism, names)
        self.require("engines", len(self.engines) <= MAX_ENGINES, f"at most {MAX_ENGINES}")
        for index, engine in enumerate(self.engines):
            if engine.graph not in self.graphs:
                raise ManifestError(
                    f"engines[{index}].graph", f"one of {', '.join(self.graphs)}", engine.graph
                )
            graph = self.graphs[engine.graph]
            if engine.onnx_sha256 != graph.content_sha256:
                raise ManifestError(
                    f"engines[{index}].onnx_sha256",
                    f"{graph.content_sha256} of {graph.file}",
                    engine.onnx_sha256,
                    remedy="Build the engines again: rcod-export engines BUNDLE.",
                )

    def _check_realism(self, realism: str | float, names: list[str]) -> None:
        settings = [*names, *(["adaptive"] if self.has_metric_estimator else [])]
        good = realism in settings if isinstance(realism, str) else 0 <= realism <= 1
        if not good:
            expected = f"one of {', '.join(settings)}, or a number in [0, 1]"
            raise ManifestError("sample.realism", expected, realism)

    @property
    def has_metric_estimator(self) -> bool:
        """Whether a graph estimates M (a MEM), which the adaptive setting needs."""
        graph = self.graphs[GUIDE if self.is_guided else "encoder"]
        return any(tensor.name == "m_l" for tensor in graph.outputs)

    @property
    def is_guided(self) -> bool:
        """Whether a guide feeds the branches of encoder and denoiser."""
        return GUIDE in self.graphs

    @property
    def has_int8(self) -> bool:
        """Whether a graph's convolutions multiply 8 bits; the rest has the backend's precision."""
        return any(graph.precision is Precision.INT8 for graph in self.graphs.values())

    @property
    def has_bf16(self) -> bool:
        """Whether a graph's products are in bf16, which ONNX Runtime has not on a CPU."""
        return any(graph.precision is Precision.BF16 for graph in self.graphs.values())

    def precision_with(self, backend_precision: str) -> str:
        """What the graphs compute in where a backend has this precision, for people."""
        return f"int8 and {backend_precision}" if self.has_int8 else backend_precision

    def to_json(self) -> str:
        """Fields in the order of the classes, newline at the end."""
        return record_to_json(self)

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read a manifest; ``source`` is named in errors.

        Raises:
            ManifestError: not JSON, or a field is unknown, missing or wrong.
        """
        try:
            value = parse_json(text)
        except ValueError as exc:
            raise ManifestError("", "JSON", str(exc), source) from exc
        try:
            if isinstance(value, dict) and type(value.get("version")) is int:
                _check_version(value["version"])  # first: its fields may well be unknown here
            return cast(Manifest, record_from_json(cls, value))
        except ManifestError as error:
            raise error.in_file(source) from None


def _check_version(version: int) -> None:
    if version != VERSION:
        newer = version > VERSION
        raise ManifestError(
            "version",
            str(VERSION),
            version,
            remedy="Upgrade rcod." if newer else "Re-export the bundle.",
        )


def read_manifest(path: Path) -> Manifest:
    """Read and check the file.

    Raises:
        BundleError: the file can't be read.
        ManifestError: its content is refused.
    """
    return parse_manifest(read_manifest_bytes(path), str(path))


def read_manifest_bytes(path: Path) -> bytes:
    """The file's content, at most MAX_MANIFEST_BYTES.

    Raises:
        BundleError: the file can't be read.
        ManifestError: it is larger.
    """
    try:
        return read_bounded(path, MAX_MANIFEST_BYTES)
    except OSError as exc:
        if exc.errno == errno.EFBIG:
            raise ManifestError(
                "", f"at most {MAX_MANIFEST_BYTES} bytes", "more", str(path)
            ) from exc
        raise BundleError(
            f"{path}: can't be read ({exc.strerror}). Give the folder of a bundle, "
            f"which holds {MANIFEST_FILE}."
        ) from exc


def parse_manifest(data: bytes, source: str) -> Manifest:
    """A manifest from the bytes of its file; ``source`` is named in errors.

    Raises:
        ManifestError: not UTF-8, not JSON, or a field is refused.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ManifestError("", "UTF-8 text", f"byte {exc.start} that is not", source) from exc
    return Manifest.from_json(text, source)


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file's bytes in lower-case hexadecimal.

    Raises:
        OSError: it can't be read, or is a pipe or a device.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()

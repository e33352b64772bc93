"""The fuzzer's cases, each made from a seed and a number alone, and the process that runs them.

  python -m benchmarks.fuzz_cases KIND SEED FIRST LAST      one JSON line before and after each case

A case ends in a result or in an RcodError; anything else is a finding. What kills or blocks the
process is seen from outside (benchmarks/fuzz.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestant import peak_bytes
from benchmarks.corpus import image_corpus
from benchmarks.mutate import VALUES, Rng, mutate_bytes, mutate_json, with_valid_png_sums
from rcod_runtime import RcodError, Upscaler
from rcod_runtime.backends import BACKENDS
from rcod_runtime.image_io import decode_image, write_image
from rcod_runtime.manifest import sha256_file

KINDS = ("images", "bundles")
MEMORY_BYTES = 6 * 2**30  # address space of the process; OpenVINO alone reserves 2 GiB
SIDE_PX = 32  # of what is upscaled: the corner of a decoded image; one shape, compiled once
GRAPHS = ("encoder", "vpim", "denoiser", "decoder")
PHOTO = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

Case = Callable[[Rng], str]  # what happened, for counting


def outcome(case: Case, seed: int, kind: str, number: int) -> dict[str, Any]:
    """Run a case: ``outcome`` is what it says, the type of an RcodError, or ``untyped``."""
    rng = np.random.default_rng((seed, KINDS.index(kind), number))
    begin = time.perf_counter()
    detail = None
    try:
        found = case(rng)
    except RcodError as error:
        found = type(error).__name__
        str(error)  # a message that can't be made is a finding
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = "untyped"
        detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    result = {"case": number, "outcome": found, "seconds": time.perf_counter() - begin}
    return result if detail is None else {**result, "detail": detail[:500]}


# -- images -----------------------------------------------------------------------------------


class ImageCases:
    """A damaged file through decoding, upscaling its corner, and writing the result."""

    def __init__(self, folder: Path) -> None:
        from tests.runtime.fakes import make_bundle

        make_bundle(folder / "bundle")
        self.upscaler = Upscaler(folder / "bundle", precision="fp32", threads=1)
        self.corpus = image_corpus()
        self.others = list(self.corpus.values())
        self.folder = folder

    def content(self, rng: Rng) -> tuple[str, bytes]:
        """(name in the corpus, damaged content)."""
        name = list(self.corpus)[int(rng.integers(len(self.corpus)))]
        data = mutate_bytes(rng, self.corpus[name], self.others)
        return name, with_valid_png_sums(data) if rng.random() < 0.7 else data

    def __call__(self, rng: Rng) -> str:
        name, data = self.content(rng)
        photo = decode_image(data, name)
        corner = np.ascontiguousarray(photo.pixels[:SIDE_PX, :SIDE_PX])
        sr = self.upscaler(corner, float(rng.random()), 1)
        write_image(self.folder / "sr.png", sr, photo.icc)
        return "image"


# -- bundles ----------------------------------------------------------------------------------


class BundleCases:
    """A damaged bundle through opening, both backends and one call."""

    def __init__(self, folder: Path) -> None:
        from tests.runtime.fakes import make_bundle

        self.origin = folder / "origin"
        make_bundle(self.origin)
        self._add_entries()
        self.files = {p.name: p.read_bytes() for p in self.origin.rglob("*.onnx")}
        self.text = (self.origin / "manifest.json").read_text(encoding="utf-8")
        self.folder = folder / "bundle"

    def _add_entries(self) -> None:
        """A sample and an engine, so that their fields are damaged too."""
        path = self.origin / "manifest.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["sample"] = {
            "lq": "lq.png", "sr": "sr.png", "realism": 0.5, "lq_sha256": "0" * 64,
            "sr_sha256": "0" * 64, "max_abs_diff_u8": 2,
        }  # fmt: skip
        raw["engines"] = [
            {
                "file": "engines/vpim.engine", "sha256": "0" * 64, "bytes": 9, "graph": "vpim",
                "target": "tensorrt", "version": "10.9.0", "sm": [89], "os": "linux-x86_64",
                "profile": {"image": [[1, 3, 16, 16]] * 3}, "precision": "fp32", "options": {},
                "onnx_sha256": raw["graphs"]["vpim"]["sha256"], "scratch_bytes": 10,
            }
        ]  # fmt: skip
        path.write_text(json.dumps(raw), encoding="utf-8")

    def __call__(self, rng: Rng) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.origin, self.folder)
        damage = (_text, _structure, _structure, _file, _onnx_bytes, _onnx_fields)
        damage[int(rng.integers(len(damage)))](rng, self)
        ends = []
        for backend in BACKENDS:
            try:
                with Upscaler(self.folder, backend=backend, precision="fp32", threads=1) as opened:
                    opened(PHOTO, float(rng.random()), 1)
                ends.append("upscaled")
            except RcodError as error:
                str(error)
                ends.append(type(error).__name__)
        return ends[0] if len(set(ends)) == 1 else "one backend only: " + ", ".join(ends)

    def write_manifest(self, raw: Any) -> None:
        text = json.dumps(raw, default=str)
        (self.folder / "manifest.json").write_text(text, encoding="utf-8", errors="replace")

    def graph(self, rng: Rng) -> Path:
        return self.folder / "onnx" / f"{GRAPHS[int(rng.integers(len(GRAPHS)))]}.onnx"

    def rehash(self, path: Path) -> None:
        """The manifest of somebody who may write it: it agrees with the damaged file."""
        raw = json.loads(self.text)
        entry = raw["graphs"][path.stem]
        entry["bytes"], entry["sha256"] = path.stat().st_size, sha256_file(path)
        raw["engines"] = []
        self.write_manifest(raw)


def _text(rng: Rng, cases: BundleCases) -> None:
    data = mutate_bytes(rng, cases.text.encode(), list(cases.files.values()))
    (cases.folder / "manifest.json").write_bytes(data)


def _structure(rng: Rng, cases: BundleCases) -> None:
    cases.write_manifest(mutate_json(rng, json.loads(cases.text)))


def _file(rng: Rng, cases: BundleCases) -> None:
    path = cases.graph(rng) if rng.random() < 0.8 else cases.folder / "manifest.json"
    data = path.read_bytes()
    path.unlink()
    choice = int(rng.integers(6))
    if choice == 0:
        path.mkdir()
    elif choice == 1:
        path.symlink_to(cases.origin / "manifest.json")
    elif choice == 2:
        path.symlink_to(path.name)
    elif choice == 3:
        os.mkfifo(path)
    elif choice == 4:
        path.write_bytes(mutate_bytes(rng, data, list(cases.files.values())))


def _onnx_bytes(rng: Rng, cases: BundleCases) -> None:
    path = cases.graph(rng)
    path.write_bytes(mutate_bytes(rng, path.read_bytes(), list(cases.files.values())))
    cases.rehash(path)


def _onnx_fields(rng: Rng, cases: BundleCases) -> None:
    """A well-formed model with other contents: names, operators, attributes, shapes, weights."""
    import onnx

    path = cases.graph(rng)
    model = onnx.load(path)
    for _ in range(int(rng.integers(1, 4))):
        messages = list(_messages(model))
        _change_field(rng, messages[int(rng.integers(len(messages)))])
    path.write_bytes(model.SerializeToString())
    cases.rehash(path)


def _messages(message: Any) -> list[Any]:
    inner: list[Any] = [message]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if hasattr(value, "add") else [value]:
                inner += _messages(item)
    return inner


def _change_field(rng: Rng, message: Any) -> None:
    fields = [(field, value) for field, value in message.ListFields()]
    if not fields:
        return
    field, value = fields[int(rng.integers(len(fields)))]
    repeated = hasattr(value, "append") or hasattr(value, "add")
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif repeated and rng.random() < 0.4:
        items = list(value)
        items.insert(int(rng.integers(len(items) + 1)), items[int(rng.integers(len(items)))])
        message.ClearField(field.name)
        getattr(message, field.name).extend(items)
    elif field.message_type is None:
        before = value[int(rng.integers(len(value)))] if repeated else value
        after = _other(rng, before)
        try:
            if repeated:
                value[int(rng.integers(len(value)))] = after
            else:
                setattr(message, field.name, after)
        except (ValueError, TypeError):
            return  # protobuf refuses the value, so no file can hold it


def _other(rng: Rng, before: Any) -> Any:
    if isinstance(before, bytes):
        return mutate_bytes(rng, before, [before])
    if isinstance(before, str):
        choices = ("Loop", "If", "Resize", "ConstantOfShape", "Expand", "Identity", "Einsum",
                   "z_lq", "image", "tokens", "com.microsoft", "", "MatMul")  # fmt: skip
        return choices[int(rng.integers(len(choices)))]
    numbers = [v for v in VALUES if type(v) in (int, float)]
    chosen = numbers[int(rng.integers(len(numbers)))]
    return type(before)(min(max(chosen, -(2**63)), 2**63 - 1)) if chosen == chosen else before


# -- the process ------------------------------------------------------------------------------


def open_cases(kind: str, folder: Path) -> Case:
    return ImageCases(folder) if kind == "images" else BundleCases(folder)


def main(argv: list[str]) -> None:
    kind, seed, first, last = argv[0], *map(int, argv[1:4])
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        case = open_cases(kind, Path(folder))
        for number in range(first, last):
            print(json.dumps({"case": number}), flush=True)
            result = outcome(case, seed, kind, number)
            result["peak_bytes"] = peak_bytes()
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Export and compile the full-size graphs with random weights, on a machine without a GPU.

  python -m benchmarks.fullsize --precision fp16

A checkpoint of Stable Diffusion 2.1's geometry with random fp16 weights is exported by
``rcod-export bundle`` (every graph and level compared with PyTorch in fp32) and its engines are
built by ``rcod-export engines`` for two generations of RTX GPUs. Each step is a process of its own;
its seconds run from start to end, its peak memory is the kernel's record for it and for what it
started. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command import run_command
from benchmarks.errors import CommandFailed
from benchmarks.report import document, format_card, format_table, machine_card
from rcod_runtime import UsageError

SCHEMA_VERSION = 1
FOLDERS = ("checkpoint", "bundle")

_MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    with open("/proc/self/status", encoding="ascii") as status:
        own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    # What it started and waited for; a child begins with the parent's pages, so it is no floor.
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak {max(own, children) * 1024}", file=sys.stderr)
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fullsize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--family", choices=("rcod-o", "rcod-s"), default="rcod-o")
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    add("--opset", type=int, choices=(20, 23), default=23, help="default: %(default)s")
    add("--sm", nargs="+", default=["89", "120"], help="RTX GPUs (default: 89 120)")
    add("--tile", default="512", metavar="PX", help="default: %(default)s")
    add("--work", type=Path, metavar="DIR", help="keep checkpoint and bundle here")
    add("--without-engines", action="store_true", help="export only")
    add("--json", type=Path, metavar="FILE", help="write the last line there too")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> str:
    """All steps; returns the JSON document."""
    card = machine_card()
    print(format_card(card))
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        checkpoint, bundle = (work / name for name in FOLDERS)
        steps: dict[str, dict[str, float]] = {}
        if (checkpoint / "rcod.json").is_file():
            check_family(checkpoint, arguments.family)
        else:
            steps["random checkpoint"] = step(
                "benchmarks.fullsize_checkpoint", arguments.family, str(checkpoint)
            )
        export = ("--precision", arguments.precision, "--opset", str(arguments.opset))
        steps["bundle"] = step(
            "rcod_export.main", "bundle", str(checkpoint), "-o", str(bundle),
            *export, "--tile", arguments.tile,
        )  # fmt: skip
        if not arguments.without_engines:
            steps["engines"] = step(
                "rcod_export.main", "engines", str(bundle), "--sm", *arguments.sm,
                "--tile", arguments.tile, "--batch", "1", "1",
            )  # fmt: skip
        print(step_table(steps))
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        sizes = {
            folder: sum(p.stat().st_size for p in (bundle / folder).rglob("*") if p.is_file())
            for folder in ("onnx", "engines")
        }
        print(f"\nonnx {sizes['onnx'] / 1e9:.2f} GB, engines {sizes['engines'] / 1e9:.2f} GB\n")
        print(captured("rcod_export.main", "inspect", str(bundle)))
    parity = manifest["evidence"]
    for row in parity["parity"]:
        where = row["graph"] if row["level"] is None else f"{row['graph']} {row['level']}"
        print(f"{where:<20} max abs {row['max_abs']:.1e}  cosine {row['cosine']:.8f}")
    return document(
        "fullsize",
        SCHEMA_VERSION,
        card,
        family=arguments.family,
        precision=arguments.precision,
        opset=arguments.opset,
        steps=steps,
        onnx_bytes=sizes["onnx"],
        engine_bytes=sizes["engines"],
        evidence=parity,
        engines=[
            {key: engine[key] for key in ("graph", "sm", "bytes", "scratch_bytes", "version")}
            for engine in manifest["engines"]
        ],
    )


def check_family(checkpoint: Path, family: str) -> None:
    """Raises UsageError where a checkpoint that is there already is of another family."""
    from rcod_train.checkpoint import read_info

    found = read_info(checkpoint / "rcod.json").family
    if found != family:
        raise UsageError(
            f"{checkpoint}: expected a checkpoint of {family}, found one of {found}. Choose "
            f"another --work, or --family {found}."
        )


def step(module: str, *arguments: str) -> dict[str, float]:
    """Run a module as a process, its messages passed on; its seconds and peak bytes.

    Raises:
        CommandFailed: its exit code is not 0.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-c", _MEASURED, module, *arguments]
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("peak "):
                peak = int(line.split()[1])
            else:
                sys.stderr.write(line)
    seconds = time.perf_counter() - begin
    if process.returncode != 0:
        raise CommandFailed(f"{module} {arguments[0]}: exit code {process.returncode}, see above.")
    return {"seconds": seconds, "peak_bytes": peak}


def captured(module: str, *arguments: str) -> str:
    """The stdout of a module run as a process."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise CommandFailed(f"{module} {arguments[0]}: exit code {done.returncode}, see above.")
    return done.stdout


def step_table(steps: dict[str, dict[str, Any]]) -> str:
    rows = [
        (name, f"{value['seconds']:.1f}", f"{value['peak_bytes'] / 1e9:.2f}")
        for name, value in steps.items()
    ]
    return format_table(("step", "seconds", "peak GB"), rows)


if __name__ == "__main__":
    sys.exit(main())

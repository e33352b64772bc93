"""The borders between the packages, read from their import statements."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "rcod_runtime": {"rcod_train", "rcod_export", "benchmarks", "tests", "torch", "diffusers",
                     "transformers", "peft", "onnx"},
    "rcod_train": {"rcod_runtime", "rcod_export", "benchmarks", "tests"},
    "rcod_export": {"benchmarks", "tests"},
}  # fmt: skip


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_in_the_allowed_direction(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_metrics_work_where_torch_is_not_installed() -> None:
    """The benchmarks judge finished images with them; rcod_train's others need torch."""
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'diffusers', 'transformers', 'cv2'))\n"
        "import benchmarks.quality, benchmarks.proof\n"
        "from benchmarks.picture import draw_picture\n"
        "from rcod_train.quality.metrics import ssim_y\n"
        "image = draw_picture(32, 32)\n"
        "assert ssim_y(image, image) > 0.999\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_one_place_makes_openvinos_core() -> None:
    """A second one in a process ends it at the next signal: see shared_core."""
    makers = {
        str(path.relative_to(ROOT))
        for package in ("rcod_runtime", "rcod_export", "rcod_train", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\b(ov|openvino)\.Core\(", path.read_text(encoding="utf-8"))
    }
    assert makers == {"rcod_runtime/backends/openvino_backend.py"}

"""``rcod-export`` and ``rcod-train`` where libraries are missing, or not needed."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["rcod_export.main", "rcod_train.main"])
def test_help_answers_without_torch(module: str) -> None:
    code = (
        "import sys, importlib\n"
        f"m = importlib.import_module({module!r})\n"
        "try:\n    m.main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'onnx', 'openvino', 'numpy', 'cryptography'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize(
    ("command", "missing", "arguments", "exit_code"),
    [
        ("export", "onnx", ["inspect", "b"], 8),
        ("export", "onnx", ["sign", "b", "--key", "k"], 8),
        ("train", "torch", ["nano", "--data", "d", "--out", "o"], 9),
    ],
)
def test_without_its_libraries_a_command_says_what_to_install(
    command: str, missing: str, arguments: list[str], exit_code: int
) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        f"from rcod_{command}.main import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == exit_code
    assert done.stderr == f'{missing} is not installed. pip install "rcod[{command}]"\n'

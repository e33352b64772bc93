"""Signed bundles: what is verified, and every way in which it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcod_export.main import main as export_main
from rcod_runtime import Upscaler
from rcod_runtime.bundle import open_bundle
from rcod_runtime.cli import doctor, upscale
from rcod_runtime.errors import HashMismatch, SignatureError, UsageError
from rcod_runtime.image_io import write_image

serialization = pytest.importorskip(
    "cryptography.hazmat.primitives.serialization", reason='needs pip install "rcod[signature]"'
)
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402


def write_keys(folder: Path, name: str = "key", kind: str = "ed25519") -> tuple[Path, Path]:
    """(private, public) PEM files, as openssl writes them."""
    key = (
        Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else ec.generate_private_key(ec.SECP256R1())
    )
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pem, encoding = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encoding))
    public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def signed(own_bundle: Path, keys: tuple[Path, Path]) -> Path:
    assert export_main(["sign", str(own_bundle), "--key", str(keys[0])]) == 0
    return own_bundle


def test_a_signed_bundle_opens_with_its_key_in_api_and_commands(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, photo, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "in.png", photo())
    options = ["--bundle", str(signed), "--require-signature", str(keys[1])]
    with Upscaler(signed, require_signature=keys[1]) as upscaler:
        assert upscaler(photo()).shape == (96, 160, 3)
    assert upscale.main([str(tmp_path / "in.png"), "-o", str(tmp_path / "o.png"), *options]) == 0
    assert doctor.main(options) == 0
    assert f"signed by {keys[1]}" in capsys.readouterr().out


def test_the_signature_is_what_openssl_makes_and_checks(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    files = ["-in", signed / "manifest.json", "-sigfile", signed / "manifest.sig"]
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", keys[1], *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        pytest.skip("no openssl command here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["manifest", "signature", "longer", "shorter"])
def test_a_changed_manifest_or_signature_is_refused(
    signed: Path, keys: tuple[Path, Path], where: str
) -> None:
    path = signed / ("manifest.json" if where == "manifest" else "manifest.sig")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1 if where == "signature" else 0
    data = {"manifest": data + b" ", "longer": data + b"x", "shorter": data[:-1]}.get(where, data)
    path.write_bytes(data)
    assert open_bundle(signed)  # it is well-formed: only the signature tells
    with pytest.raises(SignatureError, match="manifest.sig"):
        open_bundle(signed, keys[1])


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    with pytest.raises(SignatureError, match="another key signed it"):
        Upscaler(signed, require_signature=other)


def test_a_bundle_without_a_signature_is_refused_where_one_is_required(
    own_bundle: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bundle", str(own_bundle), "--require-signature", str(keys[1])]
    assert doctor.main(options) == 4
    assert "rcod-export sign BUNDLE --key" in capsys.readouterr().err
    (own_bundle / "manifest.sig").symlink_to(keys[1])
    with pytest.raises(SignatureError, match="found a link"):
        open_bundle(own_bundle, keys[1])


def test_the_manifest_stands_for_every_file_of_a_signed_bundle(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    (signed / "onnx/vpim.onnx").write_bytes(b"other")
    with pytest.raises(HashMismatch):
        open_bundle(signed, keys[1])


def test_a_key_that_cannot_be_used_is_named(signed: Path, keys: tuple[Path, Path]) -> None:
    folder = keys[0].parent
    (folder / "text.pem").write_text("hello")
    (folder / "large.pem").write_bytes(bytes(100_000))
    os.mkfifo(folder / "pipe.pem")
    _, curve = write_keys(folder, "curve", "ec")
    for path, message in {
        keys[0]: "found a private one",
        folder / "text.pem": "expected an Ed25519 public key in PEM",
        curve: "expected an Ed25519 public key, found EC",
        folder / "none.pem": "No such file",
        folder / "large.pem": "over the limit",
        folder / "pipe.pem": "a pipe",
        folder: "Is a directory",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_bundle(signed, path)


def test_only_a_plain_private_key_signs_and_only_a_whole_bundle_is_signed(
    own_bundle: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = keys[0].parent
    locked = serialization.BestAvailableEncryption(b"secret")
    (folder / "locked.pem").write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked
        )
    )
    for key in (keys[1], folder / "locked.pem", write_keys(folder, "curve", "ec")[0]):
        assert export_main(["sign", str(own_bundle), "--key", str(key)]) == 2
    (own_bundle / "onnx/vpim.onnx").write_bytes(b"other")
    assert export_main(["sign", str(own_bundle), "--key", str(keys[0])]) == 4
    assert "HashMismatch" in capsys.readouterr().err
    assert not (own_bundle / "manifest.sig").exists()


def test_without_cryptography_the_pip_line_is_said(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SignatureError, match=r'pip install "rcod\[signature\]"'):
        open_bundle(signed, keys[1])
    assert open_bundle(signed)  # nothing else needs it

"""The embedded model: what every newcomer runs first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.bundle import default_bundle_path, open_bundle
from rcod_runtime.cli import doctor, upscale
from rcod_runtime.image_io import read_image

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "nano"
PHOTO = ROOT / "docs" / "photo.png"
MAX_BUNDLE_BYTES = 40_000_000


def test_it_is_whole_and_at_most_40_mb() -> None:
    bundle = open_bundle()
    size = sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file())
    assert size <= MAX_BUNDLE_BYTES


def test_its_card_names_the_data_and_the_limits() -> None:
    card = (default_bundle_path() / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in ("google/dreambooth", "Debian", "Apache-2.0", "What it is not", "steps of"):
        assert words in card


def test_doctor_passes_on_both_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.count("self-test passed") >= 2


def test_the_readmes_first_command_works(tmp_path: Path) -> None:
    out = tmp_path / "photo_x4.png"
    assert upscale.main([str(PHOTO), "-o", str(out)]) == 0
    assert read_image(out).pixels.shape == (512, 512, 3)


def test_it_is_trained_and_its_levels_differ_in_order() -> None:
    """Away from fidelity the images move away from fidelity's; all stay near the input."""
    lq = read_image(PHOTO).pixels
    with Upscaler() as upscaler:
        images = [upscaler(lq, r).astype(float) for r in (0.0, 0.25, 0.5, 0.75, 1.0)]
    distances = [float(np.sqrt(np.square(image - images[0]).mean())) for image in images]
    assert distances[1] > 0.2 and distances == sorted(distances)
    for image in images:
        small = image.reshape(128, 4, 128, 4, 3).mean((1, 3))
        assert np.abs(small - lq).mean() < 8  # of 255: an untrained network is nowhere near


def test_it_computes_what_the_committed_checkpoint_does() -> None:
    torch = pytest.importorskip("torch")
    from rcod_export.bundle import moved_levels
    from rcod_export.parity import onnxruntime_session
    from rcod_export.reference import denoise
    from rcod_export.specs import handed_on
    from rcod_train.checkpoint import load_merged

    parts, info = load_merged(CHECKPOINT)
    info = moved_levels(info, tuple(level.timestep for level in open_bundle().manifest.levels))
    run = onnxruntime_session(open_bundle().graph_path("denoiser"))
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, handed_on(parts), 16, 24, generator=generator)
    tokens = torch.randn(1, 64, 128, generator=generator)
    for index, level in enumerate(info.levels):
        one_hot = np.eye(len(info.levels), dtype=np.float32)[index][None]
        feeds = {"z_lq": z.numpy(), "tokens": tokens.numpy(), "level": one_hot}
        found = run(feeds)["z_sr"]
        with torch.no_grad():
            expected = denoise(parts, z, tokens, info, index).numpy()
        assert np.abs(found - expected).max() < 1e-4 * max(1.0, level.sigma / level.alpha)

"""The model card of a bundle, made from the manifest and the training record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcod_runtime.manifest import Manifest


def write_card(path: Path, manifest: Manifest, training: Mapping[str, Any]) -> None:
    """Write MODEL_CARD.md. ``training`` is the record in the checkpoint's rcod.json."""
    path.write_text(card(manifest, training), encoding="utf-8")


def card(manifest: Manifest, training: Mapping[str, Any]) -> str:
    identity = manifest.identity
    lines = [
        f"# {identity.name}",
        "",
        identity.summary,
        "",
        f"Family {identity.family}, licence {identity.licence}. Method: Realism Controlled "
        "One-step Diffusion (RCOD), AAAI 2026, arXiv 2509.10122.",
        "",
        "## Levels",
        "",
        "| level | timestep | alpha | sigma |",
        "|---|---|---|---|",
        *(f"| {x.name} | {x.timestep} | {x.alpha:.4f} | {x.sigma:.4f} |" for x in manifest.levels),
        "",
        f"Latent metric M in the training data: {manifest.metric.m_min:.4f} to "
        f"{manifest.metric.m_max:.4f}.",
        "",
        "## Data",
        "",
        *(f"- {source}" for source in identity.sources or ("not stated",)),
        "",
        "## Training",
        "",
        *_training_lines(training),
        "",
        "## What it is not",
        "",
        "- It invents plausible detail, the more the higher the realism. Don't use its output as "
        "evidence: not for identification of people or number plates, not for medical, forensic or "
        "scientific measurement.",
        "- Text, faces that are only a few pixels wide and regular fine structure may come out "
        "wrong.",
        "- It was trained for photographs enlarged four times, not for drawings or screenshots.",
        "",
    ]
    return "\n".join(lines)


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    lines = []
    if "photos" in training:
        lpips = "with" if training.get("use_lpips") else "without"
        lines.append(f"{training['photos']} photo crops, seed {training['seed']}, {lpips} LPIPS.")
        lines.append("")
    for stage in ("vae", "base", "regression", "rcod", "mem"):
        if stage in training:
            c = training[stage]
            images = c["photos_per_batch"] * c["crops_per_photo"]
            lines.append(
                f"- {stage}: {c['steps']} steps of {images} crops of {c['crop_px']} px, "
                f"learning rate {c['learning_rate']}"
            )
    return lines or ["No record."]

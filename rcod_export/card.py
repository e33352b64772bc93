"""The model card of a bundle, made from the manifest and the training record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcod_runtime.errors import UsageError
from rcod_runtime.files import write_whole
from rcod_runtime.manifest import Manifest, Precision, read_manifest

CARD = "MODEL_CARD.md"
QUALITY, LAST = "## Quality", "## What it is not"


def write_card(path: Path, manifest: Manifest, training: Mapping[str, Any]) -> None:
    """Write MODEL_CARD.md. ``training`` is the record in the checkpoint's rcod.json."""
    path.write_text(card(manifest, training), encoding="utf-8")


def _int8_lines(manifest: Manifest) -> list[str]:
    names = [name for name, graph in manifest.graphs.items() if graph.precision is Precision.INT8]
    return [f"Convolutions in 8 bits, for CPUs: {', '.join(names)}.", ""] if names else []


def _moved_lines(manifest: Manifest, training: Mapping[str, Any]) -> list[str]:
    trained = _trained_timesteps(training)
    if not trained or {level.timestep for level in manifest.levels} <= set(trained):
        return []
    return [f"Moved at the export from {', '.join(map(str, trained))}.", ""]


def _trained_timesteps(training: Mapping[str, Any]) -> list[int]:
    """Of the levels; none where the record doesn't say."""
    stage = training.get("refine", training.get("rcod", {}))
    if stage.get("grouping") != "paper":
        return []
    return [stage["k"] * i for i in range(1, stage["n"] + 1)]


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
        *_int8_lines(manifest),
        "## Levels",
        "",
        "| level | timestep | alpha | sigma |",
        "|---|---|---|---|",
        *(f"| {x.name} | {x.timestep} | {x.alpha:.4f} | {x.sigma:.4f} |" for x in manifest.levels),
        "",
        *_moved_lines(manifest, training),
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
        LAST,
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


def add_quality(bundle: Path, quality: Path) -> Path:
    """Put the means of a document of benchmarks.quality into a bundle's card, in the place of those
    that were there; returns the card.

    Raises:
        ManifestError: the folder is no bundle.
        UsageError: the file is no such document or of other graphs, or the card has no place.
        OutputError: the card can't be written.
    """
    manifest = read_manifest(bundle / "manifest.json")
    path = bundle / CARD
    try:
        document = json.loads(quality.read_text(encoding="utf-8"))
        lines = _quality_lines(document)
        measured = document["model"]["graph_sha256"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise UsageError(
            f"{quality}: expected the JSON document of benchmarks.quality ({exc!r})."
        ) from exc
    if measured != {name: graph.content_sha256 for name, graph in manifest.graphs.items()}:
        raise UsageError(f"{quality}: measured with other graphs than {bundle}'s. Measure again.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"{path}: not readable ({exc.strerror or exc}). Export again.") from exc
    before, mark, after = text.partition(f"{LAST}\n")
    if not mark:
        raise UsageError(f'{path}: expected the section "{LAST}", found none. Export again.')
    before = before.partition(f"{QUALITY}\n")[0]
    whole = "\n".join([before + QUALITY, "", *lines, "", LAST, after])
    write_whole(path, whole.encode())
    return path


def _quality_lines(document: Mapping[str, Any]) -> list[str]:
    metrics = {k: v["header"] for k, v in document["metrics"].items()}
    count = len(document["methods"][0]["images"])
    lines = [
        f"{document['dataset']['name']}, {count} pairs, means (benchmarks.quality):",
        "",
        "| | " + " | ".join(metrics.values()) + " |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    for method in document["methods"]:
        values = (method["mean"].get(k) for k in metrics)
        shown = (" - " if v is None else f"{v:.3f}" if v < 1 else f"{v:.2f}" for v in values)
        lines.append(f"| {method['name']} | " + " | ".join(shown) + " |")
    return lines


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    lines = []
    if "photos" in training:
        lpips = "with" if training.get("use_lpips") else "without"
        share = training.get("validation_share")
        held_out = f", {100 * share:g} % of all held out" if share else ""
        lines.append(
            f"{training['photos']} photo crops{held_out}, seed {training['seed']}, {lpips} LPIPS."
        )
        lines.append("")
    for stage in ("vae", "base", "regression", "rcod", "refine", "mem"):
        if stage in training:
            c = training[stage]
            images = c["photos_per_batch"] * c["crops_per_photo"]
            trained, rate = "", c["learning_rate"]
            if stage in ("rcod", "refine") and (timesteps := _trained_timesteps(training)):
                trained = f", at t = {', '.join(map(str, timesteps))}"
            if not c.get("train_adapters", True):
                trained, rate = f"{trained}, the decoder alone", c["decoder_learning_rate"]
            lines.append(
                f"- {stage}: {c['steps']} steps of {images} crops of {c['crop_px']} px, "
                f"learning rate {rate}{trained}"
            )
    if "from" in training:
        start = training["from"]
        lines += ["", f"It went on from an earlier {start['name']}, trained so:", ""]
        lines += _training_lines(start["training"])
    return lines or ["No record."]

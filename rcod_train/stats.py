"""``rcod-train stats``: the distribution of M over a data set, as in the paper's Fig. 4, and how
well it and two other distances follow the SSIM of a pair, as in its Table 1b.

stats.json    one document: the range of M, coefficients, and the values of every pair
stats.png     the figure
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from rcod_train.bases import load_vae
from rcod_train.checkpoint import load_merged
from rcod_train.config import LoopConfig, degradation_shares
from rcod_train.data import PhotoBatches, to_unit
from rcod_train.degradation import upsample_lq
from rcod_train.errors import ConfigError, DataError, TrainError
from rcod_train.files import file_written_whole
from rcod_train.grouping import cosine_metric
from rcod_train.models.sd import SdVae
from rcod_train.models.vae import NanoVae
from rcod_train.photos import UNREADABLE, find_pairs, find_photos
from rcod_train.precision import Autocast, resolve_device, resolve_precision
from rcod_train.quality.metrics import ssim_y
from rcod_train.validation import to_pixels

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PAPER = {"cosine": 0.78, "l1": 0.60, "mse": 0.54}  # |Spearman| with SSIM, Table 1b
QUANTILE = 0.02  # M_min and M_max are this quantile and its mirror, as a training measures them
MIN_PAIRS = 3


@dataclass(frozen=True)
class StatsConfig:
    """model: a merged checkpoint, or a base model with vae/. Pairs are taken as they are and whole;
    of photos ``count`` crops are degraded, half heavily and half lightly."""

    model: str
    out: str
    data: tuple[str, ...] = ()
    pairs: str = ""
    count: int = 512
    crop_px: int = 512
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"


def measure(config: StatsConfig) -> dict[str, Any]:
    """Write stats.json and stats.png into ``config.out``; returns the document.

    Raises:
        ConfigError: neither or both of data and pairs, or too few of them.
        CheckpointError, DataError: the model or the images can't be read.
        TrainError: matplotlib is missing, or the folder can't be written.
    """
    if bool(config.data) == bool(config.pairs):
        raise ConfigError("stats: give either --data (photos to degrade) or --pairs (LR and HR).")
    draw = _plotter()
    device = resolve_device(config.device)
    autocast = Autocast(resolve_precision(config.precision, device), device)
    vae = _load_vae(config.model).to(device)
    rows = []
    with torch.no_grad(), autocast():
        for name, lq, hq in _images(config):
            z_lq, z_hq = (vae.encode(to_unit(x.to(device))).float() for x in (lq, hq))
            ssim = ssim_y(to_pixels(lq), to_pixels(hq))
            rows.append({"name": name, **distances(z_lq, z_hq), "ssim_y": ssim})
    if len(rows) < MIN_PAIRS:
        raise ConfigError(f"stats: expected at least {MIN_PAIRS} images, found {len(rows)}.")
    document = summary(rows) | {
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k != "out"},
        "images": rows,
    }
    _write(Path(config.out), document, draw)
    return document


def distances(z_lq: Tensor, z_hq: Tensor) -> dict[str, float]:
    """Of two latents (1, C, h, w): Eq. 6, mean distances, and the means of both (Fig. 4a)."""
    difference = z_lq - z_hq
    return {
        "cosine": float(cosine_metric(z_lq, z_hq)),
        "l1": float(difference.abs().mean()),
        "mse": float(difference.square().mean()),
        "mean_z_lq": float(z_lq.mean()),
        "mean_z_hq": float(z_hq.mean()),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The range of M and |Spearman| of every distance against SSIM."""
    m = np.array([row["cosine"] for row in rows])
    ssim = [row["ssim_y"] for row in rows]
    coefficients = {
        name: abs(float(spearmanr([row[name] for row in rows], ssim).statistic)) for name in PAPER
    }
    low, high = np.quantile(m, [QUANTILE, 1 - QUANTILE])
    return {
        "schema_version": SCHEMA_VERSION,
        "count": len(rows),
        "m": {
            "min": float(m.min()), "max": float(m.max()), "mean": float(m.mean()),
            "m_min": float(low), "m_max": float(high), "quantile": QUANTILE,
        },
        "spearman_with_ssim": coefficients,
        "paper": PAPER,
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """For the terminal."""
    m, ours = document["m"], document["spearman_with_ssim"]
    lines = [
        f"{document['count']} images: M {m['min']:.3f} to {m['max']:.3f}, mean {m['mean']:.3f}",
        f"M_min {m['m_min']:.4f}, M_max {m['m_max']:.4f} "
        f"(quantiles {m['quantile']} and {1 - m['quantile']})",
        "",
        "|Spearman| with SSIM   here   paper (Table 1b)",
    ]
    return "\n".join(lines + [f"{k:<22} {ours[k]:.3f}  {PAPER[k]:.2f}" for k in PAPER])


def _load_vae(model: str) -> NanoVae | SdVae:
    if (Path(model) / "rcod.json").exists():
        parts, _ = load_merged(model)
        if parts.guide is not None:
            # As in its training: M must not depend on what the branches learn.
            log.info("rcod-s: M is that of its base, without the branches")
            parts.guide.matrices.bypass = True
        return parts.vae
    return load_vae(model).eval().requires_grad_(False)


def _images(config: StatsConfig) -> Any:
    """Name, upsampled lq and hq of every image, (1, 3, H, W) uint8; sides multiples of 8."""
    if not config.pairs:
        loop = LoopConfig(photos_per_batch=1, crops_per_photo=1, crop_px=config.crop_px,
                          context_px=config.crop_px)  # fmt: skip
        photos = find_photos(config.data, config.crop_px)
        batches = PhotoBatches(
            photos, loop, config.seed, tokens_px=8, degradations=degradation_shares(heavy=0.5)
        )
        for i in tqdm(range(config.count), "stats", unit="image"):
            batch = batches[i]
            yield photos[int(batch.photo)].name, batch.lq, batch.hq
        return
    for pair in tqdm(find_pairs(config.pairs, 16), "stats", unit="image"):
        try:
            hq, lq = pair.read(), pair.read_lq()
        except UNREADABLE as exc:
            raise DataError(f"{pair}: can't be decoded ({exc}). Remove the pair.") from exc
        height, width = (side // 8 * 8 for side in hq.shape[:2])
        both = (upsample_lq(lq, hq.shape[:2])[:height, :width], hq[:height, :width])
        yield pair.name, *(torch.from_numpy(x.copy()).permute(2, 0, 1)[None] for x in both)


def _plotter() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise TrainError(
            'stats: the package matplotlib is missing. pip install "rcod[plot]"'
        ) from exc
    return Figure


def _write(out: Path, document: dict[str, Any], figure_type: Any) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, save in (
            ("stats.json", lambda p: p.write_text(json.dumps(document, indent=1) + "\n")),
            ("stats.png", lambda p: draw(document, figure_type).savefig(p, format="png", dpi=110)),
        ):
            with file_written_whole(out / name) as partial:
                save(partial)
    except OSError as exc:
        raise TrainError(
            f"{out}: can't be written ({exc.strerror or exc}). Choose another --out."
        ) from exc


def draw(document: dict[str, Any], figure_type: Any) -> Any:
    """Means of the latents (Fig. 4a), M with the groups of Eq. 5 for n = 3 (Fig. 4b), M against
    SSIM."""
    rows, m = document["images"], document["m"]
    figure = figure_type(figsize=(12, 3.6), layout="constrained")
    means, metric, ssim = figure.subplots(1, 3)
    both = {"$z_L$": "mean_z_lq", "$z_H$": "mean_z_hq"}
    edges = np.histogram_bin_edges([row[key] for row in rows for key in both.values()], 30)
    for label, key in both.items():
        means.hist([row[key] for row in rows], bins=edges, alpha=0.6, label=label)
    means.set(title="(a) mean of the latents", xlabel="mean", ylabel="images")
    means.legend()
    values = [row["cosine"] for row in rows]
    metric.hist(values, bins=30, color="#6b7280")
    edges = np.linspace(m["m_min"], m["m_max"], 4)
    for i, (name, colour) in enumerate(
        (("realism", "#c2410c"), ("neutral", "#ca8a04"), ("fidelity", "#1d4ed8"))
    ):
        metric.axvspan(edges[i], edges[i + 1], alpha=0.15, color=colour, label=name, zorder=0)
    metric.set(title="(b) M, with the groups of Eq. 5", xlabel="$M_L$ (cosine)", ylabel="images")
    metric.legend()
    ssim.scatter(values, [row["ssim_y"] for row in rows], s=8, color="#374151")
    coefficient = document["spearman_with_ssim"]["cosine"]
    ssim.set(
        title=f"(c) |Spearman| {coefficient:.2f}", xlabel="$M_L$ (cosine)", ylabel="SSIM of lq"
    )
    return figure

"""Node kinds of the full-size denoiser, before and after the level table and the choice of opset.

  python -m benchmarks.nodes

Before: the U-Net of Stable Diffusion 2.1 as it is, with a timestep as input. After: the graph that
ships, with the level table and Eq. 3. Both at opset 20 (what TensorRT 10.3 reads) and 23, with
random fp16 weights. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from benchmarks.command import run_command
from benchmarks.geometry import sd21_unet
from benchmarks.report import document, format_card, format_table, machine_card
from rcod_export.graphs import DenoiserGraph
from rcod_export.onnx_file import export_onnx
from rcod_train.official import official_info
from rcod_train.official.layouts import RCOD_O

SCHEMA_VERSION = 1
KINDS_SHOWN = 24
LATENT_PX, TOKENS, TOKEN_WIDTH = 64, 257, 1024


class _Plain(nn.Module):
    """The U-Net with its timestep: z_lq, tokens, timestep (B,) -> eps."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = sd21_unet().half()

    def forward(self, z_lq: Tensor, tokens: Tensor, timestep: Tensor) -> Tensor:
        eps: Tensor = self.unet(
            z_lq.half(), timestep, encoder_hidden_states=tokens.half(), return_dict=False
        )[0]
        return eps.float()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nodes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line there too")
    arguments = parser.parse_args(argv)
    return run_command(run, arguments.json)


def run() -> str:
    """Four exports; returns the JSON document."""
    card = machine_card()
    print(format_card(card))
    counts: dict[str, dict[str, int]] = {}
    z_lq, tokens = torch.zeros(1, 4, LATENT_PX, LATENT_PX), torch.zeros(1, TOKENS, TOKEN_WIDTH)
    for opset in (20, 23):
        timestep = torch.tensor([500])
        counts[f"timestep, opset {opset}"] = exported_nodes(
            _Plain(), {"z_lq": z_lq, "tokens": tokens, "timestep": timestep}, opset
        )
        levels = official_info("nodes", RCOD_O).levels
        counts[f"table, opset {opset}"] = exported_nodes(
            DenoiserGraph(sd21_unet(), levels, torch.float16),
            {"z_lq": z_lq, "tokens": tokens, "level": torch.eye(len(levels))[:1]},
            opset,
        )
    print(node_table(counts))
    return document("nodes", SCHEMA_VERSION, card, nodes=counts)


def exported_nodes(module: nn.Module, inputs: Mapping[str, Tensor], opset: int) -> dict[str, int]:
    """How many nodes of each kind the ONNX export of a module has, at these shapes."""
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        path = Path(temporary) / "denoiser.onnx"
        export_onnx(module, inputs, ("output",), {name: {} for name in inputs}, opset, path)
        graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node))


def node_table(counts: dict[str, dict[str, int]]) -> str:
    """Kinds as rows, the most frequent first; what is left after KINDS_SHOWN is one row."""
    largest: Counter[str] = Counter()
    for nodes in counts.values():
        largest |= Counter(nodes)
    shown = [kind for kind, _ in largest.most_common(KINDS_SHOWN)]
    rows = [("all", *(str(sum(nodes.values())) for nodes in counts.values()))]
    rows += [(kind, *(str(nodes.get(kind, 0)) for nodes in counts.values())) for kind in shown]
    rest = [sum(n for kind, n in nodes.items() if kind not in shown) for nodes in counts.values()]
    rows.append(("others", *map(str, rest)))
    return format_table(("nodes", *counts), rows)


if __name__ == "__main__":
    sys.exit(main())

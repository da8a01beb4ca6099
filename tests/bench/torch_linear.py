"""For how many rows which way is the fastest: `python tests/bench/torch_linear.py` prints milliseconds.

All linear layers of SmolLM2 once, the weights read from memory each time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from measure import seconds  # noqa: E402
from torch import Tensor  # noqa: E402

from kvcache_torch.native import load  # noqa: E402

LAYERS, SHAPES, HEAD = 30, ((960, 576), (576, 576), (3072, 576), (576, 1536)), (49_152, 576)


def run(layer: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor], *rest: object) -> None:
    """One way through all layers."""
    for x, weight in zip(inputs, weights, strict=True):
        layer(x, weight, *rest)


@torch.inference_mode()
def main() -> None:
    """Each way, over the number of rows."""
    kernels = load()
    if kernels is None:
        sys.exit("no C compiler: there is no kernel to compare")
    weights = [torch.randn(shape) for shape in (*SHAPES * LAYERS, HEAD)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 8) for weight in weights]
    for rows in (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512, 1024):
        x = {size: torch.randn(rows, size) for _, size in SHAPES}
        inputs = [x[weight.shape[1]] for weight in weights]
        ways = {
            "kernel": partial(run, kernels.linear, inputs, weights, None),
            "oneDNN": partial(run, torch.ops.mkldnn._linear_pointwise, inputs, weights, None, "none", [], None),
            "oneDNN, packed": partial(run, torch.ops.mkldnn._linear_pointwise, inputs, packed, None, "none", [], None),
            "F.linear": partial(run, F.linear, inputs, weights),
        }
        times = {name: [seconds(way) for _ in range(8)][1:] for name, way in ways.items()}
        print(f"{rows:3} rows: " + ", ".join(f"{name} {median(found) * 1e3:.1f}" for name, found in times.items()))


if __name__ == "__main__":
    main()

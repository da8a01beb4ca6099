"""Where copying extents together starts to pay: `python tests/bench/torch_gather.py` prints milliseconds per layer.

Rows of one decode step, each with one extent of its own at no regular distance: read as views, or copied together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

import torch  # noqa: E402
from measure import seconds  # noqa: E402

from kvcache_torch import reading  # noqa: E402

HEADS, KV_HEADS, SIZE, LAYERS = 9, 3, 64, 30


@torch.inference_mode()
def main() -> None:
    """Both ways, over the number of extents and their size."""
    keys = [torch.randn(KV_HEADS, 40_000, SIZE) for _ in range(LAYERS)]
    for count in (2, 4, 8, 16):
        q = torch.randn(count, HEADS, 1, SIZE)
        for size in (16, 64, 128, 256, 512, 1024):
            per_row = [[((size + 16) * row + row * row, size, 0)] for row in range(count)]
            times = []
            for many in (10**6, 0):
                reading._MANY, reading._SHORT = many, 10**6
                reads = reading.plan_reads(per_row, torch.device("cpu"))

                def step(reads: list[reading.Read] = reads, q: torch.Tensor = q) -> None:
                    for array in keys:
                        reading.attend_reads(reads, q, array, array, None)

                step()
                times.append(median(seconds(step) for _ in range(7)) / LAYERS * 1e3)
            print(f"{count:3d} extents of {size:5d} tokens: views {times[0]:.3f}, copied together {times[1]:.3f}")


if __name__ == "__main__":
    main()

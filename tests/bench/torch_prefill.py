"""From how many queries on the kernel in C is the fastest: `python tests/bench/torch_prefill.py` prints milliseconds.

One layer of a step of several tokens per row, SmolLM2's head size: rows behind one shared prefix.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import seconds  # noqa: E402

from kvcache_torch.kernels import attend_with_lse  # noqa: E402
from kvcache_torch.native import Kernels, PrefillReads, load  # noqa: E402
from kvcache_torch.reading import attend_reads, plan_reads  # noqa: E402

HEADS, SIZE = 3, 64
SHAPES = [
    *((rows, tokens, 4096, groups) for groups in (1, 3) for tokens in (2, 3, 5, 8) for rows in (1, 4)),
    (1, 1024, 0, 3),
    (8, 64, 1024, 3),
    (1, 512, 4096, 3),
]


def case(compiled: Kernels, rows: int, tokens: int, past: int, groups: int) -> str:
    """One shape, both ways."""
    q, k, v = (torch.randn(rows, tokens, heads, SIZE).transpose(1, 2) for heads in (HEADS * groups, HEADS, HEADS))
    keys, values = (torch.randn(HEADS, past + rows * tokens, SIZE) for _ in "kv")
    slots = past + np.arange(rows * tokens).reshape(rows, tokens)
    shared = [(0, past, 0)] * bool(past)
    per_row = [[*shared, (int(row[0]), tokens, past)] for row in slots]
    kernel = PrefillReads(compiled, per_row, slots, np.full(rows, past), np.full(rows, tokens))
    reads, flat = plan_reads([shared] * rows, keys.device), torch.from_numpy(slots.reshape(-1))

    def ours() -> torch.Tensor:
        return kernel.attend(q, k, v, keys, values, None)

    def theirs() -> torch.Tensor:
        for array, new in ((keys, k), (values, v)):
            array.index_copy_(1, flat, new.transpose(0, 1).reshape(HEADS, -1, SIZE))
        return attend_reads(reads, q, keys, values, None, attend_with_lse(q, k, v, None, causal=True))

    torch.testing.assert_close(ours(), theirs(), atol=3e-6, rtol=3e-6)
    kernel_took, torch_took = (median(seconds(way) for _ in range(11)) for way in (ours, theirs))
    work = rows * HEADS * groups * tokens * (past + (tokens + 1) / 2) * 4 * SIZE
    return (
        f"{rows} x {tokens} tokens behind {past}, {groups} queries per K/V head: kernel {kernel_took * 1e3:.3f} "
        f"({work / kernel_took / 1e9:.0f} GFLOP/s), PyTorch {torch_took * 1e3:.3f}"
    )


@torch.inference_mode()
def main() -> None:
    """Over rows, new tokens, tokens before them and query groups."""
    compiled = load()
    if compiled is None:
        sys.exit("no C compiler: there is no kernel to compare")
    for shape in SHAPES:
        print(case(compiled, *shape))


if __name__ == "__main__":
    main()

"""Block shapes by kernel, channels and architecture: a shipped table instead of tuning at run time.

``tools/tune_kernels.py`` measures the candidates and writes the table. A shape that is not in it
takes its architecture's default, cut down until the channel block divides C.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Block:
    """One kernel's launch shape: tokens and channels a tile, warps, pipeline stages.

    ``split``: at most so many blocks share a tile of tokens (or, for phi_grad, of channels).
    """

    BT: int
    BC: int
    warps: int
    stages: int = 1
    split: int = 1

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


DEFAULTS: dict[str, Block] = {
    "project": Block(BT=64, BC=32, warps=4, stages=3, split=4),
    "read": Block(BT=8, BC=256, warps=4, stages=2),
    "post": Block(BT=8, BC=256, warps=4, stages=2),
    "read_grad": Block(BT=4, BC=256, warps=1),
    "logits_grad": Block(BT=4, BC=16, warps=1),
    "phi_grad": Block(BT=64, BC=64, warps=4, stages=4, split=8),
    "boundary_grad": Block(BT=64, BC=16, warps=4, stages=3, split=16),
    "boundary_grad_hopper": Block(BT=32, BC=32, warps=4, stages=3, split=16),
    "post_grad_hopper": Block(BT=32, BC=32, warps=4, stages=3, split=16),
    "project_hopper": Block(BT=64, BC=64, warps=8, stages=3, split=8),
    "refill": Block(BT=8, BC=256, warps=4, stages=1),
}


#: Before Hopper a tile descriptor becomes pointers, in registers.
WITHOUT_TMA: dict[str, Block] = {
    "project": Block(BT=64, BC=16, warps=4, split=4),
    "boundary_grad": Block(BT=64, BC=16, warps=8, split=16),
}


#: Kernels whose last block of channels may reach beyond C, which costs less than narrow rows.
MASKED = ("read", "read_grad")


@lru_cache(maxsize=1)
def _table() -> dict[str, list]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@cache
def block(kernel: str, n: int, C: int, itemsize: int, arch: int) -> Block:
    """The launch shape of ``kernel``; independent of T, so a new T compiles nothing.

    More streams than n = 4 and elements wider than two bytes shrink the tile, so that registers
    and shared memory stay where the table was tuned.
    """
    chosen = WITHOUT_TMA.get(kernel, DEFAULTS[kernel]) if arch < 90 else DEFAULTS[kernel]
    rows = _table().get(f"sm{arch}", {}).get(kernel, [])
    if n == 4 and itemsize == 2 and rows:
        chosen = Block(**min(rows, key=lambda row: abs(row["C"] - C))["block"])
    BC, BT = chosen.BC, chosen.BT
    if n == 8 and kernel in ("project", "boundary_grad"):
        BT = 16  # 255 registers hold the n * n coefficients of no more rows
    while C % BC and not (kernel in MASKED and -(-C // BC) * BC <= 1.1 * C):
        BC //= 2
    if n * itemsize > 8:
        BC = max(16, BC * 8 // (n * itemsize))
    if n == 8:
        BT = 1 if kernel == "logits_grad" else BT
        chosen = replace(chosen, stages=min(chosen.stages, 2))
    if kernel.endswith("_hopper"):
        # A warp's share of a tile is 16 tokens by at least 16 channels.
        chosen = replace(chosen, warps=min(chosen.warps, BT // 16 * (BC // 16)))
    return replace(chosen, BT=BT, BC=BC)


@cache
def parts(tiles: int, chunks: int, most: int, slots: int, fixed: int = 4) -> int:
    """How often to split the ``chunks`` of a tile so that the GPU's ``slots`` are busiest.

    Blocks run in waves of ``slots``; a block costs its chunks and about ``fixed`` more to begin and
    end.
    """
    def time(p: int) -> int:
        return -(-tiles * p // slots) * (-(-chunks // p) + fixed)

    return min(range(1, min(most, chunks) + 1), key=time)

"""What a layout's ranks computed, against what one rank did."""

from __future__ import annotations

from typing import Any

from tests.distributed.data import BATCH, SEQUENCE


def losses(ranks: list[dict[str, Any]], variant: str) -> list[float]:
    """Mean loss of a token at every step, over the ranks that computed one."""
    parts = [rank[variant]["loss"] for rank in ranks if rank[variant]["gives_loss"]]
    return [sum(step) / (BATCH * SEQUENCE) for step in zip(*parts, strict=True)]


def differences(
    one: list[dict[str, Any]], many: list[dict[str, Any]], variant: str
) -> tuple[float, float]:
    """Largest relative difference of a loss, and of a gradient norm, over the steps."""

    def largest(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))

    norms = one[0][variant]["grad_norm"], many[0][variant]["grad_norm"]
    return largest(losses(one, variant), losses(many, variant)), largest(*norms)

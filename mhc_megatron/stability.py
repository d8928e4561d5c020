"""Stability of the connections while a model trains: Amax gains and Sinkhorn errors.

For the H_res [T, n, n] of one sublayer, per token (mHC, arXiv 2512.24880, section 3.3)::

    forward gain  = max_o |sum_i H_res[o, i]|      how much a signal can grow
    backward gain = max_i |sum_o H_res[o, i]|      how much a gradient can grow

and the mean over tokens. The minimum over o (or i) is kept beside the maximum, which hides
attenuation. Composite entries take the product of the H_res of all sublayers from the first to
this one. Doubly stochastic matrices, and so their products, have gain 1 both ways.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_megatron.connection import HyperConnection

#: Tokens looked at: the first of a microbatch on this rank. A mean over more changes little.
TOKENS = 2048


@dataclass
class Gains:
    """One row a sublayer, in the order of the model."""

    sublayers: list[str]
    forward_max: list[float]
    forward_min: list[float]
    backward_max: list[float]
    backward_min: list[float]
    composite_forward_max: list[float]
    composite_forward_min: list[float]
    composite_backward_max: list[float]
    composite_backward_min: list[float]
    row_error: list[float]
    column_error: list[float]

    @property
    def last(self) -> int:
        """The stack's last sublayer; MTP's come after it and are no part of its product."""
        return sum(not name.startswith("mtp") for name in self.sublayers) - 1


class Monitor:
    """Collects H_res of a step's first microbatch from every connection of the model chunks."""

    def __init__(self, model: list[nn.Module]) -> None:
        self.connections = [
            module
            for chunk in model
            for module in chunk.modules()
            if isinstance(module, HyperConnection)
        ]
        self._seen: dict[str, tuple[int, Tensor]] = {}
        self.seconds = 0.0

    def __enter__(self) -> Monitor:
        self._seen.clear()
        for connection in self.connections:
            connection.observer = self._observe
        return self

    def __exit__(self, *error) -> None:
        for connection in self.connections:
            connection.observer = None

    def _observe(self, connection: HyperConnection, H_res: Tensor | None) -> None:
        # Later microbatches and recomputations of the same sublayer come after the first.
        if connection.name in self._seen:
            return
        began = time.perf_counter()
        if H_res is None:
            H_res = torch.eye(connection.n).expand(1, connection.n, connection.n)
        H_res = H_res.detach().flatten(0, -3)[:TOKENS].float()
        self._seen[connection.name] = connection.index, H_res
        connection.observer = None
        self.seconds += time.perf_counter() - began

    def gains(self, group: dist.ProcessGroup | None = None) -> Gains | None:
        """Of all sublayers on the ranks of ``group`` (pipeline stages); None without a connection.

        A collective call where ``group`` has several ranks.
        """
        began = time.perf_counter()
        seen = {name: (i, H.cpu()) for name, (i, H) in self._seen.items()}
        if group is not None and dist.get_world_size(group) > 1:
            parts: list[dict] = [{} for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(parts, seen, group=group)
            seen = {name: value for part in parts for name, value in part.items()}
        # MTP modules stand beside the stack, not in it: their sublayers come last.
        order = sorted(seen, key=lambda name: (name.startswith("mtp"), seen[name][0]))
        result = gains(order, [seen[name][1] for name in order]) if order else None
        self.seconds += time.perf_counter() - began
        return result


def gains(names: list[str], matrices: list[Tensor]) -> Gains:
    """Gains and errors of the H_res [T, n, n] of the sublayers ``names``, in the model's order."""
    rows: dict[str, list[float]] = {name: [] for name in Gains.__annotations__}
    product: Tensor | None = None
    for name, H in zip(names, matrices, strict=True):
        product = H if product is None or name.startswith("mtp") else H @ product
        rows["sublayers"].append(name)
        for prefix, matrix in (("", H), ("composite_", product)):
            for direction, dim in (("forward", -1), ("backward", -2)):
                sums = matrix.sum(dim=dim).abs()
                rows[f"{prefix}{direction}_max"].append(sums.amax(dim=-1).mean().item())
                rows[f"{prefix}{direction}_min"].append(sums.amin(dim=-1).mean().item())
        rows["row_error"].append((H.sum(dim=-1) - 1).abs().amax().item())
        rows["column_error"].append((H.sum(dim=-2) - 1).abs().amax().item())
    return Gains(**rows)

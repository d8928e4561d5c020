"""Other libraries' mHC kernels in our layer: the rest of the model stays the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from mhc_megatron import connection, layer_spec, streams
from mhc_megatron.errors import UserError


@contextlib.contextmanager
def transformer_engine() -> Iterator[None]:
    """Connections built and run under it use Transformer Engine's Triton kernels, as they come.

    Their streams lie innermost: x is [s, b, C, n], so the streams enter and leave in that order and
    no copy is made at a boundary. A write and the next read are two calls.
    """
    with (
        mock.patch.object(layer_spec, "HyperConnection", TransformerEngineConnection),
        mock.patch.object(layer_spec, "enter", _enter),
        mock.patch.object(layer_spec, "Exit", _Exit),
    ):
        yield


class TransformerEngineConnection(connection.HyperConnection):
    """A connection whose read and write are ``transformer_engine.pytorch.triton.mhc``'s."""

    def followed_by(self, connection: connection.HyperConnection) -> None:
        """No call makes a write and the next read together."""

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.C, self.n))

    @property
    def _ops(self):
        return _operations()


@functools.cache
def _operations() -> SimpleNamespace:
    try:
        from transformer_engine.pytorch.triton import mhc
    except ImportError as error:
        raise UserError(
            "--peer transformer-engine: the installed Transformer Engine has no mHC kernels "
            f"({error})."
        ) from error

    def pre(x, phi, alpha, bias, *, variant: str, iterations: int, eps: float, with_H_pre: bool):
        if variant != "mhc" or iterations != 20 or x.shape[-1] != 4:
            raise UserError(
                "--peer transformer-engine has variant mhc, n = 4 and 20 iterations only."
            )
        return *mhc.mhc_generate_mix_and_aggregate(x, phi, alpha, bias.unsqueeze(0)), None

    def post(x, y, H_post, H_res, y_bias=None):
        return mhc.mhc_fused_expand_combine(y, y_bias, H_post, x, H_res, 4)

    return SimpleNamespace(mhc_pre=pre, mhc_post=post)


def _enter(hidden_states: Tensor, n: int) -> Tensor:
    return hidden_states.repeat_interleave(n, dim=-1)


class _Exit(streams.Exit):
    def forward(self, x: Tensor) -> Tensor:
        if self.learned:
            raise UserError("--peer transformer-engine: the streams leave by their mean only.")
        return torch.mean(x.unflatten(-1, (self.C, self.n)), dim=-1)

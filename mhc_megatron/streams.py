"""Entering the stack of n residual streams and leaving it.

A layer's state travels as [s, b, n*C]: stream i is channels i*C..(i+1)*C, so that the tensor-,
sequence- and pipeline-parallel code of Megatron sees an ordinary, wider hidden state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mhc_kernels.reference import V4_EPS, project
from mhc_megatron.config import MHCConfig


def enter(hidden_states: Tensor, n: int) -> Tensor:
    """[s, b, C] -> [s, b, n*C]: the embedding, once for every stream."""
    return hidden_states.repeat(1, 1, n)


class ConnectionModule(nn.Module):
    """A module whose own parameters are a connection's: float32 and marked, whatever moves them.

    Parameters that a move makes anew (from ``meta``) would lose their marks.
    """

    def _apply(self, fn, recurse: bool = True):
        parallel = {getattr(p, "sequence_parallel", False) for p in self.parameters(recurse=False)}
        super()._apply(keep_fp32(fn), recurse)
        for sequence_parallel in parallel:
            mark(self, sequence_parallel)
        return self


class Exit(ConnectionModule):
    """[s, b, n*C] -> [s, b, C]: what the final norm (or an MTP module) reads.

    ``mean`` averages the streams. ``learned`` weighs them per token, as DeepSeek-V4's head does
    (``hc_head_*``): sum_i sigmoid(alpha * (v phi^T) + b)_i x_i with phi [n, n*C], b [n], alpha
    [1], float32. b starts at -ln(n - 1), where sigmoid gives 1/n: the mean.
    """

    def __init__(
        self,
        mhc: MHCConfig,
        hidden_size: int,
        device: torch.device,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.n, self.C, self.learned, self.eps = (
            mhc.n,
            hidden_size,
            mhc.exit == "learned",
            mhc.norm_eps,
        )
        self.weight_eps = V4_EPS if mhc.sinkhorn == "deepseek-v4" else 0.0
        if self.learned:
            options = {"dtype": torch.float32, "device": device}
            self.phi = nn.Parameter(torch.zeros(mhc.n, mhc.n * hidden_size, **options))
            self.alpha = nn.Parameter(torch.full((1,), mhc.alpha, **options))
            self.bias = nn.Parameter(torch.full((mhc.n,), -math.log(mhc.n - 1), **options))
            mark(self, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.n, self.C))
        if not self.learned:
            return x.mean(dim=-2)
        weights = torch.sigmoid(self.alpha * project(x, self.phi, self.eps) + self.bias)
        weights = weights + self.weight_eps
        return torch.einsum("...n,...nc->...c", weights, x.float()).to(x.dtype)


def keep_fp32(fn):
    """``fn`` of ``Module._apply``, without its cast to half precision.

    ``model.bfloat16()`` (Float16Module does it) would round the connection's parameters; they are
    float32 whatever the model's dtype. Moves between devices go through.
    """

    def moved(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if out.dtype in (torch.bfloat16, torch.float16) and tensor.dtype == torch.float32:
            return tensor.to(out.device)
        return out

    return moved


def mark(module: nn.Module, sequence_parallel: bool) -> None:
    """Say what the parameters of ``module``, named phi, alpha and bias, are.

    Where ``sequence_parallel`` is set, a tensor-parallel rank has the gradients of its part of the
    sequence; Megatron adds them over the ranks (``finalize_model_grads``).
    """
    for name, parameter in module.named_parameters(recurse=False):
        parameter.sequence_parallel = sequence_parallel
        parameter.hyper_connection = name
        # What keeps a matrix from Muon and its like (core/optimizer/emerging_optimizers.py:130 and
        # layer_wise_optimizer.py:51); a rate that --decoupled-lr sets for these does not reach the
        # connections, optimizer.py sees to that.
        parameter.is_embedding_or_output_parameter = True


def is_connection(parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` belongs to a connection or a learned exit."""
    return hasattr(parameter, "hyper_connection")


def is_projection(parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is a phi."""
    return getattr(parameter, "hyper_connection", None) == "phi"

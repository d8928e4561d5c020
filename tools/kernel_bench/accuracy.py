"""Errors against float64, and what a training step has to keep.

Operands are the same for all, rounded to the stream's dtype before float64 sees them. The exact
boundary (``post_pre``) rounds nothing between post and pre: an implementation that reads the next
coefficients off the rounded x_next, as two separate calls must, shows that rounding in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_kernels import reference

from .case import SUBLAYERS, Case, Inputs
from .columns import Column, EquationColumn
from .tasks import OUTPUTS, ROLES, Chain, Operation

#: Tokens of the chain that are compared with float64 (token by token, so any number is exact).
CHAIN_TOKENS = 1024


class Float64:
    """The float64 results a shape's columns are compared with, made once."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        functions = (reference.mhc_pre, reference.mhc_post, reference.mhc_post_pre)
        column = EquationColumn("float64", "", functions, case.variant)
        wide = inputs.double()
        self.operations = {name: results(name, column, wide) for name in OUTPUTS}
        self.chain = _chain_results(column, wide.first(CHAIN_TOKENS))


def errors(column: Column, inputs: Inputs, exact: Float64) -> dict[str, float]:
    """Relative Frobenius error of every output and gradient, e.g. ``pre.u``, ``pre.d_phi``."""
    found = {}
    for name in OUTPUTS:
        if name != "post_pre" or column.post_pre is not None:
            values = results(name, column, inputs)
            for key, value in values.items():
                found[f"{name}.{key}"] = relative_error(value, exact.operations[name][key])
    for key, value in _chain_results(column, inputs).items():
        wanted = exact.chain[key]
        found[f"chain.{key}"] = relative_error(value[: len(wanted)], wanted)
    return found


def results(name: str, column: Column, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients (``d_x``, ...) of one operation, in reference.py's layout."""
    operation = Operation(name, column, inputs)
    outputs = operation.forward()
    gradients = operation.backward(outputs)
    found = {key: column.canonical(ROLES[key], value) for key, value in outputs.items()}
    for role, gradient in zip(operation.operands, gradients, strict=False):
        found[f"d_{role}"] = column.canonical(ROLES[role], gradient)
    if name != "post":
        params = column.canonical_params(gradients[len(operation.operands) :])
        found |= {"d_phi": params.phi, "d_alpha": params.alpha, "d_bias": params.bias}
    return {key: value.detach() for key, value in found.items()}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64; nan where value is not finite."""
    if value.shape != exact.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(exact.shape)}")
    difference = torch.linalg.vector_norm(value.double() - exact.double()).item()
    size = torch.linalg.vector_norm(exact.double()).item()
    if not math.isfinite(difference):
        return math.nan
    return difference / size if size else (0.0 if difference == 0 else math.inf)


@dataclass(frozen=True)
class Saved:
    """Bytes kept from forward to backward, per token and sublayer, parameters left out."""

    #: Everything autograd saves in the chain, each storage once.
    total: float
    #: The same without the x and y (= u) of the sublayers, which any implementation needs.
    beyond_x_y: float
    #: Growth of the allocated memory over the forward of the chain, x (but the
    #: first) and y included; None on CPU.
    allocated: float | None

    def as_dict(self) -> dict[str, float | None]:
        return {
            "total": self.total,
            "beyond_x_y": self.beyond_x_y,
            "allocated": self.allocated,
        }


def saved_bytes(column: Column, inputs: Inputs) -> Saved:
    """What the forward of the chain leaves behind for its backward."""
    chain, kept = Chain(column, inputs), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, passed = chain.forward()
    parameters = {_storage(leaf) for params in chain.params for leaf in params}
    stream = {_storage(tensor) for tensor in passed}
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    per = SUBLAYERS * len(inputs.x)
    total = sum(size for key, size in sizes.items() if key not in parameters)
    beyond = sum(size for key, size in sizes.items() if key not in parameters | stream)
    del kept[:], passed
    return Saved(total / per, beyond / per, _allocated(chain, per))


def _allocated(chain: Chain, per: int) -> float | None:
    if chain.x.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    x_last = chain.forward()[0]
    grown = torch.cuda.memory_allocated() - before
    return (grown - x_last.untyped_storage().nbytes()) / per


def _chain_results(column: Column, inputs: Inputs) -> dict[str, Tensor]:
    chain = Chain(column, inputs)
    x_last, _ = chain.forward()
    d_x = chain.gradients(x_last)[0]
    values = {"x_last": x_last, "d_x": d_x}
    return {key: column.canonical("x", value).detach() for key, value in values.items()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""What is run: each operation's forward and backward, and the chain of sublayers, per column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import PARTS, Inputs, Params
from .columns import Column, NativeParams

#: Operation -> names of its outputs, and of the operands it is differentiated by (then params).
OUTPUTS = {
    "pre": ("u", "H_post", "H_res"),
    "post": ("x_next",),
    "post_pre": ("x_next", "u", "H_post", "H_res"),
}
OPERANDS = {
    "pre": ("x",),
    "post": ("x", "y", "H_post", "H_res"),
    "post_pre": ("x", "y", "H_post", "H_res"),
}
#: The layout in which a named tensor is kept (``Column.native``).
ROLES = {"x": "x", "x_next": "x", "y": "y", "u": "y", "H_post": "H_post", "H_res": "H_res"}


@dataclass(frozen=True)
class Task:
    """``body(prepare())`` does the work of ``part``; only ``body`` is timed."""

    part: str
    prepare: Callable[[], Any]
    body: Callable[[Any], Any]


class Operation:
    """``pre``, ``post`` or ``post_pre`` of one column on leaves of its own.

    The leaves are not shared between operations: some implementations keep a gradient on the
    storage of x from one backward to the next.
    """

    def __init__(self, name: str, column: Column, inputs: Inputs) -> None:
        self.name, self.column = name, column
        self.operands = {
            role: _leaf(column.native(ROLES[role], value))
            for role in OPERANDS[name]
            if (value := getattr(inputs, role)) is not None
        }
        self.params: NativeParams = ()
        if name != "post":
            self.params = native_leaves(column, inputs.params[0])
        self._inputs = inputs
        self._output_grads: list[Tensor] | None = None

    def forward(self) -> dict[str, Tensor]:
        """Named outputs in the column's layout, without those that are None."""
        get, column = self.operands.get, self.column
        if self.name == "pre":
            outputs = column.pre(get("x"), self.params)
        elif self.name == "post":
            outputs = (column.post(get("x"), get("y"), get("H_post"), get("H_res")),)
        else:
            outputs = column.post_pre(
                get("x"), get("y"), get("H_post"), get("H_res"), self.params
            )
        named = zip(OUTPUTS[self.name], outputs, strict=True)
        return {name: output for name, output in named if output is not None}

    def backward(self, outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the operands and parameters, in their order; may be called repeatedly."""
        if self._output_grads is None:
            self._output_grads = [
                self.column.native(ROLES[name], self._inputs.grads[name]) for name in outputs
            ]
        leaves = (*self.operands.values(), *self.params)
        return torch.autograd.grad(
            list(outputs.values()), leaves, self._output_grads, retain_graph=True
        )


class Chain:
    """pre, seven post_pre, post with F = identity; every sublayer has parameters of its own.

    A column without ``post_pre`` runs a post and a pre for it.
    """

    def __init__(self, column: Column, inputs: Inputs) -> None:
        self.column = column
        self.x = _leaf(column.native("x", inputs.x))
        self.params = [native_leaves(column, params) for params in inputs.params]
        self.grad = column.native("x", inputs.grads["x_next"])

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """x after the last sublayer, and every x and u on the way."""
        column, x = self.column, self.x
        x, u, H_post, H_res = column.enter(x, self.params[0])
        passed = [x, u]
        for params in self.params[1:]:
            if column.post_pre is not None:
                x, u, H_post, H_res = column.post_pre(x, u, H_post, H_res, params)
            else:
                x = column.post(x, u, H_post, H_res)
                x, u, H_post, H_res = column.enter(x, params)
            passed += [x, u]
        return column.post(x, u, H_post, H_res), passed

    def gradients(self, x_last: Tensor) -> tuple[Tensor, ...]:
        """Of the first x, then of every sublayer's parameters."""
        leaves = [self.x, *(leaf for params in self.params for leaf in params)]
        return torch.autograd.grad(x_last, leaves, self.grad)


def make_tasks(column: Column, inputs: Inputs) -> list[Task]:
    """Every part that ``column`` has, in the order of PARTS."""
    tasks = []
    for part in PARTS:
        if part.startswith("chain"):
            tasks.append(_chain_task(part, Chain(column, inputs)))
        elif column.post_pre is not None or not part.startswith("post_pre"):
            name, direction = part.rsplit("_", 1)
            tasks.append(_operation_task(part, Operation(name, column, inputs), direction))
    return tasks


def native_leaves(column: Column, params: Params) -> NativeParams:
    """The parameters of one sublayer in the column's layout, as leaves that take gradients."""
    return tuple(_leaf(value) for value in column.native_params(params))


def _operation_task(part: str, operation: Operation, direction: str) -> Task:
    if direction == "fwd":
        return Task(part, lambda: None, lambda _: operation.forward())
    return Task(part, operation.forward, operation.backward)


def _chain_task(part: str, chain: Chain) -> Task:
    if part == "chain_fwd":
        return Task(part, lambda: None, lambda _: chain.forward())
    return Task(part, lambda: None, lambda _: chain.gradients(chain.forward()[0]))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format).requires_grad_()

"""HyperConnection: the parameters of one sublayer's connection, its read and its write.

One sublayer of a Megatron layer runs as ``norm -> attention or MLP -> bias-dropout-add``. The
connection reads before the norm and takes the place of the bias-dropout-add::

    u      = read(x)                          H_pre x
    y      = sublayer(norm(u))                Megatron's, untouched
    x_next = write(x, dropout(y + bias))      H_res x + H_post^T y

H_post and H_res are functions of x too; they are made with u and wait in the connection between
the two calls. Where the sublayer that follows is known (``followed_by``), its read is made together
with the write, in one pass over memory (``mhc_post_pre``), and waits there for the x it belongs to.
What of all this is kept for backward, ``recompute.py`` decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch import Tensor, nn

import mhc_kernels
from mhc_kernels import reference
from mhc_megatron.config import MHCConfig
from mhc_megatron.recompute import Recompute
from mhc_megatron.streams import ConnectionModule, mark


class Write(NamedTuple):
    """What the write of a sublayer needs besides x: its output and its coefficients."""

    y: Tensor
    y_bias: Tensor | None
    H_post: Tensor
    H_res: Tensor | None


class Read(NamedTuple):
    """A read that was made ahead, and the streams [s, b, n*C] it belongs to."""

    x: Tensor
    u: Tensor
    H_post: Tensor
    H_res: Tensor | None
    H_pre: Tensor

    def belongs_to(self, x: Tensor) -> bool:
        """Whether x is the streams that were read.

        Megatron may hand on another tensor object of the same memory (``make_viewless_tensor``).
        The memory cannot have become another tensor's: ``self`` holds it.
        """
        return self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape


class HyperConnection(ConnectionModule):
    """Parameters phi [K, n*C], alpha [3 or 2], bias [K] (float32) of a sublayer; F_pre and F_post.

    Args:
        mhc: the run's choices; ``mhc.enabled`` must hold.
        hidden_size: C.
        index: the sublayer's number in the whole model, from 0 (seeds phi; rotates ``static``).
        name: unique in the model, for logs: ``3.attn``, ``3.mlp``, ``mtp0.attn``.
        device: where the parameters are made.
        sequence_parallel: the gradients of a tensor-parallel rank are partial sums over its part of
            the sequence; Megatron adds them (``finalize_model_grads``) where this mark is set.
        compute_dtype: dtype of u; the stream's own where None.
    """

    def __init__(
        self,
        mhc: MHCConfig,
        hidden_size: int,
        index: int,
        name: str,
        *,
        device: torch.device,
        sequence_parallel: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mhc, self.n, self.C, self.index, self.name = mhc, mhc.n, hidden_size, index, name
        self.compute_dtype = compute_dtype
        options = {"dtype": torch.float32, "device": device}
        self.phi = nn.Parameter(torch.empty(mhc.K, mhc.n * hidden_size, **options))
        self.alpha = nn.Parameter(torch.empty(mhc.alphas, **options))
        self.bias = nn.Parameter(torch.empty(mhc.K, **options))
        mark(self, sequence_parallel)
        self.reset_parameters()
        self._coefficients: tuple[Tensor, Tensor | None] | None = None
        self._read_ahead: Read | None = None
        self._following: tuple[HyperConnection, ...] = ()
        self._norm: tuple[nn.Module, ...] = ()
        self._deferred: list[Tensor | None] | None = None
        #: The blocks of its chunk and its place among their sublayers; recompute.py sets it.
        self.recompute: tuple[Recompute, int] | None = None
        #: Of the sublayer's norm, where layer_spec.recompute_norm drops its output.
        self.norm_checkpoint: CheckpointWithoutOutput | None = None
        #: Called with (self, H_res) at every read while set; stability.py sets it.
        self.observer: Callable[[HyperConnection, Tensor | None], None] | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values that ``MHCConfig`` describes; the same on every rank and layout."""
        if self.phi.device.type == "meta":
            return
        digest = hashlib.sha256(f"{self.mhc.seed}/{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.phi.copy_(
            torch.empty(self.phi.shape, dtype=torch.float32).normal_(
                0, self.mhc.init_std, generator=generator
            )
        )
        self.alpha.fill_(self.mhc.alpha)
        self.bias.copy_(initial_bias(self.mhc, self.index))

    def followed_by(self, connection: HyperConnection) -> None:
        """Make ``connection``'s read together with this write.

        For two sublayers of one pipeline stage with nothing between them, neither of which is
        recomputed without the other. (A tuple, so that it is not registered as a submodule.)
        """
        self._following = (connection,)

    def read_before(self, norm: nn.Module, fuse: bool) -> None:
        """Read where ``norm``, the sublayer's own, is called: it gets u [s, b, C] instead of x.

        ``fuse``: norm(u) comes from the read itself, and the norm hands it on. It keeps its place,
        its class and its parameter. (A tuple, so that nothing is registered as a submodule.)

        Not a hook: layers with hooks that are not Megatron's own get no CUDA graph
        (core/transformer/cuda_graphs.py:1855), and those that gather parameters must run first.
        """
        own = norm.forward
        if fuse:
            self._norm = (norm,)
            norm.forward = lambda x: self(x)  # the module itself would become a part of the norm
        else:
            norm.forward = lambda x, *args, **kwargs: own(self(x), *args, **kwargs)

    def forward(self, x: Tensor, before: Write | None = None, head: bool = False) -> Tensor:
        """The read: x [s, b, n*C] -> u [s, b, C]; keeps H_post, H_res for the write.

        With ``before``, the write of the sublayer before comes first: x is that sublayer's, the
        result is x_next [s, b, n*C], and u is kept for the read of it. ``head``: the same for the
        first sublayer of a chain, whose x comes from elsewhere and is returned, to be used in its
        place. All go through ``forward`` so that the hooks which gather parameters
        (``overlap_param_gather``) run first.
        """
        if head:
            return self._head(x)
        if before is not None:
            return self._write_and_read(x, before)
        u, H_post, H_res, H_pre = self.read_of(x)
        self._coefficients = H_post, H_res
        if self.observer is not None:
            self.observer(self, H_res)
        u = u if self.compute_dtype is None else u.to(self.compute_dtype)
        if self.recompute is not None:
            blocks, position = self.recompute
            blocks.read(position, x, u, H_pre, *self._norm_weight())
        return u

    def write(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """In the place of Megatron's ``get_bias_dropout_add``: returns ``f((y, bias), x, p)``.

        ``fused`` asks Megatron for its own fused kernel and has no meaning here.
        """

        def post(y_with_bias: tuple[Tensor, Tensor | None], x: Tensor, p: float) -> Tensor:
            y, y_bias = y_with_bias
            if self.norm_checkpoint is not None:
                self.norm_checkpoint.discard_output_and_register_recompute(y)
                self.norm_checkpoint = None
            if self._deferred is not None:
                self._deferred.append(y_bias)
                return y
            return self.mix(
                x, Write(y, y_bias, *self.take_coefficients()), training, p, self._following
            )

        return post

    @contextlib.contextmanager
    def deferring(self) -> Iterator[list[Tensor | None]]:
        """Within it a write does nothing but note its bias in the list; its result is y itself.

        For a schedule that runs the write on its own, with ``mix``, later and elsewhere.
        """
        self._deferred = []
        try:
            yield self._deferred
        finally:
            self._deferred = None

    def mix(
        self,
        x: Tensor,
        write: Write,
        training: bool,
        p: float,
        following: tuple[HyperConnection, ...] = (),
    ) -> Tensor:
        """The write of ``write`` to x [s, b, n*C], with dropout p in training; and where there is
        one ``following``, its read.

        Without, it is F_post,res alone and uses no parameter of the connection.
        """
        y, y_bias = write.y, write.y_bias
        if training and p > 0:
            y, y_bias = F.dropout(y if y_bias is None else y + y_bias, p=p), None
        write = write._replace(y=y.to(x.dtype), y_bias=y_bias)
        if following:
            x_next = following[0](x, before=write)
        else:
            x_next = self._ops.mhc_post(
                self._split(x), write.y, write.H_post, write.H_res, y_bias=y_bias
            ).flatten(-2)
        if self.recompute is not None:
            blocks, position = self.recompute
            blocks.wrote(position, write, x_next, self._ops.mhc_refill)
        return x_next

    def read_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """u, H_post, H_res, H_pre of x: the read that was made ahead, or one that is made now."""
        return self._take_read_ahead(x) or self._ops.mhc_pre(
            self._split(x), *self._parameters_of_read(), **self._options()
        )

    def expect(self, read: Read) -> None:
        """Let the next ``forward`` of ``read.x`` find this read instead of making one."""
        self._read_ahead = read

    def normed(self, norm: nn.Module, out: Tensor) -> None:
        """The sublayer's norm has made ``out`` of u: one more tensor that a block can drop."""
        if self.recompute is not None:
            blocks, position = self.recompute
            blocks.normed(position, norm, out)

    def _head(self, x: Tensor) -> Tensor:
        """x feeds the read and the write after it.

        Handed on by ``mhc_enter``, its gradient is made once, where autograd would add two.
        """
        ahead = self._read_ahead
        if ahead is not None and ahead.belongs_to(x):
            return x
        if self._ops is not mhc_kernels or not mhc_kernels.supported(self._split(x)):
            return x
        handed_on, *read = mhc_kernels.mhc_enter(
            self._split(x), *self._parameters_of_read(), **self._options()
        )
        self._read_ahead = Read(handed_on.flatten(-2), *read)
        return self._read_ahead.x

    def _write_and_read(self, x: Tensor, before: Write) -> Tensor:
        parameters = self._parameters_of_read()
        if self._ops is mhc_kernels and mhc_kernels.supported(self._split(x)):
            x_next, *read = self._ops.mhc_post_pre(
                self._split(x),
                before.y,
                before.H_post,
                before.H_res,
                *parameters,
                y_bias=before.y_bias,
                **self._options(),
            )
            x_next = x_next.flatten(-2)
        else:
            # Through the views that separate calls take: autograd adds x's gradients in one order,
            # and full recompute, which reads nothing ahead across layers, gives the same bits.
            x_next = self._ops.mhc_post(
                self._split(x), before.y, before.H_post, before.H_res, before.y_bias
            ).flatten(-2)
            read = self._ops.mhc_pre(self._split(x_next), *parameters, **self._options())
        self._read_ahead = Read(x_next, *read)
        return x_next

    def _take_read_ahead(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
        """The read that was made ahead, if it was made of ``x``."""
        ahead, self._read_ahead = self._read_ahead, None
        if ahead is None or not ahead.belongs_to(x):
            return None
        return ahead.u, ahead.H_post, ahead.H_res, ahead.H_pre

    @property
    def _ops(self):
        # The fused kernels know Eq. (9) alone.
        eager = self.mhc.kernels == "reference" or self.mhc.sinkhorn != "paper"
        return reference if eager else mhc_kernels

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n, self.C))

    def _parameters_of_read(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """phi, alpha and bias; the fused norm's weight is there too after this.

        That one is used before the norm is called, whose hooks gather it
        (``overlap_param_gather``, distributed_data_parallel.py:438): Megatron's run here. Others
        want to see the norm's input, and do when it is called.
        """
        for norm in self._norm:
            for hook in tuple(norm._forward_pre_hooks.values()):
                if (getattr(hook, "__module__", None) or "").startswith("megatron"):
                    hook(norm, ())
        return self.phi, self.alpha, self.bias

    def _norm_weight(self) -> tuple[Tensor, ...]:
        """Of the fused norm; nothing without one."""
        return tuple(
            norm.weight + 1 if getattr(norm, "zero_centered_gamma", False) else norm.weight
            for norm in self._norm
        )

    def _options(self) -> dict[str, Any]:
        norm = {}
        for weight in self._norm_weight():
            norm = {"norm_weight": weight, "norm_eps": self._norm[0].eps}
        return {
            **norm,
            "variant": self.mhc.variant,
            "iterations": self.mhc.sinkhorn_iterations,
            "eps": self.mhc.norm_eps,
            "with_H_pre": True,
            **({} if self.mhc.sinkhorn == "paper" else {"sinkhorn_kind": self.mhc.sinkhorn}),
        }

    def take_coefficients(self) -> tuple[Tensor, Tensor | None]:
        """H_post and H_res of the last read; they are taken once."""
        if self._coefficients is None:
            raise RuntimeError(f"hyper-connection {self.name}: write without a read before it")
        taken, self._coefficients = self._coefficients, None
        return taken

    def extra_repr(self) -> str:
        return f"{self.name}, {self.mhc.variant}, n={self.n}, C={self.C}"


def initial_bias(mhc: MHCConfig, index: int) -> Tensor:
    """b [K] before training, ``MHCConfig.init`` says what it means; float32."""
    n = mhc.n
    pre, post, res = torch.zeros(n), torch.zeros(n), torch.zeros(mhc.K - 2 * n)
    if mhc.variant == "hc":
        # No sigmoid and no Sinkhorn: b is the matrix itself (arXiv 2409.19606, Eq. 14).
        pre[index % n], post[:], res = 1.0, 1.0, torch.eye(n).flatten()
        return torch.cat([pre, post, res])
    if mhc.init in ("identity", "static"):
        if mhc.variant == "mhc":
            res = mhc.identity_bias * torch.eye(n).flatten()
        elif mhc.variant == "birkhoff":
            # Softmax over n! permutations, the identity first: the same diagonal as Sinkhorn's.
            res[0] = mhc.identity_bias + math.log(len(res) / n)
    if mhc.init == "static":
        pre[:] = -mhc.identity_bias / 2
        pre[index % n] = mhc.identity_bias / 2
    return torch.cat([pre, post, res])

"""MHCConfig: what a run chooses about its residual connections, checked once."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhc_kernels.reference import ITERATIONS, NORM_EPS, SINKHORNS, alpha_size, phi_rows
from mhc_megatron.errors import UserError

#: ``none`` is Megatron's own residual connection; the others are ``mhc_kernels.reference``'s.
VARIANTS = ("none", "hc", "mhc", "identity", "birkhoff")
INITS = ("paper", "identity", "static")
EXITS = ("mean", "learned")
KERNELS = ("auto", "reference")
WIRES = ("model", "fp8")
#: Parts of the overlap schedule that a run can leave out, for ablations (overlap.py says what each
#: one does).
OVERLAP_PIECES = ("mixing_stream", "gradient_wait", "hop_streams", "open_end", "early_refill")


@dataclass(frozen=True)
class MHCConfig:
    """The choices of a run; every field has the paper's value as its default where it gives one.

    Attributes:
        variant: ``mhc`` (Sinkhorn), ``identity`` (H_res = I), ``birkhoff`` (convex mix of
            permutations), ``hc`` (unconstrained, for ablations) or ``none`` (plain residual).
        n: residual streams. n = 1 is the plain residual connection whatever the variant.
        sinkhorn_iterations: steps of Eq. (9).
        sinkhorn: ``paper``, Eq. (9), or ``deepseek-v4``, for checkpoints of that family: softmax
            first, an epsilon in every denominator and in H_pre and the learned exit's weights. It
            runs on the eager path (``mhc_kernels.reference``), not the fused kernels.
        alpha: initial value of the scalars alpha_pre, alpha_post, alpha_res.
        init: how the biases b start. ``paper``: b = 0, so every H_res is the uniform 1/n mix (for
            ``hc``, which the paper leaves to its predecessor, the static init of arXiv
            2409.19606). ``identity``: b_res favours the identity by ``identity_bias``.
            ``static``: also reads of sublayer l favour stream l mod n, the constrained
            counterpart of that static init.
        identity_bias: b_res = identity_bias * I under ``identity`` and ``static``; 4 gives H_res a
            diagonal of .95 with n = 4.
        init_std: standard deviation of phi's normal initialisation.
        norm_eps: epsilon of the RMSNorm over n*C values, Eq. (7).
        exit: how the streams leave the stack: ``mean``, or ``learned`` (DeepSeek-V4's head: one
            sigmoid weight per stream and token).
        kernels: ``auto`` takes the fused kernels where the device has them, ``reference`` never.
        fuse_norm: the fused kernels also make the sublayer's own RMSNorm, where that is a module of
            its own (Transformer Engine's dense linears keep theirs): u is neither written nor read.
        lr_mult: learning rate of the connection's parameters relative to the model's.
        phi_weight_decay: weight decay of phi relative to the model's; alpha and b have none.
        recompute: Eq. (20)'s L_r: in training, of a block of this many sublayers (attention and
            feed-forward are two) only the first x and every y are kept, the rest is made again
            before backward. ``auto`` takes the L_r that stores least; 0 or ``off`` keeps
            everything. Gradients are the same to the bit (``mhc_megatron.recompute``). What hooks
            keep of a layer's output has no memory meanwhile: they clone it.
        overlap_without: parts of the overlap schedule that are left out, separated by commas:
            ``OVERLAP_PIECES``. For ablations; the schedule itself is turned on by Megatron's
            overlap_moe_expert_parallel_comm.
        wire: x between pipeline stages in the model's dtype (``model``) or, as an experiment, in
            block-scaled ``fp8``; ``mhc_megatron.wire`` says what it costs.
        seed: seeds phi by layer number and sublayer, so that every parallel layout, and the rest of
            the model with any variant, starts from the same weights.
    """

    variant: str = "mhc"
    n: int = 4
    sinkhorn_iterations: int = ITERATIONS
    alpha: float = 0.01
    init: str = "paper"
    identity_bias: float = 4.0
    init_std: float = 0.02
    norm_eps: float = NORM_EPS
    exit: str = "mean"
    kernels: str = "auto"
    sinkhorn: str = "paper"
    fuse_norm: bool = True
    lr_mult: float = 1.0
    phi_weight_decay: float = 1.0
    recompute: int | str = 0
    overlap_without: str = ""
    wire: str = "model"
    seed: int = 1234

    def __post_init__(self) -> None:
        object.__setattr__(self, "recompute", _check_recompute(self.recompute))
        for field in dataclasses.fields(self):
            if field.name != "recompute":
                _check_type(field.name, getattr(self, field.name), str(field.type))
        _check_choice("variant", self.variant, VARIANTS)
        _check_choice("init", self.init, INITS)
        _check_choice("exit", self.exit, EXITS)
        _check_choice("kernels", self.kernels, KERNELS)
        _check_choice("sinkhorn", self.sinkhorn, SINKHORNS)
        _check_choice("wire", self.wire, WIRES)
        if self.sinkhorn != "paper" and self.variant != "mhc":
            raise UserError(f"mhc: sinkhorn {self.sinkhorn} needs variant mhc, not {self.variant}.")
        for piece in filter(None, self.overlap_without.split(",")):
            _check_choice("overlap_without", piece.strip(), OVERLAP_PIECES)
        for name, least in (("n", 1), ("sinkhorn_iterations", 1), ("norm_eps", 0)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise UserError(f"mhc: {name} must be at least {least}, not {value}.")
        for name in ("lr_mult", "init_std", "phi_weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"mhc: {name} must not be negative.")
        if self.enabled and self.variant == "birkhoff" and self.n > 4:
            raise UserError(
                f"mhc: variant birkhoff mixes all n! permutations; n must be at most 4, "
                f"not {self.n}."
            )

    @property
    def enabled(self) -> bool:
        """False where Megatron's own residual connection is asked for."""
        return self.variant != "none" and self.n > 1

    def overlaps(self, piece: str) -> bool:
        """Whether the overlap schedule has ``piece``, one of ``OVERLAP_PIECES``."""
        return piece not in [name.strip() for name in self.overlap_without.split(",")]

    @property
    def K(self) -> int:
        """Rows of phi: pre (n), post (n), res."""
        return phi_rows(self.n, self.variant)

    @property
    def alphas(self) -> int:
        """Entries of alpha."""
        return alpha_size(self.variant)

    def parameters(self, sublayers: int, hidden_size: int) -> int:
        """Parameters that the connections of ``sublayers`` sublayers of width C add."""
        if not self.enabled:
            return 0
        width = self.n * hidden_size
        head = (self.n * width + self.n + 1) if self.exit == "learned" else 0
        return sublayers * (self.K * width + self.K + self.alphas) + head

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> MHCConfig:
        """From the ``mhc:`` part of a configuration file.

        Raises:
            UserError: an unknown key (the nearest known one is named) or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given = {str(key).replace("-", "_"): value for key, value in (values or {}).items()}
        for key in given:
            if key not in known:
                raise UserError(f"mhc: unknown key {key!r}{nearest(key, known)}")
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of ``from_mapping``."""
        return dataclasses.asdict(self)


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}."


def _check_type(name: str, value: Any, kind: str) -> None:
    wanted = {"int": int, "float": (int, float), "str": str, "bool": bool}[kind]
    if isinstance(value, bool) != (kind == "bool") or not isinstance(value, wanted):
        raise UserError(f"mhc: {name} must be of type {kind}, not {value!r}.")
    if kind == "float" and not math.isfinite(value):
        raise UserError(f"mhc: {name} must be finite, not {value}.")


def _check_recompute(value: Any) -> int | str:
    """``value`` with 0 for ``off`` (which YAML reads as false)."""
    if value is False or value == "off":
        return 0
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and value != "auto":
        raise UserError(
            "mhc: recompute must be auto, off, or the number of sublayers in a block, "
            f"not {value!r}."
        )
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"mhc: {name} must be one of {', '.join(choices)}, not {value!r}.")

"""What of NVIDIA's Apex is installed, and the one kernel of it that Megatron cannot do without.

Apex is built from source (https://github.com/NVIDIA/apex); the package ``apex`` on PyPI is another
project. megatron-core 0.19.2 takes three things from it, Transformer Engine's first where both are
there:

- ``amp_C`` with ``apex.multi_tensor_apply``: norms and scales of many tensors in one launch
  (core/optimizer/clip_grads.py:21, optimizer.py:21);
- ``apex.optimizers.FusedAdam`` (core/optimizer/__init__.py:19);
- ``fused_weight_gradient_mlp_cuda``: a weight's gradient added to its float32 buffer by the matrix
  product that makes it (``--no-gradient-accumulation-fusion`` turns that off). Transformer
  Engine's layers do that by themselves (core/extensions/transformer_engine.py:1037), but the
  output layer is Megatron's own ColumnParallelLinear, which refuses to be built without Apex's
  extension (core/tensor_parallel/layers.py:1070).

So with Transformer Engine alone the whole model would lose the fusion for the sake of one layer.
``supply_weight_gradient`` gives that layer the same product, made by Transformer Engine.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor

from mhc_megatron.errors import UserError


@dataclass(frozen=True)
class Apex:
    """Which pieces of NVIDIA's Apex can be imported.

    Attributes:
        multi_tensor: ``amp_C`` and ``apex.multi_tensor_apply``.
        fused_adam: ``apex.optimizers.FusedAdam``.
        weight_gradient: ``fused_weight_gradient_mlp_cuda``.
    """

    multi_tensor: bool
    fused_adam: bool
    weight_gradient: bool

    def __str__(self) -> str:
        pieces = {
            "amp_C": self.multi_tensor,
            "FusedAdam": self.fused_adam,
            "fused_weight_gradient_mlp_cuda": self.weight_gradient,
        }
        there = [name for name, present in pieces.items() if present]
        return ", ".join(there) if there else "none"


def apex() -> Apex:
    """The pieces of NVIDIA's Apex in this environment, found by importing them.

    A build for another torch or CUDA fails on import, and the package ``apex`` of PyPI lacks the
    names: neither counts.
    """
    multi_tensor = _has("apex.multi_tensor_apply", "multi_tensor_applier")
    return Apex(
        multi_tensor=multi_tensor and _has("amp_C", "multi_tensor_l2norm"),
        fused_adam=_has("apex.optimizers", "FusedAdam"),
        weight_gradient=_has("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"),
    )


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except Exception:  # a broken build raises whatever its libraries do
        return False


def can_fuse_weight_gradients() -> bool:
    """Whether ``gradient_accumulation_fusion`` can be had, from Apex or Transformer Engine."""
    return apex().weight_gradient or importlib.util.find_spec("transformer_engine") is not None


def supply_weight_gradient() -> None:
    """Let Megatron's own linear layers fuse the weight's gradient without Apex.

    Does nothing where Apex's extension is there. Otherwise core/tensor_parallel/layers.py gets, in
    the place of the module that it could not import, Transformer Engine's matrix product with
    accumulation into the gradient's buffer. Call it before a model is built.

    Raises:
        UserError: neither Apex nor Transformer Engine is there.
    """
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return
    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm
    except ImportError as error:
        raise UserError(
            "gradient-accumulation-fusion needs NVIDIA's Apex (fused_weight_gradient_mlp_cuda) or "
            "Transformer Engine; set no-gradient-accumulation-fusion: true."
        ) from error

    def accumulate(x: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += grad_output [T, out]^T x [T, in], in the buffer's dtype."""
        general_gemm(
            x,
            grad_output,
            out_dtype=main_grad.dtype,
            layout="NT",
            out=main_grad,
            accumulate=True,
            grad=True,
        )

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    layers._grad_accum_fusion_available = True

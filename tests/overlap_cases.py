"""Models, microbatches and the two ways through them, for the tests of the overlap schedule.

``plain`` runs forward and backward of every microbatch as Megatron's 1F1B does without overlap;
``planned`` runs the same microbatches through the schedule plan, the forward of one with the
backward of another, on one rank and as many chunks as asked for. Both return every loss, the
gradient of every parameter and of every chunk's input. On CPU and on GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mhc_megatron import cpu
from mhc_megatron.config import MHCConfig

S, B, C, VOCABULARY = 16, 2, 32, 64

MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
SHARED = MOE | {"moe_shared_expert_intermediate_size": 32}
BIASES = {"add_bias_linear": True, "add_qkv_bias": True, "normalization": "LayerNorm"}

#: name -> fields of TransformerConfig over ``base_config``'s.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, biases": BIASES,
    "MoE": MOE,
    "MoE, first layer dense": MOE | {"moe_layer_freq": [0, 1, 1, 1]},
    "shared experts": SHARED,
    "MTP": SHARED | {"mtp_num_layers": 1},
    "MoE, norms recomputed": SHARED
    | {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "MoE, attention recomputed": MOE
    | {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    # As on a GPU: the connection's read makes norm(u) itself.
    "shared experts, norms in the read": SHARED | {"use_cpu_initialization": False},
    "dense, norms recomputed": {
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm"],
    },
}


def base_config(**changes: Any):
    """A small TransformerConfig whose layers are built for the overlap schedule, at EP 1."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 4,
        "hidden_size": C,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": cpu.enabled(),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "init_method_std": 0.1,
    }
    config = TransformerConfig(**{**options, **changes})
    # Its own check (transformer_config.py:2680) wants several expert-parallel ranks.
    config.overlap_moe_expert_parallel_comm = True
    return config


def build(
    kind: dict[str, Any],
    mhc: MHCConfig | None = None,
    chunks: int = 1,
    dtype=torch.float32,
    te: bool = False,
    delay_wgrad: bool = False,
) -> list:
    """The chunks of one model, all on this rank, as virtual pipeline stages are.

    ``te``: of Transformer Engine's modules, which can leave weight gradients for later
    (``delay_wgrad``); Megatron's own cannot.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mhc_megatron.layer_spec import mhc_layer_spec
    from mhc_megatron.overlap import HyperConnectedGPTModel

    mhc = mhc or MHCConfig(alpha=0.5, init_std=0.1)
    config = base_config(**kind, params_dtype=dtype)
    config.delay_wgrad_compute = delay_wgrad
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=te, normalization=config.normalization
    )
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=te)
        mtp = mhc_layer_spec(mtp, config, mhc)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    models, first = [], 0
    for i in range(chunks):
        layers = config.num_layers // chunks
        # A spec of its own: its layers' connections, and the blocks of recompute, form a chunk.
        specs = mhc_layer_spec(block, config, mhc)
        with _numbered_from(first):
            part = dataclasses.replace(specs, layer_specs=specs.layer_specs[first : first + layers])
            model = _chunk(HyperConnectedGPTModel, config, part, mtp, mhc, i, chunks)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            model = model.cuda()  # torch's own norms are made on the CPU
        models.append(model.to(dtype) if dtype != torch.float32 else model)
        first += layers
    stir(models)
    return models


@contextlib.contextmanager
def _numbered_from(first: int):
    """Layers count from ``first``; Megatron asks its process groups, and here is one rank."""
    with contextlib.ExitStack() as stack:
        for module in ("transformer_block", "transformer_layer"):
            name = f"megatron.core.transformer.{module}.get_transformer_layer_offset"
            stack.enter_context(mock.patch(name, lambda *args, **kwargs: first))
        yield


def _chunk(make: Callable, config, part, mtp, mhc: MHCConfig, i: int, chunks: int):
    last = i == chunks - 1
    return make(
        config,
        part,
        vocab_size=VOCABULARY,
        max_sequence_length=S,
        position_embedding_type="rope",
        pre_process=i == 0,
        post_process=last,
        mtp_block_spec=mtp if last else None,
        mhc=mhc,
    )


@torch.no_grad()
def stir(models: list) -> None:
    """Biases that tell the streams apart, which initial ones do not."""
    from mhc_megatron.connection import HyperConnection

    for model in models:
        for module in model.modules():
            if isinstance(module, HyperConnection):
                generator = torch.Generator().manual_seed(module.index)
                noise = torch.randn(module.bias.shape, generator=generator)
                module.bias.add_(noise.to(module.bias.device))


def batch(number: int) -> dict[str, Tensor]:
    """Microbatch ``number``."""
    generator = torch.Generator().manual_seed(100 + number)
    tokens = torch.randint(VOCABULARY, (B, S), generator=generator)
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return {
        "input_ids": tokens.to(device),
        "position_ids": torch.arange(S).expand(B, S).to(device),
        "attention_mask": torch.triu(torch.ones(1, 1, S, S), diagonal=1).bool().to(device),
        "labels": tokens.roll(-1, 1).to(device),
        "loss_mask": torch.ones(B, S).to(device),
    }


@dataclasses.dataclass
class Result:
    """Losses [B, S] of each microbatch; gradients by the parameter's name; by (chunk, microbatch)
    of the chunk's input."""

    losses: list[Tensor]
    parameters: dict[str, Tensor]
    inputs: dict[tuple[int, int], Tensor]

    def differences(self, other: Result) -> list[str]:
        """What is not bit for bit the same."""
        different = [
            f"loss {i}" for i, pair in enumerate(zip(self.losses, other.losses, strict=True))
            if not torch.equal(*pair)
        ]  # fmt: skip
        for ours, theirs in ((self.parameters, other.parameters), (self.inputs, other.inputs)):
            assert ours.keys() == theirs.keys()
            different += [
                f"{name}: {(ours[name].double() - theirs[name].double()).norm():.1e} "
                f"of {theirs[name].double().norm():.1e}"
                for name in ours
                if not torch.equal(ours[name], theirs[name])
            ]
        return different


def _result(models: list, losses, input_gradients) -> Result:
    parameters = {}
    for i, model in enumerate(models):
        for name, p in model.named_parameters():
            # Transformer Engine adds to main_grad where it is asked to (``accumulate_in_float32``).
            main = getattr(p, "main_grad", None)
            gradient = main if main is not None and main.any() else p.grad
            if gradient is not None:
                parameters[f"{i}.{name}"] = gradient.clone()
            p.grad = None
            if main is not None:
                main.zero_()
    return Result(losses, parameters, input_gradients)


def accumulate_in_float32(models: list) -> list:
    """Let Transformer Engine's modules add weight gradients to a buffer, as DDP has them do.

    Delayed ones (``delay_wgrad_compute``) are set and not added to ``grad`` otherwise.
    """
    for model in models:
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
        for p in model.parameters():
            p.main_grad = torch.zeros_like(p, dtype=torch.float32)
            p.grad_added_to_main_grad = False
    return models


def plain(models: list, microbatches: int) -> Result:
    """Without a plan: forward and backward of one microbatch after the other."""
    losses, inputs = [], {}
    for m in range(microbatches):
        x = None
        outputs = []
        for c, model in enumerate(models):
            if x is not None:
                x = inputs[c, m] = x.detach().requires_grad_()
                model.set_input_tensor(x)
            x = model(**batch(m))
            outputs.append(x)
        losses.append(x.detach())
        gradient = torch.full_like(x, 1 / x.numel())
        for c in reversed(range(len(models))):
            outputs[c].backward(gradient)
            gradient = inputs[c, m].grad if c else None
    return _result(models, losses, {key: x.grad for key, x in inputs.items()})


@dataclasses.dataclass
class Pass:
    """One microbatch in one chunk."""

    chunk: int
    microbatch: int


def steady(chunks: int, microbatches: int, ahead: int = 1) -> list[tuple[Pass | None, Pass | None]]:
    """Pairs of a forward and a backward: ``ahead`` microbatches of all chunks before the first."""
    forwards = [Pass(c, m) for m in range(microbatches) for c in range(chunks)]
    backwards = [Pass(c, m) for m in range(microbatches) for c in reversed(range(chunks))]
    lead = min(ahead, microbatches) * chunks
    return [(f, None) for f in forwards[:lead]] + [
        (forwards[lead + i] if lead + i < len(forwards) else None, b)
        for i, b in enumerate(backwards)
    ]


def random_pairs(
    seed: int, chunks: int, microbatches: int
) -> list[tuple[Pass | None, Pass | None]]:
    """A schedule drawn at random among those that a pipeline allows.

    Each chunk takes its microbatches in order, forward and backward, so that gradients are added in
    the order of ``plain``; all else is open: how far forwards run ahead, which chunk comes when,
    what meets what, and what runs alone.
    """
    draw = random.Random(seed)
    forward, backward = [0] * chunks, [0] * chunks
    pairs: list[tuple[Pass | None, Pass | None]] = []
    while min(backward) < microbatches:
        can_f = [c for c in range(chunks) if forward[c] < (forward[c - 1] if c else microbatches)]
        can_b = [
            c
            for c in range(chunks)
            if backward[c] < (backward[c + 1] if c + 1 < chunks else forward[c])
        ]
        way = draw.choice(["both", "both", "both", "f", "b"])
        f = draw.choice(can_f) if can_f and (way != "b" or not can_b) else None
        b = draw.choice(can_b) if can_b and (way != "f" or not can_f) else None
        pairs.append(
            (
                None if f is None else Pass(f, forward[f]),
                None if b is None else Pass(b, backward[b]),
            )
        )
        if f is not None:
            forward[f] += 1
        if b is not None:
            backward[b] += 1
    return pairs


def planned(
    models: list,
    microbatches: int,
    pairs: list[tuple[Pass | None, Pass | None]] | None = None,
    transfers: Callable[[str], None] = lambda what: None,
) -> Result:
    """The same through the plan, in the order of ``pairs``; a transfer hands the tensor over."""
    from megatron.core.pipeline_parallel.utils import set_streams

    set_streams()
    ways = Ways(models, transfers)
    for f, b in pairs or steady(len(models), microbatches):
        ways.run(f, b)
    losses = [ways.losses[m] for m in range(microbatches)]
    return _result(models, losses, ways.input_gradients)


class Ways:
    """The state of ``planned``: what combined_1f1b.py keeps on the output tensors."""

    def __init__(self, models: list, transfers: Callable[[str], None]) -> None:
        self.models, self.transfers = models, transfers
        self.plans: dict[tuple[int, int], Any] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.input_gradients: dict[tuple[int, int], Tensor] = {}
        self.sent: Tensor | None = None
        self.gradients: dict[tuple[int, int], Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.arrived: dict[tuple[str, int, int], torch.cuda.Event] = {}

    def run(self, f: Pass | None, b: Pass | None) -> None:
        from mhc_megatron.overlap import ChunkPlan

        f_plan = self._start(f) if f is not None else None
        b_plan = gradient = None
        if b is not None:
            b_plan = self.plans.pop((b.chunk, b.microbatch))
            gradient = self.gradients.pop((b.chunk, b.microbatch))
        last = len(self.models) - 1
        out = ChunkPlan.run(
            f_plan,
            b_plan,
            b_grad=gradient,
            pre_forward=lambda vp_stage: self._wait("x", f),
            pre_backward=lambda vp_stage: self._wait("gradient", b),
            post_forward=lambda x, vp_stage: self._send_forward(f, x),
            post_backward=lambda g, vp_stage: self._send_backward(b, g),
        )
        if b is not None and b.chunk > 0:
            # The received x goes here, as in the schedule's backward_step_helper_postprocess.
            key = b.chunk, b.microbatch
            self.input_gradients[key] = self.inputs.pop(key).grad
        self.sent = out if f is not None and f.chunk < last else None
        if f is not None and f.chunk == last:
            self.losses[f.microbatch] = out.detach()
            self.gradients[f.chunk, f.microbatch] = torch.full_like(out, 1 / out.numel())

    def _start(self, f: Pass):
        model, data = self.models[f.chunk], batch(f.microbatch)
        if f.chunk > 0:
            model.set_input_tensor(self.inputs[f.chunk, f.microbatch])
        data = [data.pop(k) for k in ("input_ids", "position_ids", "attention_mask")], data
        plan = self.plans[f.chunk, f.microbatch] = model.build_schedule_plan(*data[0], **data[1])
        return plan

    def _wait(self, what: str, way: Pass) -> None:
        """What a receive's handle does: the current stream waits for the transfer."""
        from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

        self.transfers(f"wait for {what}")
        if what == "x":
            # As pp_pre_forward does with what was sent last.
            deallocate_output_tensor(self.sent, True)
            self.sent = None
        event = self.arrived.pop((what, way.chunk, way.microbatch), None)
        if event is not None:
            event.wait()

    def _arrive(self, what: str, chunk: int, microbatch: int) -> None:
        event = self.arrived[what, chunk, microbatch] = torch.cuda.Event()
        event.record()

    def _send_forward(self, f: Pass, x: Tensor) -> None:
        self.transfers("send x")
        if f.chunk + 1 < len(self.models):
            # Allocated and written here, as a receive's buffer is.
            self.inputs[f.chunk + 1, f.microbatch] = x.detach().clone().requires_grad_()
            self._arrive("x", f.chunk + 1, f.microbatch)

    def _send_backward(self, b: Pass, gradient: Tensor) -> None:
        self.transfers("send gradient")
        if b.chunk > 0:
            self.gradients[b.chunk - 1, b.microbatch] = gradient.detach().clone()
            self._arrive("gradient", b.chunk - 1, b.microbatch)

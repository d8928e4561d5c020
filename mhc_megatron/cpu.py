"""Megatron-Core 0.19.2 on a machine without a GPU.

Megatron has no CPU mode: it asserts CUDA at start, makes tensors with ``device="cuda"`` and asks
``torch.cuda`` for devices, streams, generators and memory. ``enable()`` answers those calls from
the CPU, so that the trainer, the schedules, the optimizers and the checkpoints run as they are, on
gloo. It is for learning, tests and continuous integration; nothing in it makes the CPU fast.

Importing this module changes nothing; ``enable()`` refuses where CUDA is available. Each stand-in
below names the Megatron line that needs it (paths below ``megatron/`` in the wheel).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import time
import types
from typing import Any

import torch
import torch._dynamo
import torch.distributed
import torch.utils.data
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

_mode: _CudaIsCpu | None = None
#: What was replaced: (object, attribute, its own value), in order.
_replaced: list[tuple[Any, str, Any]] = []

#: ``Tensor.type()`` of a CPU tensor -> what its CUDA twin answers.
_CUDA_TYPES = {
    f"torch.{name}Tensor": f"torch.cuda.{name}Tensor"
    for name in ("Float", "Half", "BFloat16", "Double")
}


def enable() -> None:
    """Make ``megatron`` run on the CPU in this process. Call before building anything.

    Raises:
        RuntimeError: CUDA is available; a GPU machine needs none of this.
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("mhc_megatron.cpu.enable() is for machines without CUDA")
    # Megatron decorates functions with torch.compile (core/jit.py:15); on a CPU that means a C++
    # compiler run for each, for no gain at these sizes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _replace(torch._dynamo.config, "disable", True)  # the variable is read once, maybe before now
    stand_in_for_cuda()
    group = torch.distributed.ProcessGroup
    gather = group.allgather_into_tensor_coalesced
    _replace(group, "allgather_into_tensor_coalesced", _by_dtype(gather))
    _mode = _CudaIsCpu()
    _mode.__enter__()
    _stay_during_backward(_mode)
    _patch_megatron()


def disable() -> None:
    """Undo ``enable()``: for tests that share a process with others."""
    global _mode
    if _mode is None:
        return
    _mode.__exit__(None, None, None)
    _mode = None
    while _replaced:
        target, name, value = _replaced.pop()
        setattr(target, name, value)


def enabled() -> bool:
    """Whether ``enable()`` is in force in this process."""
    return _mode is not None


def _replace(target: Any, name: str, value: Any) -> None:
    own = inspect.getattr_static(target, name, None)
    if not isinstance(own, staticmethod):  # what getattr gives would come back as a method
        own = getattr(target, name, None)
    _replaced.append((target, name, own))
    setattr(target, name, value)


#: Settings of a run on the CPU, as Megatron's command line names them; they win over the run's own.
ARGUMENTS: dict[str, Any] = {
    "use-cpu-initialization": True,
    "distributed-backend": "gloo",
    "transformer-impl": "local",
    # Fused kernels are CUDA extensions or compiled functions.
    "no-masked-softmax-fusion": True,
    "no-bias-gelu-fusion": True,
    "no-bias-swiglu-fusion": True,
    "no-bias-dropout-fusion": True,
    "no-rope-fusion": True,
    "no-gradient-accumulation-fusion": True,
    "no-persist-layer-norm": True,
    "moe-grouped-gemm": False,
    "moe-permute-fusion": False,
    # Half-precision moments are Transformer Engine's.
    "use-precision-aware-optimizer": False,
    "exp-avg-dtype": "fp32",
    "exp-avg-sq-dtype": "fp32",
    # The writer of nvidia-resiliency-ext asks for a GPU and dies, and the rank waits for it.
    "async-strategy": "mcore",
}


class _CudaIsCpu(TorchFunctionMode):
    """Sends every ``device="cuda"`` to the CPU and lets CPU tensors name CUDA types.

    ``Tensor.type()`` is compared with ``torch.cuda.FloatTensor`` by
    core/optimizer/clip_grads.py:174 and core/optimizer/distrib_optimizer.py:479.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Almost all calls name no device. They come here too: keep their way short.
        if func not in _NAMES_A_DEVICE:
            if not kwargs:
                return func(*args)
            if "device" not in kwargs and "pin_memory" not in kwargs:
                return func(*args, **kwargs)
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _CUDA_TYPES.get(name, name)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type:
            args = tuple(_cpu_type(a) for a in args)
        kwargs.pop("pin_memory", None)  # pinning is for copies to a GPU
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = (args[0], *(torch.device("cpu") if _is_cuda(a) else a for a in args[1:]))
        return func(*args, **kwargs)


#: What may name a device without a keyword.
_NAMES_A_DEVICE = frozenset({torch.Tensor.type, torch.Tensor.cuda, torch.Tensor.to})


def _stay_during_backward(mode: TorchFunctionMode) -> None:
    """Keep ``mode`` on in a backward pass that Python starts.

    A mode is off while it handles a call, here ``torch.autograd.backward``; what recomputation runs
    inside (core/tensor_parallel/random.py:656) makes CUDA tensors.
    """
    run = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    _replace(torch.autograd, "_engine_run_backward", run_backward)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    # A bare index means a CUDA device; Megatron passes torch.cuda.current_device() (an int).
    return isinstance(device, int) and not isinstance(device, bool)


def _cpu_type(argument: Any) -> Any:
    return argument.replace("torch.cuda.", "torch.") if isinstance(argument, str) else argument


class Stream:
    """A stream that is always done: CPU work is finished when the call returns."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """As Hopper answers: the least urgent, the most urgent."""
        return 0, -5

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A recorded time; ``elapsed_time`` in milliseconds, as CUDA's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end.time - self.time)


_STREAM = Stream()
#: Streams that ``torch.cuda.stream`` was entered with; the last one is current.
_entered: list[Stream] = [_STREAM]


@contextlib.contextmanager
def _stream_context(stream: Any = None):
    _entered.append(stream if stream is not None else _entered[-1])
    try:
        yield
    finally:
        _entered.pop()


@contextlib.contextmanager
def _device_context(device: Any = None):
    yield


def stand_in_for_cuda() -> None:
    """The functions of ``torch.cuda`` that Megatron calls, answered for one CPU 'device'."""

    class Properties:
        name, major, minor, multi_processor_count, total_memory = "cpu", 0, 0, 1, 0

    answers: dict[str, Any] = {
        "is_available": lambda: True,  # training/initialize.py:66 asserts it
        "device_count": lambda: 1,  # training/initialize.py:270
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "get_device_capability": lambda *a: (0, 0),
        "get_device_properties": lambda *a: Properties(),
        "get_device_name": lambda *a: "cpu",
        "get_rng_state": lambda *a: torch.get_rng_state(),  # tensor_parallel/random.py
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": _nothing(),  # torch.manual_seed calls it after the CPU generator
        "initial_seed": torch.initial_seed,
        "current_stream": lambda *a: _entered[-1],
        "default_stream": lambda *a: _STREAM,
        "stream": _stream_context,
        "device": _device_context,
        "Stream": Stream,
        "Event": Event,
        "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0,
        "memory_reserved": lambda *a: 0,
        "max_memory_reserved": lambda *a: 0,
        "mem_get_info": lambda *a: (0, 0),
        "memory_stats": lambda *a: _NoMemory(),
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: None,
    }
    for name, answer in answers.items():
        _replace(torch.cuda, name, answer)
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "set_stream",
    ):
        _replace(torch.cuda, name, _nothing())
    for name in ("range_push", "range_pop", "mark"):  # core/utils.py nvtx_range_push
        _replace(torch.cuda.nvtx, name, _nothing())
    _replace(torch.Tensor, "record_stream", _nothing())
    # training/datasets/data_samplers.py asks for pinned batches; torch's loader pins none where
    # there is no accelerator, and with ``num-workers`` asks the driver for the current one.
    _replace(torch.Tensor, "pin_memory", lambda tensor, *device: tensor)
    _replace(torch.accelerator, "is_available", lambda: False)
    # A loader draws a seed from the CPU's generator whenever it starts. On a GPU dropout has
    # another generator; here it is the same one, and a resumed run, which starts its loaders anew,
    # would part from one that was never stopped.
    loader = torch.utils.data.DataLoader
    _replace(loader, "__init__", _with_own_generator(loader.__init__))
    # tensor_parallel/random.py:66 sets the generator's state through the default generators.
    _replace(torch.cuda, "default_generators", (torch.default_generator,))


def _with_own_generator(init):
    def own(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("generator", torch.Generator())
        init(self, *args, **kwargs)

    return own


def _by_dtype(gather):
    """``ProcessGroup.allgather_into_tensor_coalesced``, once for the tensors of each dtype.

    gloo flattens all inputs into one tensor, which takes their widest dtype, and sends it as if it
    had the first input's (pytorch issue 35671): bfloat16 and then float32 arrive scrambled, without
    an error. Megatron gathers the weights so in every model chunk but the first, whose buckets are
    one group (core/distributed/param_and_grad_buffer.py:504, :1707), and the connections' are
    float32. NCCL sends each tensor as its own dtype.
    """

    @functools.wraps(gather)
    def gather_each(group, outputs, inputs, *options: Any):
        dtypes = dict.fromkeys(tensor.dtype for tensor in inputs)
        if len(dtypes) < 2:
            return gather(group, outputs, inputs, *options)
        works = distributed_c10d._CoalescingManager()  # waits for all that it is given
        for dtype in dtypes:
            pairs = [pair for pair in zip(outputs, inputs, strict=True) if pair[1].dtype == dtype]
            works.append(gather(group, *map(list, zip(*pairs)), *options))
        return works

    return gather_each


def _nothing():
    """A function that does nothing; a new one each time, as TorchDynamo keeps a rule for each."""
    return lambda *args, **kwargs: None


class _NoMemory(dict):
    """``torch.cuda.memory_stats()`` of a machine without CUDA memory: zero for every key."""

    def __missing__(self, key: str) -> int:
        return 0


def _patch_megatron() -> None:
    """The few places in Megatron that no stand-in of ``torch.cuda`` reaches."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import dot_product_attention, mla_qk_norm_config, torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # tensor_parallel/random.py:104,135 reach for torch.cuda's generators through private calls.
    _replace(megatron_random, "_get_cuda_rng_state", _get_rng_state)
    _replace(megatron_random, "_set_cuda_rng_state", _set_rng_state)
    # dist_checkpointing/strategies/filesystem_async.py:227 copies what lies on a GPU.
    writer = filesystem_async.FileSystemWriterAsync
    _replace(writer, "preload_tensors", staticmethod(preload_copies))
    # transformer/moe/moe_utils.py:1169 moves (and turns to numpy) only what lies on a GPU.
    _replace(moe_utils, "maybe_move_tensor_to_cpu", _move_to_cpu)
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", _move_to_cpu)
    # transformer/torch_norm.py:50 refuses sequence parallelism, the only norm without CUDA.
    build = torch_norm.WrappedTorchNorm.__new__
    _replace(torch_norm.WrappedTorchNorm, "__new__", _norm_like_the_fused(build))
    # models/hybrid/hybrid_block.py:215 makes its final norm with Transformer Engine.
    _replace(hybrid_block, "TENorm", torch_norm.WrappedTorchNorm)
    # tensor_parallel/random.py:69 compiles a C++ extension that swaps pointers; here a copy does.
    _replace(megatron_random, "_get_share_storage", lambda: _share_storage)
    # Without Transformer Engine random.py:693 and :785 miss these names.
    _replace(megatron_random, "FP8GlobalStateManager", _NoFP8)
    for name in ("fp8_autocast", "activation_recompute_forward"):
        _replace(megatron_random, name, lambda **kwargs: contextlib.nullcontext())
    # pipeline_parallel/fine_grained_activation_offload.py:794 tells Transformer Engine when it
    # offloads, and :965 takes what lies on a GPU; here memory is moved to other memory, and what
    # is moved is given back as there.
    _replace(transformer_engine, "cpu_offload", types.SimpleNamespace(CPUOffloadEnabled=False))
    _replace(
        ChunkOffloadHandler,
        "_can_manage_tensor_for_offload",
        staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter)),
    )
    # transformer/multi_latent_attention.py names the channels of keys and values, which only
    # Transformer Engine's attention takes (dot_product_attention.py:46).
    attention = dot_product_attention.DotProductAttention
    _replace(attention, "__init__", _attention_with_channels(attention.__init__))
    # transformer/mla_qk_norm_config.py:259 refuses --qk-layernorm without a query rank, unless a
    # layer has norm and projection in one, as Transformer Engine's has.
    resolver = mla_qk_norm_config.QKNormConfigResolver
    _replace(resolver, "resolve", _with_normed_queries(resolver.resolve))
    # optimizer/distrib_optimizer.py loads checkpoints for Transformer Engine's Adam: torch's has a
    # step of its own, not there before the first one (:837) and not among what comes back (:1222).
    optimizer = distrib_optimizer.DistributedOptimizer
    for name, wrap in (
        ("sharded_state_dict", _with_a_step),
        ("_set_main_param_and_optimizer_states", _keeping_the_step),
    ):
        _replace(optimizer, name, wrap(getattr(optimizer, name)))


def preload_copies(write_buckets: list, non_blocking: bool = True) -> list:
    """``FileSystemWriterAsync.preload_tensors`` that copies: the rank trains on during the save.

    The writer's process has CPU tensors in memory that it shares with the rank.
    """
    return [
        (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (data, tensors) in write_buckets
    ]


def _with_normed_queries(resolve):
    """``QKNormConfigResolver.resolve`` that has a projection with a norm for full-rank queries."""

    def resolved(self):
        if self.config.qk_layernorm and not self.has_q_lora and not self.fused_norm_linear_impl:
            self.submodules = dataclasses.replace(self.submodules, q_layernorm=None)
            self.fused_norm_linear_impl = _normed_linear()
        return resolve(self)

    return resolved


@functools.cache
def _normed_linear():
    """Transformer Engine's TELayerNormColumnParallelLinear, of an RMSNorm and in its names."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    class NormedLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            weight = torch.ones(input_size, dtype=config.params_dtype)
            self.layer_norm_weight = torch.nn.Parameter(weight)
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            self.eps = config.layernorm_epsilon

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any):
            shape = self.layer_norm_weight.shape
            x = torch.nn.functional.rms_norm(x, shape, self.layer_norm_weight, self.eps)
            return super().forward(x, *args, **kwargs)

    return NormedLinear


def _with_a_step(sharded_state_dict):
    """``DistributedOptimizer.sharded_state_dict`` that finds a step when it is about to load."""

    @functools.wraps(sharded_state_dict)
    def ready(self, model_sharded_state_dict, is_loading: bool = False, **kwargs: Any):
        if is_loading and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, **kwargs)

    return ready


def _keeping_the_step(set_states):
    """Sets a parameter's state from a checkpoint; its step, which has come already, stays.

    A copy of it: :1032 gives all parameters one tensor, which AdamW would count up for each.
    """

    @functools.wraps(set_states)
    def set_others(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
        set_states(self, model_param, {**tensors, "step": state.get("step")})

    return set_others


class _NoFP8:
    """What ``FP8GlobalStateManager`` answers where there is no fp8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _attention_with_channels(build):
    """``DotProductAttention.__init__`` that takes ``k_channels`` and ``v_channels``."""

    def __init__(self, config, *args: Any, k_channels=None, v_channels=None, **kwargs: Any) -> None:
        build(self, config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return __init__


def _share_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give ``output``, whose storage was resized to nothing, the values of ``recomputed``."""
    storage = output.untyped_storage()
    storage.resize_(recomputed.untyped_storage().nbytes())
    storage.copy_(recomputed.untyped_storage())


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False):
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor


def _norm_like_the_fused(build):
    """Megatron's torch norm with two things that Apex's and Transformer Engine's do.

    Under sequence parallelism the weight is marked, so that its gradient is added over the TP
    ranks; the output has the weight's dtype (``fp32_residual_connection`` reads float32).
    """

    def new(cls, config, *args: Any, **kwargs: Any):
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        norm.register_forward_hook(lambda norm, inputs, out: out.to(norm.weight.dtype))
        return norm

    return new

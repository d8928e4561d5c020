"""What this project leans on inside Megatron-Core, checked against the installed wheel.

Each entry names a file below ``megatron/``, the place in it, and a line (whitespace aside) that
must still stand there. When Megatron moves, the test that fails says which of our files leans on
it, so that one reads the new Megatron before trusting a run. ``MEGATRON_ROOT`` points the tests at
an unpacked wheel instead of the installed one.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Reliance:
    """One line of Megatron that one of our files needs.

    Attributes:
        ours: our file.
        file: Megatron's, below ``megatron/``.
        within: the definition the line stands in (``class X`` or ``def f``), or "" for anywhere.
        line: what must stand there; runs of whitespace match any whitespace, ``{name}`` a name.
        why: what breaks without it.
    """

    ours: str
    file: str
    within: str
    line: str
    why: str


LAYER = "core/transformer/transformer_layer.py"
SCHEDULES = "core/pipeline_parallel/schedules.py"
PLAN = "core/models/common/model_chunk_schedule_plan.py"
CALLABLES = "core/models/gpt/fine_grained_callables.py"
MTP = "core/transformer/multi_token_prediction.py"
OPTIMIZER = "core/optimizer/__init__.py"
BUCKETS = "core/distributed/param_and_grad_buffer.py"

RELIES_ON = [
    Reliance("layer_spec.py", LAYER, "def _forward_attention",
             "apply_module(self.input_layernorm)(hidden_states)",
             "the read hangs on the norm"),
    Reliance("layer_spec.py", LAYER, "def _forward_attention", "residual = hidden_states",
             "the write needs the streams as residual"),
    Reliance("layer_spec.py", LAYER, "def _forward_attention",
             "self.self_attn_bda(self.training, self.config.bias_dropout_fusion)( "
             "attention_output_with_bias, residual, self.hidden_dropout )",
             "the write takes the place of the bias-dropout-add"),
    Reliance("layer_spec.py", LAYER, "def _forward_pre_mlp_layernorm",
             "apply_module(self.pre_mlp_layernorm)(hidden_states)", "the read hangs on the norm"),
    Reliance("layer_spec.py", LAYER, "def _forward_post_mlp",
             "self.mlp_bda(self.training, self.config.bias_dropout_fusion)( "
             "mlp_output_with_bias, residual, self.hidden_dropout )",
             "the write takes the place of the bias-dropout-add"),
    Reliance("layer_spec.py", LAYER, "class TransformerLayer", "self.is_mtp_layer = is_mtp_layer",
             "an MTP layer lets its streams leave"),
    Reliance("layer_spec.py", LAYER, "class TransformerLayer",
             "self.recompute_input_layernorm = True", "selective recompute of the norm is ours"),
    Reliance("layer_spec.py", LAYER, "class TransformerLayer",
             "self.bias_dropout_add_exec_handler",
             "the write runs without gradients in evaluation"),
    Reliance("layer_spec.py", "core/transformer/transformer_block.py", "def _get_block_submodules",
             "layer_specs=[spec] * num_layers, layer_norm=LayerNormImpl",
             "a layer spec becomes a block of them with a final norm"),
    Reliance("layer_spec.py", "core/transformer/transformer_block.py", "class TransformerBlock",
             "apply_module(self.final_layernorm)(cast(Tensor, hidden_states))",
             "the streams leave in a hook of the final norm"),
    Reliance("layer_spec.py", "core/models/hybrid/hybrid_block.py", "class HybridStack",
             "hidden_states = self.final_norm(hidden_states)",
             "the streams of a hybrid model leave in a hook of its final norm"),
    Reliance("layer_spec.py", MTP, "class MultiTokenPredictionLayer", "self.mtp_model_layer =",
             "MTP runs one layer, or one stack, on contracted states"),
    Reliance("layer_spec.py", "core/tensor_parallel/random.py", "class CheckpointWithoutOutput",
             "def discard_output_and_register_recompute(self, hook_tensor)",
             "norm(u) is dropped after the sublayer"),
    Reliance("pipeline.py", SCHEDULES, "def get_tensor_shapes",
             "tensor_shapes.append((effective_seq_length, micro_batch_size, config.hidden_size))",
             "1F1B takes the width of a hop from the model's configuration"),
    Reliance("pipeline.py", SCHEDULES, "def forward_backward_pipelining_with_interleaving",
             "tensor_shape = [seq_length, micro_batch_size, config.hidden_size]",
             "the interleaved schedule takes the width of a hop from the model's configuration"),
    Reliance("pipeline.py", SCHEDULES, "def forward_backward_pipelining_without_interleaving",
             "config = get_model_config(model)", "the configuration comes from the wrapped model"),
    Reliance("pipeline.py", SCHEDULES, "def forward_backward_pipelining_with_interleaving",
             "config = get_model_config(model[0])",
             "the configuration comes from the wrapped model"),
    Reliance("pipeline.py", "core/utils.py", "def get_model_config",
             'get_attr_wrapped_model(model, "config", allow_none=False)',
             "the outermost module's config is the one that counts"),
    Reliance("pipeline.py", MTP, "def get_mtp_ranks", "mtp_ranks",
             "embedding ranks include those of MTP"),
    Reliance("training.py", "training/models/gpt.py", "class GPTModelBuilder",
             "mtp_spec = mtp_block_spec("
             "self._model_config, transformer_layer_spec, vp_stage=vp_stage)",
             "the MTP spec is replaced where build_model makes it"),
    Reliance("training.py", "training/models/gpt.py", "class GPTModelBuilder",
             '"vp_stage" in inspect.signature(transformer_layer_spec).parameters',
             "the layer spec is a function of the configuration and the stage"),
    Reliance("training.py", "training/training.py", "def setup_model_and_optimizer",
             "config, config_overrides = get_megatron_optimizer_config(args)",
             "the connections' group comes in here"),
    Reliance("training.py", "training/training.py", "def setup_model_and_optimizer",
             "return builder.build_distributed_models(", "the configuration's builder is used"),
    Reliance("training.py", "training/training.py", "",
             "load_checkpoint( model, optimizer, opt_param_scheduler,",
             "fp8.py prepares the chunks that are its first argument"),
    Reliance("fp8.py", "training/checkpointing.py", "def load_checkpoint",
             "module.load_state_dict(state_dict, strict=strict)",
             "experts' states are merged by a hook of load_state_dict"),
    Reliance("fp8.py", "core/extensions/transformer_engine.py", "",
             "self._register_load_state_dict_pre_hook(merge_extra_states, with_module=True)",
             "the hook that merges them, run earlier"),
    Reliance("fp8.py", "core/extensions/transformer_engine.py", "",
             '"scale_fwd": state["scale_fwd"].view(3, -1)[:, gemm_idx],',
             "scales taken apart in another order than they lie in"),
    Reliance("fp8.py", "training/checkpointing.py", "",
             "stream_ckpt_dequant=args.stream_ckpt_dequant,",
             "a load that does not quantise on its way"),
    Reliance("launch/settings.py", "training/arguments.py", "",
             'assert os.getenv("NVTE_CPU_OFFLOAD_V1", "0") == "1"',
             "fine-grained offload, which is given it"),
    Reliance("corpus.py", "core/datasets/gpt_dataset.py", "class GPTDataset",
             "numpy.save(path_to_document_index, document_index, allow_pickle=True)",
             "numpy.save is replaced while indices are built"),
    Reliance("corpus.py", "core/datasets/blended_dataset.py", "",
             "numpy.save(path_to_dataset_index, dataset_index, allow_pickle=True)",
             "the same"),
    Reliance("training.py", "core/datasets/utils.py", "def compile_helpers", '["make", "-C"',
             "the wheel has no Makefile for it"),
    Reliance("optimizer.py", OPTIMIZER, "def _get_param_groups",
             "if param_key.matches(param, name): param_overrides_list.append(param_override)",
             "overrides choose the connections' group"),
    Reliance("streams.py", "core/optimizer/emerging_optimizers.py",
             "def _is_nonlinear_or_embedding",
             "getattr(param, 'is_embedding_or_output_parameter', False)",
             "the flag keeps phi from Muon"),
    Reliance("streams.py", "core/optimizer/layer_wise_optimizer.py",
             "def is_managed_by_layer_wise_optimizer",
             "getattr(param, 'is_embedding_or_output_parameter', False)",
             "the flag keeps phi from Muon"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py", "", "'is_decoupled_lr',",
             "the flag tells the connections' group apart in a checkpoint"),
    Reliance("optimizer.py", "core/optimizer/distrib_optimizer.py",
             "def sharded_param_state_fully_reshardable", "in buffer.param_index_map.items():",
             "places in a buffer count the padding between buckets, close_bucket_gaps mends it"),
    Reliance("optimizer.py", "core/optimizer/distrib_optimizer.py",
             "def get_parameter_state_dp_zero",
             "offset_in_world_tensors += gbuf_world_numel_unpadded",
             "what is gathered has no padding between buckets, close_bucket_gaps mends it"),
    Reliance("cpu.py", BUCKETS, "def start_param_sync",
             "with _coalescing_manager( self.intra_distributed_optimizer_instance_group, "
             "async_ops=async_op ) as cm:",
             "a group's weights of all dtypes are gathered at once, which gloo scrambles"),
    Reliance("cpu.py", BUCKETS, "def partition_buckets",
             "if force_single_bucket_group: buckets = []",
             "all buckets of a later model chunk are one group"),
    Reliance("overlap.py", PLAN, "class TransformerLayerSchedulePlan",
             "b_grad = b_layer.mtp_post_process.backward(b_grad) "
             "b_grad = b_layer.moe_combine.backward(b_grad)",
             "F_post,res sits in the fifth slot: first in backward"),
    Reliance("overlap.py", PLAN, "class TransformerLayerSchedulePlan",
             "b_grad = b_layer.pre_dispatch_computation.backward(b_grad) if f_layer is not None: "
             "with f_layer.{name}(): "  # get_fp8_context in 0.19.0
             "f_input = f_layer.mtp_post_process.forward(f_input)",
             "F_post,res is issued after the other microbatch's attention"),
    Reliance("overlap.py", PLAN, "class TransformerModelChunkSchedulePlan",
             "plan_cls = self.LAYER_SCHEDULE_PLAN_CLASS or TransformerLayerSchedulePlan",
             "the layers' plan is ours"),
    Reliance("overlap.py", CALLABLES, "def build_transformer_layer_callables",
             "node.layer_state.residual = node.detach(hidden_states)",
             "x of the write comes from the first slot"),
    Reliance("overlap.py", CALLABLES, "def build_transformer_layer_callables",
             "hidden_states = layer.mlp_bda(layer.training, layer.config.bias_dropout_fusion)( "
             "mlp_output_with_bias, residual, layer.hidden_dropout )",
             "the write is deferred where Megatron's combine calls it"),
    Reliance("overlap.py", CALLABLES, "def build_transformer_layer_callables",
             "if not node.is_mtp and final_layernorm and node.is_last_layer:",
             "the final norm is kept out of the combine"),
    Reliance("overlap.py", CALLABLES, "def build_transformer_layer_callables",
             "layer.init_backward_dw_wrapper()", "a plan that is not ours is refused"),
    Reliance("overlap.py", "core/models/common/utils.py", "def should_free_input",
             "return free_input_nodes.get(name, False)", "a node of its own name keeps its input"),
    Reliance("overlap.py", "core/models/common/utils.py", "class TransformerLayerNode",
             "detached_grad = tuple([e.grad for e in self.detached])",
             "gradients of H_post and H_res come back to the first slot"),
    Reliance("overlap.py", "core/pipeline_parallel/combined_1f1b.py",
             "def combined_forward_backward_step", "type(f_schedule_plan or b_schedule_plan).run(",
             "the plan's own run is used"),
    Reliance("overlap.py", SCHEDULES, "def forward_backward_pipelining_with_interleaving",
             "if send_next_wait_handle is not None and config.deallocate_pipeline_outputs: "
             "send_next_wait_handle.wait()",
             "a send makes its stream wait for its end, so it has one of its own"),
    Reliance("training.py", "core/optimizer/layer_wise_optimizer.py", "",
             "if config.bf16: for i in range(len(optimizers)):",
             "Muon with the distributed optimizer is refused outside bf16"),
    Reliance("cpu.py", "core/pipeline_parallel/fine_grained_activation_offload.py",
             "class ChunkOffloadHandler", 'and tensor.device.type == "cuda"',
             "what lies in memory can be offloaded on the CPU too"),
    Reliance("training.py", "training/models/gpt.py", "class GPTModelBuilder", "model = GPTModel(",
             "the model class is replaced where build_model names it"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py", "class ChainedOptimizer",
             "sharded_state_dict[optimizer_idx] = optim_state_dict",
             "a checkpoint numbers chained optimizers, load_across_expert_layouts arranges them"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py", "class ChainedOptimizer",
             "self.chained_optimizers[0].load_state_dict(state_dict)",
             "one optimizer loads what has no numbers, load_across_expert_layouts makes it so"),
    Reliance("optimizer.py", "core/optimizer/distrib_optimizer.py", "class DistributedOptimizer",
             "param_groups_map[needed_groups] = param_group",
             "groups of a checkpoint are found by their settings, the last of equal ones counts"),
    Reliance("optimizer.py", "core/optimizer/distrib_optimizer.py", "class DistributedOptimizer",
             'steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()])) '
             "assert len(steps) == 1",
             "an optimizer without a parameter has no step, save_without_parameters gives it one"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py", "class FP32Optimizer",
             "state_dict['state']['common_step'] = step",
             "the step of others than the distributed optimizer, _agree_on_step looks for it"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py", "", "'is_expert_parallel',",
             "one of these settings says which optimizer of a chain a group is from"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py",
             "class Float16OptimizerWithFloat16Params",
             "model_sharded_state_dict, chain.from_iterable(g for g in self.float16_groups)",
             "parameters are numbered by this list, number_float32_parameters completes it"),
    Reliance("optimizer.py", "core/optimizer/optimizer.py",
             "class Float16OptimizerWithFloat16Params",
             "self.fp32_from_float16_groups, state_dict[fp32_from_float16_params_key]",
             "main copies are loaded by group, number_float32_parameters puts empty ones back"),
    Reliance("observer.py", "training/training.py", "def training_log", "grad_norm,",
             "the observer reads the step's numbers"),
]


def root() -> str:
    """The folder ``megatron`` of the wheel under test."""
    if "MEGATRON_ROOT" in os.environ:
        return os.environ["MEGATRON_ROOT"]
    # The package is a namespace: look the files up without importing it.
    spec = importlib.util.find_spec("megatron")
    if spec is None:
        pytest.skip("megatron-core is not installed")
    return list(spec.submodule_search_locations)[0]


def definition(source: str, head: str) -> tuple[str, int] | None:
    """Text of the definition that begins with ``head``, and its line number."""
    if not head:
        return source, 1
    found = re.search(rf"^([ \t]*){re.escape(head)}\b", source, re.MULTILINE)
    if found is None:
        return None
    lines = source[found.start() :].splitlines(keepends=True)
    body = lines[:1]
    signature = True
    for text in lines[1:]:
        deeper = len(text) - len(text.lstrip()) > len(found[1])
        # A signature may close at the definition's own depth.
        if text.strip() and not deeper and not (signature and text.lstrip().startswith(")")):
            break
        signature = signature and not text.rstrip().endswith(":")
        body.append(text)
    return "".join(body), source.count("\n", 0, found.start()) + 1


@pytest.mark.parametrize("reliance", RELIES_ON, ids=lambda r: f"{r.ours}: {r.within or r.file}")
def test_megatron_still_says(reliance: Reliance) -> None:
    path = os.path.join(root(), reliance.file)
    needs = f"mhc_megatron/{reliance.ours} needs there\n    {reliance.line}\nfor: {reliance.why}"
    assert os.path.exists(path), f"{reliance.file} is gone; {needs}"
    with open(path, encoding="utf-8") as f:
        found = definition(f.read(), reliance.within)
    where = f"{reliance.file}: {reliance.within or 'the file'}"
    assert found, f"{where} is gone; {needs}"
    body, line = found
    wanted = re.escape(re.sub(r"\s+", "", reliance.line)).replace(r"\{name\}", r"\w+")
    assert re.search(wanted, re.sub(r"\s+", "", body)), (
        f"{where} (line {line}) no longer has what {needs}"
    )


def test_a_missing_line_is_seen(tmp_path, monkeypatch) -> None:
    path = tmp_path / "core" / "utils.py"
    path.parent.mkdir()
    path.write_text("def get_model_config(model):\n    return model.config\n")
    monkeypatch.setenv("MEGATRON_ROOT", str(tmp_path))
    reliance = next(r for r in RELIES_ON if r.file == "core/utils.py")
    with pytest.raises(AssertionError) as seen:
        test_megatron_still_says(reliance)
    said = " ".join(str(seen.value).split())
    assert f"mhc_megatron/pipeline.py needs there {reliance.line} for:" in said


@pytest.mark.parametrize(
    ("ours", "file", "name", "parameter"),
    [
        ("training.py", "core/optimizer/__init__.py", "get_megatron_optimizer", "config_overrides"),
        ("pipeline.py", "core/parallel_state.py", "initialize_model_parallel",
         "get_embedding_ranks"),
        ("training.py", "training/training.py", "pretrain", "cfg_container"),
        ("training.py", "training/training.py", "pretrain", "get_embedding_ranks"),
        ("training.py", "training/models/gpt.py", "mtp_block_spec", "config"),
        ("training.py", "training/models/gpt.py", "mtp_block_spec", "transformer_layer_spec"),
        ("training.py", "training/argument_utils.py", "gpt_config_from_args", "model_config_cls"),
        ("training.py", "training/argument_utils.py", "hybrid_config_from_args",
         "model_config_cls"),
        ("training.py", "training/checkpointing.py", "check_checkpoint_args", "checkpoint_args"),
    ],
)
def test_megatron_still_takes(ours: str, file: str, name: str, parameter: str) -> None:
    needs = f"mhc_megatron/{ours} calls {name} with {parameter}"
    path = os.path.join(root(), file)
    assert os.path.exists(path), f"{file} is gone; {needs}"
    with open(path, encoding="utf-8") as f:
        found = definition(f.read(), f"def {name}")
    assert found, f"{file}: def {name} is gone; {needs}"
    signature = found[0].partition('"""')[0]
    takes = re.search(rf"\b{parameter}\b", signature)
    assert takes, f"{file} (line {found[1]}): def {name} takes no {parameter}; {needs}"


def test_the_checkpoint_writers_queue_is_made_where_it_is_replaced():
    """mhc_megatron/faults.py: FileSystemWriterAsync looks the function up in its module."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    source = inspect.getsource(filesystem_async.FileSystemWriterAsync.prepare_write_data)
    assert "self.results_queue = get_write_results_queue()" in source
    assert "_results_queue = ctx.Manager().Queue()" in inspect.getsource(
        filesystem_async.get_write_results_queue
    )


def test_the_asynchronous_writer_is_what_it_is_guarded_as():
    """mhc_megatron/faults.py: its process, its queues, and the loop that the process runs."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    start = inspect.getsource(PersistentAsyncCaller._get_process)
    assert "target=PersistentAsyncCaller.async_loop" in start
    assert "cls._persistent_process.daemon = True" in start
    schedule = inspect.getsource(PersistentAsyncCaller.schedule_async_call)
    assert "PersistentAsyncCaller._get_process(torch.distributed.get_rank())" in schedule
    assert "self._persistent_preload_q.join()" in schedule
    done = inspect.getsource(PersistentAsyncCaller.is_current_async_call_done)
    assert "self._persistent_comp_q.get_nowait()" in done and "self.cur_item" in done

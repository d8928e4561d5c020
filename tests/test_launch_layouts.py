"""launch/pretrain.py in layouts: a run of one process goes on in another layout, loss by loss."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

COMMON = {
    "num-layers": 4,
    "hidden-size": 32,
    "ffn-hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "mock-data": "true",
    "vocab-size": 100,
    "mtp-num-layers": 1,
    "untie-embeddings-and-output-weights": "true",
    "micro-batch-size": 1,
    "global-batch-size": 4,
    "train-iters": 6,
    "lr-warmup-iters": 0,
    "log-interval": 1,
    "eval-iters": 0,
    "save-interval": 3,
    "run.stability_interval": 1,
    "init-method-std": 0.1,
    # What moves the optimizer's state between model-parallel layouts.
    "use-distributed-optimizer": "true",
    "dist-ckpt-optim-fully-reshardable": "true",
}


def losses(folder, world: int, **changes) -> list[float]:
    """Train with ``world`` processes and read the losses that the run wrote down."""
    settings = {**COMMON, **{key.replace("_", "-"): value for key, value in changes.items()}}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/tiny.yaml"]
    command += ["--run-dir", str(folder)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    command += ["--set", "data-path=null", "--set", "split=null"]
    environment = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=250)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        return [row["loss"] for row in map(json.loads, f) if row["event"] == "train"]


EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "expert_tensor_parallel_size": 1,
}

#: Layout that saves, layout that goes on, the model of both.
MOVES = {
    "TP2, SP to PP2, VPP2": (
        {"world": 2, "tensor_model_parallel_size": 2, "sequence_parallel": "true"},
        {
            "world": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
        {},
    ),
    "MoE, EP2 to one process": (
        {"world": 2, "expert_model_parallel_size": 2},
        {"world": 1},
        EXPERTS,
    ),
    "MoE, one process to EP2": (
        {"world": 1},
        {"world": 2, "expert_model_parallel_size": 2},
        EXPERTS,
    ),
    "bf16 without the distributed optimizer": (
        {"world": 2},
        {"world": 2},
        {
            "bf16": "true",
            "use_distributed_optimizer": "false",
            "dist_ckpt_optim_fully_reshardable": "false",
        },
    ),
}

#: A checkpoint whose state of the optimizer is in the buckets of its layout.
IN_BUCKETS = {"dist_ckpt_optim_fully_reshardable": "false", "train_iters": 3}

LAYOUTS = {
    "PP2": {"world": 2, "pipeline_model_parallel_size": 2},
    "PP2, VPP2": {
        "world": 2,
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
    },
    "PP3, loss and MTP alone": {
        "world": 3,
        "pipeline_model_parallel_size": 3,
        "pipeline_model_parallel_layout": "Ett|tt|mL",
    },
    "TP2, SP": {"world": 2, "tensor_model_parallel_size": 2, "sequence_parallel": "true"},
    "DP2, overlaps": {
        "world": 2,
        "overlap_grad_reduce": "true",
        "overlap_param_gather": "true",
    },
}


def test_tied_mtp_over_stages_is_refused(tmp_path) -> None:
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/tiny.yaml"]
    command += ["--set", "mock-data=true", "--set", "data-path=null", "--set", "split=null"]
    command += ["--set", "mtp-num-layers=1", "--set", "pipeline-model-parallel-size=2"]
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "untie-embeddings-and-output-weights" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[str, list[float]]:
    """Folder of the checkpoints, losses of six steps."""
    folder = tmp_path_factory.mktemp("one")
    return os.path.join(folder, "checkpoints"), losses(folder, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_in_another_layout(layout: str, one, tmp_path) -> None:
    checkpoints, whole = one
    assert len(whole) == 6
    rest = losses(tmp_path, **LAYOUTS[layout], load=checkpoints, ckpt_step=3)
    assert rest == pytest.approx(whole[3:], rel=1e-5)


OVERLAPPING = EXPERTS | {
    "mtp_num_layers": "null",
    "bf16": "true",
    "attention_softmax_in_fp32": "true",
    "expert_model_parallel_size": 2,
}


def test_megatrons_flag_overlaps_and_changes_no_loss(tmp_path) -> None:
    plain = losses(tmp_path / "plain", 2, **OVERLAPPING)
    overlapped = losses(
        tmp_path / "overlap", 2, **OVERLAPPING, overlap_moe_expert_parallel_comm="true"
    )
    assert overlapped == plain


@pytest.mark.parametrize("move", MOVES)
def test_a_run_moves_between_layouts(move: str, tmp_path) -> None:
    source, target, model = MOVES[move]
    whole = losses(tmp_path / "first", **source, **model)
    assert len(whole) == 6
    checkpoints = os.path.join(tmp_path, "first", "checkpoints")
    rest = losses(tmp_path / "second", **target, **model, load=checkpoints, ckpt_step=3)
    assert rest == pytest.approx(whole[3:], rel=1e-5)


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "expert_model_parallel_size"])
def test_state_in_buckets_stays_in_its_layout(size: str, tmp_path) -> None:
    model = {**EXPERTS, **IN_BUCKETS}
    losses(tmp_path / "first", 2, **model, **{size: 2, "sequence_parallel": "true"})
    checkpoints = os.path.join(tmp_path, "first", "checkpoints")
    with pytest.raises(AssertionError, match="dist-ckpt-optim-fully-reshardable: true, or set"):
        losses(tmp_path / "second", 1, **model, load=checkpoints)

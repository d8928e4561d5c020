"""Gains and errors of H_res."""

from types import SimpleNamespace

import torch

from mhc_kernels import reference
from mhc_megatron.observer import Observer
from mhc_megatron.stability import gains


def test_gains_of_matrices_written_out():
    A = torch.tensor([[[2.0, 0.0], [-1.0, 3.0]]])
    B = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    got = gains(["0.attn", "0.mlp"], [A, B])
    # Rows of A sum to 2 and 2, columns to 1 and 3; B @ A = [[-1, 3], [2, 0]].
    assert (got.forward_max[0], got.forward_min[0]) == (2, 2)
    assert (got.backward_max[0], got.backward_min[0]) == (3, 1)
    assert (got.composite_forward_max[1], got.composite_forward_min[1]) == (2, 2)
    assert (got.composite_backward_max[1], got.composite_backward_min[1]) == (3, 1)
    assert (got.row_error, got.column_error) == ([1, 0], [2, 0])


def test_mean_over_tokens_of_the_largest():
    H = torch.stack([torch.eye(2), 3 * torch.eye(2)])
    assert gains(["0.attn"], [H]).forward_max == [2.0]


def test_doubly_stochastic_products_keep_gain_one():
    matrices = [reference.sinkhorn(torch.randn(10, 4, 4)) for _ in range(40)]
    got = gains([f"{i}.attn" for i in range(40)], matrices)
    for values in (got.composite_forward_max, got.composite_backward_max):
        assert abs(values[-1] - 1) < 0.05
    assert max(got.row_error) < 1e-5


def test_unconstrained_products_grow():
    matrices = [torch.eye(4) + 0.2 * torch.randn(10, 4, 4).abs() for _ in range(40)]
    got = gains([f"{i}.attn" for i in range(40)], matrices)
    assert got.composite_forward_max[-1] > 1000


def test_mtp_sublayers_stand_apart():
    H = 2 * torch.eye(2)[None]
    got = gains(["0.attn", "1.attn", "mtp0.attn"], [H, H, H])
    assert got.composite_forward_max == [2, 4, 2]
    assert got.sublayers[got.last] == "1.attn"


def test_the_alarm_hears_the_stack_and_not_its_prediction_layers():
    said, told = [], {}
    observer = SimpleNamespace(
        alarm_gain=10.0,
        _alarmed=False,
        metrics=SimpleNamespace(alarm=lambda **record: said.append(record["gain"])),
        say=lambda text: None,
        exporter=SimpleNamespace(
            set=lambda name, value, **labels: told.setdefault(name, value),
            write=lambda values: None,
        ),
    )
    sublayers = ["0.attn", "0.mlp", "1.attn", "1.mlp", "mtp0.attn", "mtp0.mlp"]
    H, still = 2 * torch.eye(4)[None], torch.eye(4)[None]
    Observer._watch_gains(observer, 100, gains(sublayers, [H] * 4 + [still] * 2))
    assert said == [16.0] and told["mhc_composite_gain"] == 16.0

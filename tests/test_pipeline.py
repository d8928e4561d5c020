"""The view of a configuration that schedules see, and the ranks that hold embeddings."""

import copy

import pytest
import torch

from mhc_megatron.config import MHCConfig

pytestmark = pytest.mark.usefixtures("megatron_cpu")


def config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    return TransformerConfig(pipeline_dtype=torch.float32, **{**options, **changes})


def test_the_view_differs_in_hidden_size_alone() -> None:
    from mhc_megatron.pipeline import wide_config

    base = config()
    view = wide_config(base, 4)
    assert (view.hidden_size, base.hidden_size) == (128, 32)
    assert isinstance(view, type(base))
    # What the trainer sets on one is there on the other, both ways.
    view.grad_scale_func = torch.sum
    assert base.grad_scale_func is torch.sum
    base.no_sync_func = torch.mean
    assert view.no_sync_func is torch.mean
    assert wide_config(view, 4) is view
    assert copy.copy(view).hidden_size == copy.deepcopy(view).hidden_size == 128


def test_only_a_pipeline_is_widened() -> None:
    from mhc_megatron.pipeline import widen_pipeline

    class Model(torch.nn.Module):
        def __init__(self, settings) -> None:
            super().__init__()
            self.config, self.post_process = settings, True
            self.decoder = torch.nn.Module()
            self.decoder.layers = torch.nn.ModuleList([torch.nn.Identity()])

    one = config()
    assert widen_pipeline(Model(one), MHCConfig()).config is one
    two = config(pipeline_model_parallel_size=2)
    assert widen_pipeline(Model(two), MHCConfig(variant="none")).config is two
    models = [Model(two), Model(two)]
    assert widen_pipeline(models, MHCConfig()) is models
    assert [model.config.hidden_size for model in models] == [128, 128]
    widen_pipeline(models, MHCConfig())
    assert [model.config.hidden_size for model in models] == [128, 128]


@pytest.mark.parametrize(
    ("layout", "tied", "ranks"),
    [
        (None, False, [4, 7]),
        (None, True, [4, 7]),
        ("Ett|tt|m|L", False, [4, 6]),
        ("Ett|tt|m|L", True, [4, 6, 7]),
    ],
)
def test_embedding_ranks(layout, tied, ranks) -> None:
    from mhc_megatron.pipeline import embedding_ranks

    settings = config(
        mtp_num_layers=1, pipeline_model_parallel_size=4, pipeline_model_parallel_layout=layout
    )
    assert embedding_ranks([4, 5, 6, 7], settings, tied) == ranks
    plain = config(pipeline_model_parallel_size=4)
    assert embedding_ranks([4, 5, 6, 7], plain, False) == [4]
    assert embedding_ranks([4], plain, True) == [4]

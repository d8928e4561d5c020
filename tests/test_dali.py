"""The DALI loader against Megatron's: the same batches, from any sample on, on any rank."""

import numpy as np
import pytest
import torch
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from test_pretrain import arguments, config, corpus, launch, records  # noqa: F401

from mhc_megatron import dali

needs_dali = pytest.mark.skipif(
    not dali.is_installed(), reason="nvidia-dali is not installed (the extra [dali])"
)


class Numbers(torch.utils.data.Dataset):
    """Samples that tell their number, in the types of Megatron's."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng(i)
        return {
            "tokens": torch.from_numpy(rng.integers(0, 1000, 16)),
            "loss_mask": torch.from_numpy(rng.random(16, dtype=np.float32)),
        }


def megatrons(dataset, consumed: int, micro: int, rank: int, ranks: int) -> list[dict]:
    sampler = MegatronPretrainingSampler(len(dataset), consumed, micro, rank, ranks)
    return list(torch.utils.data.DataLoader(dataset, batch_sampler=sampler))


@pytest.mark.parametrize(
    ("consumed", "micro", "rank", "ranks"),
    [(0, 1, 0, 1), (0, 4, 1, 2), (12, 2, 2, 3), (40, 2, 1, 2)],
)
def test_the_reader_goes_where_megatrons_sampler_goes(consumed, micro, rank, ranks):
    dataset = Numbers(53)
    expected = megatrons(dataset, consumed, micro, rank, ranks)
    reader = dali.Reader(dataset, ["tokens", "loss_mask"], consumed, micro, rank, ranks)
    assert len(reader) == len(expected) > 0
    for number, batch in enumerate(expected):
        tokens, mask = reader(number)
        assert np.array_equal(tokens, batch["tokens"].numpy())
        assert np.array_equal(mask, batch["loss_mask"].numpy())
    with pytest.raises(StopIteration):
        reader(len(expected))


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_the_pipeline_gives_megatrons_batches_bit_for_bit(workers):
    dataset = Numbers(53)
    expected = megatrons(dataset, 12, 4, 1, 2)
    reader = dali.Reader(dataset, ["tokens", "loss_mask"], 12, 4, 1, 2)
    found = list(dali.DaliLoader(reader, workers))
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key])


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU mode")
@pytest.mark.filterwarnings("ignore")
def test_a_run_stopped_in_mid_epoch_goes_on_with_the_next_sample(config, tmp_path):  # noqa: F811
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert launch(arguments(config, plain), tmp_path / "out") == 0
    for stop in ("exit-interval=5", "exit-interval=100"):
        words = arguments(config, run, "run.data_loader=dali", stop)
        assert launch(words, tmp_path / "out") == 0, (tmp_path / "out").read_text()
    assert [r["iteration"] for r in records(run, "resume")] == [5]
    losses = [[r["loss"] for r in records(folder, "train")] for folder in (run, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.mark.skipif(dali.is_installed(), reason="nvidia-dali is installed")
def test_without_dali_it_says_so(config, tmp_path):  # noqa: F811
    words = arguments(config, tmp_path / "run", "run.data_loader=dali")
    assert launch(words, tmp_path / "out") == 2
    assert "nvidia-dali is not installed" in (tmp_path / "out").read_text()

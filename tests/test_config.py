"""MHCConfig and the settings of a run: what is accepted, and the sentence for what is not."""

import argparse
import enum
import errno
import os
import signal

import pytest

from launch import settings
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError


def test_round_trip():
    config = MHCConfig(variant="birkhoff", n=2, alpha=0.1, exit="learned")
    assert MHCConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"varient": "mhc"}, "did you mean 'variant'"),
        ({"variant": "mch"}, "variant must be one of"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"n": 2.5}, "n must be of type int"),
        ({"n": True}, "n must be of type int"),
        ({"sinkhorn_iterations": 0}, "at least 1"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"variant": "birkhoff", "n": 8}, "n must be at most 4"),
        ({"lr_mult": -1.0}, "lr_mult must not be negative"),
        ({"exit": "median"}, "exit must be one of mean, learned"),
    ],
)
def test_wrong_values_name_what_to_change(values, words):
    with pytest.raises(UserError, match=words):
        MHCConfig.from_mapping(values)


def test_parameters_by_formula():
    assert MHCConfig(variant="none").parameters(8, 192) == 0
    assert MHCConfig(n=1).parameters(8, 192) == 0
    assert MHCConfig().parameters(1, 10) == 24 * 40 + 24 + 3
    assert MHCConfig(variant="identity").parameters(1, 10) == 8 * 40 + 8 + 2


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


def test_files_and_changes(config):
    path = config("num_layers: 4\nlr: 1e-3\nseed: 7\nmhc:\n  n: 4\nrun:\n  name: a\n")
    got = settings.load(path, ["num-layers=6", "mhc.n=2", "run.stability_interval=5", "lr=null"])
    assert got.megatron == {"num-layers": 6, "lr": None, "seed": 7}
    assert (got.mhc.n, got.mhc.seed, got.run.name) == (2, 7, "a")
    assert got.run.dir == "runs/a" and got.run.stability_interval == 5


def test_numbers_in_exponent_form(config):
    assert settings.load(config("lr: 1e-3\neps: 1.e-20\n")).megatron == {"lr": 1e-3, "eps": 1e-20}


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("- a\n- b\n", [], "must hold keys and values"),
        ("a: [1\n", [], "not valid YAML at line"),
        ("lr: 1\nlr: 2\n", [], "given twice"),
        ("num_layers: 3\nnum-layers: 1\n", [], "'num-layers' is given twice"),
        ("mhc:\n  lr_mult: 3\n  lr-mult: 1\n", [], "'lr-mult' is given twice"),
        ("a: 2026-13-45\n", [], "not valid YAML .month"),
        ("? [a]\n: 1\n", [], "key must be text or a number"),
        ("mhc: foo\n", ["mhc.n=2"], "mhc must hold keys and values, not 'foo'"),
        ("mhc:\n  1: 2\n", [], "unknown key '1'"),
        ("lr: 1\n", ["lr=2026-13-45"], "--set lr=2026-13-45: the value is not valid YAML"),
        ("lr: 1\n", ["lr={[a]: 1}"], "key must be text or a number"),
        ("lr: 1\n", ["run.hang_minutes=.inf"], "hang_minutes must be finite, not inf"),
        ("run: {alarm_gain: .nan}\n", [], "alarm_gain must be finite, not nan"),
        (f"run: {{alarm_gain: 1{'0' * 400}}}\n", [], "alarm_gain must be finite"),
        ("mhc: 4\n", [], "mhc must hold keys and values"),
        ("run: 0\n", [], "run must hold keys and values, not 0.$"),
        ("mhc: off\n", ["mhc.n=2"], "mhc must hold keys and values, not False; mhc.variant=none"),
        ("run:\n  nam: x\n", [], "did you mean 'name'"),
        ("run:\n  stability-interval: often\n", [], "must be of type int"),
        ("lr: 1\n", ["lr"], "takes key=value"),
        ("lr: 1\n", ["mhc.streams=4"], "unknown key 'streams'"),
    ],
)
def test_wrong_files(config, text, changes, words):
    with pytest.raises(UserError, match=words):
        settings.load(config(text), changes)


@pytest.mark.parametrize("part", ["mhc", "run"])
@pytest.mark.parametrize("value", ["off", "false", "no", "0", "[]", "''"])
def test_only_null_is_an_empty_part(config, part, value):
    path = config("lr: 1\n")
    with pytest.raises(UserError, match=f"{part} must hold keys and values, not "):
        settings.load(path, [f"{part}={value}"])
    for nothing in ("null", "", "{}"):
        assert settings.load(path, [f"{part}={nothing}"]) == settings.load(path)


def test_merge_keys(config):
    """A key that a merge brings may be given beside it, also where the merge is merged again."""
    text = """
    a: {b: &b {<<: &c {x: 1, y: 1}, y: 2}}
    d: {<<: [*b, *c], x: 3}
    mhc: {<<: {n: 4, alpha: 0.1}, n: 2}
    """
    got = settings.load(config(text))
    assert got.megatron == {"a": {"b": {"x": 1, "y": 2}}, "d": {"x": 3, "y": 2}}
    assert (got.mhc.n, got.mhc.alpha) == (2, 0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n", "'y' is given twice .line 2"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}\n", "'x' is given twice .line 1"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "'<<' is given twice"),
        ("a: {<<: 1}\n", "not valid YAML at line 1"),
    ],
)
def test_wrong_merges(config, text, words):
    with pytest.raises(UserError, match=words):
        settings.load(config(text))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    with pytest.raises(UserError, match="a.yaml is not UTF-8 text"):
        settings.load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("key", ["hidden-size", "num-attention-heads", "num-layers"])
def test_sizes_of_nothing(key):
    with pytest.raises(UserError, match=f"{key} must be at least 1, not 0"):
        settings.parse({key: 0})


def test_the_connections_have_the_runs_seed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 7\nmhc: {n: 2}\n")
    assert settings.load(str(path)).mhc.seed == 7
    assert settings.load(str(path), ["mhc.seed=8"]).mhc.seed == 8
    assert settings.load(str(path), ["seed=null"]).mhc.seed == MHCConfig().seed


def test_settings_from_elsewhere_are_refused():
    with pytest.raises(UserError, match="yaml-cfg: Megatron would take its settings from there"):
        settings.parse({"yaml-cfg": "model.yaml"})


def test_what_transformer_engine_reads_when_it_is_imported(monkeypatch):
    """Set before the parser, which imports Megatron, is asked."""
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "0")
    monkeypatch.delenv("NVTE_CPU_OFFLOAD_V1")
    for given in (False, True):
        with pytest.raises(UserError, match="num-layers"):
            settings.parse({"fine-grained-activation-offloading": given, "num-layers": 0})
        assert ("NVTE_CPU_OFFLOAD_V1" in os.environ) == given


def test_missing_file():
    with pytest.raises(UserError, match="cannot read the configuration"):
        settings.load("no/such.yaml")


class Modules(enum.Enum):
    attn = 1
    mlp = 2


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--no-bias-fusion", action="store_false", dest="bias_fusion")
    parser.add_argument("--mmap", action=argparse.BooleanOptionalAction, default=True)
    # As Megatron reads enumerations.
    signals = signal.Signals
    parser.add_argument("--exit-signal", type=lambda word: signals[word], choices=list(signals))
    parser.add_argument("--modules", nargs="+", type=lambda word: Modules[word])
    return parser


@pytest.mark.parametrize(
    ("values", "argv"),
    [
        ({"num-layers": 4}, ["--num-layers", "4"]),
        ({"data-path": [30, "a", 70, "b"]}, ["--data-path", "30", "a", "70", "b"]),
        ({"swiglu": True}, ["--swiglu"]),
        ({"swiglu": False}, []),
        ({"no-bias-fusion": True}, ["--no-bias-fusion"]),
        ({"bias-fusion": False}, ["--no-bias-fusion"]),
        ({"bias-fusion": True}, []),
        ({"mmap": False}, ["--no-mmap"]),
        ({"no-mmap": True}, ["--no-mmap"]),
        ({"mmap": True}, ["--mmap"]),
        ({"num-layers": None}, []),
        ({"exit-signal": "SIGTERM"}, ["--exit-signal", "SIGTERM"]),
        ({"modules": ["attn", "mlp"]}, ["--modules", "attn", "mlp"]),
    ],
)
def test_settings_to_command_line(parser, values, argv):
    assert settings.megatron_argv(values, parser) == argv


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num-layer": 4}, "unknown key 'num-layer'; did you mean 'num-layers'"),
        ({"swiglu": "yes please"}, "is a switch"),
        ({"num-layers": {"a": 1}}, "takes a value"),
        ({"exit-signal": "SIGTERMS"}, "exit-signal: unknown name 'SIGTERMS'; did you mean 'SIGTE"),
        ({"exit-signal": 9}, "exit-signal: unknown name '9'; known are SIGABRT, "),
        ({"modules": ["attn", "moe"]}, "modules: unknown name 'moe'.$"),
    ],
)
def test_unknown_and_wrong_keys(parser, values, words):
    with pytest.raises(UserError, match=words):
        settings.megatron_argv(values, parser)


def test_megatrons_refusals_become_one_sentence(parser):
    with pytest.raises(UserError, match="invalid int value: 'many'"), settings.megatron_errors():
        parser.parse_args(["--num-layers", "many"])
    with pytest.raises(UserError, match="contradictory settings: a and b"):  # noqa: SIM117
        with settings.megatron_errors():
            raise AssertionError("a and b")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No file", "/nope"),
            "heterogeneous-layers-config-path: cannot open /nope: No",
        ),
        (FileNotFoundError(errno.ENOENT, "No file", "/other"), None),
        (FileNotFoundError("nothing said of a file"), None),
        (OSError(errno.ENOSPC, "No space left on device", "/nope"), None),
        (KeyError("/nope"), None),
    ],
    ids=str,
)
def test_which_errors_of_megatrons_checks_are_the_users(error, said, monkeypatch):
    """Only a file that a setting names is the user's to mend; the rest keeps its traceback."""
    from megatron.training import arguments

    def fail():
        raise error

    monkeypatch.setattr(arguments, "parse_and_validate_args", fail)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(UserError if said else type(error), match=said):
        settings.parse({"lr": None, "heterogeneous-layers-config-path": "/nope"})

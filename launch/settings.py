"""A run's settings: a YAML file and ``--set`` changes -> Megatron's arguments and MHCConfig.

The file's keys are Megatron's own argument names, as its command line has them (``num-layers: 4``;
underscores do as well), plus two parts of ours: ``mhc:`` (MHCConfig) and ``run:`` (RunSettings).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mhc_megatron.config import MHCConfig, nearest
from mhc_megatron.errors import UserError
from mhc_megatron.schedule import check_steps


@dataclass
class RunSettings:
    """What belongs to neither Megatron nor the connections.

    Attributes:
        name: of the run, in its report; the configuration's file name by default.
        dir: the run's folder: checkpoints, logs, TensorBoard events, metrics.jsonl.
        stability_interval: steps between stability records; 0 for none.
        gpus: GPUs that the parallel layout was chosen for; tools/plan.py's default, 0 where the
            file does not say. A run may have any number that the layout divides.
        bad_loss: what to do about a NaN or infinity in the loss or gradient. ``stop``: Megatron's
            rerun machine tries the step again, in place and then elsewhere, and ends the run.
            ``skip``: the run ends at once; when the same iteration was bad twice,
            launch/supervise.py leaves it out.
        loss_spike: what to do about a step whose loss is a spike (``mhc_megatron.spikes``).
            ``log``: say so and go on. ``stop``: end the run. ``skip``: go back to the last
            checkpoint; when the same iteration was a spike twice, leave it out. Megatron's own
            ``check-for-spiky-loss`` tries the step again and logs; with ``stop`` it ends the run as
            a NaN does.
        spike_factor: a loss above so many times the median of the last 20 records is a spike; 0 for
            never.
        data_loader: ``megatron``, or ``dali`` for the same batches through an NVIDIA DALI pipeline.
        hang_minutes: without a step, an evaluation or a save after which a rank prints its stacks
            and ends; 0 for never.
        prometheus: folder of a node exporter's textfile collector, for the last rank's metrics;
            empty for none.
        alarm_gain: composite gain above which an alarm is logged; 0 for none.
        lr_steps: the decay of the learning rate in steps, as ``mhc_megatron.schedule`` takes it:
            ``{0.8: 0.316, 0.9: 0.1}``.
    """

    name: str = ""
    dir: str = ""
    stability_interval: int = 100
    gpus: int = 0
    bad_loss: str = "stop"
    loss_spike: str = "log"
    spike_factor: float = 2.0
    data_loader: str = "megatron"
    hang_minutes: float = 30.0
    prometheus: str = ""
    alarm_gain: float = 0.0
    lr_steps: dict[float, float] = field(default_factory=dict)


@dataclass
class Settings:
    """Everything a run chooses."""

    megatron: dict[str, Any] = field(default_factory=dict)
    mhc: MHCConfig = field(default_factory=MHCConfig)
    run: RunSettings = field(default_factory=RunSettings)


def load(path: str, changes: Iterable[str] = ()) -> Settings:
    """Read ``path`` and apply ``changes``, each ``key=value`` (``train-iters=200``, ``mhc.n=2``).

    Raises:
        UserError: unreadable or malformed file, unknown key, wrong value.
    """
    values = _read(path)
    for change in changes:
        _apply(values, change)
    mhc, run = _part(values, "mhc"), _part(values, "run")
    values = {key: value for key, value in values.items() if key not in ("mhc", "run")}
    if values.get("seed") is not None and "seed" not in mhc:
        mhc = {**mhc, "seed": values["seed"]}
    settings = Settings(values, MHCConfig.from_mapping(mhc), _run_settings(run))
    settings.run.name = settings.run.name or os.path.splitext(os.path.basename(path))[0]
    settings.run.dir = settings.run.dir or os.path.join("runs", settings.run.name)
    return settings


def _part(values: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The keys and values of ``mhc`` or ``run``: none where the part is absent or null."""
    content = values.get(part)
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        off = "; mhc.variant=none switches it off" if part == "mhc" else ""
        raise UserError(f"{part} must hold keys and values, not {content!r}{off}.")
    return content


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text.") from error
    try:
        values = yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}.") from error
    except _MALFORMED as error:
        raise UserError(f"{path} is not valid YAML ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values.")
    _check_twice(values, path)
    for part in ("mhc", "run"):
        if isinstance(values.get(part), dict):
            _check_twice(values[part], f"{path}: {part}")
    return {str(key).replace("_", "-"): value for key, value in values.items()}


def _check_twice(values: Mapping[Any, Any], where: str) -> None:
    """Both spellings of a key are one key."""
    seen: dict[str, Any] = {}
    for key in values:
        first = seen.setdefault(str(key).replace("_", "-"), key)
        if first is not key:
            raise UserError(f"{where}: the key {key!r} is given twice, first as {first!r}.")


#: What else PyYAML raises: a date that does not exist, a list as a key, brackets without an end.
_MALFORMED = (ValueError, TypeError, RecursionError)


def read_yaml(path: str, what: str) -> Any:
    """What a YAML file that is no run's configuration holds; ``what`` it is, for a sentence.

    Raises:
        UserError: it cannot be read, or is not valid.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return yaml.safe_load(f)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}.") from error
    except (yaml.YAMLError, *_MALFORMED) as error:
        raise UserError(f"{path} is not valid YAML.") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads ``1e-4`` as a number (YAML 1.2 does)."""

    def compose_mapping_node(self, anchor):
        # Here rather than where mappings are constructed: a merge has put its keys beside the
        # mapping's own by then, which may be the same.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if merge else self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise UserError(f"a key must be text or a number, not {key!r} (line {line}).")
            if key in seen:
                raise UserError(f"the key {key!r} is given twice (line {line}).")
            seen.add(key)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def yaml_value(text: str) -> Any:
    """The value that ``text`` is in a configuration.

    Raises:
        UserError: it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError("the value is not valid YAML.") from error
    except _MALFORMED as error:
        raise UserError(f"the value is not valid YAML ({error}).") from error


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, not {change!r}.")
    try:
        value = yaml_value(text)
    except UserError as error:
        raise UserError(f"--set {change}: {error}") from error
    part, dot, name = key.partition(".")
    if dot and part in ("mhc", "run"):
        values[part] = {**_part(values, part), name: value}
        # Both spellings of a key are one key.
        for other in (name.replace("-", "_"), name.replace("_", "-")):
            if other != name:
                values[part].pop(other, None)
    else:
        values[key.replace("_", "-")] = value


_CHOICES = {
    "bad_loss": ("stop", "skip"),
    "loss_spike": ("log", "stop", "skip"),
    "data_loader": ("megatron", "dali"),
}


def _run_settings(values: Mapping[str, Any]) -> RunSettings:
    known = {name: type(value) for name, value in vars(RunSettings()).items()}
    given = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"run: unknown key {key!r}{nearest(key, list(known))}")
        if known[key] is float and type(value) in (int, float):
            # NaN compares with nothing; an int of hundreds of digits is no float either.
            if not abs(value) <= sys.float_info.max:
                raise UserError(f"run: {key} must be finite, not {_short(value)}.")
            given[key] = float(value)
        elif type(value) is not known[key]:
            raise UserError(f"run: {key} must be of type {known[key].__name__}, not {value!r}.")
    settings = RunSettings(**given)
    for key, choices in _CHOICES.items():
        if getattr(settings, key) not in choices:
            said = " or ".join(choices)
            raise UserError(f"run: {key} must be {said}, not {getattr(settings, key)!r}.")
    for key in ("stability_interval", "gpus", "hang_minutes", "alarm_gain"):
        if getattr(settings, key) < 0:
            raise UserError(f"run: {key} must not be negative.")
    if settings.spike_factor and not settings.spike_factor > 1:
        raise UserError("run: spike_factor must be larger than 1, or 0 for no watch.")
    check_steps(settings.lr_steps)
    return settings


def _short(value: Any) -> str:
    """A value for a sentence; Python refuses to print integers of thousands of digits."""
    try:
        return str(value)
    except ValueError:
        return "a number of thousands of digits"


#: Sizes of the model and its layout.
_SIZES = (
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups",
    "kv-channels", "seq-length", "max-position-embeddings", "vocab-size", "micro-batch-size",
    "global-batch-size", "tensor-model-parallel-size", "pipeline-model-parallel-size",
    "context-parallel-size", "expert-model-parallel-size", "expert-tensor-parallel-size",
)  # fmt: skip


def parse(values: Mapping[str, Any]) -> argparse.Namespace:
    """Megatron's own parsing and checks of ``values``.

    The world size is the environment's (WORLD_SIZE). On a machine without a GPU,
    ``mhc_megatron.cpu.enable()`` comes first.

    Raises:
        UserError: an unknown key, a wrong value, a file that is not there, settings that
            contradict each other.
    """
    if values.get("yaml-cfg"):
        raise UserError("yaml-cfg: Megatron would take its settings from there alone.")
    if values.get("fine-grained-activation-offloading"):
        # Megatron insists on it, else FP8 weights are moved too (arguments.py:1858); Transformer
        # Engine reads it when Megatron imports it.
        os.environ.setdefault("NVTE_CPU_OFFLOAD_V1", "1")
    from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args

    for key in _SIZES:
        value = values.get(key)
        # Megatron divides by most of them before it looks.
        if isinstance(value, int) and value < 1:
            raise UserError(f"{key} must be at least 1, not {value}.")
    if values.get("wandb-project") and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb-project: the package wandb is not installed (pip install wandb).")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", device_connections(values))
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    words = megatron_argv(values, parser)
    saved, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        with megatron_errors():
            return parse_and_validate_args()
    except _NO_ACCESS as error:
        for key, value in values.items():
            if value is not None and value == error.filename:
                raise UserError(f"{key}: cannot open {value}: {error.strerror}.") from error
        raise
    finally:
        sys.argv = saved


#: What a user mends in the settings. Other OSErrors (a full disk, a file server that went away) are
#: the machine's: launch/supervise.py tries again.
_NO_ACCESS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def device_connections(values: Mapping[str, Any]) -> str:
    """CUDA_DEVICE_MAX_CONNECTIONS, hardware queues of a GPU, for a configuration.

    Megatron insists on one queue where kernels must start in the order of their launch (tensor and
    context parallelism, before Blackwell), and on several where all-to-alls overlap.
    """
    return "32" if values.get("overlap-moe-expert-parallel-comm") else "1"


def megatron_argv(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The command line that says ``values``, for Megatron's parser.

    A switch takes true or false under its own name (``no-bias-swiglu-fusion: true``) or under
    what it switches (``bias-swiglu-fusion: false``). null leaves Megatron's default.

    Raises:
        UserError: a key that the parser does not know (the nearest known one is named), a value
            of the wrong kind.
    """
    options = {option: action for action in parser._actions for option in action.option_strings}
    by_dest = {}
    for action in parser._actions:
        by_dest.setdefault(action.dest.replace("_", "-"), []).append(action)
    argv: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        option = next((o for o in (f"--{key}", f"--{key.replace('-', '_')}") if o in options), None)
        actions = [options[option]] if option else by_dest.get(key, [])
        if not actions:
            known = [o[2:] for o in options if o.startswith("--")]
            raise UserError(f"unknown key {key!r}{nearest(key, known + ['mhc', 'run'])}")
        argv += _argument(key, value, actions, option)
    return argv


def _argument(
    key: str, value: Any, actions: list[argparse.Action], option: str | None
) -> list[str]:
    """Command-line words for one key."""
    if isinstance(actions[0], argparse.BooleanOptionalAction):
        _need_bool(key, value)
        names = actions[0].option_strings
        negative = [name for name in names if name.startswith("--no-")]
        if option in negative:
            value = not value
        return [negative[0] if not value else next(n for n in names if n not in negative)]
    if actions[0].nargs == 0:
        _need_bool(key, value)
        if option:
            return [option] if value else []
        switch = next((a for a in actions if a.const is value), None)
        return [switch.option_strings[0]] if switch else []
    if isinstance(value, dict):
        raise UserError(f"{key} takes a value, not keys and values.")
    words = [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    _check_names(key, words, actions[0])
    return [option or actions[0].option_strings[0], *words]


def _check_names(key: str, words: list[str], action: argparse.Action) -> None:
    """Refuse a word that an enumeration does not have.

    Megatron looks it up by ``Enum[word]``; argparse makes a sentence of other errors of a type, but
    not of a KeyError.
    """
    for word in words:
        try:
            (action.type or str)(word)
        except KeyError as error:
            known = [choice.name for choice in action.choices or ()]
            said = nearest(word, known) if known else "."
            raise UserError(f"{key}: unknown name {word!r}{said}") from error
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            return  # argparse's to say


def _need_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{key} is a switch: true or false, not {value!r}.")


@contextlib.contextmanager
def megatron_errors():
    """Turn what Megatron's argument checks raise or print into one UserError."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as error:
        said = errors.getvalue().strip().splitlines() or ["the arguments were refused"]
        raise UserError(said[-1].partition("error: ")[2] or said[-1]) from error
    except (AssertionError, ValueError, RuntimeError, ArithmeticError, TypeError) as error:
        said = str(error).strip() or _source_of(error)
        raise UserError(f"contradictory settings: {said}") from error


def _source_of(error: BaseException) -> str:
    """The checked condition, for an assertion without a message."""
    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__

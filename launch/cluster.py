"""A job script from a configuration, a number of nodes and what the site asks for.

``Site`` is the site's file (launch/slurm/site.example.yaml has every key); ``render`` fills the
templates of launch/slurm with it. launch/submit.py is the command line.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jinja2

from launch.settings import Settings, device_connections, read_yaml
from mhc_megatron.config import nearest
from mhc_megatron.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEMPLATES = os.path.join(ROOT, "launch", "slurm")
PROFILES = ("h100", "h800", "h200", "cpu")


@dataclass
class Container:
    """A pyxis container; see site.example.yaml."""

    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


@dataclass
class Site:
    """What differs between clusters; see site.example.yaml for each key."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    sbatch: list[str] = field(default_factory=list)
    gpus_per_node: int = 8
    gpu_request: str = "--gpus-per-node={gpus}"
    cpus_per_gpu: int = 12
    exclusive: bool = True
    launcher: str = "torchrun"
    srun: list[str] = field(default_factory=list)
    master_port: int = 29500
    python: str = ".venv/bin/python"
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    container: Container = field(default_factory=Container)
    env: dict[str, str] = field(default_factory=dict)
    stop_seconds: int = 300
    attempts: int = 3

    @property
    def ranks_per_node(self) -> int:
        """Ranks on a node: one for each GPU; one on a machine without."""
        return self.gpus_per_node or 1


def load_site(path: str | None) -> Site:
    """The site's file; without one the defaults.

    Raises:
        UserError: unreadable, an unknown key, a value of the wrong kind.
    """
    if path is None:
        return Site()
    site = _fill(Site, read_yaml(path, "site file") or {}, path)
    if site.launcher not in ("torchrun", "srun"):
        raise UserError(f"{path}: launcher must be torchrun or srun, not {site.launcher!r}.")
    for key in ("gpus_per_node", "cpus_per_gpu", "stop_seconds", "attempts"):
        if getattr(site, key) < (key != "gpus_per_node"):
            raise UserError(f"{path}: {key.replace('_', '-')} is too small.")
    try:
        site.gpu_request.format(gpus=1)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: gpu-request may name {{gpus}} only, which {site.gpu_request!r} does not keep "
            "to; a brace of its own is written twice."
        ) from error
    return site


def _fill(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must hold keys and values, not {values!r}.")
    blank = kind()
    known = {f.name: getattr(blank, f.name) for f in fields(kind)}
    given = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            names = [k.replace("_", "-") for k in known]
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), names)}")
        given[name] = _value(name, value, known[name], where)
    return kind(**given)


def _value(name: str, value: Any, default: Any, where: str) -> Any:
    if isinstance(default, Container):
        return _fill(Container, value or {}, f"{where}: container")
    if default is None:
        fits = value is None or isinstance(value, str)
    elif isinstance(default, list):
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif isinstance(default, dict):
        if isinstance(value, Mapping) and all(_is_variable(key) for key in value):
            return {key: str(item) for key, item in value.items()}
        fits = False
    else:
        fits = type(value) is type(default)
    if not fits:
        wanted = "text" if default is None else type(default).__name__
        raise UserError(f"{where}: {name.replace('_', '-')} must be {wanted}, not {value!r}.")
    return value


def _is_variable(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None


@dataclass
class Job:
    """One submission.

    Attributes:
        kind: pretrain, sweep or convert: the template.
        name: of the job; jobs of one name and user form a chain with --dependency=singleton.
        nodes: how many.
        profile: for launch/env.sh.
        run_dir: the run's folder.
        config: the configuration's path.
        settings: the same, read.
        changes: ``--set`` changes, passed on.
        dependency: Slurm's, e.g. ``singleton``.
        time: over the site's.
        sweep: path of the sweep's YAML.
        convert: words for tools/convert_checkpoint.py.
    """

    kind: str
    name: str
    nodes: int
    profile: str
    run_dir: str
    config: str = ""
    settings: Settings | None = None
    changes: Sequence[str] = ()
    dependency: str | None = None
    time: str | None = None
    sweep: str = ""
    convert: Sequence[str] = ()


def render(job: Job, site: Site) -> str:
    """The job's script."""
    one_task = job.kind == "convert" or site.launcher == "torchrun"
    ranks = 1 if job.kind == "convert" else site.ranks_per_node
    gpus = 0 if job.kind == "convert" else site.gpus_per_node
    megatron = job.settings.megatron if job.settings else {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["sbatch"] = _sbatch
    environment.filters["pattern"] = lambda path: path.replace("%", "%%")
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": device_connections(megatron)} if gpus else {}
    env |= {"RANKS_PER_NODE": str(ranks)} | site.env
    tasks = 1 if one_task else ranks
    text = environment.get_template(f"{job.kind}.sbatch.j2").render(
        site=site,
        name=job.name,
        nodes=job.nodes,
        tasks_per_node=tasks,
        cpus_per_task=site.cpus_per_gpu * ranks // tasks,
        gpu_request=site.gpu_request.format(gpus=gpus) if gpus else "",
        time=job.time or site.time,
        run_dir=job.run_dir,
        root=ROOT,
        profile=job.profile,
        env=env,
        dependency=job.dependency,
        python=shlex.quote(site.python),
        srun=shlex.join(_srun(site)),
        config=job.config,
        changes=job.changes,
        sweep=job.sweep,
        world=job.nodes * ranks,
        convert=job.convert,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _sbatch(value: Any) -> str:
    """A value for an ``#SBATCH`` line, in double quotes where it needs them.

    sbatch parts such a line at spaces and ends it at ``#``, knows both quotes, and takes what
    follows a backslash as it is (src/sbatch/opt.c).

    Raises:
        UserError: a line break or another character that no such line can hold.
    """
    text = str(value)
    if not text.isprintable():
        raise UserError(f"{text!r} has a character that a job script's header cannot hold.")
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _srun(site: Site) -> list[str]:
    words = ["srun", "--kill-on-bad-exit=1", *site.srun]
    if site.container.image:
        mounts = [f"{ROOT}:{ROOT}", *site.container.mounts]
        words += [f"--container-image={site.container.image}"]
        words += [f"--container-mounts={','.join(mounts)}", f"--container-workdir={ROOT}"]
        words += site.container.options
    return words


def check_layout(settings: Settings, world: int) -> None:
    """Whether ``world`` ranks can hold the configuration's layout.

    Raises:
        UserError: they cannot; with the numbers.
    """
    values = settings.megatron

    def size(key: str, default: int = 1) -> int:
        value = values.get(key)
        if value is None:
            return default
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a whole number, at least 1, not {value!r}.")
        return value

    tp, pp = size("tensor-model-parallel-size"), size("pipeline-model-parallel-size")
    cp, ep = size("context-parallel-size"), size("expert-model-parallel-size")
    etp = size("expert-tensor-parallel-size", tp)
    if world % (tp * pp * cp):
        raise UserError(
            f"{world} ranks cannot hold tensor {tp} x pipeline {pp} x context {cp} parallelism: "
            f"the number of ranks must be a multiple of {tp * pp * cp}."
        )
    if world % (etp * ep * pp):
        raise UserError(
            f"{world} ranks cannot hold expert {ep} x expert-tensor {etp} x pipeline {pp} "
            f"parallelism: the number of ranks must be a multiple of {etp * ep * pp}."
        )
    dp, micro = world // (tp * pp * cp), size("micro-batch-size")
    batch = size("global-batch-size", micro * dp)
    if batch % (micro * dp):
        raise UserError(
            f"a global batch of {batch} cannot be split over {dp} data-parallel ranks with "
            f"micro-batches of {micro}."
        )

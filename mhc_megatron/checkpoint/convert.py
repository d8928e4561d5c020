"""Run a plan: bounded memory, several processes, resumable, all or nothing.

Everything is written to ``OUT.partial`` beside the target, which appears by one rename at the end.
A conversion that was killed leaves what was there before and a journal of finished files; the
same command takes them up. ``checksums.json`` (sha256 of every file) goes into the result.

Memory: a worker holds one output and what it is made of, so at most some three times the largest
tensor (input, result, cast), and no more for a larger model.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mhc_megatron.checkpoint import safetensors_io, torch_dist
from mhc_megatron.checkpoint.recipes import CastError, Output, Source, make
from mhc_megatron.errors import UserError

CHECKSUMS = "checksums.json"
JOURNAL = "journal.jsonl"
#: What a file holds at most, unless a single tensor is larger.
FILE_BYTES = {"torch_dist": 1 << 30, "safetensors": 5 * 10**9}
_WRITERS = {"torch_dist": torch_dist.write_file, "safetensors": safetensors_io.write_file}


@dataclass
class Plan:
    """A conversion before anything is written.

    Attributes:
        target: format of the result, ``torch_dist`` or ``safetensors``.
        sources: folders that the regions refer to; with several, a region's key starts with the
            folder's number and a colon.
        outputs: what is written, in order.
        folder: where in the result the files go (``iter_0000100``), or "".
        objects: torch_dist's objects, name -> archive.
        texts: further files of the result, name -> text.
    """

    target: str
    sources: list[Path]
    outputs: list[Output]
    folder: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Job:
    """One file for a worker."""

    target: str
    sources: tuple[str, ...]
    path: str
    outputs: tuple[Output, ...]


class Sources(Source):
    """Several sources under one: ``0:name``, ``1:name``."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.all = [open_source(path) for path in paths]

    def infos(self):
        return {f"{i}:{k}": v for i, s in enumerate(self.all) for k, v in s.infos().items()}

    def read(self, region):
        number, _, key = region.key.partition(":")
        return self.all[int(number)].read(dataclasses.replace(region, key=key))


def open_source(path: str | os.PathLike[str]) -> Any:
    """The checkpoint in a folder, whichever of the two formats it has.

    Raises:
        UserError: no such folder, or neither format.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if torch_dist.is_torch_dist(path):
        return torch_dist.TorchDistSource(path)
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors*")):
        return safetensors_io.SafetensorsSource(path)
    raise UserError(f"{path} holds neither a torch_dist checkpoint nor safetensors.")


def check_target(out: str | os.PathLike[str]) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: it exists, or its folder cannot be written to.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; nothing is overwritten: choose another folder.")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {parent}.")


def run(
    plan: Plan, out: str | os.PathLike[str], *, workers: int = 1, quiet: bool = False
) -> dict[str, CastError]:
    """Write a plan's result to ``out``; returns the errors of reported casts by output.

    Raises:
        UserError: ``out`` exists, the disk is full, a source is damaged.
    """
    out = Path(out)
    check_target(out)
    partial = out.with_name(out.name + ".partial")
    files = _files(plan)
    with _disk_full(partial), _locked(partial):
        done = _resume(plan, partial, files)
        _check_space(partial, files, done)
        folder = partial / "result" / plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        _write_files(plan, partial, folder, files, done, workers, quiet)
        _finish(plan, folder, files, done)
        _write_checksums(partial / "result", plan, done)
        os.rename(partial / "result", out)
        _sync(out.absolute().parent)
        shutil.rmtree(partial)
    errors: dict[str, CastError] = {}
    for name, outputs in files.items():
        for output, error in zip(outputs, done[name]["errors"], strict=True):
            if error is not None:
                errors[output.key] = CastError(*error)
    return errors


def _files(plan: Plan) -> dict[str, list[Output]]:
    """Outputs by file, in order, each file below the format's size."""
    groups: list[list[Output]] = []
    size = limit = FILE_BYTES[plan.target]
    for output in plan.outputs:
        if size + output.nbytes > limit or not groups:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    if plan.target == "torch_dist":
        return {f"__{i}_0.distcp": group for i, group in enumerate(groups)}
    if len(groups) == 1:
        return {safetensors_io.SINGLE: groups[0]}
    of = len(groups)
    return {f"model-{i + 1:05d}-of-{of:05d}.safetensors": g for i, g in enumerate(groups)}


def fingerprint(plan: Plan) -> str:
    """Changes where the plan or a file of its sources does."""
    digest = hashlib.sha256(f"{plan.target}/{plan.folder}".encode())
    for output in plan.outputs:
        digest.update(repr(output).encode())
    for key, data in plan.objects.items():
        digest.update(key.encode() + data)
    for source in plan.sources:
        files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
        for path in files:
            stat = path.stat()
            digest.update(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _resume(plan: Plan, partial: Path, files: dict[str, list[Output]]) -> dict[str, dict]:
    """Records of finished files, where the journal is of this very conversion; else start anew."""
    journal, key = partial / JOURNAL, fingerprint(plan)
    done: dict[str, dict] = {}
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    with contextlib.suppress(ValueError):  # a line cut short by a kill
        if lines and json.loads(lines[0]).get("plan") == key:
            for line in lines[1:]:
                record = json.loads(line)
                path = partial / "result" / plan.folder / record["file"]
                if record["file"] in files and _size(path) == record["bytes"]:
                    done[record["file"]] = record
    if not done:
        shutil.rmtree(partial / "result", ignore_errors=True)
    text = "".join(json.dumps(x) + "\n" for x in ({"plan": key}, *done.values()))
    journal.write_text(text, encoding="utf-8")
    return done


def _write_files(
    plan: Plan, partial: Path, folder: Path, files: dict, done: dict, workers: int, quiet: bool
) -> None:
    jobs = [
        Job(plan.target, tuple(map(str, plan.sources)), str(folder / name), tuple(outputs))
        for name, outputs in files.items()
        if name not in done
    ]
    kept = sum(record["bytes"] for record in done.values())
    if kept and not quiet:
        print(f"resuming: {len(done)} of {len(files)} files are there", file=sys.stderr)
    bar = tqdm(
        total=plan.nbytes,
        initial=min(kept, plan.nbytes),
        unit="B",
        unit_scale=True,
        disable=True if quiet else None,
    )
    with bar, open(partial / JOURNAL, "a", encoding="utf-8") as journal:
        for record in _records(jobs, workers, bar.update):
            done[record["file"]] = record
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _records(jobs: list[Job], workers: int, tick: Callable[[int], Any]) -> Iterator[dict]:
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield write_job(job, tick)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context) as pool:
        futures = {pool.submit(write_job, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
                tick(sum(output.nbytes for output in futures[future].outputs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_job(job: Job, tick: Callable[[int], Any] = lambda n: None) -> dict[str, Any]:
    """Write one file; its record for the journal."""
    source = open_source(job.sources[0]) if len(job.sources) == 1 else None
    if source is None and job.sources:
        source = Sources(job.sources)
    errors: list[list[float] | None] = []

    def tensors() -> Iterator[Tensor]:
        for output in job.outputs:
            with torch.no_grad():
                value, error = make(output, source)
            errors.append(None if error is None else [error.error, error.norm])
            yield value
            tick(output.nbytes)

    path = Path(job.path)
    record = _WRITERS[job.target](path, job.outputs, tensors())
    return {"file": path.name, **record, "errors": errors}


def _finish(plan: Plan, folder: Path, files: dict[str, list[Output]], done: dict) -> None:
    """The small files, which need the records of all others."""
    if plan.target == "torch_dist":
        name = "__objects_0.distcp"
        record = torch_dist.write_objects(folder / name, plan.objects)
        torch_dist.write_metadata(
            folder,
            {file: (outputs, done[file]) for file, outputs in files.items()},
            (name, plan.objects, record),
        )
    elif len(files) > 1:
        text = json.dumps(safetensors_io.index_of(files), indent=2)
        (folder / safetensors_io.INDEX).write_text(text, encoding="utf-8")
    root = folder.parent if plan.folder else folder
    for name, text in plan.texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def _write_checksums(root: Path, plan: Plan, done: dict[str, dict]) -> None:
    known = {str(Path(plan.folder) / name): record["sha256"] for name, record in done.items()}
    write_checksums(root / plan.folder if plan.folder else root, root, known)


def write_checksums(folder: Path, root: Path | None = None, known: dict | None = None) -> None:
    """``checksums.json`` of a checkpoint's folder: name -> sha256 of every file in it."""
    sums = {}
    ours = (CHECKSUMS, f"{CHECKSUMS}.new")
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ours):
        stated = (known or {}).get(str(path.relative_to(root))) if root else None
        sums[str(path.relative_to(folder))] = stated or file_sha256(path)
    # Beside the old file, which a full disk then leaves as it was.
    new = folder / f"{CHECKSUMS}.new"
    try:
        new.write_text(checksum_text(sums), encoding="utf-8")
        for path in folder.rglob("*"):
            if path.is_file():
                _sync(path)
        os.replace(new, folder / CHECKSUMS)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(folder)


def checksum_text(sums: dict[str, str]) -> str:
    """One form only, so that a changed byte of the file itself shows."""
    return json.dumps(sums, indent=0, sort_keys=True)


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_space(partial: Path, files: dict[str, list[Output]], done: dict) -> None:
    needed = sum(o.nbytes for name, outputs in files.items() if name not in done for o in outputs)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"the disk of {partial.parent} is too full: {needed / 1e9:.2f} GB are needed and "
            f"{free / 1e9:.2f} GB are free; nothing was written."
        )


@contextlib.contextmanager
def _disk_full(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"the disk is full; what is converted is kept in {partial}: "
                "make room and run the same command again."
            ) from error
        raise UserError(f"cannot write to {partial}: {error.strerror or error}.") from error


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """One conversion at a time on a target."""
    partial.mkdir(exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another conversion is writing to {partial}.") from error
        yield


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

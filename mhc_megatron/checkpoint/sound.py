"""Which checkpoint of a run to go on from: the newest one that is whole.

A process can be killed, and a disk can fill up, at any moment of a save. Megatron writes the folder
``iter_NNNNNNN`` first and the tracker file last, so that a save that was cut short is normally not
named; but the tracker itself is not replaced atomically, and a file can be cut after the fact.
``choose`` looks at what a load would read: the tracker, ``.metadata`` and the size of every file
that ``.metadata`` refers to. It reads no tensors (``tools/convert_checkpoint.py verify`` does).
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from mhc_megatron.checkpoint.torch_dist import COMMON, TRACKER, check_archive, read_metadata
from mhc_megatron.errors import UserError
from mhc_megatron.files import replacing

_NAME = re.compile(r"iter_(\d{7,})$")


@dataclass(frozen=True)
class Choice:
    """What ``choose`` found.

    Attributes:
        iteration: of the checkpoint to load; None where there is none.
        named: what the tracker said, None where it could not be read or did not exist.
        faults: a sentence for every newer checkpoint that is not whole.
    """

    iteration: int | None
    named: int | None
    faults: list[str]


def choose(folder: str | os.PathLike[str]) -> Choice | None:
    """The checkpoint to load from ``folder``; None to leave it to Megatron.

    Newer folders than the tracker names are the remains of saves that did not end, or were given
    up by hand: they are not considered, unless the tracker cannot be read. A ``release`` checkpoint
    or another format than torch_dist is left to Megatron.

    Without a tracker, which is written after a checkpoint and may be lost as well, it is the newest
    whole one; None where there is none: the first save did not end, and the run begins anew.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    folder = Path(folder)
    tracker = folder / TRACKER
    tracked = tracker.exists()
    if not tracked and not folder.is_dir():
        return None
    said = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracked else ""
    if said == "release":
        return None
    named = int(said) if said.isdigit() else None
    candidates = [i for i in iterations(folder) if named is None or i <= named]
    if named is not None and named not in candidates:
        candidates.insert(0, named)
    faults: list[str] = []
    for iteration in candidates:
        path = folder / f"iter_{iteration:07d}"
        foreign = path.exists() and not (path / ".metadata").exists() and not _is_torch_dist(path)
        if tracked and foreign:
            return None
        fault = fault_of(path)
        if fault is None:
            return Choice(iteration, named, faults)
        faults.append(fault)
    if not tracked:
        return None
    if not candidates:
        raise UserError(f"{tracker} is damaged, and {folder} has no checkpoint.")
    raise UserError(f"no checkpoint in {folder} is whole: {' '.join(faults)}")


def iterations(folder: Path) -> list[int]:
    """Iterations of the checkpoints' folders, newest first."""
    found = [_NAME.match(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def fault_of(path: Path) -> str | None:
    """What is missing or cut short in a torch_dist checkpoint, in a sentence; None if nothing."""
    if not path.is_dir():
        return f"{path} does not exist."
    try:
        json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{path}/metadata.json is missing or damaged."
    try:
        metadata = read_metadata(path)
        if COMMON not in metadata.state_dict_metadata:  # older checkpoints have a file for it
            check_archive(path / "common.pt", f"{path}/common.pt")
    except UserError as error:
        return str(error)
    ends: dict[str, int] = defaultdict(int)
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    for name, end in sorted(ends.items()):
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{path / name} is missing."
        if size < end:
            return f"{path / name} is cut short: {size} bytes of {end}."
    return None


def _is_torch_dist(path: Path) -> bool:
    """Whether this is (the beginning of) a torch_dist checkpoint: such a save makes no folders.

    The legacy format has ``mp_rank_XX`` folders, FSDP's its own ``metadata.json``.
    """
    return not any(entry.is_dir() for entry in path.iterdir())


def set_tracker(folder: str | os.PathLike[str], iteration: int) -> None:
    """Name ``iteration`` in the tracker file, atomically."""
    with replacing(Path(folder) / TRACKER) as f:
        f.write(str(iteration))


def settle(folder: str | None) -> list[str]:
    """Before a load, on every rank: rank 0 chooses, and names its choice in the tracker.

    Returns:
        Sentences on what was passed over; the same on all ranks.

    Raises:
        UserError: no checkpoint is whole; on all ranks.
    """
    said: list[object] = [None, []]
    if folder and torch.distributed.get_rank() == 0:
        try:
            choice = choose(folder)
        except UserError as error:
            said[0] = str(error)
        else:
            if choice is not None and choice.iteration != choice.named:
                set_tracker(folder, choice.iteration)
                lost = choice.faults or [f"{Path(folder) / TRACKER} was damaged or missing."]
                said[1] = [*lost, f"Going on from iteration {choice.iteration} instead."]
    torch.distributed.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise UserError(said[0])
    return said[1]

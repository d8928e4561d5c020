#!/usr/bin/env python3
"""The README's table of what runs in which layout, from the tests that ran it.

    tools/support_table.py                # write it between the markers in README.md
    tools/support_table.py --check        # exit code 1 where README.md differs
    tools/support_table.py --print        # to the terminal

Reads build/layouts.jsonl, which ``pytest tests/distributed/test_layouts.py`` writes: one row for
each kind of model and layout, with its losses and how far they are from one rank's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECORDS = os.path.join(_ROOT, "build", "layouts.jsonl")
README = os.path.join(_ROOT, "README.md")
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        table = markdown(read(options.records))
        if options.print:
            print(table)
            return 0
        with open(options.readme, encoding="utf-8") as f:
            old = f.read()
        new = insert(old, table, options.readme)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != old:
            print(f"{options.readme} differs from {options.records}", file=sys.stderr)
        return int(new != old)
    if new != old:
        with open(options.readme + ".part", "w", encoding="utf-8") as f:
            f.write(new)
        os.replace(options.readme + ".part", options.readme)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--records", default=RECORDS, help="default: build/layouts.jsonl")
    parser.add_argument("--readme", default=README, help="default: README.md")
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--print", action="store_true", help="to the terminal, not into a file")
    return parser


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a records file.

    Raises:
        ValueError: there is none, or a line of it is broken.
    """
    if not os.path.exists(path):
        raise ValueError(f"no {path}; run pytest tests/distributed/test_layouts.py first.")
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                rows.append({key: row[key] for key in ("kind", "layout", "ranks", "mhc", "none")})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a row of the table.") from error
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line a row: the largest relative difference of a loss or gradient norm to one rank."""
    lines = [
        "| model | layout | ranks | difference to one rank | plain Megatron's |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        ours, plain = (difference(row[variant]) for variant in ("mhc", "none"))
        lines.append(
            f"| {row['kind']} | {row['layout'].replace('|', chr(92) + '|')} | {row['ranks']} "
            f"| {ours} | {plain} |"
        )
    return "\n".join(lines)


def difference(errors: dict[str, float]) -> str:
    """The larger of both errors, one digit; "none" where every bit is the same."""
    largest = max(errors["loss_error"], errors["grad_norm_error"])
    return f"{largest:.0e}" if largest else "none"


def insert(text: str, table: str, name: str) -> str:
    """``text`` with ``table`` between the markers.

    Raises:
        ValueError: a marker is missing, or there are several.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{name} must have the line {marker} once.")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)
    if len(tail) != 2:
        raise ValueError(f"{name}: {END} must come after {BEGIN}.")
    return f"{head}{BEGIN}\n{table}\n{END}{tail[1]}"


if __name__ == "__main__":
    sys.exit(main())

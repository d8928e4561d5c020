#!/usr/bin/env bash
# Solve pyproject.toml's ranges anew and write requirements.lock. Needs uv (pip install uv).
#
# One solution serves CPython 3.12 and newer on x86_64 and aarch64. uv then repeats the condition
# "Linux on either" behind every line; it is taken out, and a line with another one keeps it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pinned=(torch==2.11.0 triton==3.6.0)
machines="platform_machine == 'aarch64' or platform_machine == 'x86_64'"
both=" ; ($machines) and sys_platform == 'linux'"
new=$(mktemp)
trap 'rm -f "$new"' EXIT

{
    echo "# Every package of the environment, pinned. Written by tools/lock.sh; do not edit."
    printf '%s\n' "${pinned[@]}" | uv pip compile - pyproject.toml \
        --extra train --extra convert --extra dev \
        --universal --python-version 3.12 --no-annotate --no-header --quiet \
        --default-index "${UV_DEFAULT_INDEX:-https://pypi.org/simple}"
} | while IFS= read -r line; do printf '%s\n' "${line%"$both"}"; done >"$new"
cat "$new" >requirements.lock

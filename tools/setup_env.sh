#!/bin/bash
# Make .venv, the project's environment, from requirements.lock.
#
#   tools/setup_env.sh           make or repair .venv; at once when it already matches the lock
#   tools/setup_env.sh --find    print the Python that would be used, and install nothing
#
# .venv/.installed is a copy of the lock, written last: an environment without it, or with another
# one, is not finished. .venv/.unfinished is written first: what still has it is made anew.
# PYTHON=/path/to/python names an interpreter to try before all others.
set -uo pipefail

readonly SUPPORTED="3.12 3.13" # megatron-core 0.19.2 and torch 2.11.0 have wheels for these
readonly GLIBC_MINOR=28        # torch 2.11.0 wheels are manylinux_2_28
readonly SEARCH_PATH=${PATH:-}
readonly SYSTEM_ROOT=${MHC_SYSTEM_ROOT:-} # put before /opt by the tests
PATH=${PATH:+$PATH:}/usr/local/bin:/usr/bin:/bin
HOME=${HOME:-/root}
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

say() { printf '%s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

check_platform() {
    case "$(uname -s) $(uname -m)" in
    "Linux x86_64" | "Linux aarch64") ;;
    *) die "mhc-megatron runs on Linux x86_64 and aarch64, not on $(uname -s) $(uname -m): its" \
        "dependencies (torch with CUDA, megatron-core) have no wheels for it." ;;
    esac
}

# --- Finding a Python -------------------------------------------------------------------------

# Folders whose bin/ (or which themselves) may hold interpreters, most explicit first.
path_folders() {
    local folder
    while IFS= read -r -d : folder; do
        [ -n "$folder" ] && printf '%s\n' "$folder"
    done <<<"$SEARCH_PATH:"
}

pyenv_folders() {
    local root shims
    while IFS= read -r shims; do # the root of shims that stand on PATH, wherever it is
        [ "${shims##*/}" = shims ] && printf '%s\n' "${shims%/shims}"/versions/*/bin
    done < <(path_folders)
    for root in "${PYENV_ROOT:-}" "$HOME/.pyenv" "$SYSTEM_ROOT/opt/pyenv"; do
        [ -n "$root" ] && printf '%s\n' "$root"/versions/*/bin
    done
}

conda_folders() {
    local root tool folder
    [ -n "${CONDA_PREFIX:-}" ] && printf '%s\n' "$CONDA_PREFIX/bin"
    if [ -r "$HOME/.conda/environments.txt" ]; then
        while IFS= read -r root; do
            [ -n "$root" ] && printf '%s\n' "$root/bin"
        done <"$HOME/.conda/environments.txt"
    fi
    { # installations: named by the shell's set-up, seen on PATH, or in their usual places
        [ -n "${CONDA_EXE:-}" ] && dirname "$(dirname "$CONDA_EXE")"
        [ -n "${MAMBA_ROOT_PREFIX:-}" ] && printf '%s\n' "$MAMBA_ROOT_PREFIX"
        while IFS= read -r folder; do
            for tool in conda mamba; do [ -x "$folder/$tool" ] && dirname "$folder"; done
        done < <(path_folders)
        for root in miniforge3 mambaforge miniconda3 anaconda3 micromamba conda; do
            printf '%s\n' "$HOME/$root" "$SYSTEM_ROOT/opt/$root"
        done
    } | while IFS= read -r root; do
        printf '%s\n' "$root/bin" "$root"/envs/*/bin
    done
}

uv_folders() {
    local root
    for root in "${UV_PYTHON_INSTALL_DIR:-}" "${XDG_DATA_HOME:-$HOME/.local/share}/uv/python"; do
        [ -n "$root" ] && printf '%s\n' "$root"/*/bin
    done
}

# Candidates for version $1, one a line: exact names everywhere, `python3` on PATH only.
candidates() {
    local version=$1 folder name
    while IFS= read -r folder; do
        for name in "python$version" python3 python; do printf '%s\n' "$folder/$name"; done
    done < <(path_folders)
    { pyenv_folders; conda_folders; uv_folders; } | while IFS= read -r folder; do
        printf '%s\n' "$folder/python$version"
    done
}

named_candidate() { type -P "$PYTHON"; }

# Asked of every candidate, because only running it tells: a pyenv shim may exist and fail, a
# distribution's Python may lack venv. Prints "<version> <venv|no-venv> <real interpreter>"; the
# real one, so that an active virtual environment (even this one) is not built upon.
readonly PROBE='
import platform, sys
def main():
    import ctypes, ssl, sysconfig, zlib
    libc, release = platform.libc_ver()
    fits = platform.python_implementation() == "CPython" and sys.maxsize > 2**32
    fits = fits and not sysconfig.get_config_var("Py_GIL_DISABLED") and libc == "glibc"
    fits = fits and [int(part) for part in release.split(".")[:2]] >= [2, int(sys.argv[1])]
    if not fits:
        sys.exit(1)
    try:
        import ensurepip, venv
        ensurepip.version()
        maker = "venv"
    except Exception:
        maker = "no-venv"
    real = getattr(sys, "_base_executable", None) or sys.executable
    print("%d.%d %s %s" % (sys.version_info[0], sys.version_info[1], maker, real))
main()
'

# The fitting ones among what the function $1 lists, as "<venv|uv> <path>", the preferred one first.
# Those without the venv module come last, and only where uv can stand in for it.
fitting() {
    local version candidate answer later=""
    local -A seen=()
    for version in $SUPPORTED; do
        while IFS= read -r candidate; do
            [ -f "$candidate" ] && [ -x "$candidate" ] && [ -z "${seen[$version$candidate]:-}" ] ||
                continue
            seen[$version$candidate]=1
            answer=$(timeout 20 "$candidate" -I -c "$PROBE" "$GLIBC_MINOR" 2>/dev/null </dev/null)
            case $answer in
            "$version venv "*) printf 'venv %s\n' "${answer#* * }" ;;
            "$version no-venv "*) later+="uv ${answer#* * }"$'\n' ;;
            esac
        done < <("$1" "$version")
    done
    if PATH=$SEARCH_PATH type -P uv >/dev/null; then printf '%s' "$later"; fi
}

# All of them, the one that PYTHON names in front, whatever its version.
choices() {
    local named=""
    if [ -n "${PYTHON:-}" ]; then
        named=$(fitting named_candidate)
        if [ -n "$named" ]; then
            printf '%s\n' "$named"
        else
            say "PYTHON=$PYTHON does not fit (CPython ${SUPPORTED/ / or } with venv is needed):" \
                "looking further."
        fi
    fi
    fitting candidates
}

die_without_python() {
    local found
    found=$(timeout 20 python3 -c 'import platform; print(platform.python_version())' 2>/dev/null)
    die "No fitting Python: mhc-megatron needs CPython ${SUPPORTED/ / or } with the venv module" \
        "on glibc 2.$GLIBC_MINOR or newer (python3 here is ${found:-not usable}); install one, for" \
        "example with 'apt install python3.12-venv', 'uv python install 3.12'," \
        "'pyenv install 3.12' or 'conda create -n py312 python=3.12', or name one with" \
        "PYTHON=/path/to/python3.12."
}

# --- Making .venv -----------------------------------------------------------------------------

pip() { .venv/bin/python -m pip "$@"; }
up_to_date() { cmp -s requirements.lock .venv/.installed && usable_venv; }

usable_venv() {
    local version
    version=$(.venv/bin/python -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null) && [[ " $SUPPORTED " == *" $version "* ]]
}

# An empty environment from the first interpreter that manages it.
new_venv() {
    local maker python
    while read -r maker python; do
        rm -rf .venv && mkdir .venv && : >.venv/.unfinished || return 1
        say "Python: $python"
        case $maker in
        venv) "$python" -m venv .venv >&2 ;;
        uv) uv venv --seed --allow-existing --python "$python" .venv >&2 ;;
        esac && pip --version >/dev/null && return 0
        say "$python cannot make a virtual environment: trying the next."
    done < <(choices)
    rm -rf .venv
    die_without_python
}

# A finished environment of another lock, or one made by hand, is brought up to date in place, so
# that what was added to it stays; a rehearsal first, so that a failing download changes nothing.
# Anything else in .venv's place is what an interruption left.
prepare_venv() {
    if [ -e .venv/.unfinished ] || ! usable_venv || ! pip --version &>/dev/null; then
        [ -e .venv ] && say ".venv is half-made, or of a Python that does not fit: making it anew."
        new_venv
    else
        say ".venv is not what requirements.lock says: bringing it up to date."
        pip install --dry-run --quiet --only-binary :all: --requirement requirements.lock >&2 ||
            return 1
        : >.venv/.unfinished && rm -f .venv/.installed
    fi
}

report_device() {
    .venv/bin/python - <<'PYTHON' >&2
import importlib.util
import pathlib
import shutil
import sysconfig

if importlib.util.find_spec("torch"):
    import torch

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "no usable GPU: the CPU is used"
    print(f"torch {torch.__version__}, {name}.")
    if not gpu and shutil.which("nvidia-smi"):
        print(f"nvidia-smi is here: is the driver new enough for CUDA {torch.version.cuda}?")
    if gpu and not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        print("Triton needs a C compiler for its kernels: install gcc.")
    if gpu and not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file():
        print("Triton needs Python.h for its kernels: install this Python's development files.")
PYTHON
}

install() {
    local start=$SECONDS
    trap '[ -e .venv/.unfinished ] && say "The environment is not finished: run \`make setup\`" \
        "again; it starts anew."' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    say "Setting up .venv, once: $(grep -c '==' requirements.lock) packages of requirements.lock," \
        "some minutes, 6 GB of disk for torch and its CUDA libraries."
    if ! { prepare_venv && pip install --only-binary :all: --no-warn-script-location \
        --requirement requirements.lock >&2; }; then
        say "requirements.lock could not be installed: the reason is above."
        return 1
    fi
    cp requirements.lock .venv/.installed.new && rm .venv/.unfinished &&
        mv .venv/.installed.new .venv/.installed || return 1
    say "The environment stands after $((SECONDS - start)) s."
    report_device
}

main() {
    case ${1:-} in
    --find)
        check_platform
        local choice
        read -r _ choice < <(choices)
        [ -n "${choice:-}" ] || die_without_python
        printf '%s\n' "$choice"
        ;;
    "")
        up_to_date && return 0
        check_platform
        [ -r requirements.lock ] || die "requirements.lock is missing: the clone is incomplete."
        exec 9<requirements.lock
        if type -P flock >/dev/null && ! flock -n 9; then
            say "Another set-up of this clone is running: waiting for it."
            flock 9
        fi
        up_to_date && return 0 # made while this one waited
        install
        ;;
    *) die "usage: tools/setup_env.sh [--find]" ;;
    esac
}

main "$@"

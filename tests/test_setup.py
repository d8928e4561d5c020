"""Setting up a fresh clone: the Python that is found, the environment that is made, the lock.

Finding is tested with stand-ins that answer the probe as an interpreter would; making .venv with
the running interpreter, a one-line lock and a package built here, so nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BASE_PYTHON: str = getattr(sys, "_base_executable", sys.executable)
NAMES = ("Makefile", "tools/setup_env.sh", ".ci/run", "requirements.lock")

Result = subprocess.CompletedProcess[str]


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str = "3.12", maker: str = "venv") -> Path:
    return write_script(path, f'[ "$2" = -c ] && echo "{version} {maker} $0"')


def failing_shims(folder: Path) -> Path:
    for name in ("python", "python3", "python3.12", "python3.13"):
        write_script(folder / name, f'echo "pyenv: {name}: command not found" >&2; exit 127')
    return folder


class Machine:
    """A clone's set-up files and a machine around them: home, PATH and /opt are all empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clone = root / "a clone"
        self.home = root / "home"
        self.bin = root / "bin"
        for name in NAMES:
            target = self.clone / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.home.mkdir()
        self.bin.mkdir()

    def environment(self, **more: str | Path) -> dict[str, str]:
        base = {"HOME": self.home, "PATH": self.bin, "MHC_SYSTEM_ROOT": self.root / "system"}
        offline = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.root.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return {name: str(value) for name, value in (base | offline | more).items()}

    def run(self, *command: str, **more: str | Path) -> Result:
        return subprocess.run(
            command, cwd=self.clone, env=self.environment(**more), text=True, timeout=240,
            stdin=subprocess.DEVNULL, capture_output=True,
        )  # fmt: skip

    def find(self, **more: str | Path) -> Result:
        return self.run("/bin/bash", "tools/setup_env.sh", "--find", **more)

    def setup(self) -> Result:
        return self.run("/usr/bin/env", "make", "setup", PATH=os.defpath, PYTHON=BASE_PYTHON)

    def lock(self, *lines: str) -> None:
        (self.clone / "requirements.lock").write_text("".join(line + "\n" for line in lines))

    def installed(self) -> str:
        python = self.clone / ".venv" / "bin" / "python"
        code = "import tiny; print(tiny.version)"
        return subprocess.run([python, "-c", code], text=True, capture_output=True).stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- Finding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3.12",
        "bin/python3",
        "home/.pyenv/versions/3.12.7/bin/python3.12",
        "home/miniforge3/bin/python3.12",
        "home/anaconda3/envs/some name/bin/python3.12",
        "system/opt/conda/envs/py312/bin/python3.12",
        "home/.local/share/uv/python/cpython-3.12.9-linux-x86_64-gnu/bin/python3.12",
    ],
)
def test_finds_python_behind_failing_shims(machine: Machine, place: str) -> None:
    shims = failing_shims(machine.root / "shims of nothing")
    python = fake_python(machine.root / place)
    result = machine.find(PATH=f"{shims}:{machine.bin}")
    assert (result.returncode, result.stdout.strip()) == (0, str(python)), result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "place"),
    [
        ("PYENV_ROOT", "py env", "py env/versions/3.12.7/bin/python3.12"),
        ("PATH", "odd/shims", "odd/versions/3.12.7/bin/python3.12"),
        ("PATH", "mamba/condabin", "mamba/envs/x/bin/python3.12"),
        ("CONDA_PREFIX", "env", "env/bin/python3.12"),
        ("CONDA_EXE", "conda/bin/conda", "conda/envs/x/bin/python3.12"),
        ("MAMBA_ROOT_PREFIX", "mm", "mm/envs/x/bin/python3.12"),
        ("UV_PYTHON_INSTALL_DIR", "uv", "uv/cpython-3.12.9/bin/python3.12"),
    ],
)
def test_finds_python_where_variables_point(
    machine: Machine, variable: str, value: str, place: str
) -> None:
    write_script(machine.root / "mamba/condabin/conda", "exit 1")
    failing_shims(machine.root / "odd/shims")
    python = fake_python(machine.root / place)
    result = machine.find(**{variable: machine.root / value})
    assert result.stdout.strip() == str(python), result.stderr


def test_finds_environments_that_conda_registered(machine: Machine) -> None:
    python = fake_python(machine.root / "far away/bin/python3.12")
    (machine.home / ".conda").mkdir()
    (machine.home / ".conda/environments.txt").write_text(f"/gone\n{machine.root}/far away\n")
    assert machine.find().stdout.strip() == str(python)


def test_prefers_the_oldest_supported_and_takes_a_newer_one(machine: Machine) -> None:
    newer = fake_python(machine.bin / "python3.13", "3.13")
    assert machine.find().stdout.strip() == str(newer)
    older = fake_python(machine.home / ".pyenv/versions/3.12.1/bin/python3.12")
    assert machine.find().stdout.strip() == str(older)


def test_named_python_goes_first_and_a_bad_name_is_reported(machine: Machine) -> None:
    other = fake_python(machine.bin / "python3.12")
    named = fake_python(machine.root / "my python", "3.13")
    assert machine.find(PYTHON=named).stdout.strip() == str(named)
    result = machine.find(PYTHON="/no/such/python")
    assert result.stdout.strip() == str(other)
    assert "PYTHON=/no/such/python does not fit" in result.stderr


def test_python_without_venv_is_passed_over_unless_uv_helps(machine: Machine) -> None:
    bare = fake_python(machine.bin / "python3.12", maker="no-venv")
    assert machine.find().returncode == 2
    write_script(machine.bin / "uv", "exit 1")
    assert machine.find().stdout.strip() == str(bare)
    whole = fake_python(machine.bin / "python3.13", "3.13")
    assert machine.find().stdout.strip() == str(whole)


@pytest.mark.parametrize("version", [None, "3.11", "3.14"])
def test_no_fitting_python_is_one_sentence(machine: Machine, version: str | None) -> None:
    failing_shims(machine.bin)
    if version is not None:
        fake_python(machine.bin / "python3", version)
    for arguments in (["--find"], []):
        result = machine.run("/bin/bash", "tools/setup_env.sh", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        sentence = result.stderr.splitlines()[-1]
        assert sentence.startswith("No fitting Python") and "python3.12-venv" in sentence
        assert len(result.stderr.splitlines()) == 1 or not arguments
        assert not (machine.clone / ".venv").exists()


def test_other_platform_is_one_sentence(machine: Machine) -> None:
    write_script(machine.bin / "uname", '[ "$1" = -s ] && echo Darwin || echo arm64')
    result = machine.find()
    assert result.returncode == 2
    assert re.fullmatch(
        r"mhc-megatron runs on Linux [^\n]* not on Darwin arm64[^\n]*\n", result.stderr
    )


def test_probe_accepts_the_real_interpreter_and_leaves_its_environment(machine: Machine) -> None:
    result = machine.find(PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == Path(sys.executable).resolve()
    assert (
        not Path(result.stdout.strip()).is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix
    )


# --- Making .venv -------------------------------------------------------------------------------


def write_wheel(folder: Path, version: str) -> None:
    info = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", f"version = {version!r}\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = Machine(tmp_path_factory.mktemp("made"))
    for version in ("1.0", "2.0"):
        write_wheel(machine.root, version)
    machine.lock("tiny==1.0")
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    return machine


@pytest.fixture
def ready(made: Machine, tmp_path: Path) -> Machine:
    """A copy of the finished set-up, to change."""
    shutil.copytree(made.root, tmp_path / "copy", symlinks=True)
    copy = object.__new__(Machine)
    copy.root, copy.clone = tmp_path / "copy", tmp_path / "copy" / "a clone"
    copy.home, copy.bin = copy.root / "home", copy.root / "bin"
    return copy


def children_seconds() -> float:
    """CPU time of finished children: a busy machine does not lengthen it as it does the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_second_call_starts_at_once(made: Machine) -> None:
    assert made.installed() == "1.0"
    before = children_seconds()
    result = made.setup()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert children_seconds() - before < 0.5


def test_environment_that_does_not_run_is_made_anew(ready: Machine) -> None:
    venv = ready.clone / ".venv"
    shutil.rmtree(venv / "bin")
    (venv / "bin").mkdir()
    result = ready.setup()  # although .installed matches the lock
    assert result.returncode == 0 and "making it anew" in result.stderr, result.stderr
    assert ready.installed() == "1.0"


def test_killed_installation_is_not_taken_for_a_finished_one(ready: Machine) -> None:
    venv = ready.clone / ".venv"
    shutil.rmtree(venv)
    process = subprocess.Popen(
        ["/bin/bash", "tools/setup_env.sh"], cwd=ready.clone, start_new_session=True,
        env=ready.environment(PYTHON=BASE_PYTHON), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (venv / "bin" / "python").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (venv / ".unfinished").exists() and not (venv / ".installed").exists()
    result = ready.setup()
    assert result.returncode == 0 and "making it anew" in result.stderr, result.stderr
    assert ready.installed() == "1.0" and not (venv / ".unfinished").exists()


def test_changed_lock_updates_in_place(ready: Machine) -> None:
    added = ready.clone / ".venv" / "added by hand"
    added.touch()
    ready.lock("tiny==2.0")
    result = ready.setup()
    assert result.returncode == 0, result.stderr
    assert ready.installed() == "2.0" and added.exists()
    assert ready.setup().stderr == ""


def test_failed_download_changes_nothing_and_can_be_repeated(ready: Machine) -> None:
    ready.lock("tiny==3.0")
    result = ready.setup()
    assert result.returncode != 0 and "could not be installed" in result.stderr
    assert ready.installed() == "1.0"
    write_wheel(ready.root, "3.0")
    assert ready.setup().returncode == 0
    assert ready.installed() == "3.0"


def test_make_prints_its_targets_a_line_each(machine: Machine) -> None:
    result = machine.run("/usr/bin/env", "make", PATH=os.defpath)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and all(
        re.fullmatch(r"make [a-z-]+ +\S.*", line) for line in lines
    )
    targets = {line.split()[1] for line in lines}
    assert targets >= {
        "train",
        "test",
        "test-all",
        "test-gpu",
        "setup",
        "lint",
        "clean",
        "distclean",
    }
    assert targets == set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(("outcome", "status"), [("2 passed", 0), ("1 failed, 1 passed", 1)])
def test_ci_repeats_the_closing_line_and_fails_with_the_tests(
    machine: Machine, outcome: str, status: int
) -> None:
    closing = f"===== {outcome} in 0.12s ====="
    recipe = f"test:\n\t@echo '{closing}'; echo after; exit {status}\n"
    (machine.clone / "Makefile").write_text(recipe)
    result = machine.run("/bin/bash", ".ci/run", PATH=os.defpath)
    assert result.stdout.splitlines()[-1] == closing
    assert (result.returncode == 0) == (status == 0)


# --- The lock -----------------------------------------------------------------------------------


def locked_versions() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in requirements:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
    return {canonicalize_name(r.name): str(r.specifier)[2:] for r in requirements}


def test_lock_satisfies_pyproject() -> None:
    locked = locked_versions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["train"] + extras["convert"] + extras["dev"]:
        requirement = Requirement(line)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line}: the lock has {version}"
    assert (locked["torch"], locked["triton"]) == ("2.11.0", "3.6.0")


def test_lock_holds_every_dependency_of_what_it_holds() -> None:
    """Packages that are installed tell what they need; all of that must be pinned too."""
    locked = locked_versions()
    environment = {"extra": ""}
    for name in locked:
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an environment made by hand; `make setup` installs all
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert canonicalize_name(requirement.name) in locked, f"{name} needs {requirement}"

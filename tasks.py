#!/usr/bin/env python3
"""Everything this repository does, from a bare Python 3.11 or newer. Nothing else has to be
installed first.

    python3 tasks.py record experiments/astronaut.yaml    make a recording, as `python -m probe.run`
    python3 tasks.py view                                 look at recordings in a browser
    python3 tasks.py test [pytest arguments]              run the quick tests, or those you name
    python3 tasks.py test --smoke                         tell within a minute whether it works
    python3 tasks.py check                                format, lint, types and the quick tests
    python3 tasks.py check --all                          the slow tests too; no gpu tests
    python3 tasks.py check --no-tests                     format, lint and types alone
    python3 tasks.py web [FOLDER]                         build the page in which the bundled model
                                                          draws by itself: a folder for any static
                                                          host, and one file that works from a disk
    python3 tasks.py release --check                      build wheel and sdist, and use them on
                                                          every Python that is here (see --help)

The first call makes an environment in .venv and installs this checkout there, in the versions of
constraints.txt. That takes minutes and gigabytes, most of them torch's. Later calls start at once;
when pyproject.toml or constraints.txt has changed they install first. A call that was interrupted
is finished by the next one. What pip said is in probe-install.log inside the environment.

    PROBE_VENV=/some/where     put the environment there. An environment that is already there is
                               used; its packages are kept if constraints.txt agrees with them.

On Linux, torch comes with CUDA by default (about 3 GB to download). Without an NVIDIA GPU the CPU
build (0.2 GB) will do:

    python3 -m venv .venv      then, with .venv/bin/pip, install the torch of constraints.txt from
                               the CPU wheel index that "Get started" on PyTorch's site names, and
                               call tasks.py; or set PIP_EXTRA_INDEX_URL to that index for the
                               first call.

Exit codes: 0 all went well; 1 an installation or a check failed; 2 a mistake in the call; else that
of what was run.
"""

# Only the standard library, and nothing that Python 3.8 cannot parse: an old Python must get as far
# as our message.

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: nothing is begun yet

import difflib
import hashlib
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
STAMP = "probe-installed.json"
LOG = "probe-install.log"
PACKAGES = ("dependencies", "devDependencies")  # of the page, as npm's lock calls them

# What the tests need: without UMAP, those of its maps are skipped.
DEVELOPERS = ("record", "dashboard", "umap", "cluster", "test")

# Tests compare with it; it asks for torchvision, whose usual build breaks a CPU torch, and runs
# without.
WITHOUT_REQUIREMENTS = {"test": "attention-map-diffusers==1.0.0"}

# Settings of pip that would send packages elsewhere, or leave some out, and of Python that would
# show it those of another.
NOT_FOR_PIP = (
    "PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_DRY_RUN PIP_NO_DEPS PIP_PYTHON "
    "PYTHONPATH PYTHONHOME"
).split()

# Prints what the package and its extras ask for and the environment does not have.
WHAT_IS_MISSING = r"""
import re, sys
from importlib.metadata import PackageNotFoundError, requires, version
asked, missing = ["diffusion-probe"], []
for name in asked:
    try:
        version(name)
    except PackageNotFoundError:
        missing.append(name)
        continue
    for line in requires(name) or [] if name == asked[0] else []:
        extra = re.search(r"extra *== *.([\w-]+)", line)
        if (extra and extra[1] in sys.argv[1:]) or ";" not in line:
            asked.append(re.match(r"[\w.-]+", line)[0])
print(*missing)
"""

REMEDIES = (  # (what pip said, what to do), the first that matches
    (
        ("No space left on device",),
        "Free some disk space (an installation needs up to 10 GB), or place it elsewhere with "
        "PROBE_VENV; then call again.",
    ),
    (
        ("the ssl module in Python is not available",),
        "The environment's Python was built without ssl, which pip needs. Remove the environment, "
        "then call tasks.py with another Python: "
        "one where python3 -c 'import ssl' says nothing.",
    ),
    (
        (
            "Temporary failure in name resolution",
            "Max retries exceeded",
            "Connection",
            "timed out",
            "SSLError",
            "(from versions: none)",
        ),
        "Check the network and pip's index settings (PIP_INDEX_URL), then call again: what was "
        "downloaded is kept.",
    ),
    (
        ("Permission denied",),
        "Make the environment's folder writable, or place it elsewhere with PROBE_VENV.",
    ),
    (
        ("No matching distribution", "ResolutionImpossible"),
        "Your package index lacks a version that constraints.txt asks for. Check PIP_INDEX_URL, "
        "or take Python 3.11 to 3.13.",
    ),
)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        near, known = difflib.get_close_matches(command, COMMANDS, 1), ", ".join(COMMANDS)
        stop(
            f"tasks.py has no {command!r}.",
            f"Did you mean {near[0]!r}?" if near else f"Choose from: {known}.",
            code=2,
        )
    if sys.version_info < (3, 11):
        stop(
            f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; Python 3.11 or newer is "
            "needed.",
            "Call it with a newer one: python3.11 tasks.py ...",
        )
    return COMMANDS[command](rest)


def record(arguments: list[str]) -> int:
    hand_over([install("record"), "-m", "probe.run", *arguments])


def view(arguments: list[str]) -> int:
    hand_over([install("dashboard"), "-m", "probe.view", *arguments])


def test(arguments: list[str]) -> int:
    python = install(*DEVELOPERS)
    os.chdir(ROOT)
    if arguments[:1] == ["--smoke"]:
        arguments = ["-m", "smoke", *smoke_files(), *arguments[1:]]
    hand_over([python, "-m", "pytest", *(arguments or side_by_side())])


def smoke_files() -> list[str]:
    """The test files with a test of the marker `smoke`: the others need not be imported."""
    return [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "@pytest.mark.smoke" in path.read_text(encoding="utf-8")
    ]


def side_by_side() -> list[str]:
    """pytest's options for all the tests: several files at a time.

    Not more than four, since every process holds a torch.
    """
    return ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]


def web(arguments: list[str]) -> int:
    """Build the page with node alone: nothing is installed in Python."""
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        stop("web takes a folder or nothing.", "python3 tasks.py web build/web", code=2)
    source, folder = ROOT / "web", Path(arguments[0] if arguments else ROOT / "build" / "web")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there - {"site", "diffusion.html"} or (folder.exists() and not folder.is_dir()):
        stop(f"{folder} has other things in it.", "Name a new folder, or an empty one.", code=2)
    node, npm = shutil.which("node"), shutil.which("npm")
    if not (node and npm and node_version(node) >= 20):
        stop(
            "The page is built by node 20 or newer and its npm.",
            "On Debian or Ubuntu: apt install nodejs npm. Then call again.",
        )
    if not modules_are_there(source):
        say("Fetching what the page is built of, in the versions of web/package-lock.json.")
        if subprocess.call([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=source):
            stop(
                "npm could not fetch them.",
                "Check the network and npm's registry (npm config get registry), then call again.",
            )
    return subprocess.call([node, str(source / "build.mjs"), str(folder.resolve())])


def node_version(node: str) -> int:
    """Like 20; 0 if it does not say."""
    asked = subprocess.run([node, "--version"], stdout=subprocess.PIPE, text=True, check=False)
    major = asked.stdout.strip().lstrip("v").partition(".")[0]
    return int(major) if major.isdigit() else 0


def modules_are_there(source: Path) -> bool:
    """Whether npm has fetched what the lock names."""
    lock, own = source / "package-lock.json", source / "node_modules" / ".package-lock.json"
    if not own.exists():
        return False
    wanted, there = (
        json.loads(path.read_text(encoding="utf-8"))["packages"] for path in (lock, own)
    )
    named = [f"node_modules/{name}" for kind in PACKAGES for name in wanted[""].get(kind, {})]
    same = (wanted.get(name, {}).get("version") == one["version"] for name, one in there.items())
    return all(same) and there.keys() >= set(named)


def check(arguments: list[str]) -> int:
    if arguments not in ([], ["--all"], ["--no-tests"]):
        stop(
            f"check takes --all, --no-tests or nothing, not {arguments}.",
            "To run some tests only: python3 tasks.py test <pytest arguments>.",
            code=2,
        )
    python = install(*DEVELOPERS)
    steps = {
        "format": ["ruff", "format", "--check"],
        "lint": ["ruff", "check"],
        "types": ["mypy"],
        "tests": ["pytest", *side_by_side(), *(["-m", "not gpu"] if arguments else [])],
    }
    if arguments == ["--no-tests"]:
        del steps["tests"]
    failed = []
    for name, step in steps.items():
        say(name + ": " + " ".join(step))
        if subprocess.call([python, "-m", *step], cwd=ROOT):
            failed.append(name)
    say("failed: " + ", ".join(failed) if failed else "all of it passed: " + ", ".join(steps))
    return 1 if failed else 0


def release(arguments: list[str]) -> int:
    if arguments[:1] != ["--check"]:
        stop(
            "release only checks: it publishes nothing.",
            "Call it with --check: python3 tasks.py release --check.",
            code=2,
        )
    hand_over([install("record", "test"), str(ROOT / ".ci" / "release.py"), *arguments[1:]])


COMMANDS = {
    "record": record,
    "view": view,
    "test": test,
    "check": check,
    "web": web,
    "release": release,
}


def install(*extras: str) -> str:
    """Bring the environment to a state that has `extras`; returns the path of its Python.

    The stamp says what is installed. It is marked unfinished before pip starts, and finished only
    after pip has ended well, so an interrupted installation is seen and repaired by the next call.
    """
    # Not resolved: bin/python is a link.
    venv = Path(os.path.abspath(os.environ.get("PROBE_VENV") or ROOT / ".venv"))  # noqa: PTH100
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    version = version_of(python)
    if version is None:
        version = create(venv, python)
    stamp = read_stamp(venv)
    sources = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    now = {
        "sources": hashlib.sha256(sources + str(WITHOUT_REQUIREMENTS).encode()).hexdigest(),
        "checkout": str(ROOT),
        "python": version,
    }
    if (
        stamp.get("finished")
        and set(extras) <= set(stamp["extras"])
        and all(stamp.get(key) == value for key, value in now.items())
    ):
        return str(python)

    wanted = sorted({*extras, *stamp.get("extras", [])})
    listed = ",".join(wanted)
    say(why_install(venv, stamp, listed, changed=set(extras) <= set(stamp.get("extras", []))))
    if stamp and not stamp.get("finished"):
        forget_half_installed(venv)
    write_stamp(venv, dict(now, extras=wanted, finished=False))
    began = time.monotonic()
    pip_install(
        python, venv / LOG, ["-e", f"{ROOT}[{listed}]", "-c", str(ROOT / "constraints.txt")]
    )
    for package in [package for extra, package in WITHOUT_REQUIREMENTS.items() if extra in wanted]:
        pip_install(python, venv / LOG, ["--no-deps", package])
    ask_for = [str(python), "-c", WHAT_IS_MISSING, *wanted]
    missing = subprocess.run(
        ask_for, stdout=subprocess.PIPE, text=True, env=environment_of_pip(), check=True
    ).stdout.split()
    if missing:
        stop(
            f"pip ended well, but {venv} lacks "
            f"{', '.join(missing[:5])}{' and more' if missing[5:] else ''}.",
            "Remove target, prefix, root, dry-run and no-deps from pip's settings (see `pip "
            "config list`), then call again.",
        )
    write_stamp(venv, dict(now, extras=wanted, finished=True))
    say(f"Installed in {time.monotonic() - began:.0f} s.")
    return str(python)


def why_install(venv: Path, stamp: dict[str, Any], listed: str, changed: bool) -> str:
    """Return what is about to be installed, and why, in one line."""
    if not stamp:
        return (
            f"Installing probe[{listed}] into {venv}. The first time this takes 2 to 10 minutes "
            "and 2 to 8 GB of disk."
        )
    if not stamp.get("finished"):
        return (
            f"An installation into {venv} did not finish. Trying again: probe[{listed}], up to "
            "some minutes."
        )
    if changed:
        return (
            "pyproject.toml, constraints.txt, the checkout or Python has changed. Updating "
            f"{venv}: seconds, unless torch changed."
        )
    return f"Adding what probe[{listed}] needs to {venv}: up to a minute."


def version_of(python: Path) -> str | None:
    """Like "3.11"; None if this Python does not start or has no pip."""
    code = (
        "import sys, importlib.util as u; print('%d.%d' % sys.version_info[:2]); "
        "sys.exit(u.find_spec('pip') is None)"
    )
    try:
        asked = subprocess.run(
            [str(python), "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
    except OSError:
        return None
    version = asked.stdout.strip()
    if version and tuple(map(int, version.split("."))) < (3, 11):
        stop(
            f"The environment of {python} is Python {version}; 3.11 or newer is needed.",
            "Name another folder with PROBE_VENV.",
        )
    return version if asked.returncode == 0 else None


def create(venv: Path, python: Path) -> str:
    """Make the environment, or mend one that was left half made: `venv` keeps what is already
    there.
    """
    if venv.exists() and not (
        venv.is_dir() and ((venv / "pyvenv.cfg").exists() or not any(venv.iterdir()))
    ):
        stop(
            f"{venv} exists and is not a Python environment.",
            "Name an empty or a new folder with PROBE_VENV.",
        )
    remedy = (
        "On Debian or Ubuntu: apt install python3-venv. Or, with uv: uv venv --seed "
        f"{shlex.quote(str(venv))}. Then call again."
    )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        stop(
            "This Python cannot make environments: its venv or ensurepip module is missing.", remedy
        )
    say(f"Making a Python environment in {venv}: some seconds.")
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    version = version_of(python)
    if made.returncode or version is None:
        print(made.stdout.strip()[-2000:], file=sys.stderr)
        stop(
            "The environment could not be made.",
            remedy if "ensurepip" in made.stdout else "Name another folder with PROBE_VENV.",
        )
    return version


def forget_half_installed(venv: Path) -> None:
    """pip takes a package for installed as soon as its metadata is there, but writes INSTALLER and
    RECORD only at its end.
    """
    for metadata in [
        *venv.glob("lib/python*/site-packages/*.dist-info"),
        *venv.glob("Lib/site-packages/*.dist-info"),
    ]:
        if not ((metadata / "INSTALLER").exists() and (metadata / "RECORD").exists()):
            shutil.rmtree(metadata)


def pip_install(python: Path, log: Path, arguments: list[str]) -> None:
    """Run pip: all it says goes to `log`, its last line to the terminal; when it fails, its last
    lines and a remedy.
    """
    terminal = sys.stdout.isatty()
    tail: deque[str] = deque(maxlen=15)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-user",
        *arguments,
    ]
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment_of_pip(),
    ) as pip:
        assert pip.stdout
        try:
            for line in pip.stdout:
                file.write(line)
                tail.append(line.rstrip())
                shown = line.strip()[: shutil.get_terminal_size().columns - 3]
                if terminal:
                    print("\r\033[K  " + shown, end="", flush=True)
                elif shown.startswith(("Downloading", "Installing collected")):
                    print("  " + shown, flush=True)
        except KeyboardInterrupt:
            pip.kill()
            print()
            stop("Interrupted.", "The next call finishes the installation.", code=130)
    if terminal:
        print("\r\033[K", end="")
    if pip.returncode:
        print("\n".join(tail), file=sys.stderr)
        said = log.read_text(encoding="utf-8")
        remedy = next(
            (remedy for signs, remedy in REMEDIES if any(sign in said for sign in signs)),
            f"Its whole output is in {log}.",
        )
        stop(f"pip could not install into the environment (exit {pip.returncode}).", remedy)


def environment_of_pip() -> dict[str, str]:
    """Return our environment without what would make pip install elsewhere or less.

    Index, proxy and certificates stay.
    """
    return {name: value for name, value in os.environ.items() if name not in NOT_FOR_PIP}


def read_stamp(venv: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get("extras"), list) else {}


def write_stamp(venv: Path, stamp: dict[str, Any]) -> None:
    (venv / (STAMP + ".new")).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    (venv / (STAMP + ".new")).replace(venv / STAMP)


def hand_over(command: list[str]) -> NoReturn:
    """Become `command`, so that signals and the exit code are its own."""
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    sys.exit(subprocess.call(command))


def say(what: str) -> None:
    print("== " + what, flush=True)


def stop(cause: str, remedy: str, code: int = 1) -> NoReturn:
    print(cause + "\n" + remedy, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop("Stopped.", "Call it again to go on.", code=130)
    sys.exit(code)

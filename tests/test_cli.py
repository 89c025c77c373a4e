"""The commands, as people call them: options, forecasts, mistakes, Ctrl-C, and looking.

Most calls happen in this process. What only a process shows (the speed of --help, signals, pipes)
happens in one of its own.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr
from recordings import change_root, cut

from probe import cli, run
from probe.diffusion.loading import BUNDLED
from probe.output import rows
from probe.reading.compare import compare
from probe.reading.listing import list_runs
from probe.reading.recording import Run, open_run
from probe.run import say_where
from probe.running import recorder
from probe.running.recorder import record
from probe.settings.capture import CaptureOptions
from probe.settings.experiment import Experiment, load_experiment
from probe.terminal import guarded, overrides, shell_path, without_home
from probe.writing.chunks import StepFiles
from probe.writing.store import RunWriter

ROOT = Path(__file__).parent.parent
BLOCK = "error: (?P<cause>[^\n]+)\n       (?P<remedy>[^\n]+)\n"
Command = Callable[..., tuple[int, str, str]]

needs_the_bundled_model = pytest.mark.skipif(
    not (BUNDLED["emojiworld"] / "model_index.json").is_file(),
    reason="probe/emojiworld is not there",
)


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own for each test, no terminal to ask, and the environment as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    kept, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # a command that was stopped is deaf to a second Ctrl-C
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    os.environ.update(kept)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: its exit code, stdout and stderr."""

    def called(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            guarded(main, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return called


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small recording. Not to be changed: take `runs`."""
    folder = tmp_path_factory.mktemp("made")
    record(
        {
            "name": "small",
            "prompt": "a cat on\nthe \x07hat".replace("\x07", ""),
            "steps": 2,
            "output": str(folder),
        },
        pipeline=tiny.pipeline(),
        progress=False,
    )
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def process(*command: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    full = [sys.executable, "-m", *map(str, command)]
    return subprocess.Popen(
        full, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def told(err: str) -> tuple[str, str]:
    """Cause and remedy, each one line, which are the last two lines of stderr."""
    assert "Traceback" not in err
    found = re.search(BLOCK + r"\Z", err)
    assert found and err.count("error: ") == 1, err
    assert len(found["cause"]) < 400
    return found["cause"], found["remedy"]


def refused(
    call: Command, *arguments: object, main: Callable[[list[str]], int] = run.main, code: int = 2
) -> tuple[str, str]:
    got, out, err = call(main, *arguments)
    assert got == code, (got, err)
    assert out == ""
    return told(err)


# --- options --------------------------------------------------------------------------------------

FIELDS = {
    name: field
    for name, field in Experiment.model_fields.items()
    if name not in ("capture", "scheduler_options")
}
FIELDS |= {f"capture.{name}": field for name, field in CaptureOptions.model_fields.items()}

GIVEN: dict[str, tuple[str, Any]] = {
    "name": ("my-run", "my-run"),
    "model": ("some/model", "some/model"),
    "revision": ("main", "main"),
    "variant": ("fp16", "fp16"),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cuda:1", "cuda:1"),
    "prompt": ("a cat: 3 # 4", "a cat: 3 # 4"),
    "negative_prompt": ("7", "7"),
    "over_long": ("cut", "cut"),
    "seed": ("7", 7),
    "images": ("3", 3),
    "height": ("64", 64),
    "width": ("40", 40),
    "image": ("a picture.png", "a picture.png"),
    "strength": ("0.6", 0.6),
    "scheduler": ("DPM++2M", "DPM++2M"),
    "steps": ("20", 20),
    "guidance_scale": ("5", 5.0),
    "guidance_rescale": ("0.7", 0.7),
    "eta": ("1e-1", 0.1),
    "decode_every": ("5", 5),
    "on_nan": ("record", "record"),
    "durability": ("none", "none"),
    "output": ("/tmp/else where", "/tmp/else where"),
    "capture.attention": ("off", "off"),
    "capture.self_attention": ("8x8,mid_block.*", ("8x8", "mid_block.*")),
    "capture.counterfactual": ("cat,hat", ("cat", "hat")),
    "capture.branches": ("both", "both"),
    "capture.tokens": ("all", "all"),
    "capture.layers": ("16x16,up_blocks.*", ("16x16", "up_blocks.*")),
    "capture.steps": ("0:20:5", "0:20:5"),
    "capture.dtype": ("float32", "float32"),
    "capture.text": ("false", False),
    "capture.statistics": ("false", False),
    "capture.activations": ("unet.mid_block", ("unet.mid_block",)),
}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def value_of(experiment: Experiment, name: str) -> Any:
    group, _, last = name.rpartition(".")
    return getattr(experiment.capture if group else experiment, last)


def asked(*arguments: str, base: Experiment | None = None) -> Experiment:
    return load_experiment(base or Experiment(), **overrides(run.parser().parse_args(arguments)))


def test_help_lists_every_field_with_its_description_and_default(call: Command) -> None:
    code, out, err = call(run.main, "--help")
    assert code == 0 and err == ""
    dense = re.sub(r"\s+", "", out)
    for name, field in FIELDS.items():
        default = field.get_default(call_default_factory=True)
        shown = (
            ",".join(default)
            if isinstance(default, tuple)
            else {"None": "none", "True": "true", "False": "false"}.get(str(default), default)
        )
        assert field.description
        assert re.sub(r"\s+", "", f"{field.description} [{shown}]") in dense, name
        assert re.search(rf"^  {re.escape(option(name))} [A-Z{{]", out, re.MULTILINE), name
    for word in (
        "--dry-run",
        "--max-bytes SIZE",
        "--quiet",
        "--debug",
        "python -m probe.run experiments/astronaut.yaml",
    ):
        assert word in out
    assert (
        re.search(r"--seed INT\b", out)
        and re.search(r"--eta FLOAT\b", out)
        and re.search(r"--capture.text BOOL\b", out)
    )
    assert (
        re.search(r"--capture.layers GLOBS\b", out)
        and "--capture.dtype {float16,float32,sqrt_u8}" in out
    )


def test_every_field_has_a_line_in_this_test() -> None:
    assert GIVEN.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_overrides_its_field_and_no_other(name: str) -> None:
    text, value = GIVEN[name]
    for arguments in ((option(name), text), (f"{option(name)}={text}",)):
        found = asked(*arguments)
        assert value_of(found, name) == value and type(value_of(found, name)) is type(value)
        assert {other: value_of(found, other) for other in FIELDS if other != name} == {
            other: value_of(Experiment(), other) for other in FIELDS if other != name
        }


def test_none_means_none_where_a_field_may_be_nothing() -> None:
    base = Experiment(height=64, width=64, revision="main", variant="fp16")
    found = asked(
        "--height", "none", "--width", "None", "--revision", "none", "--variant", "none", base=base
    )
    assert (found.height, found.width, found.revision, found.variant) == (None, None, None, None)
    assert asked("--prompt", "none").prompt == "none", "a prompt is text"
    assert asked("--capture.activations", "").capture.activations == ()
    assert (
        asked("--negative-prompt", "", base=Experiment(negative_prompt="a cat")).negative_prompt
        == ""
    )


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("prompt: a cat\nseed: 3\ncapture:\n  dtype: float32\n  text: false\n")
    found = asked("--seed", "4", "--capture.text", "true", base=load_experiment(file))
    assert (found.prompt, found.seed, found.capture.dtype, found.capture.text) == (
        "a cat",
        4,
        "float32",
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--guidence-scale", "5"], "Did you mean --guidance-scale?"),
        (["--capture.laers=16x16"], "Did you mean --capture.layers?"),
        (["--dryrun"], "Did you mean --dry-run?"),
        (["--quite-something-else"], "See python -m probe.run --help."),
        (
            ["--guidance", "5"],
            "Did you mean --guidance-scale?",
        ),  # and no abbreviation is taken for it
    ],
)
def test_an_unknown_option_suggests(call: Command, arguments: list[str], remedy: str) -> None:
    cause, found = refused(call, *arguments)
    assert arguments[0].split("=")[0] in cause and found == remedy


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300", 300),
        ("300MB", 300_000_000),
        ("2GB", 2 * 10**9),
        ("1.5 kb", 1500),
        ("4b", 4),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert run.parser().parse_args(["--max-bytes", text]).max_bytes == size


@pytest.mark.parametrize("text", ["", "much", "3XB", "GB", "nan", "inf", "1e999", "2 GB more"])
def test_sizes_that_are_none(call: Command, text: str) -> None:
    cause, _ = refused(call, "--max-bytes", text)
    assert "is not a size; write 300MB or 2GB" in cause


def test_help_is_quick_and_needs_no_torch() -> None:
    check = (
        "import runpy, sys; sys.argv = ['probe.run', '--help']\ntry: runpy.run_module('probe.run', "
        "run_name='__main__')\n"
    )
    check += "except SystemExit as end: assert not end.code\n"
    check += (
        "assert not {'torch', 'diffusers', 'transformers', 'zarr', 'xarray'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    walls, users = [], []
    for _ in range(3):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
        out, _ = process("probe.run", "--help").communicate(timeout=60)
        walls.append(time.perf_counter() - start)
        users.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        assert "--guidance-scale" in out
    print(f"--help: {min(walls):.2f} s, of them {min(users):.2f} s of this program's own work")
    assert min(walls) < 1.5


# --- the forecast ---------------------------------------------------------------------------------


def test_a_dry_run_needs_no_weights_and_writes_nothing(
    call: Command, model: Path, tmp_path: Path
) -> None:
    for file in model.rglob("*.safetensors"):
        file.unlink()
    before = sorted(tmp_path.rglob("*"))
    options = [
        "--model",
        model,
        "--prompt",
        "a cat on the hat",
        "--steps",
        20,
        "--guidance-scale",
        5,
        "--capture.dtype",
        "float32",
        "--output",
        "nowhere",
    ]
    code, out, err = call(run.main, "--dry-run", *options)
    assert (code, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    config, end = json.JSONDecoder().raw_decode(out)
    assert (
        config
        == load_experiment(
            Experiment(), **overrides(run.parser().parse_args([str(o) for o in options]))
        ).resolved()
    )
    assert "21 model calls, latents 1 x 4 x 8 x 8, branches: uncond, cond" in out[end:], (
        "PNDM takes one step twice"
    )
    assert re.search(
        r"^/attention/8x8/cross +float32 +step 21 x token 8 x branch 1 x image 1 x layer 3 x head "
        r"2 x y 8 x x 8 +258.0 kB$",
        out,
        re.MULTILINE,
    )
    assert re.search(r"Together [0-9.]+ [kM]B \([0-9]+ bytes\)", out)


def test_the_forecast_is_what_is_written(call: Command, model: Path) -> None:
    options = [
        "--model",
        model,
        "--prompt",
        "a cat",
        "--steps",
        4,
        "--capture.steps",
        "0:5:2",
        "--decode-every",
        2,
        "--quiet",
    ]
    code, out, _ = call(run.main, "--dry-run", *options)
    found = re.search(r"\((\d+) bytes\)", out)
    assert code == 0 and found
    code, out, _ = call(run.main, *options)
    assert code == 0
    written = sum(
        file.stat().st_size
        for file in Path(out.strip()).rglob("c*")
        if file.name == "c" or file.name.startswith("c.")
    )
    assert int(found[1]) * 0.98 < written < int(found[1]) * 1.05 + 30_000, (
        "checksums and indices come on top"
    )


@pytest.mark.parametrize("dry", [True, False])
def test_a_recording_that_is_too_large_is_refused_before_it_begins(
    call: Command, model: Path, tmp_path: Path, dry: bool
) -> None:
    arguments = [
        "--model",
        model,
        "--prompt",
        "a cat",
        "--max-bytes",
        "100kB",
        "--output",
        "new",
        *["--dry-run"] * dry,
    ]
    code, _, err = call(run.main, *arguments)
    cause, remedy = told(err)
    assert code == 2 and re.fullmatch(
        r"The recording would take [\d.]+ kB, more than --max-bytes: 100.0 kB.", cause
    )
    assert "Most of it is " in remedy and not (tmp_path / "new").exists()


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_says_where_things_are(call: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.yaml"
    file.write_text(f"model: {model}\nprompt: a cat\nsteps: 2\noutput: {tmp_path / 'out'}\n")
    code, out, err = call(run.main, file, "--seed", 7)
    assert code == 0 and "Traceback" not in err
    (path,) = (tmp_path / "out").iterdir()
    made = Run(path)
    assert (
        made.experiment.seed == 7
        and made.experiment.prompt == "a cat"
        and made.status == "complete"
    )
    for part in (
        f"Recording  {path}",
        "Pictures   contact-sheet.png, picture.png",
        f"probe show {made.name}",
        f"probe verify {made.name}",
    ):
        assert part in out
    assert "Recording 3 model calls to" in err and "Denoising" in err
    code, out, err = call(run.main, file, "--quiet")
    assert (
        code == 0 and "Denoising" not in err and Path(out.strip()).is_dir() and out.count("\n") == 1
    )
    assert len(list((tmp_path / "out").iterdir())) == 2, "nothing is overwritten"


@pytest.mark.parametrize("on_path", [True, False])
def test_what_is_said_to_be_called_is_there(
    on_path: bool, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whoever only ran tasks.py has no `probe` on PATH."""
    venv = tmp_path / "my venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("probe", "python"):
        (venv / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(venv / "bin" / "python"))
    monkeypatch.setenv("PATH", str(venv / "bin") if on_path else str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = open_run("latest", "runs")
    say_where(made, quiet=False)
    out = capsys.readouterr().out
    probe, python = (
        ("probe", "python")
        if on_path
        else ("'my venv/bin/python' -m probe", "'my venv/bin/python'")
    )
    assert (
        f"\nLook       {probe} show {made.name}\nCheck      {probe} verify {made.name}\nRead       "
        f"{python} -c " in out
    )
    monkeypatch.chdir(tmp_path / "runs")
    say_where(Run(tmp_path / made.path), quiet=False)
    assert on_path or f"Look       '{venv}/bin/python' -m probe show" in capsys.readouterr().out


def test_no_path_of_a_home_is_in_a_log(
    call: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in it begin with ~, as in the recording, and a shell takes them as they are printed."""
    home = tmp_path / "somebody"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(model, home / "model")
    (tmp_path / "somebody-else").mkdir()
    options = [
        "--model",
        home / "model",
        "--prompt",
        "a cat",
        "--steps",
        1,
        "--output",
        home / "my" / "runs",
    ]
    code, out, err = call(run.main, *options)
    (path,) = (home / "my" / "runs").iterdir()
    assert (
        code == 0
        and str(home) not in out + err
        and f"~/my/runs/{path.name}" in out
        and f"~/my/runs/{path.name}" in err
    )
    hint = re.search(r"^Read +\S*python\S* (-c .*)$", out, re.MULTILINE)
    assert hint
    read = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} {hint[1]}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0 and "latents" in read.stdout, read.stderr
    hint = re.search(r"^Check .*probe verify (.*)$", out, re.MULTILINE)
    assert hint and call(cli.dispatch, "verify", *hint[1].replace("~", str(home)).split())[0] == 0
    (path / "zarr.json").write_text("{")
    assert "~/my/runs" in refused(call, "show", path, main=cli.dispatch)[0]
    code, out, err = call(run.main, *options, "--quiet")
    assert code == 0 and str(home) not in err and Path(out.strip()).is_dir(), (
        "a program reads it: no shell would find ~ in it"
    )
    for text in (f"in {home}-else/x", f"/mnt{home}/x", str(home.parent)):
        assert without_home(text) == text
    for text in (f"{home}/x", f"'{home}/x'", f"a\n{home}/x", f"--runs={home}/x"):
        assert without_home(text) == text.replace(str(home), "~")


def test_the_same_from_a_shell(model: Path, tmp_path: Path) -> None:
    running = process(
        "probe.cli",
        "run",
        "--model",
        model,
        "--prompt",
        "a cat",
        "--steps",
        1,
        "--output",
        tmp_path / "out",
        "--quiet",
    )
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert Run(Path(out.strip())).status == "complete"
    assert err == "", "with --quiet not even the libraries talk"


# --- mistakes -------------------------------------------------------------------------------------

TINY = "<the saved tiny model>"


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("stepss: 20\n", "stepss: unknown field", "Did you mean steps?"),
        (
            "capture:\n  layer: [a]\n",
            "capture.layer: unknown field",
            "Did you mean capture.layers?",
        ),
        ("steps: many\n", "steps: 'many' is not a whole number", "Write a whole number"),
        ("steps: 1.5\n", "steps: 1.5 is not a whole number", "Write a whole number"),
        ("seed: yes\n", "seed: 'yes' is not a whole number", "Write a whole number"),
        ("guidance_scale: [7]\n", "guidance_scale: [7] is not a number", "Write a number"),
        ("seed: 1\nseed: 2\n", "line 2: seed is written twice", "Keep one of the two."),
        ("prompt: a cat\n  bad: [\n", "line 2: not YAML", "Write one `field: value` a line"),
        ("scheduler: Eular\n", "'Eular' is not a scheduler", "Did you mean Euler?"),
        ("", "this file is empty", "Write `field: value` lines"),
    ],
)
def test_mistakes_in_a_file(
    call: Command, tmp_path: Path, text: str, cause: str, remedy: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    found = refused(call, file, "--dry-run")
    assert "mine.yaml" in found[0] and cause in found[0] and remedy in found[1]


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (["nothing.yaml"], "nothing.yaml: this file does not exist", "Check the path."),
        (["--steps", "many"], "steps: 'many' is not a whole number", "Write a whole number"),
        (["--steps", "0"], "steps: 0 is less than 1", "Write a number from 1 to 1000."),
        (
            ["--capture.text", "perhaps"],
            "capture.text: 'perhaps' is not true or false",
            "Write true or false.",
        ),
        (
            ["--capture.dtype", "float61"],
            "'float61' is not one of float16, float32, sqrt_u8",
            "Did you mean float16?",
        ),
        (["--seed", "a: b"], "command line: line 1: not YAML", "Write"),
        (["--seed"], "--seed: expected one argument", "--help"),
        (["one.yaml", "two.yaml"], "unrecognized arguments: two.yaml", "--help"),
        (
            ["--model", "nowhere/nothing"],
            "model: nowhere/nothing is not on this machine",
            "use the bundled model: --model emojiworld",
        ),
        (["--model", "./nowhere"], "model: './nowhere' is no directory", "Bundled: emojiworld."),
        (
            [TINY, "--height", "30"],
            "height: 30 is not a multiple of f = 4",
            "Use height: 28 or 32.",
        ),
        (
            [TINY, "--width", "1001"],
            "width: 1001 is not a multiple of f = 4",
            "Use width: 1000 or 1004.",
        ),
        (
            [TINY, "--prompt", "a cat " * 60],
            "The prompt has 122 tokens, 77 is the most",
            "Shorten it, or set over_long: cut.",
        ),
        (
            [TINY, "--capture.layers", "16x16"],
            "capture.layers: '16x16' matches no cross-attention layer.",
            "8x8",
        ),
        (
            [TINY, "--capture.layers", "up_block.*"],
            "capture.layers: 'up_block.*' matches no cross-attention layer.",
            "up_blocks",
        ),
        (
            [TINY, "--capture.activations", "unet.midblock"],
            "capture.activations: 'unet.midblock' matches no module.",
            "unet.mid_block",
        ),
        (
            [TINY, "--capture.steps", "99"],
            "capture.steps: 99 is not a step of this run",
            "write indices from 0 to 50",
        ),
        (
            [TINY, "--capture.branches", "uncond", "--guidance-scale", "1"],
            "there is no unconditional branch",
            "Use a guidance_scale above 1",
        ),
        ([TINY, "--variant", "fp16"], "no weights of variant 'fp16'", "Leave variant out."),
        (
            [TINY, "--output", "file"],
            "file is a file, not a folder",
            "Name a folder: --output runs.",
        ),
        (
            [TINY, "--output", "file/below/it"],
            "file is a file, not a folder",
            "Name a folder: --output runs.",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    call: Command, model: Path, tmp_path: Path, arguments: list[str], cause: str, remedy: str
) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    given = [
        word
        for argument in arguments
        for word in (
            ["--model", str(model), "--prompt", "a cat"] if argument == TINY else [argument]
        )
    ]
    found = refused(call, *given)
    assert cause in found[0] and remedy in found[1]
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_an_option_that_the_scheduler_lacks(call: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        f"model: {model}\nprompt: a cat\nscheduler: DDIM\nscheduler_options: {{karras: true}}\n"
    )
    cause, remedy = refused(call, file)
    assert (
        cause == "scheduler_options: DDIMScheduler has no option 'karras'."
        and "It has: beta_end" in remedy
    )


def test_only_pickled_weights(call: Command, model: Path) -> None:
    for file in model.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    cause, remedy = refused(call, "--model", model, "--prompt", "a cat")
    assert (
        "has only pickled weights, which can run code when they are read" in cause
        and "safe_serialization=True" in remedy
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_machine_without_cuda(call: Command, model: Path) -> None:
    cause, remedy = refused(call, "--model", model, "--device", "cuda")
    assert (
        cause == "device: cuda is not on this machine (0 CUDA devices)."
        and "--device cpu" in remedy
    )


@needs_the_bundled_model
def test_words_that_the_bundled_model_never_saw(call: Command) -> None:
    cause, remedy = refused(call, "--prompt", "A zebra and an astronaut, reading")
    assert cause == "emojiworld never saw 'zebra', 'reading' in its training."
    words = json.loads((BUNDLED["emojiworld"] / "words.json").read_text())
    assert "astronaut" in words and f"Its words: {' '.join(sorted(words))}." in remedy
    assert refused(call, "--negative-prompt", "ugly")[0].startswith("emojiworld never saw 'ugly'")


# --- runs that fail -------------------------------------------------------------------------------


def test_nan_ends_a_run_and_what_came_before_is_kept(call: Command, tmp_path: Path) -> None:
    pipeline = tiny.pipeline()
    pipeline.unet.conv_out.weight.data[0, 0, 0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "model")
    cause, remedy = refused(
        call, "--model", tmp_path / "model", "--prompt", "a cat", "--output", "out", code=1
    )
    assert re.fullmatch(r"\w+ holds NaN at step 0\.", cause) and remedy.startswith(
        "Try a smaller guidance_scale; "
    )
    (path,) = Path("out").iterdir()
    assert Run(path).status == "failed" and Run(path).steps.size == 0


def test_a_full_disk_ends_a_run_and_what_came_before_is_kept(
    call: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = StepFiles.write, 0

    def write(own: Any, at: Any, value: Any) -> bytes:
        nonlocal count
        count += own.path == "latents/latents"
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(own, at, value)

    monkeypatch.setattr(StepFiles, "write", write)
    cause, remedy = refused(call, "--model", model, "--prompt", "a cat", "--output", "out", code=1)
    assert cause.endswith("could not be written: No space left on device.") and remedy.startswith(
        "Free some room"
    )
    monkeypatch.undo()
    (path,) = (model.parent / "out").iterdir()
    assert (
        Run(path).status == "failed"
        and Run(path).steps.tolist() == [0, 1, 2, 3]
        and np.isfinite(Run(path).latents).all()
    )


@pytest.mark.parametrize(
    "message",
    [
        "not enough memory: you tried to allocate 9 bytes",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_out_of_memory(
    call: Command, model: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def decode(*_: object) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr("probe.diffusion.sd.StableDiffusion.decode", decode)
    cause, remedy = refused(call, "--model", model, "--prompt", "a cat", code=1)
    assert (
        cause.startswith(("Out of memory on cpu:", "Out of memory on cuda:"))
        and "Fewer images" in remedy
    )


def test_a_fault_of_our_own_is_one_line_and_a_hint(
    call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(recorder, "record", broken)
    cause, remedy = refused(call, code=1)
    assert (
        cause == "ZeroDivisionError: division by zero"
        and "fault of probe itself: run again with --debug" in remedy
    )
    code, _, err = call(run.main, "--debug")
    assert (
        code == 1
        and err.startswith("Traceback")
        and "in broken" in err
        and re.search(BLOCK + r"\Z", err)
    )


def test_debug_shows_the_traceback_of_a_mistake(call: Command) -> None:
    code, _, err = call(run.main, "--steps", "0", "--debug")
    assert (
        code == 2
        and err.startswith("Traceback")
        and "in load_experiment" in err
        and re.search(BLOCK + r"\Z", err)
    )


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interruptible() -> None:
    """What a shell does for its foreground job: tests may run as a background job, where SIGINT is
    ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def after_three_steps(running: subprocess.Popen[str], folder: Path) -> Path:
    """Wait until a process has recorded three steps; returns the recording."""
    deadline = time.monotonic() + 90
    while True:
        for path in folder.glob("[!.]*.zarr"):
            if Run(path).steps.size >= 3:
                return path
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()
        time.sleep(0.05)


@needs_the_bundled_model
@pytest.mark.parametrize("durability", ["run", pytest.param("step", marks=pytest.mark.slow)])
def test_ctrl_c_in_the_middle_keeps_what_was_recorded(tmp_path: Path, durability: str) -> None:
    arguments = [
        "--steps",
        900,
        "--output",
        tmp_path / "out",
        "--durability",
        durability,
        "--capture.steps",
        "0:5",
    ]
    running = process("probe.run", *arguments, preexec_fn=interruptible)
    path = after_three_steps(running, tmp_path / "out")
    assert Run(path).status == "running"
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130 and time.monotonic() - start < 10, (
        "it went on with its 900 steps"
    )
    assert (
        "Traceback" not in err and err.endswith("\nStopped.\n") and str(path) in err and out == ""
    )
    made = Run(path)
    assert made.status == made.attributes["status"] == "interrupted"
    assert made.steps.tolist() == list(range(len(made.steps))) and 3 <= made.steps.size < 900
    assert (
        np.isfinite(made.latents.values).all()
        and np.isfinite(made.denoised().values).all()
        and made.attention().sizes["step"] == min(5, made.steps.size)
    )
    assert [file.name for file in (tmp_path / "out").iterdir()] == [path.name], "no lock is left"


@needs_the_bundled_model
def test_ctrl_c_pressed_again_and_again(tmp_path: Path) -> None:
    """No traceback of how Python ends, and the recording is there."""
    running = process(
        "probe.run",
        "--steps",
        900,
        "--output",
        tmp_path / "out",
        "--capture.steps",
        "0:5",
        preexec_fn=interruptible,
    )
    path, deadline = after_three_steps(running, tmp_path / "out"), time.monotonic() + 30
    while running.poll() is None:
        assert time.monotonic() < deadline
        running.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = running.communicate()
    assert (
        running.returncode == 130 and "Traceback" not in err and err.count("\nStopped.\n") == 1
    ), err
    assert Run(path).status == "interrupted" and Run(path).steps.size >= 3


def test_ctrl_c_before_anything_was_written(model: Path, tmp_path: Path) -> None:
    running = process(
        "probe.run",
        "--model",
        model,
        "--prompt",
        "a cat",
        "--output",
        tmp_path / "out",
        preexec_fn=interruptible,
    )
    assert running.stderr and running.stderr.readline().startswith("Loading")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "Traceback" not in err and "Stopped." in err
    assert all(Run(path).status == "interrupted" for path, _ in list_runs(tmp_path / "out"))


def test_a_second_ctrl_c_with_debug_shows_where_it_was(
    call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "record", stopped)
    code, out, err = call(run.main)
    assert (code, out, err) == (130, "", "\nStopped.\n")
    code, _, err = call(run.main, "--debug")
    assert code == 130 and "in stopped" in err


# --- going on, again, and side by side ------------------------------------------------------------


@pytest.fixture(scope="session")
def from_disk(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording of the saved model, which can be loaded again.

    Not to be changed: `cut` it, or take a copy.
    """
    folder = tmp_path_factory.mktemp("disk")
    asked = {
        "name": "mine",
        "model": str(saved),
        "prompt": "a cat",
        "steps": 4,
        "scheduler": "DDIM",
        "device": "cpu",
        "output": str(folder),
    }
    return record(asked, progress=False)


def test_an_interrupted_run_goes_on(call: Command, from_disk: Run, tmp_path: Path) -> None:
    left = cut(from_disk, tmp_path, 2)
    code, out, err = call(run.main, "--resume", "latest", "--output", tmp_path)
    assert code == 0 and "Traceback" not in err
    assert (
        f"Resuming {left.path}: 2 of 4 model calls are there" in err and "Not as it was" not in err
    )
    for part in (
        f"Recording  {left.path}",
        "Pictures   contact-sheet.png, picture.png",
        f"probe verify {left.name} --runs {tmp_path}",
    ):
        assert part in out
    assert compare(from_disk, Run(left.path)).same and Run(left.path).status == "complete"
    code, out, err = call(cli.dispatch, "run", "--resume", left.path)
    assert (
        code == 0
        and err.endswith(f"{left.name} is complete already.\n")
        and f"Recording  {left.path}" in out
    )
    code, out, err = call(cli.dispatch, "run", "--quiet", "--resume", left.path)
    assert (code, out, err) == (0, f"{left.path}\n", "")


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (
            ["--resume", "mine", "mine.yaml"],
            "goes on as it was asked: no experiment, no other option",
            "Give --resume RUN alone",
        ),
        (["--resume", "mine", "--seed", "7"], "goes on as it was asked", "Give --resume RUN alone"),
        (
            ["--resume", "mine", "--capture.text", "false"],
            "goes on as it was asked",
            "Give --resume RUN alone",
        ),
        (["--resume", "mine", "--dry-run"], "goes on as it was asked", "Give --resume RUN alone"),
        (
            ["--resume", "mine", "--max-bytes", "1GB"],
            "goes on as it was asked",
            "Give --resume RUN alone",
        ),
        (["--resume"], "--resume: expected one argument", "--help"),
        (["--resume", ""], "No recording in runs begins with ''", "mine"),
        (["--resume", "nime"], "No recording in runs begins with 'nime'", "There are: mine-"),
        (
            ["--resume", "mine", "--output", "nowhere"],
            "There is no recording in nowhere.",
            "Make one",
        ),
    ],
)
def test_going_on_takes_a_recording_and_nothing_else(
    call: Command, from_disk: Run, tmp_path: Path, arguments: list[str], cause: str, remedy: str
) -> None:
    left = cut(from_disk, tmp_path / "runs", 2)
    before = (left.path / "zarr.json").read_bytes()
    found = refused(call, *arguments)
    assert cause in found[0] and remedy in found[1]
    assert (left.path / "zarr.json").read_bytes() == before and Run(
        left.path
    ).status == "interrupted"


def test_going_on_with_other_weights_is_refused(
    call: Command, from_disk: Run, model: Path, tmp_path: Path
) -> None:
    tiny.pipeline(seed=1).save_pretrained(model)
    left = cut(from_disk, tmp_path / "runs", 2)
    change_root(left, lambda attributes: attributes["experiment"].update(model=str(model)))
    cause, remedy = told(call(run.main, "--resume", left.path)[2])
    assert (
        cause.startswith(f"{left.name} was begun with other weights of {model}")
        and "probe rerun" in remedy
    )


def test_a_rerun_has_the_same_bits_and_says_so(
    call: Command, from_disk: Run, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(from_disk.path, runs / from_disk.path.name)
    code, out, err = call(cli.dispatch, "rerun", "mine")
    assert code == 0 and "Denoising" in err
    (path,) = (path for path in runs.iterdir() if path.name != from_disk.path.name)
    again = Run(path)
    assert again.status == "complete" and again.attributes["parent_run"] == from_disk.name
    assert out.splitlines() == [
        f"Recorded runs/{path.name}",
        f"{from_disk.name}  and  {again.name}",
        "  asked       the same",
        "  conditions  the same",
        f"  values      the same bits in all {compare(from_disk, again).variables} variables",
    ]
    code, out, err = call(cli.dispatch, "rerun", path, "--quiet")
    assert (
        code == 0
        and "Denoising" not in err
        and "the same bits" in out
        and len(list(runs.iterdir())) == 3
    )


def test_a_rerun_under_other_conditions_names_them(
    call: Command, from_disk: Run, model: Path, tmp_path: Path
) -> None:
    tiny.pipeline(seed=1).save_pretrained(model)
    copy = Run(Path(shutil.copytree(from_disk.path, tmp_path / "runs" / from_disk.path.name)))
    change_root(copy, lambda attributes: attributes["experiment"].update(model=str(model)))
    change_root(
        copy, lambda attributes: attributes["environment"].update(threads=64, device="cuda")
    )
    code, out, _ = call(cli.dispatch, "rerun", "mine", "--quiet")
    assert code == 1
    assert re.search(
        r"^  conditions  device: cuda and cpu\n +threads: 64 and 1\n +weights: [0-9a-f]+ and "
        r"[0-9a-f]+$",
        out,
        re.MULTILINE,
    )
    assert re.search(
        r"^/latents/prediction +values differ +\d+ of 1024 +[\d.e-]+ +0$", out, re.MULTILINE
    )


def test_diff_tells_what_differs_and_where(call: Command, runs: Path) -> None:
    first = next(runs.glob("small-*.zarr")).name.removesuffix(".zarr")
    twin = copied(runs, "twin-11111111")
    code, out, err = call(cli.dispatch, "diff", "small", "twin")
    assert (
        (code, err) == (0, "")
        and "the same bits in all" in out
        and out.startswith(f"{first}  and  twin-11111111\n")
    )
    latents = zarr.open_array(twin, path="latents/latents", mode="r+")
    latents[1, 0, 0, 0, 0] += 0.25
    code, out, err = call(cli.dispatch, "diff", "twin", "small")
    assert (code, err) == (1, "") and "  values      1 of " in out
    assert re.search(r"^variable +values +by at most +first at step$", out, re.MULTILINE)
    assert re.search(r"^/latents/latents +values differ +1 of 768 +0.25 +1$", out, re.MULTILINE)


def test_diff_of_unlike_runs(call: Command, runs: Path) -> None:
    """Another seed, another number of steps, another type: what was asked, and the sizes and
    types.
    """
    base = {"name": "other", "prompt": "a cat on\nthe hat", "output": str(runs)}
    for name, changes, pipe in (
        ("seed", {"steps": 2, "seed": 9}, tiny.pipeline()),
        ("steps", {"steps": 3}, tiny.pipeline()),
        ("dtype", {"steps": 2}, tiny.pipeline().to(torch.float16)),
    ):
        record({**base, "name": name, **changes}, pipeline=pipe, progress=False)
    code, out, _ = call(cli.dispatch, "diff", "small", "seed")
    assert (
        code == 1
        and "  asked       seed: 0 and 9\n  conditions  the same\n" in out
        and re.search(r"^/images/final +values differ", out, re.MULTILINE)
    )
    code, out, _ = call(cli.dispatch, "diff", "small", "steps")
    assert (
        code == 1
        and "  asked       steps: 2 and 3\n" in out
        and "sizes {'step': 3, " in out
        and "/committed " in out
    )
    code, out, _ = call(cli.dispatch, "diff", "small", "dtype")
    assert (
        code == 1
        and "  conditions  dtype: float32 and float16\n" in out
        and "types float32 and float16" in out
    )


@pytest.mark.parametrize("folder", ["runs", "two words", "~not-home", "it's", "漢"])
def test_paths_in_commands_to_copy_are_what_a_shell_takes(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home of mine"))
    for path in (
        tmp_path / folder / "a.zarr",
        tmp_path / "home of mine" / folder / "a.zarr",
        Path(folder) / "a.zarr",
    ):
        said = subprocess.run(
            ["bash", "-c", f"printf %s {shell_path(path)}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said == str(path) and ("home of mine" not in shell_path(path))


def test_diff_counts_shared_variables_apart_from_the_others(call: Command, runs: Path) -> None:
    record(
        {
            "name": "queries",
            "prompt": "a cat on\nthe hat",
            "steps": 3,
            "output": str(runs),
            "capture": {"attention": "queries"},
        },
        tiny.pipeline(),
    )
    code, out, _ = call(cli.dispatch, "diff", "small", "queries")
    (counted,) = re.findall(
        r"^  values      (\d+) of (\d+) variables differ, and (\d+) are not in both$",
        out,
        re.MULTILINE,
    )
    differ, shared, alone = map(int, counted)
    assert (
        code == 1
        and 0 < differ <= shared
        and alone == len(re.findall(r"^/\S+ +only in the (?:first|second)$", out, re.MULTILINE))
    )
    assert differ + alone + 1 == len(re.findall(r"^/", out, re.MULTILINE)), (
        "and one row for the steps that are committed"
    )


@pytest.mark.parametrize("gone", ["environment", "model"])
def test_diff_of_one_that_does_not_say_where_it_ran(call: Command, runs: Path, gone: str) -> None:
    root = copied(runs, "odd-11111111") / "zarr.json"
    content = json.loads(root.read_text())
    del content["attributes"][gone]
    root.write_text(json.dumps(content))
    cause, remedy = refused(call, "diff", "small", "odd", main=cli.dispatch)
    assert (
        cause.endswith(f"odd-11111111.zarr is damaged: its {gone} is missing.")
        and remedy == "Record it again, or remove it."
    )


def test_diff_names_what_it_cannot_find(call: Command, runs: Path) -> None:
    damaged(runs)
    assert "begins with 'samll'" in refused(call, "diff", "samll", "small", main=cli.dispatch)[0]
    assert (
        "broken-00000000.zarr is damaged"
        in refused(call, "diff", "small", "broken", main=cli.dispatch)[0]
    )
    assert (
        "the following arguments are required: b"
        in refused(call, "diff", "small", main=cli.dispatch)[0]
    )


def test_gc_removes_what_dead_writers_left_and_no_recording(call: Command, runs: Path) -> None:
    from probe.format.schema import spec

    kept = sorted(runs.iterdir())
    attributes = {
        "format_version": 1,
        "created": "2026-01-01",
        "experiment": Experiment().resolved(),
    }
    code, out, err = call(cli.dispatch, "gc")
    assert (code, out, err) == (0, "Nothing to remove in runs.\n", "")
    left = [
        runs / ".dead-11111111.zarr.0123abcd.partial",
        runs / ".dead-11111111.zarr.lock",
        kept[0] / "zarr.json.0123abcd.partial",
    ]
    left[0].mkdir()
    for file in left[1:]:
        file.write_text("")
    with RunWriter(runs / "live-11111111.zarr", [spec("", "committed", (2,))], attributes):
        living = [runs / "live-11111111.zarr", runs / ".live-11111111.zarr.lock"]
        code, out, err = call(cli.dispatch, "gc", "--dry-run")
        assert (
            (code, err) == (0, "")
            and out.endswith("\nWould remove 3 left by writers that died.\n")
            and all(path.exists() for path in left)
        )
        assert {Path(line) for line in out.splitlines()[:-1]} == {
            path.relative_to(runs.parent) for path in left
        }
        code, out, err = call(cli.dispatch, "gc", runs)
        assert (
            (code, err) == (0, "")
            and out.endswith("\nRemoved 3 left by writers that died.\n")
            and not any(path.exists() for path in left)
        )
        assert sorted(runs.iterdir()) == sorted(kept + living)
    assert call(cli.dispatch, "gc", "nowhere")[:2] == (0, "Nothing to remove in nowhere.\n")


# --- looking at recordings ------------------------------------------------------------------------


def damaged(folder: Path, name: str = "broken-00000000") -> Path:
    path = folder / f"{name}.zarr"
    path.mkdir(parents=True)
    (path / "zarr.json").write_text('{"zarr_format": 3, "attrib')
    return path


def copied(runs: Path, name: str, **attributes: Any) -> Path:
    """Another recording, with other attributes."""
    source = next(runs.glob("small-*.zarr"))
    path = Path(shutil.copytree(source, runs / f"{name}.zarr"))
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= attributes
    (path / "zarr.json").write_text(json.dumps(root))
    return path


def test_words_of_a_prompt_without_any(call: Command, runs: Path) -> None:
    record(
        {"name": "wordless", "prompt": "", "steps": 1, "output": str(runs)},
        tiny.pipeline(),
        progress=False,
    )
    code, out, err = call(cli.dispatch, "show", "wordless", "--words")
    assert (code, err) == (0, "") and out.endswith(
        "words.png\nThe prompt has no words: there is no map to draw.\n"
    )
    assert call(cli.dispatch, "show", "small", "--words")[1].endswith("words.png\n")


def test_ls_of_nothing_says_how_to_begin(call: Command, tmp_path: Path) -> None:
    for folder in ("nowhere", str(tmp_path)):
        code, out, err = call(cli.dispatch, "ls", folder)
        assert (code, err) == (0, "") and out == (
            f"No recording in {folder} yet. Make one: python -m probe.run\n"
            "With probe come: sample, sample-guidance-8, sample-noising.\n"
        )


def test_ls_has_a_row_for_each_also_for_a_damaged_one(call: Command, runs: Path) -> None:
    name = next(runs.glob("small-*.zarr")).name.removesuffix(".zarr")
    damaged(runs)
    experiment = Experiment(prompt="an old cat " + "and a hat " * 20).resolved()
    copied(
        runs,
        "old-11111111",
        created="2020-01-01T00:00:00.000+00:00",
        status="failed",
        experiment=experiment,
    )
    code, out, err = call(cli.dispatch, "ls")
    header, *lines = out.partition("\n\nWith probe come: ")[0].splitlines()
    assert (code, err) == (
        0,
        "",
    ) and header.split() == "recording status model sampling prompt created (UTC)".split()
    assert [line.split()[:2] for line in lines] == [
        [name, "complete"],
        ["old-11111111", "failed"],
        ["broken-00000000", "damaged"],
    ]
    assert "2 steps, guidance 3, seed 0" in lines[0] and "a cat on the hat" in lines[0], (
        "a prompt of two lines is one row"
    )
    assert "an old cat and a hat and a hat and a ..." in lines[1] and lines[1].endswith(
        "2020-01-01 00:00"
    )


def test_what_others_made_does_not_steer_the_terminal(call: Command, runs: Path) -> None:
    hostile = {
        **Experiment().resolved(),
        "prompt": "a \x1b[31mred\x1b[0m cat\x07",
        "model": "m\x1b]0;title\x07",
    }
    copied(runs, "hostile-11111111", experiment=hostile)
    code, out, _ = call(cli.dispatch, "ls")
    assert (
        code == 0 and "hostile-11111111" in out and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    )
    code, out, err = call(cli.dispatch, "show", "hostile")
    assert code == 2 and "damaged" in err and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out + err)


def test_show_tells_what_is_inside(call: Command, runs: Path) -> None:
    path = next(runs.glob("small-*.zarr"))
    for arguments in (
        [],
        ["latest"],
        ["small"],
        [path.name],
        [str(path)],
        [path.name.removesuffix(".zarr"), "--runs", str(runs)],
    ):
        code, out, err = call(cli.dispatch, "show", *arguments)
        assert (code, err) == (0, "")
    assert (
        "complete, 3 of 3 model calls" in out
        and "PNDMScheduler, 2 steps, guidance 3, seed 0" in out
    )
    assert re.search(
        r"^/attention/8x8/cross +float16 +step 3 x token \d+ x branch 1 ", out, re.MULTILINE
    )
    of_unet = (
        r"^unet +\d+\.\d\d s +\d+\.\d\d GFLOP a call +\d+\.\d M parameters +\d+\.\d MB of weights$"
    )
    assert re.search(of_unet, out, re.MULTILINE) and re.search(
        r"^peak memory +\d+ MB$", out, re.MULTILINE
    )
    assert str(path / "contact-sheet.png") in out and str(path / "picture.png") in out


def test_show_of_a_run_that_did_not_finish(call: Command, runs: Path) -> None:
    path = copied(runs, "half-11111111", status="interrupted")
    code, out, err = call(cli.dispatch, "show", path)
    assert (
        (code, err) == (0, "")
        and "interrupted, 3 of 3 model calls" in out
        and "peak memory" not in out
    )


def test_show_of_a_recording_of_format_1(call: Command) -> None:
    code, out, err = call(cli.dispatch, "show", str(ROOT / "tests" / "format_1" / "default.zip"))
    assert (code, err) == (0, "")
    assert re.search(r"^unet +\d+\.\d\d s +\d+\.\d\d GFLOP a call$", out, re.MULTILINE)


@pytest.mark.parametrize("gone", ["cost", "cost/flops", "cost/component"])
def test_show_of_a_complete_recording_without_its_costs(
    call: Command, runs: Path, gone: str
) -> None:
    path = next(runs.glob("small-*.zarr"))
    shutil.rmtree(path / gone)
    root = json.loads((path / "zarr.json").read_text())
    nodes = root["consolidated_metadata"]["metadata"]
    for name in [name for name in nodes if name == gone or name.startswith(f"{gone}/")]:
        del nodes[name]
    (path / "zarr.json").write_text(json.dumps(root))
    code, out, err = call(cli.dispatch, "show", path)
    assert (
        (code, err) == (0, "")
        and "complete, 3 of 3 model calls" in out
        and "peak memory" not in out
        and "picture.png" in out
    )


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\x9b31m", "a\n\x07", "a\u202etxt", os.fsdecode(b"a\xff")], ids=ascii
)
def test_the_name_of_a_folder_does_not_steer_the_terminal(
    call: Command, runs: Path, name: str
) -> None:
    one, other, broken = (runs / f"{name}-{tail}.zarr" for tail in ("1", "2", "3"))
    for path in (one, other):
        shutil.copytree(next(runs.glob("small-*.zarr")), path)
    broken.mkdir()
    (one / f"{name}.png").touch()
    (one / "latents" / name).touch()
    half = runs / f".{name}-4.zarr.0a0a0a0a.partial"
    half.mkdir()
    codes = {}
    commands: list[list[Any]] = [
        *(["ls"], ["ls", runs / name], ["gc", runs]),
        *(
            ["show", one],
            ["show", name],
            ["show", broken],
            ["show", f"{name}-9"],
            ["show", "nowhere", "--runs", runs / name],
        ),
        *(
            ["verify", one],
            ["verify", one, "--json"],
            ["diff", one, other],
            ["rm", one, f"{name}-3", "--yes"],
        ),
    ]
    for arguments in commands:
        code, out, err = call(cli.dispatch, *arguments)
        assert (out + err).replace("\n", "").isprintable() and "Traceback" not in err, arguments
        codes[" ".join(map(str, arguments)).replace(str(runs), "").replace(name, "*")] = code
    assert list(codes.values()) == [0, 0, 0, 0, 2, 2, 2, 2, 1, 1, 0, 0], codes
    assert not one.exists() and not broken.exists() and not half.exists() and other.is_dir()


@pytest.mark.parametrize("verb", ["show", "verify", "rm"])
def test_names_that_are_none_or_several(call: Command, runs: Path, verb: str) -> None:
    copied(runs, "twin-11111111")
    copied(runs, "twin-22222222")
    cause, remedy = refused(call, verb, "twin", main=cli.dispatch)
    assert (
        cause == "2 recordings begin with 'twin'."
        and "twin-11111111" in remedy
        and "twin-22222222" in remedy
    )
    cause, remedy = refused(call, verb, "twni-11111111", main=cli.dispatch)
    assert "begins with 'twni-11111111'" in cause and "Did you mean twin-11111111" in remedy
    cause, remedy = refused(call, verb, "latest", "--runs", "nowhere", main=cli.dispatch)
    assert cause == "There is no recording in nowhere." and "python -m probe.run" in remedy
    assert len(list(runs.iterdir())) == 3


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_a_damaged_recording_is_said_to_be(call: Command, runs: Path, verb: str) -> None:
    damaged(runs)
    cause, remedy = refused(call, verb, "broken", main=cli.dispatch)
    assert "broken-00000000.zarr is damaged" in cause and remedy == "Record it again, or remove it."


def test_verify_is_0_for_a_good_one_and_1_for_a_changed_one(call: Command, runs: Path) -> None:
    code, out, err = call(cli.dispatch, "verify")
    assert (code, err) == (0, "") and "failed" not in out
    assert [line.split()[0] for line in out.splitlines()[1:5]] == [
        "manifest",
        "digests",
        "committed",
        "schema",
    ]
    chunk = next(runs.glob("*.zarr/latents/latents/c.1.*"))
    chunk.unlink()
    code, out, err = call(cli.dispatch, "verify")
    assert (code, err) == (1, "") and re.search(
        r"^  manifest +failed +1 files missing: latents/latents/c.1", out, re.MULTILINE
    )


def test_rm_does_nothing_unasked(
    call: Command, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(runs.iterdir())
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, out, err = call(cli.dispatch, "rm", "small")
    assert code == 2 and told(err) == (
        "Nothing was removed: there is nobody to ask.",
        "Give --yes to remove without asking.",
    )
    assert path.is_dir()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer in ("", "n", "no", "perhaps"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        code, out, _ = call(cli.dispatch, "rm", "small")
        assert code == 0 and out.endswith("Nothing was removed.\n") and path.is_dir()
    monkeypatch.setattr("builtins.input", lambda question: {"Remove this? [y/N] ": "Y"}[question])
    code, out, _ = call(cli.dispatch, "rm", "small")
    assert code == 0 and out.endswith("Removed 1.\n") and not path.exists()


def test_rm_removes_several_once_each_and_damaged_ones_too(call: Command, runs: Path) -> None:
    kept = copied(runs, "kept-11111111")
    damaged(runs)
    (runs / "empty-22222222.zarr").mkdir()
    code, out, err = call(cli.dispatch, "rm", "small", "small", "broken", "empty", "--yes")
    assert (
        (code, err) == (0, "") and out.endswith("Removed 3.\n") and list(runs.iterdir()) == [kept]
    )
    broken = damaged(runs)
    code, out, err = call(cli.dispatch, "rm", broken.absolute(), "--yes")
    assert (code, err) == (0, "") and list(runs.iterdir()) == [kept], "by its absolute path too"


def test_rm_asks_the_lock_and_not_the_status(call: Command, runs: Path) -> None:
    """A killed writer's number may be somebody else's by now, and a copy's writer is on another
    machine.
    """
    for name, writer in (
        ("reused-11111111", {"pid": os.getpid(), "host": socket.gethostname()}),
        ("away-22222222", {"pid": 1, "host": "elsewhere"}),
    ):
        copied(runs, name, status="running", writer=writer)
    reused = runs / "reused-11111111.zarr"
    assert Run(reused).status == "running"
    code, out, err = call(cli.dispatch, "rm", "reused", reused.absolute(), "away", "--yes")
    assert (
        (code, err) == (0, "") and out.endswith("Removed 2.\n") and len(list(runs.iterdir())) == 1
    )


def test_rm_takes_only_recordings(call: Command, runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    zarr.create_group(other)
    assert "damaged" in refused(call, "rm", other, "--yes", main=cli.dispatch)[0]
    assert refused(call, "rm", tmp_path, "--yes", main=cli.dispatch)[0].startswith(
        "No recording in runs begins with"
    )
    assert refused(call, "rm", "", "--yes", main=cli.dispatch)[0].startswith(
        "No recording in runs begins with"
    )
    assert other.is_dir() and len(list(runs.iterdir())) == 1


def test_rm_refuses_one_that_is_being_written_and_all_that_go_with_it(
    call: Command, runs: Path
) -> None:
    from probe.format.schema import spec

    attributes = {
        "format_version": 1,
        "created": "2026-01-01",
        "experiment": Experiment().resolved(),
    }
    with RunWriter(runs / "live-11111111.zarr", [spec("", "committed", (2,))], attributes):
        cause, remedy = refused(call, "rm", "small", "live", "--yes", main=cli.dispatch)
        assert (
            cause.startswith("live-11111111.zarr is being written by")
            and remedy == "Stop its writer first."
        )
        assert len(list(runs.glob("*.zarr"))) == 2
    assert call(cli.dispatch, "rm", "live", "--yes")[0] == 0


@pytest.mark.parametrize(
    ("verb", "remedy"),
    [
        ("lss", "Did you mean ls?"),
        ("verfy", "Did you mean verify"),
        ("dance", "There are: run, noising"),
    ],
)
def test_an_unknown_verb_suggests(call: Command, verb: str, remedy: str) -> None:
    cause, found = refused(call, verb, main=cli.dispatch)
    assert cause == f"There is no verb {verb!r}." and remedy in found


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_names_every_verb(call: Command, arguments: list[str]) -> None:
    code, out, _ = call(cli.dispatch, *arguments)
    assert code == 0
    for verb in cli.VERBS:
        assert re.search(rf"^    probe {verb}\b", out, re.MULTILINE), verb


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help_and_notices_a_misspelled_option(call: Command, verb: str) -> None:
    code, out, _ = call(cli.dispatch, verb, "--help")
    assert code == 0 and out.startswith("usage: ")
    cause, remedy = refused(
        call, verb, *["x"] * (2 if verb in ("ask", "diff") else 1), "--halp", main=cli.dispatch
    )
    assert "--halp" in cause and remedy == "Did you mean --help?"


def test_a_reader_that_has_seen_enough_is_no_error(runs: Path) -> None:
    """`probe ls | head -1`: no complaint, whether the pipe closes while we write or before."""
    for verb in ("ls", "show"):
        running = process("probe.cli", verb)
        assert running.stdout and running.stderr
        running.stdout.close()
        with running.stderr:
            err = running.stderr.read()
        assert (running.wait(60), err) == (0, ""), verb


def test_tables_are_aligned() -> None:
    assert rows([("a", "long one", "x"), ("bbb", "", "")], ("1", "2", "3")) == [
        "1    2         3",
        "a    long one  x",
        "bbb",
    ]

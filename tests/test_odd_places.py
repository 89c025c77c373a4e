"""Commands on odd machines: no home, nowhere to write, nobody who listens, names of every kind.

An ordinary condition ends in cause and remedy, never in "a fault of probe itself", and never in a
traceback.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from probe import cli
from probe.errors import ExperimentError
from probe.reading.recording import Run, open_run
from probe.reading.sample import unpacked
from probe.running.planning import free_room
from probe.running.recorder import record
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import expand_home, from_home, home
from probe.settings.pictures import read_masks, read_picture
from probe.terminal import guarded, without_home

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"error: [^\n]+\n       [^\n]+\n\Z")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.chdir(tmp_path)

    def called(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            guarded(cli.dispatch, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "fault of probe" not in err and "Traceback" not in err, err
        assert not err or end.value.code == 0 or BLOCK.search(err), err
        return int(str(end.value.code)), out, err

    return called


def shell(command: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """What a shell makes of a command that begins with `probe`."""
    full = command.replace("probe", f"{sys.executable} -m probe", 1)
    found = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        ["/bin/sh", "-c", full], cwd=folder, env=found, capture_output=True, check=False
    )
    err = done.stderr.decode()
    assert (
        "fault of probe" not in err and "Traceback" not in err and "Exception ignored" not in err
    ), err
    return done.returncode, done.stdout.decode(), err


# --- home -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "recorded", "meant"),
    [
        ("{home}/runs", "~/runs", "{home}/runs"),
        ("{home}//runs", "~/runs", "{home}/runs"),
        ("/{home}/runs", "~/runs", "{home}/runs"),
        ("{home}/./runs/", "~/runs", "{home}/runs"),
        ("{home}/", "~", "{home}"),
        ("{home}", "~", "{home}"),
        ("{home}/../x", "~/../x", "{home}/../x"),
        ("{home}-else/x", "{home}-else/x", "{home}-else/x"),
        ("{home}/my runs/中文", "~/my runs/中文", "{home}/my runs/中文"),
        ("~//runs", "~//runs", "{home}/runs"),
        ("~///etc/passwd", "~///etc/passwd", "{home}/etc/passwd"),
        ("~", "~", "{home}"),
        ("~/", "~/", "{home}"),
        ("~root", "~root", "{root}"),
        ("~root//x", "~root//x", "{root}/x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("./~/x", "./~/x", "~/x"),
        ("runs//a/../b/", "runs//a/../b/", "runs/a/../b"),
        ("./nowhere", "./nowhere", "nowhere"),
    ],
)
def test_a_path_means_the_same_before_and_after_it_is_recorded(
    text: str, recorded: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    names = {"home": str(tmp_path / "somebody"), "root": str(Path("~root").expanduser())}
    text, recorded, meant = (part.format(**names) for part in (text, recorded, meant))
    assert from_home(text) == recorded == load_experiment(Experiment(), output=text).output
    assert expand_home(text) == expand_home(recorded) == Path(meant) or expand_home(text) == Path(
        f"/{meant}"
    )
    assert expand_home(from_home(text)) == Path(meant)


@pytest.mark.parametrize("value", ["", "/", "relative", "//"])
def test_a_home_that_is_none_hides_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", value)
    assert (
        home() is None
        and from_home("/runs/x") == "/runs/x"
        and without_home("a /runs/x") == "a /runs/x"
    )


NOBODY = """
import os, pwd, sys
def gone(_): raise KeyError("no such account")
pwd.getpwuid = gone
from probe import cli
from probe.terminal import guarded
for line in ("show sample", "ls", "gc", "run --dry-run --model ~/x", "run --output ~/x"):
    try:
        guarded(cli.dispatch, line.split())
    except SystemExit as end:
        print("code", end.code)
"""


@pytest.mark.slow
def test_an_account_without_a_home(tmp_path: Path) -> None:
    """As in a container that is run under any number."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NOBODY],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr and "fault" not in done.stderr, done.stderr
    assert re.findall(r"^code (\d)", done.stdout, re.MULTILINE) == ["0", "0", "0", "2", "2"], (
        done.stdout + done.stderr
    )
    assert (
        done.stderr.count("you have no home folder here.\n       Write the whole path, without ~.")
        == 2
    ), done.stderr
    assert (tmp_path / f"probe-cache-{os.getuid()}").stat().st_mode & 0o777 == 0o700


# --- room, and places to write --------------------------------------------------------------------


def test_room_that_nobody_knows_is_not_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    for answer in (usage(0, 0, 0), OSError(errno.ENOSYS, "no answer")):

        def asked(_: object, answer: Any = answer) -> Any:
            if isinstance(answer, OSError):
                raise answer
            return answer

        monkeypatch.setattr(shutil, "disk_usage", asked)
        assert free_room(tmp_path / "new") is None
        asked_for = {"prompt": "a cat", "steps": 1, "output": str(tmp_path / "out")}
        assert record(asked_for, tiny.pipeline(), progress=False).status == "complete"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    assert free_room(tmp_path) == 0, "full is full"


def test_a_name_that_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="a name in it has 300 bytes; 255 is the most"):
        free_room(tmp_path / "x" / ("é" * 150))


@pytest.mark.parametrize("verb", [("show", "--words"), ("ask", "cat")], ids=lambda verb: verb[0])
def test_a_picture_goes_elsewhere_where_the_recording_takes_none(
    call: Command, verb: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "prompt": "a cat",
        "steps": 1,
        "output": str(tmp_path / "runs"),
        "capture": {"attention": "queries"},
        "model": "tiny",
    }
    if verb[0] == "ask":
        tiny.pipeline().save_pretrained(tmp_path / "tiny")
        made = record(settings | {"model": str(tmp_path / "tiny")}, progress=False)
    else:
        made = record(settings, tiny.pipeline(), progress=False)
    name = "words.png" if verb[0] == "show" else "ask-cat.png"
    (made.path / name).mkdir()  # root may write everywhere, but a folder is no file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = call(verb[0], "latest", verb[1])
    assert code == 1 and f"{name} could not be written" in err
    remedy = re.search(r"--save (\S+)", err)
    assert remedy and remedy[1] == str(tmp_path / name)
    code, out, _ = call(verb[0], "latest", verb[1], "--save", remedy[1])
    assert (
        code == 0
        and remedy[1] in out
        and (tmp_path / remedy[1]).read_bytes().startswith(b"\x89PNG")
    )
    assert call(verb[0], "latest", verb[1], "--save", "x.jpg")[0] == 2
    code, _, err = call(verb[0], "latest", verb[1], "--save", "nowhere/x.png")
    assert code == 1 and "No such file or directory" in err and "Name a folder that exists" in err


warm: list[bool] = []


@pytest.fixture
def ordinary(call: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of an account that is not root, with a recording in runs, and the test goes on as
    that account.
    """
    if os.name != "posix":
        pytest.skip("needs the owners of POSIX")
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        shutil.copytree(unpacked(), folder / "runs" / "mine.zarr")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert call("show", "sample")[0] == 0
        if not warm:  # all modules are to be there, which the other account may not read
            assert call("show", "mine", "--words", "--save", "warm.png")[0] == 0
            assert call("verify", "mine")[0] == 0
            warm.append(True)
        if root:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                if path.is_dir():
                    path.chmod(0o755)


def test_a_recording_that_may_not_be_written(call: Command, ordinary: Path) -> None:
    made = ordinary / "runs" / "mine.zarr"
    for path in (made, made.parent):
        path.chmod(0o555)
    code, _, err = call("show", "mine", "--words")
    assert code == 1 and "Permission denied" in err and "/words.png" in err
    assert call("show", "mine", "--words", "--save", "words.png")[0] == 0
    assert call("verify", "mine")[0] == 0 and call("rm", "mine", "--yes")[0] == 1


def every_file(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.slow
def test_a_recording_goes_whole_or_not_at_all(call: Command, ordinary: Path) -> None:
    shutil.copytree(ordinary / "runs" / "mine.zarr", ordinary / "runs" / "other.zarr")
    (inner := ordinary / "runs" / "mine.zarr" / "text").chmod(0o555)
    before = every_file(ordinary / "runs")
    code, _, err = call("rm", "other", "mine", "--yes")
    assert code == 1 and err == (
        "error: mine.zarr stays as it is: nothing may be removed from runs/mine.zarr/text.\n"
        "       Allow it, then try again: chmod u+rwx runs/mine.zarr/text\n"
    )
    assert every_file(ordinary / "runs") == before, "and neither does the other"
    inner.chmod(0o755)
    assert (
        call("rm", "mine", "other", "--yes")[0] == 0 and list((ordinary / "runs").iterdir()) == []
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_somebody_elses_stays_whole(call: Command, ordinary: Path, shared: bool) -> None:
    """A folder of another owner inside; or all of it, in a shared folder where each removes what is
    theirs.
    """
    made = ordinary / "runs" / "mine.zarr"
    os.seteuid(0)
    os.chown(made / "text", 0, 0)
    if shared:
        os.chown(made.parent, 0, 0)
        made.parent.chmod(0o1777)
        os.chown(made, 0, 0)
        made.chmod(0o777)
    os.seteuid(65534)
    before = every_file(made)
    code, _, err = call("rm", "mine", "--yes")
    assert (
        code == 1
        and err.startswith("error: mine.zarr stays as it is: ")
        and "another user" in err
        and "Ask its owner to remove it" in err
    )
    assert every_file(made) == before


@pytest.mark.parametrize("value", ["closed", pytest.param("file", marks=pytest.mark.slow)])
def test_a_home_that_cannot_be_written_is_none(
    value: str, call: Command, ordinary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ordinary / "file").touch()
    (ordinary / "closed").mkdir(mode=0o555)
    (ordinary / "temporary").mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(ordinary / value))
    monkeypatch.setattr("tempfile.tempdir", str(ordinary / "temporary"))
    assert call("show", "sample")[0] == 0
    (made,) = (ordinary / "temporary").iterdir()
    assert made.name == f"probe-cache-{os.geteuid()}" and list(
        made.glob("diffusion-probe/sample-*.zarr")
    )


def test_a_closed_folder_of_recordings(call: Command, ordinary: Path) -> None:
    (ordinary / "runs").chmod(0o000)
    code, _, err = call("ls")
    assert (
        code == 2
        and "runs could not be read: Permission denied. The recordings in it are probably whole."
        in err
    )


@pytest.mark.parametrize("kind", ["folder", "long", "null"])
def test_a_picture_that_the_system_does_not_read(kind: str, tmp_path: Path) -> None:
    path = {"folder": str(tmp_path), "long": "x" * 300, "null": "a\0b"}[kind]
    with pytest.raises(ExperimentError) as problem:
        read_picture(path, 8, 8)
    assert "Save it as one" not in problem.value.remedy or kind == "null"
    with pytest.raises(ExperimentError):
        read_masks([f"{path}.npz"], 8, 8)


# --- names, and nobody who listens ----------------------------------------------------------------

LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ("ls", LONG),
            ("ls", f"{LONG}/{LONG}"),
            ("show", LONG),
            ("show", "a", "--runs", LONG),
            ("gc", LONG),
            ("rm", LONG),
            ("verify", LONG),
        ),
        *(
            ("diff", LONG, LONG),
            ("ask", LONG, LONG),
            ("rerun", LONG),
            ("run", LONG),
            ("run", "--name", LONG),
            ("run", "--output", LONG),
        ),
        *(
            ("run", "--resume", LONG),
            ("run", "--image", LONG),
            ("run", "--model", LONG),
            ("run", "--max-bytes", LONG),
            ("noising", "--picture", LONG),
        ),
        *(
            ("ls", ""),
            ("ls", "--runs="),
            ("show", "--runs="),
            ("gc", ""),
            ("rm", "a", "--runs="),
            ("verify", "--runs="),
            ("show", ""),
            ("ask", "", ""),
        ),
        *(
            ("run", ""),
            ("run", "--output="),
            ("run", "--model="),
            ("run", "--resume="),
            ("run", "--steps="),
            ("run", "--image="),
            ("", ""),
            ("help", ""),
        ),
        *(
            ("ls", "a\0b"),
            ("show", "a\0b"),
            ("run", "a\0b"),
            ("run", "--output", "a\0b"),
            ("gc", "a\0b"),
            ("rm", "a\0b"),
        ),
        *(
            ("show", "a\nb"),
            ("show", "中文"),
            ("run", "中文.yaml"),
            ("run", "--output", "file"),
            ("show", "x", "--runs", "file"),
            ("gc", "file"),
        ),
    ],
    ids=lambda arguments: " ".join(arguments)[:30].encode("unicode_escape").decode(),
)
def test_names_of_every_kind(call: Command, arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, _ = call(*arguments)
    assert code in (0, 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("probe --version >&-", 0, ""),
        ("probe --version 2>&-", 0, ""),
        ("probe --version <&- >&- 2>&-", 0, ""),
        ("probe nothing 2>&-", 2, ""),
        (
            "probe --version >/dev/full",
            1,
            "error: What was to be printed could not be written: No space left on device.\n",
        ),
        (
            "probe run --help >/dev/full",
            1,
            "error: What was to be printed could not be written: No space left on device.\n",
        ),
        ("probe nothing 2>/dev/full", 2, ""),
        ("probe show nope 2>/dev/full", 2, ""),
        ("probe --version >/dev/full 2>/dev/full", 1, ""),
        ("probe run --help | head -1", 0, ""),
        ("probe rm runs/mine.zarr <&-", 2, "error: Nothing was removed: there is nobody to ask.\n"),
        (
            "probe rm runs/mine.zarr </dev/null",
            2,
            "error: Nothing was removed: there is nobody to ask.\n",
        ),
        ("COLUMNS=1 probe run --help", 0, ""),
        ("COLUMNS=-7 probe help show", 0, ""),
        ("PYTHONIOENCODING=ascii probe ls 中文", 0, ""),
        ("PYTHONIOENCODING=ascii probe show 中文", 2, "error: There is no recording in runs.\n"),
        (
            "PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C probe run --prompt 中文",
            2,
            "these bytes are no text in this terminal's encoding",
        ),
    ],
)
def test_nobody_listens(command: str, code: int, said: str, tmp_path: Path) -> None:
    if " rm " in command:
        shutil.copytree(unpacked(), tmp_path / "runs" / "mine.zarr")
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    got, _, err = shell(command, tmp_path)
    assert got == code and said in err and (said or not err), err


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("nothing", 2),
        ("show nope", 2),
        ("show sample", 0),
        ("run --help", 0),
        pytest.param("verify damaged", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "streams", [pytest.param("stdout", marks=pytest.mark.slow), "stdout stderr"]
)
def test_a_reader_that_left_early_changes_no_exit_code(
    command: str, code: int, streams: str, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(unpacked(), tmp_path / "runs" / "damaged.zarr"))
    chunk = damaged / "latents" / "latents" / "c.1.0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert left_early(command, streams, tmp_path).returncode == code


@pytest.mark.slow
def test_a_run_that_nobody_watches_is_complete(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "tiny")
    done = left_early(
        f"run --model {tmp_path / 'tiny'} --steps 2 --device cpu", "stdout stderr", tmp_path
    )
    assert done.returncode == 0 and open_run("latest", tmp_path / "runs").status == "complete"


def left_early(command: str, streams: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Call probe with streams whose reader has gone.

    Python buffers them as on a reader's machine: see conftest.py.
    """
    assert "PYTHONUNBUFFERED" not in os.environ
    read, write = os.pipe()
    os.close(read)
    full = [sys.executable, "-m", "probe", *command.split()]
    options: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | dict.fromkeys(
        streams.split(), write
    )
    try:
        return subprocess.run(
            full, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, **options
        )
    finally:
        os.close(write)


@pytest.mark.parametrize(
    "command",
    [
        "run --steps 2",
        "verify sample",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                "run --dry-run",
                "rerun sample",
                "ask sample cat",
                "noising --picture x.png",
            )
        ),
    ],
)
def test_torch_is_not_begun_in_a_folder_that_is_gone(command: str, tmp_path: Path) -> None:
    """Its libraries end the process there, with a message that helps nobody."""
    done = in_a_folder_that_is_gone(command, tmp_path)
    assert (
        done.returncode == 2
        and done.stderr == "error: The folder you are in is gone.\n       cd to one that exists.\n"
    )


@pytest.mark.parametrize(
    ("command", "codes"),
    [("ls", (0, 2)), ("show a", (2,)), ("run", (1, 2)), ("--version", (0,)), ("gc", (0, 1))],
)
def test_a_folder_that_is_gone(command: str, codes: tuple[int, ...], tmp_path: Path) -> None:
    done = in_a_folder_that_is_gone(command, tmp_path)
    assert (
        done.returncode in codes
        and "Traceback" not in done.stderr
        and "fault of probe" not in done.stderr
    ), done.stderr
    assert done.returncode == 0 or "error: " in done.stderr


def in_a_folder_that_is_gone(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "gone").mkdir()
    gone = (
        f"import os, shutil; os.chdir({str(tmp_path / 'gone')!r}); "
        f"os.rmdir({str(tmp_path / 'gone')!r}); os.execv({sys.executable!r}, "
    )
    gone += f"[{sys.executable!r}, '-m', 'probe', *{command.split()!r}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", gone], env=environment, capture_output=True, text=True, check=False
    )


def test_a_run_without_a_step(tmp_path: Path, call: Command) -> None:
    with pytest.raises(ExperimentError, match="less than 1"):
        load_experiment(Experiment(), steps=0)
    with pytest.raises(ExperimentError):
        Experiment().capture.steps_of(0)
    made = record(
        {"prompt": "a cat", "steps": 1, "name": "none", "output": str(tmp_path / "runs")},
        tiny.pipeline(),
        progress=False,
    )
    (made.path / "committed" / "c.0").unlink(missing_ok=True)
    for arguments in (
        ("show", "none"),
        ("show", "none", "--words"),
        ("ls",),
        ("verify", "none"),
        ("ask", "none", "cat"),
        ("diff", "none", "none"),
    ):
        call(*arguments)
    assert Run(made.path).name == made.name

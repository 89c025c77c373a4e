"""What holds for every test: no network, one thread, and the same examples each time.

The environment is set when pytest reads this file, before any test module imports torch or
huggingface_hub, which read these variables once. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", STREAMLIT_BROWSER_GATHER_USAGE_STATS="false"
)
# A reader's machine sets neither, and what is buffered fails later.
os.environ.pop("PYTHONUNBUFFERED", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Two threads on two busy cores are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from PIL import ImageFont, features

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("ci")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Let no collection of garbage look at what was imported: 600,000 objects, which stay.

    Streamlit asks for a whole one after each run of a page.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files where workers share them, so that no worker waits at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -item.path.stat().st_size)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Hold torch to one thread, also if a plugin imported it before this file was read."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _main_stays() -> Iterator[None]:
    """Put Python's main module back: a page that is tested takes its place, and children run it."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture(autouse=True, scope="session")
def _disk_that_does_not_wait() -> Iterator[None]:
    """Let a sync return at once; an ordinary recording has hundreds, of milliseconds each.

    What is synced, and when, is held by test_power_cut.py. A handle that is not open is still
    refused. Processes that tests start sync as on any machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(autouse=True, scope="session")
def _a_home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the home folder beside what tests write.

    If TMPDIR were in the home folder, messages would write paths as ~/...
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "USERPROFILE"):
            patch.setenv(name, str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_fonts() -> Iterator[None]:
    """Hide what a bare machine does not have: fonts in files, and raqm.

    Pillow's own font remains.
    """
    truetype, check = ImageFont.truetype, features.check

    def refuse(font: Any = None, *args: Any, **settings: Any) -> ImageFont.FreeTypeFont:
        if isinstance(font, str | bytes | Path):
            raise OSError(f"a bare machine has no font of the system, so tests do without: {font}")
        return truetype(font, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFont, "truetype", refuse)
        patch.setattr(ImageFont.core, "HAVE_RAQM", False)
        patch.setattr(features, "check", lambda feature: feature != "raqm" and check(feature))
        yield


@pytest.fixture(scope="session")
def full_xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recording of the tiny Stable Diffusion XL with everything on. Not to be changed."""
    from tiny_xl import full

    return full(tmp_path_factory.mktemp("full_xl"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a diffusers directory. Not to be changed: take a copy."""
    import tiny

    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.pipeline().save_pretrained(folder)
    return folder


# --- browsers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser of a module's own."""
    from browsers import started

    made = started()
    yield made
    made.quit()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of web/, built. Not to be changed."""
    from web_pages import build

    folder = tmp_path_factory.mktemp("web")
    build(folder)
    return folder


@pytest.fixture(scope="session")
def address(built: Path) -> Iterator[str]:
    """The page of web/, served."""
    from web_pages import serving

    with serving(built) as page:
        yield page


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test in a folder of its own, with a wide terminal, and restore the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    kept, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # a command that was stopped is deaf to a second Ctrl-C
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    os.environ.update(kept)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit code, stdout and stderr."""
    from probe.terminal import guarded

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
    """The tiny model as a diffusers directory of this test's own."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="session")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small recording. Not to be changed: take `runs`."""
    import tiny

    from probe.running.recorder import record

    folder = tmp_path_factory.mktemp("one_run")
    asked = {"name": "small", "prompt": "a cat on\nthe hat", "steps": 2, "output": str(folder)}
    record(asked, pipeline=tiny.pipeline(), progress=False)
    return folder


@pytest.fixture
def runs(one_run: Path, tmp_path: Path) -> Path:
    """A folder of this test's own with one small recording."""
    return Path(shutil.copytree(one_run, tmp_path / "runs"))


# --- the store ------------------------------------------------------------------------------------


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a writing thread behind."""
    from stored import writers

    before = writers()
    yield
    assert writers() == before, "a writing thread is left over"

"""What holds for every test: no network, one thread, and the same examples each time.

The environment is set when pytest reads this file, before any test module imports torch or
huggingface_hub, which read these variables once. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", STREAMLIT_BROWSER_GATHER_USAGE_STATS="false"
)
os.environ.pop(
    "PYTHONUNBUFFERED", None
)  # a reader's machine sets neither, and what is buffered fails later
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two threads on two busy cores are several times slower than one

import pytest
from hypothesis import settings
from PIL import ImageFont, features

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """A plugin may have imported torch before this file was read; then only this call reaches
    it.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def _a_home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home folder beside what tests write: where TMPDIR lies in the real one, paths would be said
    as ~/...
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

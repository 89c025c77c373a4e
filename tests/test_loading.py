"""Models are loaded safely: safetensors only, none of their code, a commit for a hub model.

Nobody's token or home folder is recorded.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import COMMIT, OLDER, hub_cache

from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, ModelError
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import expand_home, from_home

ROOT = Path(__file__).parent.parent
TOKEN = "hf_thisIsNobodysTokenButItLooksLikeOne"
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub_cache(tmp_path / "hub", saved, {"main": COMMIT, "older": OLDER})


def load_cpu(name: str, **options: Any) -> StableDiffusion:
    return load(name, device="cpu", **options)


# --- a hub model is a commit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("older", OLDER), (OLDER, OLDER)]
)
def test_a_hub_model_is_resolved_to_its_commit(
    revision: str | None, commit: str, hub: Path, saved: Path
) -> None:
    assert load_cpu("somebody/tiny", revision=revision, weights=False).revision == commit
    if revision is None:
        there, here = load_cpu("somebody/tiny"), load_cpu(str(saved))
        assert there.digest() == here.digest() and (there.name, here.revision) == (
            "somebody/tiny",
            None,
        )


@pytest.mark.parametrize("revision", ["never", "f" * 40])
def test_a_commit_that_is_not_here_is_no_other_commit(revision: str, hub: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_cpu("somebody/tiny", revision=revision)
    assert caught.value.cause.startswith(
        f"model: somebody/tiny at revision {revision} is not on this machine and could not be "
        "fetched"
    )
    assert str(hub) not in str(caught.value)


def test_the_commit_and_the_weights_are_recorded(hub: Path, tmp_path: Path) -> None:
    asked = load_experiment(
        {
            "model": "somebody/tiny",
            "prompt": "a cat",
            "steps": 1,
            "device": "cpu",
            "output": str(tmp_path / "runs"),
        }
    )
    run = record(asked, progress=False)
    said = run.attributes["model"]
    assert (said["name"], said["revision"], said["weights"]) == (
        "somebody/tiny",
        COMMIT,
        load_cpu("somebody/tiny").digest(),
    )
    assert run.experiment == asked and run.experiment.revision is None, (
        "what was asked stays what was asked"
    )


# --- safetensors only, and no code ----------------------------------------------------------------


class Owned:
    """Unpickling this leaves a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def unpickled() -> Iterator[Callable[[], list[str]]]:
    """What was looked up by name while something was unpickled, from C or Python, by whomever."""
    seen: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "pickle.find_class":
            seen.append(".".join(map(str, arguments)))

    sys.addaudithook(watch)
    yield lambda: seen
    watching.clear()


def test_pickled_weights_beside_safe_ones_are_not_read(
    copy: Path, tmp_path: Path, unpickled: Callable[[], list[str]]
) -> None:
    for part, stem in PARTS.items():
        for name in (f"{stem}.bin", "pytorch_model.bin", f"{stem}.ckpt", f"{stem}.fp16.bin"):
            torch.save({"weight": Owned(tmp_path / "owned")}, copy / part / name)
    assert load_cpu(str(copy)).digest() == StableDiffusion.of(tiny.pipeline()).digest()
    assert not (tmp_path / "owned").exists() and unpickled() == []


@pytest.mark.parametrize("part", PARTS)
def test_pickled_weights_alone_are_refused(
    part: str, copy: Path, tmp_path: Path, unpickled: Callable[[], list[str]]
) -> None:
    (copy / part / f"{PARTS[part]}.safetensors").unlink()
    torch.save({"weight": Owned(tmp_path / "owned")}, copy / part / f"{PARTS[part]}.bin")
    with pytest.raises(
        ModelError, match=f"{part} has only pickled weights, which can run code when they are read"
    ):
        load_cpu(str(copy))
    assert not (tmp_path / "owned").exists() and unpickled() == []


def test_pickles_named_safetensors_are_refused(
    copy: Path, tmp_path: Path, unpickled: Callable[[], list[str]]
) -> None:
    (copy / "unet" / f"{PARTS['unet']}.safetensors").write_bytes(
        pickle.dumps(Owned(tmp_path / "owned"))
    )
    with pytest.raises(ModelError) as caught:
        load_cpu(str(copy))
    assert (
        "\n" not in caught.value.cause and not (tmp_path / "owned").exists() and unpickled() == []
    )


def test_the_watch_on_pickles_can_fail(tmp_path: Path, unpickled: Callable[[], list[str]]) -> None:
    torch.save({"weight": Owned(tmp_path / "owned")}, tmp_path / "model.bin")
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert (tmp_path / "owned").exists() and unpickled() != []


def test_no_code_that_comes_with_a_model_runs(copy: Path, tmp_path: Path) -> None:
    """Neither a pipeline, nor a scheduler, nor a text encoder or tokenizer of the model's own."""
    code = (
        f"from pathlib import Path\nPath({str(tmp_path / 'owned')!r}).touch()\nclass Evil: pass\n"
    )
    for folder in (
        copy,
        *(copy / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")),
    ):
        for name in ("pipeline.py", "modeling_evil.py", "evil.py", "__init__.py", "setup.py"):
            (folder / name).write_text(code)
    evil = {
        "auto_map": dict.fromkeys(
            ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor"), "modeling_evil.Evil"
        ),
        "custom_pipelines": "evil",
    }
    for file in (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "model_index.json",
    ):
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | evil))
    assert load_cpu(str(copy)).digest() == StableDiffusion.of(tiny.pipeline()).digest()
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["evil", "Evil"]}))
    with pytest.raises(ModelError, match="its scheduler 'Evil' is not one of diffusers'"):
        load_cpu(str(copy))
    assert not (tmp_path / "owned").exists() and "modeling_evil" not in sys.modules


UNSAFE = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "snapshot_download"}
FETCHERS = ("loading.py", "single_file.py")  # they may fetch


def test_weights_are_read_by_us_alone() -> None:
    """No from_pretrained is in the packages, and nothing there unpickles or trusts remote code."""
    found = []
    for path in (ROOT / "probe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword):
                pickles = node.arg == "allow_pickle" and getattr(node.value, "value", True)
                if pickles or node.arg in ("trust_remote_code", "custom_pipeline"):
                    found.append(f"{path.name}:{node.value.lineno}: {node.arg}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            fetches = called == "snapshot_download" and path.name in FETCHERS
            if (called in UNSAFE and not fetches) or called.endswith(".from_pretrained"):
                found.append(f"{path.name}:{node.lineno}: {called}")
    assert found == []


# --- nobody's home, nobody's token ----------------------------------------------------------------


def test_a_place_in_the_home_folder_begins_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/somewhere/anna")
    same = ("/somewhere/annabel/sd", "models/sd", "owner/name", "~/sd", "~anna/sd")
    shortened = {"/somewhere/anna": "~", "/somewhere/anna/models/sd": "~/models/sd"}
    for text, kept in {**shortened, **{text: text for text in same}}.items():
        assert from_home(text) == kept and from_home(kept) == kept
        assert expand_home(kept) == Path(text.replace("~/", "/somewhere/anna/"))
    asked = load_experiment(
        {
            "model": "/somewhere/anna/sd",
            "output": "/somewhere/anna/runs",
            "image": "/somewhere/anna/cat.png",
        }
    )
    assert (asked.model, asked.output, asked.image) == ("~/sd", "~/runs", "~/cat.png")
    assert load_experiment(asked.resolved()) == asked
    monkeypatch.setenv("HOME", "/")
    assert from_home("/etc/x") == "/etc/x"
    with pytest.raises(ExperimentError, match="you have no home folder here"):
        expand_home("~/x")
    monkeypatch.setenv("HOME", "/elsewhere/ben")
    assert load_experiment(asked.resolved()).identity() == asked.identity(), (
        "the same was asked, whoever asked"
    )


def test_a_model_in_the_home_folder_is_found_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    for name in ("~/model", str(saved)):
        assert load_cpu(load_experiment({"model": name}).model, weights=False).name == "~/model"
    loaded = type(tiny.pipeline()).from_pretrained(
        saved, safety_checker=None, requires_safety_checker=False
    )
    assert StableDiffusion.of(loaded).name == "~/model"


RECORD = """
import sys
from probe.cli import dispatch
from probe.diffusion.loading import load
from probe.reading.recording import open_run
assert dispatch(["run", "asked.yaml", "--model", sys.argv[1], "--output", sys.argv[2]]) == 0
run = open_run("latest", sys.argv[2])
weights = run.attributes["model"]["weights"]
assert load(run.experiment.model).digest() == weights, "its own record leads back to the model"
assert dispatch(["rerun", str(run.path), "--quiet"]) == 0
"""


@pytest.mark.slow
def test_no_token_and_no_home_in_a_recording_or_in_what_is_said(
    saved: Path, tmp_path: Path
) -> None:
    """Recorded, and recorded again, by somebody with a token, whose model, picture and recordings
    are all in the home folder.
    """
    home = tmp_path / "home" / "anna-lovelace"
    (home / "project").mkdir(parents=True)
    shutil.copytree(saved, home / "models" / "tiny")
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(home / "cat.png")
    asked = {
        "prompt": "a cat",
        "steps": 3,
        "strength": 1.0,
        "image": str(home / "cat.png"),
        "device": "cpu",
        "capture": {"attention": "off"},
    }
    (home / "project" / "asked.yaml").write_text(json.dumps(asked))
    secret = {
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": TOKEN,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", RECORD, str(home / "models" / "tiny"), "runs"]
    done = subprocess.run(
        command,
        env={**os.environ, **secret},
        cwd=home / "project",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = sorted((home / "project" / "runs").glob("*.zarr"))
    assert len(made) == 2
    for what in (TOKEN, "anna-lovelace"):
        assert what not in done.stderr
        for path in made:
            assert not [
                name for name, content in contents(path).items() if what.encode() in content
            ]
    assert (Run(made[0]).experiment.image, Run(made[0]).attributes["model"]["name"]) == (
        "~/cat.png",
        "~/models/tiny",
    )


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a recording, and what is packed in them: texts of variables, and of
    pictures.
    """
    found = {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }
    for group in Run(path).tree.subtree:
        found |= {
            f"{group.path}/{name}": str(v.values).encode()
            for name, v in group.variables.items()
            if v.dtype.kind in "TO"
        }
    for picture in path.glob("*.png"):
        with Image.open(picture) as shown:
            found |= {
                f"{picture.name} {key}": str(value).encode() for key, value in shown.info.items()
            }
    assert len(found) > 30
    return found


def test_defaults_name_no_place_of_this_machine() -> None:
    assert not any(
        text.startswith(("/", "~")) for text in (Experiment().model, Experiment().output)
    )

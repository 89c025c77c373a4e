"""Every field has an option, every option is explained, and a forecast is what is written."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Command, cause_and_remedy, process, refused

from probe import run
from probe.settings.capture import CaptureOptions
from probe.settings.experiment import Experiment, load_experiment
from probe.terminal import overrides

pytestmark = pytest.mark.usefixtures("own_folder")


# --- options --------------------------------------------------------------------------------------


FIELDS = {
    name: field
    for name, field in Experiment.model_fields.items()
    if name not in ("capture", "scheduler_options", "edits", "loras")
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
    "clip_skip": ("1", 1),
    "prompt_embeds": ("a.safetensors", "a.safetensors"),
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
    "graphs": ("off", "off"),
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
        plain = {other: value_of(Experiment(), other) for other in FIELDS if other != name}
        if name == "prompt_embeds":
            plain["prompt"] = ""  # the default prompt is not that of somebody's embeddings
        assert {other: value_of(found, other) for other in FIELDS if other != name} == plain


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
    cause, remedy = cause_and_remedy(err)
    assert code == 2 and re.fullmatch(
        r"The recording would take [\d.]+ kB, more than --max-bytes: 100.0 kB.", cause
    )
    assert "Most of it is " in remedy and not (tmp_path / "new").exists()

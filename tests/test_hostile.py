"""Whatever is in somebody else's recording, reading it ends in a line of cause and one of remedy.

Each hostile store is a good recording (synthetic, without torch) with one thing done to it. A
process of its own, which has never seen torch, reads everything of it in every way there is: in at
most 512 MB and 5 s.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import Zstd
from PIL import Image
from recordings import ATTRIBUTES, CALLS, GRID, recording

from probe.errors import RecordingDamaged, RecordingNotFound, RecordingUnreadable
from probe.format.schema import spec
from probe.proof.checks import DAMAGE, check_picture
from probe.reading.files import UNLINKED
from probe.reading.lazy import UNBACKED
from probe.reading.listing import list_runs
from probe.reading.recording import Run
from probe.writing.digests import sealed
from probe.writing.store import MANIFEST, RunWriter

ROOT = Path(__file__).parent.parent
MEGABYTES, SECONDS = 512, 5
SECRET = b"the words of somebody else" * 40


# --- reading all of it, in a process of its own ---------------------------------------------------


def ways(path: Path) -> dict[str, Callable[[], Any]]:
    """Every way to read a recording."""
    from probe.cli import dispatch

    run = functools.cache(lambda: Run(path))

    def every_variable() -> None:
        for group in run().tree.subtree:
            for variable in group.to_dataset(inherit=False).variables.values():
                for at in range(variable.sizes["step"]) if "step" in variable.dims else [None]:
                    np.asarray(variable if at is None else variable.isel(step=at))

    return {
        "list_runs": lambda: list_runs(path.parent),
        "ls": lambda: dispatch(["ls", str(path.parent)]),
        "show": lambda: dispatch(["show", str(path)]),
        "repr": lambda: repr(run()),
        "html": lambda: run()._repr_html_(),
        "latents": lambda: run().latents.values,
        "preview": lambda: run().preview().values,
        "images": lambda: run().images.values,
        "attention": lambda: [run().attention(grid).values for grid in run().grids],
        "one map": lambda: run().attention().isel(step=0, token=1).values,
        "words": lambda: run().word_overview(),
        "tokens": lambda: run().tokens(),
        "experiment": lambda: run().experiment,
        "everything": every_variable,
        "verify": lambda: dispatch(["verify", str(path)]),
    }


def look(path: Path) -> dict[str, Any]:
    """What each way of reading a recording ends in: nothing, an error's two lines, or a
    traceback.
    """
    said: dict[str, Any] = {}
    shown, told, seconds = io.StringIO(), io.StringIO(), 0.0
    for way, read in ways(path).items():
        began = time.process_time()
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
                read()
        except (RecordingDamaged, RecordingNotFound, RecordingUnreadable) as error:
            said[way] = [error.cause, error.remedy]
        except BaseException:
            said[way] = traceback.format_exc()
        seconds = max(seconds, time.process_time() - began)
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return {
        "said": said,
        "shown": shown.getvalue(),
        "told": told.getvalue(),
        "seconds": seconds,
        "megabytes": peak / 1024,
    }


def serve() -> None:
    """Read the paths that come in, each in a fork of this process, which has imported what is
    needed and done nothing yet.
    """
    import probe.cli  # noqa: F401

    for line in sys.stdin:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            sys.modules["torch"] = None  # type: ignore[assignment]  # as where it is not installed: what needs it is not checked
            resource.setrlimit(
                resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)
            )  # not the limit: it keeps a failure from taking the machine
            signal.alarm(
                120
            )  # nothing waits, for a pipe say: that would end here, without an answer
            with os.fdopen(theirs, "w") as answer:
                json.dump(look(Path(line.rstrip("\n"))), answer)
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as answer:
            print(answer.read() or json.dumps({"died": True}), flush=True)
        os.waitpid(child, 0)


@pytest.fixture(scope="module")
def reader() -> Iterator[Callable[[Path], dict[str, Any]]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", "import test_hostile; test_hostile.serve()"]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def read(path: Path) -> dict[str, Any]:
            assert process.stdin and process.stdout
            print(path, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield read
        process.stdin.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("good") / "good.zarr")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return Path(shutil.copytree(good, tmp_path / "runs" / "mine.zarr"))


# --- what is done to them -------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def root(change: Change) -> Callable[[Path], None]:
    """Change the root's zarr.json."""

    def plant(path: Path) -> None:
        content = json.loads((path / "zarr.json").read_text())
        change(content)
        (path / "zarr.json").write_text(json.dumps(content))

    return plant


def said(*place: str, value: Any) -> Callable[[Path], None]:
    """Put an attribute of the root."""

    def change(content: dict[str, Any]) -> None:
        at = content["attributes"]
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value

    return root(change)


def node(name: str, change: Change) -> Callable[[Path], None]:
    """Change a node: its own zarr.json, and what the root's says of it."""

    def plant(path: Path) -> None:
        file = path / name / "zarr.json"
        own = json.loads(file.read_text())
        change(own)
        file.write_text(json.dumps(own))
        root(lambda content: change(content["consolidated_metadata"]["metadata"][name]))(path)

    return plant


def listed(name: str, value: Any = None) -> Callable[[Path], None]:
    """List a node in the root's zarr.json that is not there, or is something else."""
    group = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
    return root(
        lambda content: content["consolidated_metadata"]["metadata"].update(
            {name: group if value is None else value}
        )
    )


def shaped(shape: Any, chunks: Any) -> Change:
    return lambda it: it.update(
        shape=shape, chunk_grid={"name": "regular", "configuration": {"chunk_shape": chunks}}
    )


def coded(*codecs: Any) -> Change:
    return lambda it: it.update(codecs=[{"name": c} if isinstance(c, str) else c for c in codecs])


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Remove a file or folder, and put something else where it was."""

    def plant(path: Path) -> None:
        target = path / name
        if target.is_dir():
            target.rename(path.parent.parent / "elsewhere")
        else:
            (path.parent.parent / "elsewhere").write_bytes(target.read_bytes())
            target.unlink()
        make(target)

    return plant


def link(target: Path) -> None:
    """A link to what was there: it would even read well."""
    target.symlink_to(
        next(parent for parent in target.parents if parent.name == "runs").parent / "elsewhere"
    )


def sparse(size: int) -> Callable[[Path], Any]:
    return lambda target: target.touch() or os.truncate(target, size)


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def checked(raw: bytes) -> bytes:
    return raw + google_crc32c.value(raw).to_bytes(4, "little")


def all_of(*plants: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda path: [plant(path) for plant in plants] and None


def shard_index(change: Callable[[list[int]], Any]) -> Callable[[bytes], bytes]:
    """Change a shard's index (offset and length of each chunk), its checksum included."""

    def plant(raw: bytes) -> bytes:
        numbers = list(struct.unpack("<6Q", raw[-52:-4]))
        change(numbers)
        return raw[:-52] + checked(struct.pack("<6Q", *numbers))

    return plant


def texts(raw: bytes) -> Callable[[Path], None]:
    """Other bytes in place of a variable of text, which holds three texts."""
    return lambda path: (
        all_of(
            node(
                "cost/component",
                coded(
                    "vlen-utf8", {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
                ),
            )
        )(path)
        or content("cost/component/c.0", lambda _: raw)(path)
    )


def repacked(path: Path) -> None:
    """What zarr's second format looks like, with a filter that runs code when it is read."""
    shutil.rmtree(path)
    (path / "latents").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    metadata = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "filters": [{"id": "pickle"}],
        "compressor": None,
        "order": "C",
    }
    (path / "latents" / ".zarray").write_text(json.dumps({**metadata, "fill_value": None}))
    (path / "latents" / "0").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")


BOMB = bytes(Zstd(level=19).encode(bytes(2**27)))  # 128 MB in a few kilobytes
CHUNK, MAPS, TEXT = (
    "latents/latents/c.1.0.0.0.0",
    f"{GRID}/cross/c.1.0.0.0.0.0.0.0",
    f"{GRID}/token_text",
)
BYTES, PLAIN = {"name": "bytes", "configuration": {"endian": "little"}}, [1, 1, 4, 8, 8]
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # links, pipes, devices, holes
    "a chunk is a link": (replaced(CHUNK, link), "behind a link"),
    "a chunk is a link to a device": (
        replaced(CHUNK, lambda target: target.symlink_to("/dev/zero")),
        "behind a link",
    ),
    "a variable is a link": (replaced("latents/latents", link), "behind a link"),
    "a group is a link": (replaced("latents", link), "behind a link"),
    "the root file is a link": (replaced("zarr.json", link), "behind a link"),
    "a node's file is a link": (replaced("images/final/zarr.json", link), "behind a link"),
    "a group goes round in circles": (
        lambda path: (path / "attention" / "loop").symlink_to("."),
        "attention/loop is behind a link",
    ),
    "a listed group goes round in circles": (
        all_of(lambda path: (path / "again").symlink_to("."), listed("again")),
        "behind a link",
    ),
    "a link to a secret": (
        lambda path: (path / "contact-sheet.png").symlink_to("/proc/self/environ"),
        "contact-sheet.png is behind a link",
    ),
    "a chunk is a pipe": (replaced(CHUNK, os.mkfifo), "is not a file"),
    "a chunk of labels is a pipe": (replaced("step/c.0", os.mkfifo), "is not a file"),
    "the root file is a pipe": (replaced("zarr.json", os.mkfifo), "is not a file"),
    "a pipe among the groups": (
        lambda path: os.mkfifo(path / "latents" / "pipe"),
        "latents/pipe is a pipe",
    ),
    "a chunk is a folder": (replaced(CHUNK, Path.mkdir), "is not a file"),
    "a root file of 100 GB": (replaced("zarr.json", sparse(100 * 10**9)), "100000000000 bytes"),
    "a node's file of 100 GB": (
        replaced("images/final/zarr.json", sparse(100 * 10**9)),
        "100000000000 bytes",
    ),
    "a chunk of 100 GB": (replaced(CHUNK, sparse(100 * 10**9)), "100000000000 bytes, and not 1028"),
    "a hole of 4 GB, as declared": (
        all_of(
            node("images/final", shaped([1, 40_000, 33_333, 3], [1, 40_000, 33_333, 3])),
            replaced("images/final/c.0.0.0.0", sparse(3999960004)),
        ),
        "is a hole",
    ),
    # shapes
    "a trillion steps": (
        all_of(
            *(
                node(name, shaped([10**12], [10**12]))
                for name in ("step", "timestep", "sigma", "alpha_bar", "committed")
            )
        ),
        "too many labels",
    ),
    "a trillion steps of one variable": (
        node("committed", shaped([10**12], [10**12])),
        "do not fit together",
    ),
    "values without end": (
        node("sigma", shaped([10**14, 10**14], [10**14, 10**14])),
        "does not name its dimensions",
    ),
    "4 GB in no file": (
        all_of(
            node("images/final", shaped([1, 40_000, 33_333, 3], [1, 40_000, 33_333, 3])),
            lambda path: (path / "images/final/c.0.0.0.0").unlink(),
        ),
        "4000 MB of images/final are claimed, and in no file",
    ),
    "a million chunks": (node("sigma", shaped([10**6], [1])), "claims a shape"),
    "a million chunks in a shard": (
        node(
            f"{GRID}/cross",
            lambda it: it["chunk_grid"]["configuration"].update(
                chunk_shape=[1, 3, 1, 1, 2, 2, 4 * 10**3, 4 * 10**3]
            ),
        ),
        "claims a shape",
    ),
    "chunks larger than they are": (
        node("latents/latents", shaped([CALLS, 1, 4, 8, 8], [2, 1, 4, 8, 8])),
        "has 1028 bytes, and not 2052",
    ),
    "a chunk cut off": (
        content(CHUNK, lambda raw: checked(raw[:100])),
        "has 104 bytes, and not 1028",
    ),
    "a chunk too long": (content(CHUNK, lambda raw: checked(raw + bytes(2**20))), "and not 1028"),
    "an empty chunk": (content(CHUNK, lambda raw: b""), "has 0 bytes"),
    "a shard that points out of itself": (
        content(MAPS, shard_index(lambda n: n.__setitem__(2, 10**9))),
        f"{GRID}/cross",
    ),
    "a shard of a huge chunk": (
        content(MAPS, shard_index(lambda n: n.__setitem__(3, 2**62))),
        f"{GRID}/cross",
    ),
    "a shard that ends before it begins": (
        content(MAPS, shard_index(lambda n: n.__setitem__(3, 2**64 - 3))),
        f"{GRID}/cross",
    ),
    "a negative size": (node("latents/latents", shaped([-3, 1, 4, 8, 8], PLAIN)), "has no shape"),
    "a size that is true": (
        node("latents/latents", shaped([CALLS, True, 4, 8, 8], PLAIN)),
        "has no shape",
    ),
    "a size of 4000 digits": (
        node("latents/latents", shaped([10**4000, 1, 4, 8, 8], PLAIN)),
        "has no shape",
    ),
    "chunks of size 0": (
        node("latents/latents", shaped([CALLS, 1, 4, 8, 8], [0, 1, 4, 8, 8])),
        "its chunks have none",
    ),
    "draws of noise in a generation": (
        node(
            "latents/latents",
            lambda it: it.update(dimension_names=["step", "draw", "channel", "y", "x"]),
        ),
        "latents/latents is float32 (step, draw, channel, y, x), and not",
    ),
    "too few dimensions": (
        node("latents/latents", lambda it: it.update(dimension_names=["step", "image"])),
        "does not name its dimensions",
    ),
    "dimensions that disagree": (
        all_of(node("latents/prediction", shaped([CALLS, 1, 4, 8, 9], [1, 1, 4, 8, 9]))),
        "do not fit together",
    ),
    "dimensions in another order": (
        node(
            "latents/latents",
            lambda it: it.update(dimension_names=["step", "image", "channel", "x", "y"]),
        ),
        "and not float16 or float32 or float64 (step, image, channel, y, x)",
    ),
    "another type": (
        node("latents/latents", lambda it: it.update(data_type="int64", fill_value=0)),
        "latents/latents is int64",
    ),
    "a type from nowhere": (
        node("latents/latents", lambda it: it.update(data_type={"name": "numpy.object"})),
        "has a type",
    ),
    "too many labels": (node(f"{GRID}/token", shaped([10**9], [10**9])), "too many labels"),
    # codecs
    "a bomb in place of numbers": (
        all_of(
            node(
                "latents/latents",
                coded(BYTES, {"name": "zstd", "configuration": {"level": 0, "checksum": False}}),
            ),
            content(CHUNK, lambda raw: BOMB),
        ),
        "encoded in a way",
    ),
    "a bomb in place of text": (texts(BOMB), "cost/component is not the text"),
    "a second bomb behind a small one": (
        texts(bytes(Zstd().encode(bytes(16))) + BOMB),
        "cost/component is not the text",
    ),
    "a bomb that does not say its size": (
        texts(b"\x28\xb5\x2f\xfd\x00\x58" + BOMB[8:]),
        "cost/component is not the text",
    ),
    "four billion texts": (
        texts(bytes(Zstd().encode(b"\xff\xff\xff\xff" + bytes(100)))),
        "cost/component is not the text",
    ),
    "a text of 2 GB": (
        texts(bytes(Zstd().encode(struct.pack("<II", 3, 2**31) + bytes(100)))),
        "cost/component",
    ),
    "a foreign codec": (
        node("latents/latents", coded(BYTES, {"name": "blosc", "configuration": {}})),
        "encoded in a way",
    ),
    "a pickling codec": (
        node(TEXT, coded({"name": "numcodecs.pickle", "configuration": {"protocol": 5}})),
        "encoded in a way",
    ),
    "a codec that is a number": (node("latents/latents", coded(BYTES, 7)), "encoded in a way"),
    "a shard in a shard": (
        node(
            f"{GRID}/cross",
            lambda it: it["codecs"][0]["configuration"].update(codecs=copied(it["codecs"])),
        ),
        "encoded in a way",
    ),
    "no checksums": (node("latents/latents", coded(BYTES)), "encoded in a way"),
    "a storage transformer": (
        node("latents/latents", lambda it: it.update(storage_transformers=[{"name": "x"}])),
        "nor a plain array",
    ),
    "a field from nowhere": (
        node("latents/latents", lambda it: it.update(run_this={"must_understand": True})),
        "nor a plain array",
    ),
    "zarr's second format, pickled": (repacked, "is not a recording"),
    "a root of zarr's second format": (
        root(lambda it: it.update(zarr_format=2)),
        "not that of a recording",
    ),
    # json
    "broken json": (content("zarr.json", lambda raw: raw[:-50]), "is not JSON"),
    "json of another kind": (content("zarr.json", lambda raw: b"[]"), "not that of a recording"),
    "json 100,000 deep": (
        content("zarr.json", lambda raw: b'{"attributes":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "is not JSON",
    ),
    "json of 100 MB": (
        content("zarr.json", lambda raw: raw[:-1] + b" " * 10**8 + b"}"),
        "bytes, where",
    ),
    "json of two million lists": (
        content("zarr.json", lambda raw: raw[:-1] + b',"x":[' + b"[]," * 2_600_000 + b"[]]}"),
        "too many parts",
    ),
    "a number of 100,000 digits": (
        content("zarr.json", lambda raw: raw[:-1] + b',"x":' + b"9" * 10**5 + b"}"),
        "is not JSON",
    ),
    "NaN in json": (said("experiment", "guidance_scale", value=float("nan")), "is not JSON"),
    "infinity in json": (
        node("latents/latents", lambda it: it["attributes"].update(scale=float("inf"))),
        "is not JSON",
    ),
    "json in UTF-16": (
        content("zarr.json", lambda raw: raw.decode().encode("utf-16")),
        "is not JSON",
    ),
    "an attribute of 9 MB": (said("note", value="x" * 9 * 2**20), "bytes, where"),
    "an attribute of a variable of 7 MB": (
        node("latents/latents", lambda it: it["attributes"].update(note="x" * 7 * 2**20)),
        "bytes, where",
    ),
    # attributes
    "an experiment that is a list": (
        said("experiment", value=[1, 2]),
        "its experiment is not what",
    ),
    "an experiment without a prompt": (
        root(lambda it: it["attributes"]["experiment"].pop("prompt")),
        "its experiment.prompt is missing",
    ),
    "an experiment of another version": (
        said("experiment", "what", value=1),
        "its experiment is none of this version",
    ),
    "no environment": (
        root(lambda it: it["attributes"].pop("environment")),
        "its environment is missing",
    ),
    "an environment that is text": (
        said("environment", value="cpu"),
        "its environment is not what",
    ),
    "a model that is a number": (said("model", value=5), "its model is not what"),
    "a status from nowhere": (said("status", value="perfect"), "its status is not what"),
    "a status that is a list": (said("status", value=["complete"]), "its status is not what"),
    "a version that is a list": (
        said("format_version", value=[1]),
        "its format_version is not what",
    ),
    "a prompt that moves the cursor": (
        said("experiment", "prompt", value="\x1b[2J gone"),
        "its experiment.prompt is not what",
    ),
    "a prompt that is half a character": (
        said("experiment", "prompt", value="\ud800"),
        "its experiment.prompt is not what",
    ),
    "a seed of 4000 digits": (
        said("experiment", "seed", value=10**4000),
        "its experiment.seed is not what",
    ),
    "a guidance of 1e999": (
        content(
            "zarr.json",
            lambda raw: raw.replace(b'"guidance_scale": 3.0', b'"guidance_scale": 1e999'),
        ),
        "guidance_scale is not",
    ),
    "no prediction type": (said("prediction_type", value=None), "its prediction_type is not what"),
    # names
    "a name out of the store": (listed("../../elsewhere"), "no name of a variable or group"),
    "an absolute name": (listed("/etc"), "no name of a variable or group"),
    "a name of dots": (listed("latents/.."), "no name of a variable or group"),
    "a name that moves the cursor": (listed("\x1b[2J"), "no name of a variable or group"),
    "a name of 5000 characters": (listed("x" * 5000), "no name of a variable or group"),
    "a grid that is none": (listed("attention/large"), "no name of a variable or group"),
    "a name in no group": (listed("nowhere/x"), "is in no group"),
    "a dimension that moves the cursor": (
        node("sigma", lambda it: it.update(dimension_names=["\x1b[2J"])),
        "dimensions with strange names",
    ),
    "a description that moves the cursor": (
        node("sigma", lambda it: it["attributes"].update(long_name="\x1b[2J")),
        "hide what they say",
    ),
    # what the root lists
    "nothing is listed": (
        root(lambda it: it.pop("consolidated_metadata")),
        "does not list what is in it",
    ),
    "a list of another kind": (
        root(lambda it: it["consolidated_metadata"].update(metadata=[1])),
        "does not list what is in it",
    ),
    "a node that is a list": (listed("latents/latents", [1]), "disagree"),
    "a node that is not there": (listed("latents/more"), "has no zarr.json"),
    "a node that is described in two ways": (
        root(
            lambda it: it["consolidated_metadata"]["metadata"]["latents/latents"].update(
                data_type="float16"
            )
        ),
        "latents/latents/zarr.json and the root's zarr.json disagree",
    ),
    "a hundred thousand groups": (
        root(
            lambda it: it["consolidated_metadata"]["metadata"].update(
                {f"g{i}": {} for i in range(10**5)}
            )
        ),
        "variables and groups",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_store_is_refused_in_one_line(
    what: str, copy: Path, reader: Callable[[Path], dict[str, Any]]
) -> None:
    plant, expected = HOSTILE[what]
    plant(copy)
    found = reader(copy)
    assert found["said"], "nothing was refused"
    for way, error in found["said"].items():
        assert isinstance(error, list), f"{way}: {error}"
        for line in error:
            assert line.strip() and line.isprintable() and len(line) < 600, f"{way}: {line!r}"
    causes = [cause for cause, _ in found["said"].values()]
    assert any(expected in cause for cause in causes), causes
    assert "list_runs" not in found["said"] and "ls" not in found["said"], (
        "one bad recording hides the others"
    )
    assert found["megabytes"] <= MEGABYTES and found["seconds"] <= SECONDS, found
    assert found["told"] == "" and found["shown"].replace("\n", "").isprintable()


def test_a_good_recording_is_read_in_every_way(
    good: Path, reader: Callable[[Path], dict[str, Any]]
) -> None:
    found = reader(good)
    assert found["said"] == {} and found["told"] == "" and "latents/prediction" in found["shown"]
    assert re.search(r"\n  manifest +exact ", found["shown"]) and re.search(
        r"\n  scheduler +not checked +needs torch", found["shown"]
    )
    assert found["megabytes"] <= MEGABYTES


def png(pixels: np.ndarray | tuple[int, int]) -> bytes:
    """A picture: these pixels, or a black one of that size in one bit a pixel."""
    made = io.BytesIO()
    (Image.new("1", pixels) if isinstance(pixels, tuple) else Image.fromarray(pixels)).save(
        made, "PNG"
    )
    return made.getvalue()


def shows(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """A picture beside the arrays that shows what was recorded, changed, and sealed again."""
    return lambda path: (path / "picture.png").write_bytes(
        sealed(change(png(Run(path).images.values[0])))
    )


def tells(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Change what the manifest lists."""

    def plant(path: Path) -> None:
        written = json.loads((path / MANIFEST).read_text())
        change(written)
        (path / MANIFEST).write_text(json.dumps(written))

    return plant


LATE = "latents/latents/late"
# Nothing but `probe verify` looks at these: which check fails, and what it says.
HOSTILE_TO_VERIFY: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "the manifest is a link": (replaced(MANIFEST, link), "manifest", "is behind a link"),
    "the manifest is a pipe": (replaced(MANIFEST, os.mkfifo), "manifest", "is not a file"),
    "the manifest is a folder": (replaced(MANIFEST, os.mkdir), "manifest", "is not a file"),
    "a manifest of 100 MB": (
        content(MANIFEST, lambda raw: raw + b" " * 10**8),
        "manifest",
        "bytes, where",
    ),
    "a manifest of two million names": (
        content(
            MANIFEST,
            lambda raw: b'{"":0' + b"".join(b',"%x":""' % i for i in range(1_400_000)) + b"}",
        ),
        "manifest",
        "too many parts",
    ),
    "a manifest 100,000 deep": (
        content(MANIFEST, lambda raw: b"[" * 10**5),
        "manifest",
        "is not JSON",
    ),
    "a manifest that is a list": (
        content(MANIFEST, lambda raw: b"[1]"),
        "manifest",
        "is not a list of files",
    ),
    "a manifest of numbers": (
        tells(lambda written: written.update(dict.fromkeys(written, 1))),
        "manifest",
        "files changed",
    ),
    "a manifest with a name out of the store": (
        tells(lambda written: written.update({"../../elsewhere": "0"})),
        "manifest",
        "files missing",
    ),
    "a manifest with a name that moves the cursor": (
        tells(lambda written: written.update({"\x1b[2J": "0"})),
        "manifest",
        "files missing: ?[2J",
    ),
    "a file with a name that moves the cursor": (
        lambda path: (path / "latents/\x1b[2J\n\u202e").touch(),
        "manifest",
        "files new: latents/?[2J??",
    ),
    "a file with a name that is no text": (
        lambda path: Path(os.fsdecode(bytes(path / "latents") + b"/\xff")).touch(),
        "manifest",
        "files new",
    ),
    "a link among the chunks": (
        lambda path: (path / LATE).symlink_to("/proc/self/environ"),
        "manifest",
        "late is behind a link",
    ),
    "a pipe among the chunks": (lambda path: os.mkfifo(path / LATE), "manifest", "late is a pipe"),
    "a round of folders among the chunks": (
        lambda path: (path / LATE).symlink_to("."),
        "manifest",
        "late is behind a link",
    ),
    "a hundred folders in each other": (
        lambda path: (path / LATE / "/".join("x" * 100)).mkdir(parents=True),
        "manifest",
        "too deep",
    ),
    "a hole of a terabyte among the chunks": (
        lambda path: sparse(2**40)(path / LATE),
        "manifest",
        "is a hole",
    ),
    "a hole of a terabyte, as listed": (
        all_of(
            lambda path: sparse(2**40)(path / LATE),
            tells(lambda written: written.update({LATE: "0"})),
        ),
        "manifest",
        "is a hole",
    ),
    "a picture of another size": (shows(lambda raw: png((10, 10))), "picture", "does not show"),
    "a picture of 100 million pixels": (
        shows(lambda raw: png((10_000, 10_000))),
        "picture",
        "no picture that can be read",
    ),
    "a picture of 400 million pixels": (
        shows(lambda raw: png((20_000, 20_000))),
        "picture",
        "no picture that can be read",
    ),
    "a picture that says it has 10 billion pixels": (
        shows(lambda raw: raw[:16] + struct.pack(">II", 100_000, 100_000) + raw[24:]),
        "picture",
        "no picture that can be read",
    ),
    "a picture with 100 MB behind it": (shows(lambda raw: raw + bytes(10**8)), "picture", "bytes"),
    "a picture of another kind": (
        shows(lambda raw: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n"),
        "picture",
        "no picture that can be read",
    ),
    "a picture that is cut": (
        shows(lambda raw: raw[: len(raw) * 2 // 3]),
        "picture",
        "no picture that can be read",
    ),
    "a picture that is a folder": (
        lambda path: (path / "picture.png").mkdir(),
        "picture",
        "is not a file",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_TO_VERIFY)
def test_verify_says_in_one_line_what_is_hostile(
    what: str, copy: Path, reader: Callable[[Path], dict[str, Any]]
) -> None:
    plant, check, expected = HOSTILE_TO_VERIFY[what]
    plant(copy)
    found = reader(copy)
    unread = {way: error for way, error in found["said"].items() if not isinstance(error, list)}
    assert not unread and found["told"] == "", unread
    (line,) = [line for line in found["shown"].splitlines() if line.startswith(f"  {check} ")] or [
        str(found["said"]["verify"])
    ]
    assert "failed" in line and expected in line, line
    assert len(line) < 400 and found["shown"].replace("\n", "").isprintable()
    assert found["megabytes"] <= MEGABYTES and found["seconds"] <= SECONDS, found


def test_no_byte_of_a_picture_makes_verify_stumble(copy: Path) -> None:
    """Every byte of the file turned, one at a time: it shows the same, or the check fails."""
    shows(lambda raw: raw)(copy)
    raw, run = (copy / "picture.png").read_bytes(), Run(copy)
    verdicts = set()
    for at in range(len(raw)):
        (copy / "picture.png").write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        try:
            verdicts.add(check_picture(run).verdict)
        except DAMAGE:
            verdicts.add("failed")
    assert verdicts == {"failed"}, "no experiment is in it, and without it nothing passes"


def test_no_reader_follows_a_link_out(copy: Path, tmp_path: Path) -> None:
    """Not even one that appears after the recording was opened."""
    run = Run(copy)
    latents = run.tree["latents/latents"]
    (tmp_path / "secret").write_bytes(SECRET[:1028])
    (copy / CHUNK).unlink()
    (copy / CHUNK).symlink_to(tmp_path / "secret")
    (copy / "contact-sheet.png").symlink_to(tmp_path / "secret")
    with pytest.raises(RecordingDamaged) as caught:
        _ = latents.values
    assert caught.value.remedy == UNLINKED and "behind a link" in caught.value.cause
    assert "<img" not in run._repr_html_()


@pytest.mark.parametrize("plant", [
    lambda path: (path / "notes").mkdir(),
    lambda path: (path / "latents" / ".zarray").write_text("not JSON"),
    lambda path: (path / "latents" / "own.txt").write_text("mine"),
])  # fmt: skip
def test_what_nobody_lists_is_left_alone(
    plant: Callable[[Path], Any], copy: Path, reader: Callable[[Path], dict[str, Any]]
) -> None:
    plant(copy)
    assert reader(copy)["said"] == {}


def test_a_variable_of_a_newer_version_may_be_there(
    copy: Path, reader: Callable[[Path], dict[str, Any]]
) -> None:
    """The schema does not know it, nothing here reads it, and it is harmless."""
    for name in ("latents/curvature", "unet/mid_block/curl"):
        file = copy / name / "zarr.json"
        file.parent.mkdir(parents=True)
        described = json.loads((copy / "latents/latents/zarr.json").read_text())
        file.write_text(json.dumps(described))
        if name.startswith("unet"):
            for group in ("unet", "unet/mid_block"):
                shutil.copy(copy / "latents/zarr.json", copy / group / "zarr.json")
                listed(group)(copy)
        listed(name, described)(copy)
    found = reader(copy)
    assert found["said"] == {} and "/latents/curvature" in found["shown"]


# --- what the guards must not change --------------------------------------------------------------


def test_the_tree_is_what_stock_xarray_opens(good: Path) -> None:
    with xr.open_datatree(good, engine="zarr", chunks=None) as stock:
        ours = Run(good).tree
        xr.testing.assert_identical(ours, stock)
        for group in stock.subtree:
            for name, variable in group.to_dataset(inherit=False).variables.items():
                assert ours[group.path].dataset[name].dtype == variable.dtype, name


@pytest.mark.parametrize("at", [
    {"step": 1},
    {"step": slice(None, None, -1), "token": 2},
    {"step": [2, 0, 0], "token": slice(1, 3)},
    {"x": -1, "token": [2, 1]},
    {"step": slice(3, 3)},
    {"step": xr.DataArray([0, 2], dims="pick"), "token": xr.DataArray([1, 0], dims="pick")},
])  # fmt: skip
def test_parts_of_maps_are_what_zarr_gives(at: dict[str, Any], good: Path) -> None:
    ours = Run(good).tree[f"{GRID}/cross"]
    whole = xr.DataArray(zarr.open_array(good, path=f"{GRID}/cross", mode="r")[:], dims=ours.dims)
    np.testing.assert_array_equal(ours.isel(at).values, whole.isel(at).values)


def test_what_no_file_holds_is_made_up_only_to_a_size(tmp_path: Path) -> None:
    """An unfinished run with large maps: its steps are read, and steps that are not there as long
    as they are not many.
    """
    size = UNBACKED // 4 // 4 // 4 * 3  # of one step: 3/4 of the limit in float32
    arrays = [
        spec("", "step", value=np.arange(100)),
        spec("", "committed", (100,)),
        spec("latents", "latents", (100, 1, 1, 4, size), "float32"),
    ]
    with RunWriter(tmp_path / "a.zarr", arrays, ATTRIBUTES, "none") as writer:
        writer.write("latents/latents", np.ones((1, 1, 4, size), np.float32), 7)
    latents = Run(tmp_path / "a.zarr").tree["latents/latents"]
    assert latents.isel(step=[7]).sum() == 4 * size
    assert np.isnan(latents.isel(step=3, y=0).values).all()
    with pytest.raises(RecordingDamaged) as caught:
        _ = latents.isel(step=slice(10, 20)).values
    assert (
        "are claimed, and in no file" in caught.value.cause
        and caught.value.remedy == "Choose steps that were recorded: run.steps."
    )
    with pytest.raises(RecordingDamaged):
        _ = latents.values


@pytest.mark.parametrize(
    "writer",
    [
        {"pid": 10**30, "host": os.uname().nodename},
        {"pid": -1},
        {"pid": [1]},
        [1],
        "1",
        None,
        {"host": [2]},
    ],
)
def test_a_writer_that_makes_no_sense_is_one_that_may_live(writer: Any, copy: Path) -> None:
    all_of(said("status", value="running"), said("writer", value=writer))(copy)
    assert Run(copy).status == "running"


@pytest.mark.parametrize("value", [1.5, -3.25e-9, float("nan"), float("inf"), float("-inf")])
def test_only_a_schedulers_settings_hold_what_is_no_number(value: float, copy: Path) -> None:
    said("scheduler", "config", "lambda_min_clipped", value=value)(copy)
    np.testing.assert_equal(
        Run(copy).attributes["scheduler"]["config"]["lambda_min_clipped"], value
    )
    said("environment", "threads", value=value)(copy)
    if np.isfinite(value):
        assert Run(copy).attributes["environment"]["threads"] == value
    else:
        with pytest.raises(RecordingDamaged, match="is not JSON"):
            Run(copy)


@pytest.mark.parametrize("steps", [20, 300])
def test_opening_costs_the_same_whatever_the_number_of_steps(steps: int, tmp_path: Path) -> None:
    """Chunks are looked at when they are read: opening a long run opens as many files as opening a
    short one.
    """
    arrays = [
        spec("", "step", value=np.arange(steps)),
        spec("", "committed", (steps,)),
        spec("latents", "latents", (steps, 1, 1, 1, 1), "float32"),
    ]
    with RunWriter(tmp_path / "a.zarr", arrays, ATTRIBUTES, "none") as writer:
        writer.write("latents/latents", np.ones((steps, 1, 1, 1, 1)))
    opened: list[str] = []
    audit = {"on": True}
    sys.addaudithook(
        lambda event, arguments: (
            opened.append(str(arguments[0])) if audit["on"] and event == "open" else None
        )
    )
    assert Run(tmp_path / "a.zarr").tree.sizes["step"] == steps
    audit["on"] = False
    assert len(list((tmp_path / "a.zarr" / "latents" / "latents").glob("c.*"))) == steps
    assert 0 < len(opened) < 60 and not any(name.startswith("c.1") for name in opened), opened

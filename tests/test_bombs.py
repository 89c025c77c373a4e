"""Every command on every hostile recording stays within 5 s of CPU and 256 MB.

The memory is what it takes beyond the same command on a good recording. A hostile one has a few
bytes that would become much: claims, counts, sums. Each command runs in a fork of a process that
has imported everything, up to where a model would be loaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs import Zstd
from recordings import GRID, recording

ROOT = Path(__file__).parent.parent
MEGABYTES, SECONDS = 256, 5
Node = dict[str, Any]
GROUP: Node = {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def commands(path: Path) -> dict[str, list[str]]:
    runs = str(path.parent)
    return {
        "ls": ["ls", runs],
        "show": ["show", str(path)],
        "words": ["show", str(path), "--words"],
        "verify": ["verify", str(path)],
        "diff": ["diff", str(path), str(path)],
        "ask": ["ask", str(path), "cat"],
        "rm": ["rm", str(path), "--runs", runs],
        "gc": ["gc", runs],
        "resume": ["run", "--resume", str(path), "--quiet"],
        "rerun": ["rerun", str(path), "--quiet"],
    }


def memory(name: str) -> float:
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )
        / 1024
    )


def measured(command: list[str]) -> dict[str, Any]:
    """What a command ends in, its CPU seconds, and how many megabytes it added."""
    from probe.cli import dispatch
    from probe.errors import ProbeError

    before, began, said = memory("VmRSS"), time.process_time(), ""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
        try:
            dispatch(command)
        except ProbeError as error:
            said = str(error)
        except ModuleNotFoundError as error:  # torch: here a model would be loaded
            said = "" if "torch" in str(error) else traceback.format_exc()
        except BaseException:
            said = traceback.format_exc()
    return {
        "said": said,
        "seconds": time.process_time() - began,
        "megabytes": memory("VmHWM") - before,
        "shown": shown.getvalue()[:100_000],
    }


def serve() -> None:
    import probe.cli
    import probe.figures.sheets
    import probe.reading.compare
    import probe.run
    import probe.verify  # noqa: F401

    for line in sys.stdin:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            sys.modules["torch"] = None  # type: ignore[assignment]
            resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
            signal.alarm(60)
            with os.fdopen(theirs, "w") as answer:
                json.dump(measured(json.loads(line)), answer)
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as answer:
            print(
                answer.read()
                or json.dumps({"said": "died", "seconds": 60, "megabytes": 6000, "shown": ""}),
                flush=True,
            )
        os.waitpid(child, 0)


@pytest.fixture(scope="module")
def measure() -> Iterator[Callable[[list[str]], dict[str, Any]]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", "import test_bombs; test_bombs.serve()"]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def ask(command: list[str]) -> dict[str, Any]:
            assert process.stdin and process.stdout
            print(json.dumps(command), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("good") / "runs" / "mine.zarr")


@pytest.fixture(scope="module")
def usual(good: Path, measure: Callable[[list[str]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: measure(command) for name, command in commands(good).items()}


# --- bombs ----------------------------------------------------------------------------------------


def checked(raw: bytes) -> bytes:
    return raw + google_crc32c.value(raw).to_bytes(4, "little")


def root(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((path / "zarr.json").read_text())
    change(content)
    (path / "zarr.json").write_text(json.dumps(content))


def node(path: Path, name: str, change: Callable[[Node], Any]) -> None:
    """Change a node: its own file, and what the root's says of it."""
    own = json.loads((path / name / "zarr.json").read_text())
    change(own)
    (path / name / "zarr.json").write_text(json.dumps(own))
    root(path, lambda content: content["consolidated_metadata"]["metadata"].update({name: own}))


def shaped(shape: list[int], chunks: list[int]) -> Callable[[Node], Any]:
    return lambda it: it.update(
        shape=shape, chunk_grid={"name": "regular", "configuration": {"chunk_shape": chunks}}
    )


def array(
    path: Path,
    shape: list[int],
    dims: list[str],
    dtype: str = "float64",
    fill: Any = 0.0,
    chunks: list[int] | None = None,
) -> Node:
    there: Node = json.loads((path / "latents/latents/zarr.json").read_text())
    grid = {"name": "regular", "configuration": {"chunk_shape": chunks or shape}}
    return {
        **there,
        "shape": shape,
        "chunk_grid": grid,
        "dimension_names": dims,
        "data_type": dtype,
        "fill_value": fill,
        "attributes": {},
    }


def many(path: Path, names: list[str], what: Node) -> None:
    """The same node under many names, its file by hard links."""
    first = path / names[0] / "zarr.json"
    for name in names:
        (path / name).mkdir(parents=True)
        if name == names[0]:
            first.write_text(json.dumps(what))
        else:
            os.link(first, path / name / "zarr.json")
    listed = {key: value for key, value in what.items() if key != "consolidated_metadata"}
    root(
        path,
        lambda content: content["consolidated_metadata"]["metadata"].update(
            dict.fromkeys(names, listed)
        ),
    )


def without(path: Path, *groups: str) -> None:
    for group in groups:
        shutil.rmtree(path / group)
    root(
        path,
        lambda it: [
            it["consolidated_metadata"]["metadata"].pop(n)
            for n in list(it["consolidated_metadata"]["metadata"])
            if n.startswith(groups)
        ],
    )


def committed(path: Path, steps: int) -> None:
    """As many steps, all of them committed."""
    for name in ("step", "timestep", "sigma", "alpha_bar", "committed"):
        node(path, name, shaped([steps], [steps]))
        dtype = json.loads((path / name / "zarr.json").read_text())["data_type"]
        values = np.arange(steps) if name == "step" else np.linspace(14, 1, steps)
        (path / name / "c.0").write_bytes(checked(values.astype(dtype).tobytes()))


def sized(path: Path, steps: int, side: int) -> None:
    without(path, "attention", "preview", "cost", "images")
    committed(path, steps)
    for name in ("latents", "prediction"):
        node(path, f"latents/{name}", shaped([steps, 1, 4, side, side], [1, 1, 4, side, side]))
        for file in (path / "latents" / name).glob("c.*"):
            file.unlink()


def huge_claim(path: Path) -> None:
    node(path, "images/final", shaped([1, 300_000_000, 1, 3], [1, 300_000_000, 1, 3]))


def huge_claim_unknown(path: Path) -> None:
    many(path, ["latents/extra"], array(path, [300_000_000], ["place"]))


def huge_tokens(path: Path) -> None:
    node(
        path,
        f"{GRID}/cross",
        shaped([3, 300_000_000, 1, 1, 2, 2, 4, 4], [1, 300_000_000, 1, 1, 2, 2, 4, 4]),
    )


def many_labels(path: Path) -> None:
    many(path, [f"g{i}" for i in range(900)], GROUP)
    many(
        path,
        [f"g{i}/component" for i in range(900)],
        array(path, [100_000], ["component"], "int64", 0),
    )


def fat_nodes(path: Path) -> None:
    many(
        path,
        [f"g{i}" for i in range(1900)],
        {**GROUP, "consolidated_metadata": {"x": list(range(100_000))}},
    )


def fat_text_nodes(path: Path) -> None:
    many(
        path, [f"g{i}" for i in range(1900)], {**GROUP, "consolidated_metadata": {"x": "y" * 10**6}}
    )


def many_groups(path: Path) -> None:
    many(path, [f"g{i}" for i in range(1900)], GROUP)


def many_small_arrays(path: Path) -> None:
    many(path, [f"latents/a{i}" for i in range(1900)], array(path, [10_000], ["place"]))


def many_written_arrays(path: Path) -> None:
    names = [f"latents/a{i}" for i in range(1900)]
    many(path, names, array(path, [10_000], ["place"]))
    (path / names[0] / "c.0").write_bytes(checked(bytes(80_000)))
    for name in names[1:]:
        os.link(path / names[0] / "c.0", path / name / "c.0")


def many_texts(path: Path) -> None:
    text = json.loads((path / "cost/component/zarr.json").read_text())
    zstd = [
        {"name": "vlen-utf8"},
        {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
    ]
    grid = {"name": "regular", "configuration": {"chunk_shape": [1]}}
    names = [f"latents/t{i}" for i in range(1900)]
    many(
        path,
        names,
        {**text, "shape": [1], "chunk_grid": grid, "dimension_names": ["place"], "codecs": zstd},
    )
    size = 4 * 2**20 - 8
    (path / names[0] / "c.0").write_bytes(
        bytes(Zstd(level=19).encode(struct.pack("<II", 1, size) + b"x" * size))
    )
    for name in names[1:]:
        os.link(path / names[0] / "c.0", path / name / "c.0")


def unwritten_steps(path: Path) -> None:
    sized(path, 10_000, 2000)


def many_unwritten_maps(path: Path) -> None:
    committed(path, 10_000)
    for name in ("latents", "prediction"):
        node(path, f"latents/{name}", shaped([10_000, 1, 4, 8, 8], [1, 1, 4, 8, 8]))
    node(path, f"{GRID}/recorded", shaped([10_000], [10_000]))
    (path / GRID / "recorded/c.0").write_bytes(checked(np.ones(10_000, np.uint8).tobytes()))
    node(path, f"{GRID}/cross", lambda it: it.update(shape=[10_000, *it["shape"][1:]]))
    node(path, f"{GRID}/overview", shaped([3, 10_000, 4, 4], [1, 10_000, 4, 4]))


def sparse_chunks(path: Path) -> None:
    sized(path, 500, 1000)
    size = 4 * 1000 * 1000 * 4
    for name in ("latents", "prediction"):
        for step in range(500):
            with (path / "latents" / name / f"c.{step}.0.0.0.0").open("wb") as file:
                file.seek(size)
                file.write(checked(bytes(size))[-4:] if not step else b"\0\0\0\0")


def shared_chunks(path: Path) -> None:
    sized(path, 500, 1000)
    first = path / "latents/latents/c.0.0.0.0.0"
    first.write_bytes(checked(bytes(4 * 1000 * 1000 * 4)))
    for name in ("latents", "prediction"):
        for step in range(500):
            with contextlib.suppress(FileExistsError):
                os.link(first, path / "latents" / name / f"c.{step}.0.0.0.0")


def overlapping_chunks(path: Path) -> None:
    """A shard whose 9,000 tokens are all the same bytes."""
    count, size = 9000, 2 * 64 * 64 * 2
    without(path, "attention", "cost")
    shape = [3, count, 1, 1, 1, 2, 64, 64]
    many(path, ["attention"], GROUP)
    many(path, ["attention/64x64"], GROUP)
    described = array(
        path,
        shape,
        ["step", "token", "branch", "image", "layer", "head", "y", "x"],
        "float16",
        0.0,
        [1, *shape[1:]],
    )
    inner = {
        "chunk_shape": [1, 1, *shape[2:]],
        "codecs": described["codecs"],
        "index_codecs": described["codecs"],
        "index_location": "end",
    }
    described["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
    many(path, ["attention/64x64/cross"], described)
    chunk = checked(bytes(size))
    index = checked(struct.pack("<QQ", 0, len(chunk)) * count)
    for step in range(3):
        (path / "attention/64x64/cross" / f"c.{step}.0.0.0.0.0.0.0").write_bytes(chunk + index)


def json_numbers(path: Path) -> None:
    root(path, lambda it: it.update(x=[1] * 1_500_000))


def json_texts(path: Path) -> None:
    root(path, lambda it: it["attributes"].update(note=[f"ab{i}" for i in range(190_000)]))


def json_objects(path: Path) -> None:
    root(path, lambda it: it["attributes"].update(note=[{"a": []} for _ in range(90_000)]))


def many_attributes(path: Path) -> None:
    root(
        path,
        lambda it: it["attributes"]["environment"].update({f"k{i}": 1 for i in range(190_000)}),
    )


def many_fields(path: Path) -> None:
    root(
        path, lambda it: it["attributes"]["experiment"].update({f"k{i}": 1 for i in range(190_000)})
    )


def many_chosen_steps(path: Path) -> None:
    root(
        path,
        lambda it: it["attributes"]["experiment"]["capture"].update(
            steps=",".join(["1"] * 300_000)
        ),
    )


def deep_attributes(path: Path) -> None:
    deep = "[" * 900 + "]" * 900
    (path / "zarr.json").write_text(
        (path / "zarr.json")
        .read_text()
        .replace('"environment": {', f'"environment": {{"deep": {deep}, ', 1)
    )


def long_text(path: Path) -> None:
    root(path, lambda it: it["attributes"]["environment"].update(device_name="\u202ex" * 10**6))


def large_numbers(path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        asked = content["attributes"]["experiment"]
        asked.update(images=2**60, height=2**40, width=2**40, decode_every=2**60, seed=2**63)
        content["attributes"]["scheduler"]["config"].update(num_train_timesteps=10**15)

    root(path, change)


def many_steps_asked(path: Path) -> None:
    root(path, lambda it: it["attributes"]["experiment"].update(steps=2**60))


def picture_bomb(path: Path) -> None:
    """A PNG whose text grows to a gigabyte, one of 16 gigapixels, and very many."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 6, 8, 2, 0, 0, 0))
    text = chunk(b"iTXt", b"experiment\0\1\0\0\0" + zlib.compress(bytes(10**9), 9))
    (path / "picture.png").write_bytes(
        head + text + chunk(b"IDAT", zlib.compress(bytes(6 * 28))) + chunk(b"IEND", b"")
    )
    large = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", 2**17, 2**17, 8, 2, 0, 0, 0)
    )
    (path / "contact-sheet.png").write_bytes(
        large + chunk(b"IDAT", zlib.compress(bytes(10**8), 9)) + chunk(b"IEND", b"")
    )


def manifest_bomb(path: Path) -> None:
    (path / "manifest.json").write_text("{" + ",".join(f'"{i}":[[]]' for i in range(130_000)) + "}")


def many_files(path: Path) -> None:
    for index in range(20_000):
        (path / "latents/latents" / f"late{index}").touch()
        (path / f"{index}.png").touch()


BOMBS: dict[str, Callable[[Path], None]] = {
    bomb.__name__.replace("_", " "): bomb
    for bomb in (
        huge_claim, huge_claim_unknown, huge_tokens, many_labels, fat_nodes, fat_text_nodes,
        many_groups, many_small_arrays, many_written_arrays, many_texts, unwritten_steps,
        many_unwritten_maps, sparse_chunks, shared_chunks, overlapping_chunks, json_numbers,
        json_texts, json_objects, many_attributes, many_fields, many_chosen_steps, deep_attributes,
        long_text, large_numbers, many_steps_asked, picture_bomb, manifest_bomb, many_files,
    )
}  # fmt: skip
QUICK = {"huge claim", "picture bomb", "json numbers"}


@pytest.mark.parametrize(
    "bomb",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BOMBS],
)
def test_a_few_bytes_do_not_become_much(
    bomb: str,
    good: Path,
    usual: dict[str, dict[str, Any]],
    tmp_path: Path,
    measure: Callable[[list[str]], dict[str, Any]],
) -> None:
    path = Path(shutil.copytree(good, tmp_path / "runs" / "mine.zarr"))
    BOMBS[bomb](path)
    for name, command in commands(path).items():
        found = measure(command)
        assert "Traceback" not in found["said"] and found["said"] != "died", (
            f"{name}: {found['said']}"
        )
        assert all(len(line) < 600 and line.isprintable() for line in found["said"].splitlines()), (
            f"{name}: {found['said'][:2000]!r}"
        )
        assert found["seconds"] <= usual[name]["seconds"] + SECONDS, (
            f"{name}: {found['seconds']:.1f} s, {found['said'][:200]}"
        )
        assert found["megabytes"] <= usual[name]["megabytes"] + MEGABYTES, (
            f"{name}: {found['megabytes']:.0f} MB, {found['said'][:200]}"
        )

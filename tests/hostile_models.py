"""Load model folders, each in a fork with a limit of memory and time; say how each ended.

    python tests/hostile_models.py FOLDER ...      one line of JSON for each folder, in order

The forks come from one process that has imported everything. Each watches for what a load may never
do: unpickle, reach for the network, start a program, write or remove a file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from probe.diffusion.loading import load
from probe.errors import ProbeError
from probe.terminal import before_torch

ROOM, SECONDS = 1 << 30, 8
WATCHED = (
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.remove",
    "os.rename",
)


def watch(broken: list[str]) -> None:
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if event in WATCHED or writes:
            at = (
                os.fsdecode(arguments[0])
                if isinstance(arguments[0], str | bytes | os.PathLike)
                else str(arguments[0])
            )
            broken.append(f"{event} {at}")

    def unpickled(*_: Any, **__: Any) -> None:
        broken.append("torch.load")

    torch.load = unpickled
    sys.addaudithook(audit)


def attempt(folder: str) -> dict[str, Any]:
    """Load a model, and return how that ended."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(
        resource.RLIMIT_CPU,
        (int(time.process_time()) + SECONDS, int(time.process_time()) + SECONDS + 1),
    )
    before, started, broken = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.process_time(),
        [],
    )
    watch(broken)
    error: BaseException | None = None
    try:
        load(folder, device="cpu", weights="--bare" not in sys.argv)
    except BaseException as problem:
        error = problem
    ours = isinstance(error, ProbeError)
    return {
        "kind": type(error).__name__,
        "code": error.exit_code if ours else None,
        "cause": error.cause if ours else str(error),
        "remedy": error.remedy if ours else "",
        "seconds": time.process_time() - started,
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "broken": broken,
    }


def forked(folder: str) -> str:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, json.dumps(attempt(folder)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        content = answer.read()
    _, status = os.waitpid(child, 0)
    return content.decode() or json.dumps({"kind": f"killed ({status})"})


if __name__ == "__main__":
    before_torch(True)
    transformers.CLIPTextModel  # noqa: B018  (imported where it is first asked for)
    load("emojiworld", device="cpu")
    for one in sys.argv[1:]:
        if one != "--bare":
            print(forked(one), flush=True)

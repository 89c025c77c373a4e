"""Cells on a dask cluster: workers and schedulers that are killed, and workers without memory."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from probe.errors import ExperimentError, RunFailed, UserError
from probe.reading.recording import Run
from probe.settings.grid import load_grid
from probe.studies.cluster import Cluster, check_secure, is_here, scheduler_address
from probe.studies.study import Outcome, StudyPlan, carry_out, plan_study, write_study

distributed = pytest.importorskip("distributed", reason="pip install 'diffusion-probe[cluster]'")
ROOT = Path(__file__).resolve().parent.parent
QUIET = {"distributed.worker.memory.monitor-interval": "50ms", "logging.distributed": "critical"}
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


def grid(model: Path, folder: Path, cells: int, **changes: Any) -> dict[str, Any]:
    lean = {"attention": "off", "text": False, "statistics": False}
    return {
        "model": str(model),
        "prompt": "a cat on the hat",
        "steps": 20,
        "output": str(folder / "runs"),
        "durability": "none",
        "capture": lean,
        "axes": {"seed": list(range(cells))},
        **changes,
    }


def carried(
    written: dict[str, Any], address: str, say: Callable[[str], None], retries: int = 3
) -> tuple[StudyPlan, Outcome]:
    with Cluster(address) as workers:
        plan = plan_study(load_grid(written), workers)
        write_study(plan)
        return plan, carry_out(plan, workers, say, retries)


def assert_whole(plan: StudyPlan, cells: int) -> None:
    """Every cell is there once, and sound."""
    recordings = sorted(plan.results.root.glob("*.zarr"))
    assert len(recordings) == cells == len(plan.cells)
    for cell in plan.cells:
        record = plan.results.record(cell.address)
        assert record is not None and record["status"] == "complete"
        run = Run(plan.results.run_path(cell))
        assert run.status == "complete" and run.verify().verdict != "failed"
    assert not list(plan.results.cells.glob("*.tries"))


# --- where a scheduler is -------------------------------------------------------------------------


def test_the_address_of_a_scheduler(tmp_path: Path) -> None:
    for address in ("tcp://127.0.0.1:8786", "tls://scheduler.example:8786"):
        assert scheduler_address(address) == address
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": "tcp://127.0.0.1:4", "id": "x"}))
    assert scheduler_address(str(file)) == "tcp://127.0.0.1:4"
    for wrong in ("http://a:1", "tcp://", "tcp://host", "tcp://host:x", str(tmp_path / "no")):
        with pytest.raises(ExperimentError, match="cluster: "):
            scheduler_address(wrong)
    for text in ("", "[]", "{}", '{"address": 3}', '{"address": "ucx://a:1"}'):
        file.write_text(text)
        with pytest.raises(ExperimentError, match="cluster: "):
            scheduler_address(str(file))


def test_a_plain_scheduler_elsewhere_needs_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    for here in ("tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://127.8.8.8:1", "tls://1.2.3.4:1"):
        check_secure(here, False)
    for elsewhere in ("tcp://192.0.2.7:1", "tcp://no-such-host.invalid:1"):
        with pytest.raises(ExperimentError, match="another machine") as error:
            check_secure(elsewhere, False)
        assert "--insecure" in error.value.remedy
        check_secure(elsewhere, True)
    both = [(0, 0, 0, "", (one, 0)) for one in ("127.0.0.1", "192.0.2.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: both)
    assert not is_here("named-twice")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probe.studies.cluster.PATIENCE", 1.0)
    with pytest.raises(UserError, match="does not answer"), Cluster("tcp://127.0.0.1:1"):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError) as error, Cluster("tcp://127.0.0.1:1"):
        pass
    assert error.value.remedy == "pip install 'diffusion-probe[cluster]'"


# --- real clusters --------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Callable[..., Any]]:
    """Start a cluster of two processes on this machine."""
    started = []

    def start(**options: Any) -> Any:
        import dask

        with dask.config.set(QUIET):
            started.append(
                distributed.LocalCluster(
                    n_workers=2,
                    threads_per_worker=1,
                    dashboard_address=":0",
                    silence_logs=50,
                    **{"memory_limit": 0, **options},
                )
            )
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_are_killed_and_every_cell_is_there_once(
    saved: Path, tmp_path: Path, cluster: Callable[..., Any]
) -> None:
    local, chance, killed = cluster(), random.Random(5), []
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        living = [nanny.pid for nanny in local.workers.values() if nanny.pid]
        if len(lines) % 2 == 0 and len(killed) < 5 and living:
            killed.append(chance.choice(living))
            os.kill(killed[-1], signal.SIGKILL)

    written = grid(saved, tmp_path, 16)
    plan, outcome = carried(written, local.scheduler_address, say, retries=10)
    assert len(killed) == 5
    assert (outcome.computed, outcome.failed, len(lines)) == (16, [], 16)
    assert_whole(plan, 16)
    again, outcome = carried(written, local.scheduler_address, lines.append)
    assert again.missing == () and outcome.computed == 0 and len(lines) == 16


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_without_memory_fails_its_cell_by_name(
    saved: Path, tmp_path: Path, cluster: Callable[..., Any]
) -> None:
    local = cluster(memory_limit="1500MB")
    sizes = [32, 40, 48, 512]
    axes = {"images": [1, 2, 3, 64], "height": sizes, "width": sizes}
    written = grid(saved, tmp_path, 4, steps=3, axes=axes, zip=[[*axes]])
    plan, outcome = carried(written, local.scheduler_address, lambda _: None, retries=1)
    assert outcome.computed == 3 and len(outcome.failed) == 1
    title, cause, remedy = outcome.failed[0]
    assert title.startswith("images=64") and "died 2 times" in cause and "memory" in remedy
    assert {cell.title for cell in plan.missing} > {title}


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start parts of a cluster as processes of their own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *words],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_scheduler_is_killed_and_a_relaunch_computes_what_is_missing(
    saved: Path, tmp_path: Path, processes: Callable[..., subprocess.Popen[bytes]]
) -> None:
    def start(name: str) -> tuple[str, subprocess.Popen[bytes]]:
        file = tmp_path / name
        scheduler = processes(
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(file),
        )
        until = time.monotonic() + 120
        while not (file.exists() and file.read_text().rstrip().endswith("}")):
            assert time.monotonic() < until
            time.sleep(0.1)
        for _ in range(2):
            processes(
                "worker",
                "--scheduler-file",
                str(file),
                "--nthreads",
                "1",
                "--no-dashboard",
                "--memory-limit",
                "0",
                "--local-directory",
                str(tmp_path / "dask"),
            )
        return str(file), scheduler

    address, scheduler = start("one.json")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            scheduler.kill()

    written = grid(saved, tmp_path, 8)
    with pytest.raises(RunFailed, match=r"does not answer any more|no worker"):
        carried(written, address, say)
    address, _ = start("two.json")
    plan, outcome = carried(written, address, lambda _: None)
    assert 1 <= outcome.computed == len(plan.missing) <= 5 and not outcome.failed
    assert_whole(plan, 8)

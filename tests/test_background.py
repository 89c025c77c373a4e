"""The writing queue is bounded, makes its producer wait, passes errors on, and always ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from probe.errors import NotFinite, StoreError
from probe.writing.background import Queue

pytestmark = pytest.mark.usefixtures("no_thread_left")


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(100, [30] * 40), (100, [250] * 8), (100, [1, 99, 100, 101, 7] * 6), (0, [5] * 10)],
)
def test_the_queue_is_bounded_in_bytes(limit: int, sizes: list[int]) -> None:
    done: list[int] = []
    held: list[int] = []

    def work(item: int) -> None:
        held.append(queue._held)
        time.sleep(0.001)
        done.append(item)

    queue = Queue(work, limit)
    for index, size in enumerate(sizes):
        queue.put(index, size)
        held.append(queue._held)
    queue.join()
    assert done == list(range(len(sizes))) and queue._held == 0
    assert max(held) <= max(limit, *sizes), "never more than the limit, or one item larger than it"
    queue.close()


def test_a_slow_disk_makes_the_producer_wait() -> None:
    release = threading.Event()
    queue = Queue(lambda item: release.wait(10), 100)
    queue.put(1, 60)
    waiting = threading.Thread(target=queue.put, args=(2, 60))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "the second item does not fit beside the first"
    release.set()
    waiting.join(5)
    assert not waiting.is_alive()
    queue.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("broken"), StoreError), (NotFinite("NaN at step 3", "stop"), NotFinite)],
)
def test_a_producer_that_waits_hears_of_an_error(error: Exception, kind: type[Exception]) -> None:
    release = threading.Event()

    def work(item: int) -> None:
        release.wait(10)
        raise error

    queue = Queue(work, 100)
    queue.put(1, 60)
    heard: list[Exception] = []

    def produce() -> None:
        try:
            queue.put(2, 60)
        except Exception as problem:
            heard.append(problem)

    waiting = threading.Thread(target=produce)
    waiting.start()
    time.sleep(0.05)
    release.set()
    waiting.join(2)
    assert not waiting.is_alive() and [type(problem) for problem in heard] == [kind]
    for call in (queue.join, queue.close, lambda: queue.put(3, 1)):
        with pytest.raises(kind):
            call()
    assert kind is NotFinite or heard[0].__cause__ is error


INTERRUPTED = """
import random, signal, threading
from probe.writing.background import Queue

signal.signal(signal.SIGALRM, signal.default_int_handler)
rng = random.Random(0)
for index in range(2000):
    queue = Queue(lambda item: None, 100)
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
        while True:
            queue.put(1, 60)
    except KeyboardInterrupt:
        pass
    closing = threading.Thread(target=queue.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive(), f"round {index}: the queue does not end"
"""


def test_ctrl_c_between_any_two_instructions_leaves_a_queue_that_ends() -> None:
    """In a process of its own, since pytest's limit of time has the timer here."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=200
    )
    assert (ended.returncode, ended.stderr) == (0, "")

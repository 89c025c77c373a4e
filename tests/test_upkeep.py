"""What dead writers left goes, and what living ones write stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored import another_process, check_prefix, contents, recorded

from probe.writing.upkeep import clear_orphans

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_orphans_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    """Names with dots, brackets and `.zarr` in them are names like others."""
    names = ("a-11111111.zarr", "b.zarr-22222222.zarr", "c [1]-33333333.zarr")
    script = """
        folder = Path(sys.argv[1])
        writers = [RunWriter(folder / name, layout(), ATTRIBUTES) for name in sys.argv[2:]]
        for writer in writers:
            put(writer, 0)
            writer.flush()
        print("ready", flush=True)
        time.sleep(60)
    """
    holder = another_process(script, tmp_path, *names)
    assert holder.stdout and holder.stdout.readline() == "ready\n"
    left = []
    for name in names:
        (tmp_path / f".{name}.0123abcd.partial" / "latents").mkdir(parents=True)
        (tmp_path / name / "latents" / "c.0123.partial").write_text("")
        left += [
            tmp_path / f".{name}.0123abcd.partial",
            tmp_path / name / "latents" / "c.0123.partial",
            tmp_path / f".{name}.lock",
        ]
    for file in ("note.txt", ".hidden", ".not-ours.lock", "part.partial"):
        (tmp_path / file).write_text("somebody else's")
    recorded(tmp_path / "d-44444444.zarr")
    alone = (
        tmp_path / ".e-55555555.zarr.89abcdef.partial"
    )  # of one that was killed before it had a name
    alone.mkdir()

    everything = contents(tmp_path)
    assert (
        clear_orphans(tmp_path, dry_run=True) == [alone]
        and contents(tmp_path) == everything
        and alone.exists()
    )
    assert (
        clear_orphans(tmp_path) == [alone]
        and contents(tmp_path) == everything
        and not alone.exists()
    )

    holder.kill()
    holder.communicate()
    assert (
        sorted(clear_orphans(tmp_path, dry_run=True)) == sorted(left)
        and contents(tmp_path) == everything
    )
    assert sorted(clear_orphans(tmp_path)) == sorted(left) and not any(
        path.exists() for path in left
    )
    gone = {str(path.relative_to(tmp_path)) for path in left}
    assert contents(tmp_path) == {
        name: content for name, content in everything.items() if name not in gone
    }
    assert clear_orphans(tmp_path) == clear_orphans(tmp_path / "nowhere") == []
    assert all(check_prefix(tmp_path / name) == 1 for name in names)

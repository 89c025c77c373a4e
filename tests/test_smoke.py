"""The whole way once, on the bundled model: record, open, stop, go on to the same bits, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probe
from probe.diffusion.loading import load
from probe.proof.verdict import verify

ASKED = {
    "prompt": "an astronaut scuba diving",
    "steps": 4,
    "device": "cpu",
    "dtype": "float32",
    "decode_every": 2,
}


@pytest.mark.smoke
def test_the_bundled_model_is_recorded_stopped_resumed_and_verified(tmp_path: Path) -> None:
    whole = probe.record(ASKED, output=str(tmp_path / "whole"), progress=False)
    assert whole.status == "complete" and whole.images.shape == (1, 128, 128, 3)
    assert np.isfinite(whole.phrase("scuba diving").values).all()

    model, calls = load("emojiworld", dtype="float32", device="cpu"), 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hook = model.unet.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        probe.record(ASKED, model, output=str(tmp_path / "stopped"), progress=False)
    hook.remove()
    stopped = probe.open_run("latest", tmp_path / "stopped")
    assert stopped.status == "interrupted" and stopped.steps.tolist() == [0, 1]

    resumed = probe.resume(stopped, progress=False)
    for path in ("latents/latents", "latents/prediction", "attention/16x16/cross", "images/final"):
        assert resumed.variable(path).values.tobytes() == whole.variable(path).values.tobytes(), (
            path
        )
    verdicts = {check.name: check.verdict for check in verify(resumed, model=True)}
    assert "failed" not in verdicts.values() and "not checked" not in verdicts.values(), verdicts

"""What is said above the player of a recording that is not complete, and what goes on with it.

    following(run)    # {"state": "recording", "text": "recording: 11 of 50 steps", "command": ""}

The player asks again while the state is one of LIVE: its writer is alive, and more will come.
"""

from __future__ import annotations

import shlex

from probe.reading.listing import status_of
from probe.reading.recording import Run

LIVE = ("recording", "finishing")
GOES_ON = "This goes on with it, to the same bits:"
ENDED = {
    "interrupted": "Interrupted {far}: its writer is gone. {then}",
    "failed": "Ended by an error {far}. Once its cause is gone: {then}",
}


def following(run: Run) -> dict[str, str]:
    """Return how far a recording is: `state`, `text`, and a `command` if its writer is gone.

    The state is "recording", "finishing", "complete", "interrupted" or "failed". Raise
    RecordingDamaged.
    """
    done = len(run.steps)
    status = status_of(dict(run.attributes))  # as it was opened: the steps are as old or newer
    steps = int(run.variable("committed").size)
    if status == "complete":
        return _told("complete")
    if status == "running" and done < steps:
        begun = f"recording: {done} of {steps} steps"
        waits = f"recording: the first of {steps} steps is not finished yet"
        return _told("recording", begun if done else waits)
    if status == "running":
        return _told("finishing", f"finishing: all {steps} steps are here, the picture is made")
    far = f"after {done} of {steps} steps" if done < steps else f"after the last of {steps} steps"
    if run.kind == "noising":  # those are short, and never resumed
        command = f"python -m probe rerun {shlex.quote(str(run.path))}"
        return _told(status, ENDED[status].format(far=far, then="This records it again:"), command)
    command = f"python -m probe.run --resume {shlex.quote(str(run.path))}"
    return _told(status, ENDED[status].format(far=far, then=GOES_ON), command)


def _told(state: str, text: str = "", command: str = "") -> dict[str, str]:
    return {"state": state, "text": text, "command": command}

"""Everything that can go wrong, as one tree. An error is one line of cause and one of remedy.

ProbeError
|-- UserError                the request cannot be met: exit code 2
|   |-- ExperimentError      (ValueError)          an experiment file or option that makes no sense
|   |-- ModelError           (ValueError)          a model that is missing, unsafe or not supported
|   |-- DeviceError          (RuntimeError)        a device or dtype this machine does not have
|   |-- PromptError          (ValueError)          words the model cannot take
|   |-- TooLarge             (ValueError)          larger than --max-bytes or than the disk has room
|   |-- RecordingNotFound    (FileNotFoundError)   no such recording, or no such variable in it
|   |-- RecordingDamaged     (ValueError)          a recording that is not what was written
|   |   `-- RecordingLinked                        its files are links, which are not followed
|   |-- RecordingUnreadable  (OSError)             the system did not read a recording
|   `-- RecordingBusy        (RuntimeError)        someone else is writing it
`-- RunFailed                a run that began and could not go on: exit code 1
    |-- CaptureError         (RuntimeError)        a hook that fired 0 or 2 times in a step
    |-- NotFinite            (FloatingPointError)  NaN or infinity in a latent
    |-- OutOfMemory          (MemoryError)         the device or the machine is out of memory
    `-- StoreError           (OSError)             the recording could not be written
"""

from __future__ import annotations


class ProbeError(Exception):
    """Every error that is raised on purpose. `cause` and `remedy` are one line each."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str = ""):
        self.cause, self.remedy = cause, remedy
        super().__init__(cause, remedy)

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class UserError(ProbeError):
    exit_code = 2


class ExperimentError(UserError, ValueError):
    pass


class ModelError(UserError, ValueError):
    pass


class DeviceError(UserError, RuntimeError):
    pass


class PromptError(UserError, ValueError):
    pass


class TooLarge(UserError, ValueError):
    pass


class RecordingNotFound(UserError, FileNotFoundError):
    pass


class RecordingDamaged(UserError, ValueError):
    pass


class RecordingLinked(RecordingDamaged):
    pass


class RecordingUnreadable(UserError, OSError):
    """The system did not read a recording. It is probably whole: never remove it for this."""


class RecordingBusy(UserError, RuntimeError):
    pass


class RunFailed(ProbeError):
    exit_code = 1


class CaptureError(RunFailed, RuntimeError):
    pass


class NotFinite(RunFailed, FloatingPointError):
    pass


class OutOfMemory(RunFailed, MemoryError):
    pass


class DeviceFailed(RunFailed, RuntimeError):
    """A GPU stopped working for this process: only a new one can go on."""


class StoreError(RunFailed, OSError):
    pass

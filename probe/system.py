"""What the operating system says, in words: why it did not read a recording, and what helps.

    with reading(path):          # an error of the system becomes a RecordingUnreadable
        os.scandir(path)
    trouble_in(error)            # the system's error that another error was made from, or None

After a RecordingUnreadable the recording is probably whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from probe.errors import ProbeError, RecordingUnreadable, UserError
from probe.text import printable

# Errors that a file itself makes, by what it is or is not: its reader says what they mean.
OF_THE_FILE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENXIO", "ENODEV", "ENAMETOOLONG"),
        *("EINVAL", "EMLINK", "EEXIST", "EPIPE"),
    )
    if hasattr(errno, name)
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_THE_NETWORK = (
    "ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOTCONN ECONNRESET "
    "ECONNREFUSED ECONNABORTED ENOLINK ECOMM EPROTO"
)
REMEDIES = (
    ("EACCES EPERM", "Ask its owner, or change its permissions: chmod -R u+rX."),
    (
        "EIO EUCLEAN EBADMSG EFAULT EREMOTEIO ENOMEDIUM",
        "Copy it to another disk, and check this one.",
    ),
    (OF_THE_NETWORK, "Mount the network share again, then try again."),
    ("EMFILE", "Close some files or recordings, or allow more: ulimit -n 4096."),
    ("ENFILE", "Close other programs: the system has no open files left."),
    ("ENOMEM", "Close other programs, or read fewer steps at once."),
    (
        "EBUSY EAGAIN ETXTBSY EDEADLK ENOLCK EINTR",
        "Try again in a moment: something else is using it.",
    ),
)
REMEDY = {
    getattr(errno, name): remedy
    for names, remedy in REMEDIES
    for name in names.split()
    if hasattr(errno, name)
}


def trouble_in(error: BaseException | None) -> OSError | None:
    """Return the system's error in an error, or in what that was made from; else None.

    It is None also for an error that a file itself makes, such as one that does not exist.
    """
    for _ in range(20):
        if error is None:
            return None
        if isinstance(error, MemoryError) and not isinstance(error, ProbeError):
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        system = _from_zarrs(error) if isinstance(error, RuntimeError) else error
        if isinstance(system, OSError) and _is_of_the_system(system.errno):
            return system
        error = system.__cause__ or system.__context__
    return None


def _is_of_the_system(number: object) -> bool:
    return isinstance(number, int) and number not in OF_THE_FILE


def _from_zarrs(error: RuntimeError) -> BaseException:
    """Return the system's error that zarrs reports in its text, or the error itself."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else error


def check_here() -> None:
    """Raise UserError if the current folder was removed.

    Torch's libraries would end the process there without a word of ours.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("The folder you are in is gone.", "cd to one that exists.") from error


def may_change(folder: Path) -> bool:
    """Tell whether this account may make and remove files in a folder."""
    effective = os.access in os.supports_effective_ids
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def unreadable(
    path: str | Path, trouble: OSError, what: str = "The recording is"
) -> RecordingUnreadable:
    """Return the error for a recording, or a folder of them, that the system did not read."""
    reason = trouble.strerror or type(trouble).__name__
    if not trouble.strerror and trouble.errno:
        reason = os.strerror(trouble.errno)
    error = RecordingUnreadable(
        f"{printable(str(path))} could not be read: {printable(reason)}. {what} probably whole.",
        REMEDY.get(trouble.errno or 0, "Check the disk, then try again."),
    )
    error.errno, error.strerror = trouble.errno, reason
    return error


@contextlib.contextmanager
def reading(path: str | Path, what: str = "The recording is") -> Iterator[None]:
    """Turn the system's errors into RecordingUnreadable. Let every other error through."""
    try:
        yield
    except RecordingUnreadable:
        raise
    except Exception as error:
        if (trouble := trouble_in(error)) is None:
            raise
        raise unreadable(path, trouble, what) from error


KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of(status: os.stat_result) -> str:
    """Return what lies at a path, in words: "a pipe"."""
    return next((kind for is_it, kind in KINDS if is_it(status.st_mode)), "a device")


def exists(path: str | Path) -> bool:
    """Tell whether something is at `path`, a broken link included.

    Raise RecordingUnreadable if the system cannot tell.
    """
    with reading(path):
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno in OF_THE_FILE:
                return False
            raise
        except ValueError:  # a null character
            return False
    return True


def lives(process: int) -> bool:
    """Tell whether a process of this machine lives: True also if nobody can tell."""
    if sys.platform == "win32":  # os.kill(process, 0) would end it
        return _lives_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _lives_on_windows(process: int) -> bool:
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    kernel.GetExitCodeProcess.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    kernel.CloseHandle.argtypes = (ctypes.c_void_p,)
    handle = kernel.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return bool(ctypes.get_last_error() != 87)  # type: ignore[attr-defined,unused-ignore]  # ERROR_INVALID_PARAMETER: there is none
    try:
        code, still_active = ctypes.c_ulong(), 259
        known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        return not known or code.value == still_active
    finally:
        kernel.CloseHandle(handle)


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes; 0 if nobody can tell."""
    if sys.platform == "win32":
        return _peak_on_windows()
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is used up: Python's, torch's or CUDA's."""
    messages = (
        *("not enough memory", "can't allocate", "can't start new thread"),  # the host's
        *("CUDA error: out of memory", "STATUS_ALLOC_FAILED"),  # outside of torch's own allocator
    )
    by_message = isinstance(error, RuntimeError) and any(x in str(error) for x in messages)
    by_name = type(error).__name__ == "OutOfMemoryError"  # of torch, which is not imported here
    return by_message or by_name or isinstance(error, MemoryError)


LESS_MEMORY = "Fewer images, a smaller height and width, --dtype float16, or fewer capture.layers."
A_NEW_PROCESS = (
    "Go on with it in a new process. If that comes again, record it with --graphs off, and look "
    "for a newer driver."
)


def is_device_failure(error: BaseException) -> bool:
    """Tell whether an error says that a GPU failed, or a library that computes on it."""
    messages = ("CUDA error", "cuDNN error", "CUDNN_STATUS_", "CUBLAS_STATUS_")
    return isinstance(error, RuntimeError) and any(x in str(error) for x in messages)


def free_memory() -> int:
    """Return how many bytes a process can still be given; 0 if nobody can tell.

    A container's own limit counts.
    """
    free = 0
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        most, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        left = int(most) - int(used)
    except (OSError, ValueError):  # no limit, or none that is told
        return free
    return min(free, max(left, 0)) if free else max(left, 0)


def processor(instructions: str = "") -> str:
    """Return the processor's own name, with the `instructions` that are used of it, as "AVX2".

    Torch's last bits depend on both: its square roots are those of MKL, which differ by the maker.
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return ", ".join(filter(None, (name, instructions)))


def _peak_on_windows() -> int:
    class Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h."""

        _fields_ = [
            ("cb", ctypes.c_ulong),
            ("faults", ctypes.c_ulong),
            ("peak", ctypes.c_size_t),
            *((f"more{i}", ctypes.c_size_t) for i in range(7)),
        ]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    ask = kernel.K32GetProcessMemoryInfo
    ask.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong)
    known = ask(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
    return int(counters.peak) if known else 0

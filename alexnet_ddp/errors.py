"""What can go wrong, and the exit code that says so.

The codes hold for a single process, under srun and under `alexnet-ddp train --nproc-per-node N`. A bare torchrun
turns every non-zero code of a rank into its own 1, so there a stop exits 0 and `state.json` is the truth.
"""

EXIT_FINISHED = 0
EXIT_FAILED = 1  # a fault of ours, of the machine or of a peer
EXIT_USER = 2  # the recipe, the data or the command line must change first
EXIT_UNAVAILABLE = 69  # the hosts of a job do not reach each other (EX_UNAVAILABLE); worth another start
EXIT_STOPPED = 75  # stopped on request, resumable (EX_TEMPFAIL of sysexits.h)
EXIT_INTERRUPTED = 130  # a second Ctrl-C: left at once, nothing saved


def first_line(error: BaseException) -> str:
    """What a library's error says, for a sentence of ours: its first line, at most 200 characters, no full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


class UserError(ValueError):
    """A mistake the user can mend: the message states the rule, what was found and what to change."""

    kind = "user"  # of failure, as state.json tells it to whoever decides about another start
    code = EXIT_USER


class OutOfMemory(UserError):
    """The device's (or the host's) memory doesn't hold a micro-batch."""

    kind = "memory"


class Diverged(UserError):
    """Update after update was skipped because the gradients were not finite."""

    kind = "nonfinite"


class DeviceFailed(UserError):
    """A GPU that doesn't work: another start, perhaps on another node, may fare better."""

    kind = "device"


class Unreadable(UserError):
    """Data that was there when the run began and can't be read now: deleted, or a file system that is away."""

    kind = "disk"


class RunFailed(RuntimeError):
    """The run can't go on; one line that names rank, host, step and cause has been (or will be) printed."""

    kind = "disk"

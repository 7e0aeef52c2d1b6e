"""submitit's three executors, as a run needs them: `slurm` (sbatch), `local` (this machine), `debug` (this process).

The script that sbatch gets is submitit's, with the lines of `launch.batch` around its srun. submitit's own requeueing
is never reached: its handlers are replaced by the ranks' before the blocked signals are let in.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, UserError
from launch import batch
from launch.job import Task
from launch.preflight import Request
from launch.profiles import Profile, Value

IN_A_TASK = '$BLOCK "$TASK_PYTHON" -P'  # put into the script as it is: launch.batch sets both
YEARS = 60.0 * 24 * 366 * 10  # minutes: submitit's local executor has to have some limit


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, able to tell its script on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int) -> str:
        """The very text that sbatch gets for so many jobs: for more than one a job array."""
        told = SlurmExecutor(self.folder, self.max_num_timeout, python=self.python)
        told.parameters = self.parameters | ({"map_count": jobs} if jobs > 1 else {})
        return str(told._make_submission_file_text(told._submitit_command_str, ""))


def slurm(folder: Path, *, request: Request, profile: Profile, keys: Mapping[str, Value], options: Mapping[str, Any],
          snapshots: Sequence[Path], cwd: Path, parallel: int | None = None) -> SlurmExecutor:
    """The executor that submits the snapshots: one job, or an array of them.

    Args:
        folder: for scripts, pickles and logs.
        keys: further keys of sbatch; they win over the profile's.
        options: plain ones such as partition and job_name; None: not given.
        parallel: tasks of the array that may run at a time; None: all.
    """
    executor = SlurmExecutor(folder, python=IN_A_TASK)
    more = {name: value for name, value in {**profile.slurm, **keys}.items() if value not in (None, False)}
    setup = [*profile.setup, *(f"export {name}={shlex.quote(value)}" for name, value in profile.env.items())]
    if request.cpus is not None:
        setup.append(f"export SRUN_CPUS_PER_TASK={request.cpus}")  # Slurm 22.05 to 23.02 don't pass it on to srun
    executor.update_parameters(
        nodes=request.nodes,
        ntasks_per_node=request.tasks,
        cpus_per_task=request.cpus,
        time=None if request.limit is None else
        "infinite" if math.isinf(request.limit) else math.ceil(request.limit / 60),
        signal_delay_s=math.ceil(request.lead),
        setup=[*setup, *batch.before(snapshots, python=sys.executable, task_python=profile.python)],
        teardown=batch.after(),
        srun_args=srun_args(request, profile),
        additional_parameters={**more, "requeue": True, "chdir": str(cwd)},
        array_parallelism=parallel or 256,
        stderr_to_stdout=True,
        wckey=None,  # submitit would charge to one of its own name
        **gpu_request(request, profile.gpus),
        **options)
    return executor


def gpu_request(request: Request, style: str) -> dict[str, Any]:
    """The parameters that ask for a node's GPUs in a site's style."""
    if not request.gpus:
        return {}
    if request.gpus_per_task is not None or style == "gpus-per-task":
        return {"gpus_per_task": f"{request.gpu_type}:1" if request.gpu_type else 1}
    if style == "gpus-per-node":
        return {"gpus_per_node": f"{request.gpu_type}:{request.gpus}" if request.gpu_type else request.gpus}
    kind = request.gpu_type or style.partition(":")[2]
    return {"gres": f"gpu:{kind}:{request.gpus}" if kind else f"gpu:{request.gpus}"}


def srun_args(request: Request, profile: Profile) -> list[str]:
    """srun's arguments. Variables of today's environment are filled in: the script quotes what it is given."""
    ours = ["--kill-on-bad-exit=1",  # a lost rank is everybody's end; without it the others would wait for it
            "--open-mode=append",  # the batch shell writes into rank 0's log too, and so did the attempt before
            "--export=ALL"]  # a site's SBATCH_EXPORT=NONE would keep the ranks from finding their code
    if request.cpus is not None:
        ours.append(f"--cpus-per-task={request.cpus}")
    return [*ours, *(os.path.expandvars(word) for word in profile.srun_args)]


# --- submitting -------------------------------------------------------------------------------------------------

# Variables by which sbatch overrules its script, whatever it says; and those named otherwise than their option.
OVERRULING = {"ARRAY_INX", "ERROR", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE", "SIGNAL", "WAIT"}
GPUS = {"GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "GRES"}
NAMES = {"time": {"TIMELIMIT"}, "mem": {"MEM_PER_NODE"}, "gpus_per_node": GPUS, "gpus_per_task": GPUS, "gres": GPUS}


def overruling(parameters: Mapping[str, Any]) -> list[str]:
    """The environment variables by which sbatch would overrule a script with these parameters."""
    told = {**parameters, **parameters.get("additional_parameters", {})}
    names = set(OVERRULING)
    for key, value in told.items():
        if value is not None:
            names |= NAMES.get(key, {key.replace("-", "_").upper()})
    return sorted(f"SBATCH_{name}" for name in names)


@contextlib.contextmanager
def clean_environment(drop: Sequence[str] = ()) -> Iterator[None]:
    """Without what a surrounding job says of itself, and without the variables of these names."""
    before = dict(os.environ)
    inside = submitit.helpers.clean_env() if "SLURM_JOB_ID" in before else contextlib.nullcontext()
    try:
        with inside:
            if "SLURM_CONF" in before:  # where the cluster is, not what the job is
                os.environ["SLURM_CONF"] = before["SLURM_CONF"]
            for name in drop:
                os.environ.pop(name, None)
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def submit_slurm(executor: SlurmExecutor, snapshots: Sequence[Path]) -> list[str]:
    """Submits, and returns a job id for each snapshot: 12, or 12_0, 12_1 ... of an array. Raises UserError."""
    if shutil.which("sbatch") is None:
        raise UserError("There is no sbatch on this machine's PATH. Submit from a login node of the cluster; --dry-run "
                        "shows the script anywhere, and --cluster local trains on this machine.")
    task, folder = Task([str(snapshot) for snapshot in snapshots]), Path(executor.folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    said = io.StringIO()
    try:
        # submitit prints sbatch's refusal, and raises it too.
        with clean_environment(overruling(executor.parameters)), contextlib.redirect_stderr(said), executor.batch():
            jobs = [executor.submit(task) for _ in snapshots]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        for leftover in set(folder.iterdir()) - before:
            leftover.unlink(missing_ok=True)
        words = " ".join((str(error) or said.getvalue()).split())
        raise UserError(f"Slurm refused the job: {words.removeprefix('sbatch: error: ')}. "
                        "The script it got is shown by --dry-run.") from None
    except OSError as error:
        raise UserError(f"The job's files can't be written to {folder}: {error.strerror or error}.") from None
    return [str(job.job_id) for job in jobs]


def submit_local(snapshot: Path, folder: Path, *, request: Request, profile: Profile) -> str:
    """Starts a run on this machine, in the background, and returns its job id: the number of the process to end."""
    def start() -> str:
        os.environ |= {**profile.env, "PYTHONPATH": os.pathsep.join(
            [str(snapshot), *filter(None, [os.environ.get("PYTHONPATH")])])}
        # Signals are blocked until the ranks' handlers stand; `setup` would need a shell that submitit can't find
        # its own number behind where /bin/sh is bash.
        executor = submitit.LocalExecutor(folder, python=f"{sys.executable} -P -m launch.block {sys.executable} -P")
        visible = [int(number) for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number.isdigit()]
        executor.update_parameters(
            timeout_min=YEARS if request.limit is None or math.isinf(request.limit) else request.limit / 60,
            signal_delay_s=math.ceil(request.lead), tasks_per_node=request.tasks, gpus_per_node=request.gpus,
            visible_gpus=visible if len(visible) >= request.gpus else (), stderr_to_stdout=True)
        return str(executor.submit(Task([str(snapshot)])).job_id)

    with clean_environment():
        return detached(start)


def detached(act: Callable[[], str]) -> str:
    """What `act` returns, from a session of its own: neither Ctrl-C nor a closed terminal reaches what it starts."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = EXIT_FAILED
        try:
            os.close(reader)
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):  # whoever reads our output must not wait for the run's end
                os.dup2(nothing, stream)
            os.write(writer, act().encode())
            code = EXIT_FINISHED
        except BaseException as error:
            os.write(writer, f"!{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        answer = told.read()
    os.waitpid(child, 0)
    if answer.startswith("!"):
        raise UserError(f"The run can't be started on this machine: {answer[1:]}.")
    return answer


def run_here(snapshot: Path, folder: Path) -> int:
    """Runs it in this process, a single rank, and returns its exit code."""
    with clean_environment():
        job = submitit.DebugExecutor(folder).submit(Task([str(snapshot)]))
        try:
            job.results()
        except SystemExit as left:
            return int(left.code or 0)
    return EXIT_FINISHED

"""One training at a time in a run folder: two would mix their logs and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from terdit_cli.errors import UsageError
from terdit_cli.system.job import Job
from terdit_cli.system.locks import held


@contextmanager
def locked_run(run_folder: Path, job: Job) -> Iterator[None]:
    """Lock a run folder, created if absent; all processes of a job must call.

    Raises:
        UsageError: another training runs there.
        EnvironmentProblem: the folder cannot be made.
    """
    made = job.is_main and not run_folder.exists()
    with ExitStack() as stack:
        taken = job.is_main and stack.enter_context(held(run_folder)) is None
        try:
            if job.largest(float(taken)):
                raise UsageError(
                    "another process trains in this run folder", where=run_folder,
                    fix="wait for it, stop it, or name another folder with --out",
                )  # fmt: skip
            yield
        finally:
            if made:
                with suppress(OSError):  # of a run that failed before its first file
                    run_folder.rmdir()

"""The errors a user can cause, one class for each exit code, all with one form of message.

    what failed: got X, expected Y (where). Fix: command or field

Exit codes: 0 ok, 1 bug (traceback), 2 usage or recipe, 3 bad input file, 4 environment
(backend or extra missing, disk full, not writable, too little memory), 5 quality gate failed,
130/143 stopped by SIGINT/SIGTERM after saving (129: SIGHUP).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TerditError(Exception):
    """An error with a message for the user and a documented exit code; never a traceback."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        facts = [f"got {got}"] if got is not None else []
        facts += [f"expected {expected}"] if expected is not None else []
        message = what + (": " + ", ".join(facts) if facts else "")
        message += f" ({where})" if where is not None else ""
        advice = f" Fix: {_sentence(fix)}" if fix else ""
        super().__init__(_sentence(message) + advice)
        self.problem = message.rstrip(".")  # without the advice, to be quoted in another message


def _sentence(text: str) -> str:
    """Return a text that ends in one full stop; a final ellipsis stays."""
    return text if text.endswith("...") else text.rstrip(".") + "."


class UsageError(TerditError):
    """A wrong argument, flag or recipe."""

    exit_code = 2


class InputFileError(TerditError):
    """A file that is missing, corrupt, of another version or of another kind."""

    exit_code = 3


class EnvironmentProblem(TerditError):
    """The machine lacks something: a backend, an extra, disk space, a permission."""

    exit_code = 4


class GateFailed(TerditError):
    """A quality gate (`eval-fid --max-fid`) was missed."""

    exit_code = 5


class Interrupted(TerditError):
    """Stopped by a signal, after everything was saved."""

    def __init__(self, what: str, *, signal_number: int, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest of `choices`, or "" when none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""

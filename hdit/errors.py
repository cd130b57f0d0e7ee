"""What the user can mend, as errors whose message says how."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message names the key or file, what arrived and the fix."""


class SpecError(UserError):
    """Settings that are well-typed but do not fit together.

    `problems` holds (path of the key within the spec, message), one for each thing that is wrong.
    """

    def __init__(self, problems: list[tuple[str, str]]):
        self.problems = problems
        super().__init__("\n".join(f"{path}: {message}" for path, message in problems))


class SolverError(UserError):
    """A sampler or solver that cannot go on."""


class WritingError(OSError, UserError):
    """A file or folder that cannot be written: made of errno, reason and path, which it names."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"

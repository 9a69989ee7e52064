"""Whether programs that a model wrote may run, and in what: decided once, by the command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kpsvd_tune.errors import InputError
from kpsvd_tune.evaluation.sandbox.run import Sandbox, check_sandbox

_RUN_CODE = ("mbpp",)


@dataclass(frozen=True)
class CodePermission:
    """What the user allowed.

    Attributes:
        sandbox: What programs run in, "none" for no protection; None where they may not run.
    """

    sandbox: Sandbox | None = None

    def for_task(self, task: str) -> Sandbox:
        """What the programs of a task run in.

        Raises:
            InputError: They may not run.
        """
        if self.sandbox is None:
            raise InputError(
                f"the task {task} runs programs the model wrote, and that was not allowed. Type "
                "--allow-code-execution to run them in a sandbox."
            )
        return self.sandbox


NO_CODE = CodePermission()


def permission_for(tasks: Iterable[str], is_allowed: bool, sandbox: Sandbox) -> CodePermission:
    """The permission that a command gives, checked before any work is done for its tasks.

    Args:
        tasks: Names of the tasks that will be scored.
        is_allowed: Whether the user typed --allow-code-execution.
        sandbox: "bwrap", or "none" to run programs without protection.

    Raises:
        InputError: A task runs programs, and they may not run or there is no sandbox for them.
    """
    permission = CodePermission(sandbox if is_allowed else None)
    for task in tasks:
        if task in _RUN_CODE:
            check_sandbox(permission.for_task(task))
    return permission

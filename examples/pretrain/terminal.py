"""What a run shows: on a terminal the stage it is at with its seconds, then a bar; elsewhere lines of a log."""

import sys

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Terminal:
    """Standard error of one process; imports no JAX, so that it can tell of that too."""

    def __init__(self, shown: bool = True) -> None:
        """Without `shown` nothing is written, until it is set."""
        self.shown, self._moves = shown, sys.stderr.isatty()
        self._console = Console(stderr=True, highlight=False, soft_wrap=not self._moves)
        self._live = Live(console=self._console)
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("passed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            expand=True,
        )
        self._status = Text()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._live.transient = not self._bar.tasks  # a stage is gone once it is over, the bar stays
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            self._console.print(text, markup=False)

    def stage(self, text: str) -> None:
        """What is done from now on; on a terminal in place of the stage before, with the time that it takes."""
        if self._bar.tasks:
            self._bar.update(self._bar.task_ids[0], description=text)
        elif not self._moves:
            self.say(text)
        elif self.shown:
            progress = Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            progress.add_task(text, total=None)
            self._live.start()
            self._live.update(progress, refresh=True)

    def count(self, start: int, steps: int) -> None:
        """From now on a bar of steps, of which `start` are done."""
        self._bar.add_task("step", completed=start, total=steps)
        self._live.update(Group(self._bar, self._status))

    def step(self, step: int, parts: list[str], log: bool) -> None:
        """After a step: what to say of it, on a line each below the bar; in a log on one line, and only with `log`."""
        if self._moves:
            self._status.plain = "\n".join(parts)
            self._bar.update(self._bar.task_ids[0], completed=step, description="step")
        elif log:
            self.say("  ".join([f"step {step}/{self._bar.tasks[0].total:.0f}", *parts]))

"""Progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = [
    "stage_progress",
]

_LINE_SECONDS = 15.0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def stage_progress(
    title: str, console: Console
) -> Iterator[Callable[[float, str], None]]:
    """Yield ``report(fraction, text)``: bar with elapsed and remaining time of one stage."""
    started = time.monotonic()
    first: list[tuple[float, float]] = []

    def remaining(fraction: float) -> str:
        now = time.monotonic()
        if fraction > 0 and not first:
            # What came before the first fraction went at another pace: earlier attempts, or
            # preparations (a prior to fit) that count as nothing done.
            first.append((now, fraction))
        if not first or fraction - first[0][1] <= 0.02:
            return "-:--"
        since, before = first[0]
        return _clock((now - since) * max(0.0, 1 - fraction) / (fraction - before))

    if not console.is_terminal:
        last, ended = [-math.inf], [False]

        def line(fraction: float, text: str) -> None:
            now = time.monotonic()
            # The end is told at once, but only once: what follows it is told now and then.
            ends = fraction >= 1 and not ended[0]
            if now - last[0] < _LINE_SECONDS and not ends:
                return
            last[0], ended[0] = now, fraction >= 1
            console.print(
                f"{title:<10} {min(fraction, 1.0):4.0%}  {_clock(now - started)} elapsed, "
                f"{remaining(fraction)} left  {text}",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )

        yield line
        return
    with Progress(
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
        TextColumn("{task.fields[text]}", style="dim"),
        console=console,
    ) as bars:
        task = bars.add_task(title, total=1.0, left="-:--", text="")

        def bar(fraction: float, text: str) -> None:
            bars.update(
                task, completed=min(fraction, 1.0), left=remaining(fraction), text=text
            )

        yield bar

"""The progress of a run for a person: a display that redraws on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import IO, Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

Mode = Literal["auto", "live", "plain", "off"]
REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0

# metric name, short label, format: what a step's line shows of its metrics, in this order
_SHOWN: tuple[tuple[str, str, str], ...] = (
    ("cold_start/loss", "loss", "{:.4f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/em", "EM", "{:.3f}"),
    ("outcome/wrong", "wrong", "{:.0%}"),
    ("outcome/unread", "unread", "{:.0%}"),
    ("outcome/no_answer", "no answer", "{:.0%}"),
    ("outcome/no_thought", "no thought", "{:.0%}"),
    ("outcome/open_thought", "open thought", "{:.0%}"),
    ("outcome/answer_tags", "answer tags", "{:.0%}"),
    ("outcome/open_call", "open call", "{:.0%}"),
    ("outcome/no_box", "no box", "{:.0%}"),
    ("outcome/token_limit", "token limit", "{:.0%}"),
    ("outcome/call_limit", "call limit", "{:.0%}"),
    ("sampling/no_signal", "no signal", "{:.0%}"),
    ("eval/em", "EM", "{:.3f}"),
    ("eval/f1", "F1", "{:.3f}"),
    ("eval/format", "format", "{:.3f}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/clipped_low", "clip-", "{:.2%}"),
    ("policy/clipped_high", "clip+", "{:.2%}"),
    ("policy/grad_norm", "grad", "{:.3g}"),
    ("tokens/overlap", "overlap", "{:.2f}"),
    ("rate/rollout_tokens_per_s", "rollout tok/s", "{:,.0f}"),
    ("rate/train_tokens_per_s", "train tok/s", "{:,.0f}"),
    ("cold_start/tokens_per_s", "tok/s", "{:,.0f}"),
)
_ONLY_IF_ANY = ("outcome/", "sampling/")  # shares that are shown where they are above 0


class Progress:
    """Progress of a run; use it as a context manager.

    `live` redraws two lines in place; `plain` writes a line per step and, in a long phase, a line every ten seconds;
    `auto` is `live` on a terminal that can redraw, else `plain`; `off`, or a rank that is not `is_main`, writes
    nothing. A terminal that goes away or cannot be drawn on silences the display, never the run. Output goes to
    `file`, by default to standard output.
    """

    def __init__(self, mode: Mode = "auto", *, is_main: bool = True, file: IO[str] | None = None):
        self._console = _Console(file=file, highlight=False, force_terminal=True if mode == "live" else None)
        if mode == "auto":
            capable = self._console.is_terminal and not self._console.is_dumb_terminal
            mode = "live" if capable else "plain"
        self.mode: Mode = mode if is_main else "off"
        self._display: _Display | None = None
        self._label, self._status = "", ""
        self._phase, self._done = "", 0
        self._total: int | None = None
        self._rates: dict[str, float] = {}
        self._phase_start = self._last_output = time.monotonic()
        self._step_times: deque[float] = deque(maxlen=20)

    def __enter__(self) -> Progress:
        if self.mode == "live":
            self._display = _Display(self._console)
            self._safely(self._display.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        display, self._display = self._display, None
        if display is not None:
            self._safely(display.stop)

    def start_phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase of `total` units of work (None: unknown)."""
        self._phase, self._done, self._total, self._rates = name, 0, total, {}
        self._phase_start = time.monotonic()
        if self.mode == "plain":
            self._last_output = self._phase_start
        self._redraw(force=True)

    def advance(self, done: int, **rates: float) -> None:
        """Show that `done` units of the phase are finished, and numbers beside them.

        `loss=0.5` reads "loss 0.5"; `x_tokens=900`, a count since the phase began, is shown as tokens per second.
        """
        self._done = done
        self._rates.update(rates)
        if self.mode == "plain" and time.monotonic() - self._last_output >= LINE_SECONDS:
            self._line("  " + self._phase_text())
        self._redraw()

    def step_done(self, step: int, total: int, metrics: Mapping[str, Any], label: str = "step") -> None:
        """Report a finished step; `label` names what is counted (train, batch)."""
        if label != self._label:
            self._label = label
            self._step_times = deque([self._step_times[-1]] if self._step_times else [], maxlen=20)
        self._step_times.append(time.monotonic())
        eta = self._eta(total - step)
        parts = [f"{label} {step}/{total}", *_metric_texts(metrics), *([f"eta {_clock(eta)}"] if eta else [])]
        self._status = "  ".join(parts)
        if self.mode == "plain":
            self._line(self._status)
        self._redraw(force=True)

    def message(self, text: str) -> None:
        """Write a line above the display, where it stays."""
        if self.mode != "off":
            self._line(text)

    def _eta(self, remaining: int) -> float:
        """Estimate the seconds that `remaining` steps will take, from the last steps' mean; 0 when nothing is known."""
        if remaining <= 0 or len(self._step_times) < 2:
            return 0.0
        return (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1) * remaining

    def _phase_text(self) -> str:
        count = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        seconds = max(time.monotonic() - self._phase_start, 1e-9)
        rates = [_rate_text(name, value, seconds) for name, value in self._rates.items()]
        return "  ".join([self._phase, count, *rates, _clock(seconds)])

    def _line(self, text: str) -> None:
        self._last_output = time.monotonic()
        self._safely(lambda: self._console.print(Text(text), soft_wrap=True))

    def _redraw(self, force: bool = False) -> None:
        display, now = self._display, time.monotonic()
        if display is None or not (force or now - self._last_output >= REDRAW_SECONDS):
            return
        self._last_output = now
        self._safely(lambda: display.show(self._status, self._phase_text(), self._done, self._total))

    def _safely(self, action: Callable[[], object]) -> None:
        """Draw. Output that cannot be written (closed pipe, odd encoding) ends the display, nothing else."""
        try:
            action()
        except (OSError, ValueError):
            self.mode, self._display = "off", None


class _Display(Bars):
    """Two lines that redraw: the last step's, and the bar and numbers of the phase."""

    def __init__(self, console: Console):
        self._status = ""
        columns = BarColumn(bar_width=30), TextColumn("{task.description}", markup=False)
        super().__init__(*columns, console=console, auto_refresh=False, transient=True)

    def show(self, status: str, phase: str, done: int, total: int | None) -> None:
        """Draw a phase of which `done` units of `total` (None: unknown) are finished."""
        self._status = status
        for task in self.task_ids:
            self.remove_task(task)
        self.add_task(phase, total=total, completed=done)
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the two lines of the display: status and progress bar."""
        yield Text(self._status)
        yield self.make_tasks_table(self.tasks)


class _Console(Console):
    """A console that survives a broken pipe (`| head`), which ends the process in rich."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if self.file is sys.stdout:  # whatever else is printed there would fail as well
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _metric_texts(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"{label} {form.format(float(metrics[name]))}"
        for name, label, form in _SHOWN
        if name in metrics and (metrics[name] or not name.startswith(_ONLY_IF_ANY))
    ]


def _rate_text(name: str, value: float, seconds: float) -> str:
    if name.endswith("_tokens"):
        return f"{value / seconds:,.0f} {name.removesuffix('_tokens').replace('_', ' ')} tok/s"
    return f"{name.replace('_', ' ')} {value:,.4g}"


def _clock(seconds: float) -> str:
    """Format a duration as m:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

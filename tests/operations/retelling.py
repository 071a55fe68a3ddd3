"""An account of a run as a text and as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from operations.account import Account, Restart, pieces

ROWS = 24
DRAWN = ("step", "samples / s", "ranks that answer")


def text(account: Account) -> str:
    """Return it for a terminal."""
    job = account.job
    head = f"job {job['JobId']}: {job['JobState']}, {job['Restarts']} restarts, exit code {job['ExitCode']}"
    return "\n\n".join((head, _history(account), _costs(account.restarts), _metrics(account), _alerts(account)))


def picture(account: Account, path: Path) -> None:
    """Draw what Prometheus saw, with lines where the run was hit, and bars where an alert fired."""
    figure, axes = plt.subplots(len(DRAWN) + 1, 1, figsize=(10, 8), sharex=True, layout="constrained")
    for axis, name in zip(axes, DRAWN, strict=False):
        _draw_curve(axis, account, name)
    _draw_alerts(axes[-1], account)
    for number, blow in enumerate(account.blows, 1):
        when = blow.time - account.begin
        for axis in axes:
            axis.axvline(when, color="0.5", linestyle=":")
        axes[0].annotate(str(number), (when, axes[0].get_ylim()[1]), ha="center", va="bottom")
    named = "; ".join(f"{number} {blow.text}" for number, blow in enumerate(account.blows, 1))
    axes[-1].set_xlabel(f"seconds since the job was submitted\n{named}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _history(account: Account) -> str:
    return "\n".join(
        f"{event.time - account.begin:7.1f} s  {event.text}" + (f", at step {event.step}" if event.step else "")
        for event in account.events
    )


def _costs(restarts: list[Restart]) -> str:
    lines = ["signal to saved   in the queue   start to first step   steps lost   because"]
    for each in restarts:
        saved = "nothing saved" if each.saved is None else f"{each.saved:.1f} s"
        lines.append(f"{saved:>15}{each.queued:>13.1f} s{each.started:>20.1f} s{each.lost:>13}   {each.blow.text}")
    return "\n".join(lines)


def _metrics(account: Account) -> str:
    """Return the curves at some times, and what was not known then as a dash."""
    times = sorted({when for curve in account.curves.values() for when in curve})
    lines = ["     time  " + "  ".join(f"{name:>8}" for name in account.curves)]
    for when in times[:: max(1, len(times) // ROWS)]:
        known = ((name, curve.get(when)) for name, curve in account.curves.items())
        cells = [f"{'-' if value is None else format(value, '.0f'):>{max(8, len(name))}}" for name, value in known]
        lines.append(f"{when - account.begin:7.1f} s  " + "  ".join(cells))
    return "\n".join(lines)


def _alerts(account: Account) -> str:
    lines = [
        f"{alert.name} fired from {alert.begin - account.begin:.0f} s to {alert.end - account.begin:.0f} s"
        for alert in account.alerts
    ]
    return "\n".join(lines) or "no alert fired"


def _draw_curve(axis: Axes, account: Account, name: str) -> None:
    for piece in pieces(account.curves[name]):
        times, values = zip(*piece, strict=True)
        axis.plot([when - account.begin for when in times], values, color="C0")
    axis.set_ylabel(name)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _draw_alerts(axis: Axes, account: Account) -> None:
    names = list(dict.fromkeys(alert.name for alert in account.alerts))
    for alert in account.alerts:
        axis.barh(names.index(alert.name), alert.end - alert.begin, left=alert.begin - account.begin, color="C3")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel("alerts")

"""One figure per op: time against size, and the ratios to the best peer and to the limit."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastmix.benchmarks.harness import MODES
from fastmix.benchmarks.report import Row, function_of

# Colours that are told apart with colour-vision deficiencies too (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"


def draw(rows: list[Row], path: Path) -> None:
    """Rows of one op, at the highest number of threads. All have a limit.

    The size of a case is the bytes that it must move; both follow from the record: bytes = GB/s · time, and the
    limit's time = ratio_to_limit · time.
    """
    threads = max(row.ours["threads"] for row in rows)
    present = [mode for mode in MODES if any(row.ours["mode"] == mode for row in rows)]
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}  # (function, dtype) → mode → rows
    for row in rows:
        if row.ours["threads"] == threads:
            modes = groups.setdefault((function_of(row.ours), row.ours["dtype"]), {})
            modes.setdefault(row.ours["mode"], []).append(row)
    figure, axes = plt.subplots(
        len(present), 3, figsize=(16, 1 + 4.25 * len(present)), squeeze=False, layout="constrained"
    )
    for mode, (times, peers, limits) in zip(present, axes, strict=True):
        for i, (key, modes) in enumerate(groups.items()):
            if mode in modes:
                _draw_series(modes[mode], " ".join(key), _COLOURS[i % len(_COLOURS)], times, peers, limits)
        _label(times, f"{mode}: time", "median, ms")
        _label(peers, f"{mode}: best peer's time / ours", "above 1: faster than the best peer")
        _label(limits, f"{mode}: limit's time / ours", "1: the machine's limit")
        for axis in (peers, limits):
            axis.axhline(1, color=_GREY, linewidth=1.2, linestyle="--", zorder=1)
        low, high = peers.get_ylim()
        peers.axhspan(min(low, 0.5), 1, color=_COLOURS[1], alpha=0.08, zorder=0)
        peers.set_ylim(min(low, 0.5), max(high, 2))
    first = rows[0].ours
    figure.suptitle(f"{first['op']} on {first['device'].partition(': ')[2]}, threads: {threads}", fontsize=13)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(groups), frameon=False, fontsize=9)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png", dpi=120)
    plt.close(figure)
    beside.replace(path)


def _draw_series(rows: list[Row], label: str, colour: str, times, peers, limits) -> None:
    rows = sorted(rows, key=lambda row: _moved_mb(row.ours))
    size = [_moved_mb(row.ours) for row in rows]
    with_peer = [row for row in rows if row.peer]
    size_with_peer = [_moved_mb(row.ours) for row in with_peer]
    dots = {"s": 26, "color": colour, "linewidths": 1.2, "zorder": 3}
    rings = {**dots, "color": "none", "edgecolors": colour}
    limit_ms = [row.ours["ratio_to_limit"] * row.ours["median_ms"] for row in rows]
    times.scatter(size, [row.ours["median_ms"] for row in rows], label=f"{label}, fastmix", **dots)
    times.scatter(size_with_peer, [row.peer["median_ms"] for row in with_peer], label=f"{label}, best peer", **rings)
    times.plot(size, limit_ms, color=colour, linewidth=1, linestyle="--", marker="_", label=f"{label}, limit")
    peers.scatter(size_with_peer, [row.ours["ratio_to_best_peer"] for row in with_peer], **dots)
    limits.scatter(size, [row.ours["ratio_to_limit"] for row in rows], **dots)


def _moved_mb(record: dict) -> float:
    return record["gbps"] * record["median_ms"]


def _label(axis, title: str, what: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("bytes to move, MB")
    axis.set_ylabel(what)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())

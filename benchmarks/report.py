"""Shows records: a compact table for the terminal, and report.md with plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastmix.benchmarks import provenance
from fastmix.benchmarks.harness import BOTH, FORWARD, MODES, OURS

Record = dict[str, Any]
_SHORT = {FORWARD: "fwd", BOTH: "fwd+bwd"}
READING = (
    "× best peer: the best peer's median time over ours, above 1 is faster; “even” where the ranges from the 20th to "
    "the 80th percentile overlap. × limit: the least time in which this machine, as measured in the same run, could "
    "move the bytes and do the operations and exponentials, over ours; 1 can't be beaten unless the data stay in the "
    "cache. A yardstick does something else than the case, and is no peer."
)


@dataclass(frozen=True)
class Row:
    """Our record of a case and the best peer's, if a peer ran."""

    ours: Record
    peer: Record | None

    @property
    def verdict(self) -> str:
        if self.peer is None:
            return "no peer"
        if self.ours["p80_ms"] < self.peer["p20_ms"]:
            return "faster"
        if self.ours["p20_ms"] > self.peer["p80_ms"]:
            return "SLOWER"
        return "even"

    @property
    def ratio(self) -> str:
        return "" if self.peer is None else f"{self.ours['ratio_to_best_peer']:.2f} {self.verdict}"


def case_key(record: Record) -> tuple:
    return record["op"], record["case"], record["dtype"], record["threads"], record["mode"]


def compare(records: Iterable[Record]) -> list[Row]:
    """One row per case, dtype, threads and mode, in the order of the records."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(case_key(record), []).append(record)
    rows = []
    for group in groups.values():
        ours = next((record for record in group if record["provider"] == OURS), None)
        peers = [record for record in group if record["provider"] != OURS and not record["yardstick"]]
        if ours is not None:
            rows.append(Row(ours, min(peers, key=lambda record: record["median_ms"], default=None)))
    return rows


def function_of(record: Record) -> str:
    """The public function: a case's name begins with it."""
    return record["case"].partition(" ")[0]


def summary(rows: list[Row]) -> str:
    """ "faster than the best peer in 60 of 70 measurements, even in 6, SLOWER in 4"."""
    count = Counter(row.verdict for row in rows)
    text = f"faster than the best peer in {count['faster']} of {len(rows)} measurements, even in {count['even']}, "
    text += f"SLOWER in {count['SLOWER']}"
    return text + (f", without a peer in {count['no peer']}" if count["no peer"] else "")


def terminal_text(document: dict[str, Any]) -> str:
    """Forward and forward+backward of a case side by side."""
    rows = {case_key(row.ours): row for row in compare(document["records"])}
    modes = [mode for mode in MODES if any(key[-1] == mode for key in rows)]
    lines = []
    for case in dict.fromkeys(key[:-1] for key in rows):
        _, name, dtype, threads = case
        line = [name, dtype, threads]
        for mode in modes:
            row = rows.get((*case, mode))
            line += [_ms(row.ours), row.ratio, _number(row.ours["ratio_to_limit"])] if row else [""] * 3
        forward = rows.get((*case, FORWARD))
        lines.append([*line, forward.peer["provider"] if forward and forward.peer else ""])
    headers = ["case", "dtype", "thr"]
    headers += [header for mode in modes for header in (f"{_SHORT[mode]} ms", "× best peer", "× limit")]
    headers += ["best peer, fwd"]
    parts = [tabulate(lines, headers=headers, tablefmt="simple", disable_numparse=True)] if lines else []
    parts += [_yardsticks(document["records"], rows)]
    parts += [f"{op}: {summary(group)}" for op, group in _by_op(rows.values()).items()]
    parts += [_model_text(model) for model in document["models"]]
    reasons = dict.fromkeys(f"{entry['provider']} ({entry['reason']})" for entry in document["not_run"])
    if reasons:
        parts.append(f"not run, in some cases at least: {', '.join(reasons)}")
    if document["load"] > 0.5:
        parts.append(f"The machine was busy before the run (load {document['load']:.1f}): expect noise.")
    return "\n\n".join(filter(None, parts))


def _yardsticks(records: list[Record], rows: dict[tuple, Row]) -> str:
    """Cases that have a yardstick, with the time of each of their providers over ours."""
    keys = dict.fromkeys(case_key(record) for record in records if record["yardstick"])
    chosen = [rows[key] for key in keys if key in rows]
    return _all_providers(records, chosen, "simple") if chosen else ""


def write(document: dict[str, Any], folder: Path) -> Path:
    """Writes report.md and the plots into folder; returns report.md."""
    from fastmix.benchmarks.run import write_text

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    write_text(path, markdown(document, committed_documents(), folder))
    return path


def committed_documents() -> dict[str, dict[str, Any]]:
    """File name → document of the records that come with the package."""
    folder = resources.files("fastmix.benchmarks") / "results"
    if not folder.is_dir():
        return {}
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def markdown(document: dict[str, Any], committed: dict[str, dict[str, Any]], folder: Path) -> str:
    """The whole report; plots are written into folder."""
    parts = ["# fastmix benchmarks", READING, "## This run", _how(document)]
    parts += _failures(document)
    parts += _sections(document, folder, "")
    for name, recorded in committed.items():
        parts += [f"## Recorded elsewhere: {name}", _how(recorded), *_freshness(recorded)]
        parts += _sections(recorded, folder, f"{Path(name).stem}-")
    return "\n\n".join(parts) + "\n"


def _how(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    limits = "; ".join(
        f"{_threads(entry)}, {entry['dtype']}: copy {entry['copy_gbps']:.4g} GB/s, "
        f"matrix product {entry['product_gflops']:.4g} GFLOP/s"
        + (f", exp {entry['exp_gops']:.3g} G/s" if entry.get("exp_gops") else "")
        for entry in document["limits"]
    )
    answers = ", ".join(f"{op}: {answer}{f' ({why})' if why else ''}" for op, _, answer, why in document["answers"])
    rows = [
        ("device", document["device"]),
        ("time", f"{document['time']}, {document['mode']} mode, OMP_WAIT_POLICY {document['wait_policy']}"),
        ("load before the run", f"{document['load']:.1f}; other processes' work shows in these figures"),
        ("versions", versions),
        ("revision", document["revision"] or "not in a clone"),
        ("limits", limits),
        ("answered by", answers),
    ]
    return _table(rows, ("", ""))


def _failures(document: dict[str, Any]) -> list[str]:
    if not document["failures"]:
        return []
    rows = [(failure["case"], failure.get("dtype", ""), failure["reason"]) for failure in document["failures"]]
    return ["**Parity failures. Nothing is recorded for these cases:**", _table(rows, ("case", "dtype", "reason"))]


def _freshness(document: dict[str, Any]) -> list[str]:
    """A line for each op whose source is another now than when it was recorded."""
    device = document["device"].partition(":")[0]
    recorded = {record["op"]: record["source_digest"] for record in document["records"]}
    lines = []
    for op, digest in recorded.items():
        now = provenance.source_digest(op, device)
        if now.partition(":")[0] != digest.partition(":")[0]:
            lines.append(f"{op}: whether the source has changed since can be told in a clone only.")
        elif now != digest:
            lines.append(f"**{op}: stale.** The op's source has changed since these figures were recorded.")
    return lines


def _sections(document: dict[str, Any], folder: Path, prefix: str) -> list[str]:
    parts = []
    by_op = _by_op(compare(document["records"]))
    for op in dict.fromkeys([*by_op, *(model["op"] for model in document["models"])]):
        rows = by_op.get(op, [])
        parts += [f"### {op}"]
        if rows:
            parts += [f"fastmix is {summary(rows)}."]
            with_limit = [row for row in rows if row.ours["ratio_to_limit"] is not None]
            parts += [_plot(with_limit, folder, f"{prefix}{op}.png")] if with_limit else []
        modes = {row.ours["mode"] for row in rows}
        for function in dict.fromkeys(function_of(row.ours) for row in rows):
            for mode in MODES:
                chosen = [row for row in rows if function_of(row.ours) == function and row.ours["mode"] == mode]
                if chosen:
                    title = f"{function}, {mode}" if len(modes) > 1 else function
                    parts += [f"#### {title}", _comparison(chosen)]
                    parts += [
                        "Median ms of every provider, and over ours:",
                        _all_providers(document["records"], chosen),
                    ]
        parts += _not_run(document, op)
        models = [model for model in document["models"] if model["op"] == op]
        parts += ["#### Whole models", *map(_model_text, models)] if models else []
    return parts


def _comparison(rows: list[Row]) -> str:
    with_limit, with_peak, with_size = (
        any(row.ours[figure] is not None for row in rows) for figure in ("ratio_to_limit", "peak_mib", "bytes_per_key")
    )
    table = []
    for row in rows:
        ours, peer = row.ours, row.peer
        line = [_size(ours), ours["dtype"], ours["threads"], _ms(ours), f"{ours['p20_ms']:.3f} to {ours['p80_ms']:.3f}"]
        if with_limit:
            line += [f"{ours['gbps']:.1f}", f"{ours['gflops']:.1f}", _number(ours["ratio_to_limit"])]
        line += [peer["provider"], _ms(peer), f"{ours['ratio_to_best_peer']:.2f}"] if peer else [""] * 3
        line += [f"**{row.verdict}**" if row.verdict == "SLOWER" else row.verdict]
        if with_peak:
            line += [_figure(ours, "peak_mib"), _figure(peer, "peak_mib")]
        if with_size:
            line += [_figure(ours, "bytes_per_key"), _figure(peer, "bytes_per_key")]
        table.append(line)
    headers = ["case", "dtype", "threads", "ours, ms", "p20 to p80"]
    headers += ["GB/s", "GFLOP/s", "× limit"] if with_limit else []
    headers += ["best peer", "its ms", "× best peer", ""]
    headers += ["peak, MiB", "best peer's peak"] if with_peak else []
    headers += ["bytes a key", "best peer's"] if with_size else []
    return _table(table, headers)


def _all_providers(records: list[Record], rows: list[Row], form: str = "pipe") -> str:
    ours = {case_key(row.ours): row.ours["median_ms"] for row in rows}
    medians: dict[tuple, dict[str, str]] = {}
    for record in records:
        if case_key(record) in ours:
            place = (_size(record), record["dtype"], record["threads"])
            name = f"{record['provider']} (yardstick)" if record["yardstick"] else record["provider"]
            ratio = f" ({record['median_ms'] / ours[case_key(record)]:.3g} ×)" if record["provider"] != OURS else ""
            medians.setdefault(place, {})[name] = _ms(record) + ratio
    providers = list(dict.fromkeys(name for figures in medians.values() for name in figures))
    table = [[*place, *(figures.get(name, "") for name in providers)] for place, figures in medians.items()]
    return _table(table, ["case", "dtype", "threads", *providers], form)


def _not_run(document: dict[str, Any], op: str) -> list[str]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for entry in document["not_run"]:
        if entry["op"] == op:
            key = (function_of(entry), entry["provider"], entry["reason"])
            reasons.setdefault(key, []).append(entry["mode"])
    if not reasons:
        return []
    table = [
        (function, provider, reason, ", ".join(f"{modes.count(mode)} × {mode}" for mode in MODES if mode in modes))
        for (function, provider, reason), modes in reasons.items()
    ]
    return ["#### Peers not run", _table(table, ("function", "peer", "reason", "cases"))]


def _model_text(model: dict[str, Any]) -> str:
    title = f"{model['model']}, {_threads(model)}"
    if "not_run" in model:
        return f"{title}: not run: {model['not_run']}"
    return (
        f"{title}: {model['before_ms']:.1f} ms with the model's own layers, {model['after_ms']:.1f} ms with fastmix "
        f"(medians of {model['rounds']} rounds). The replaced layers take {model['share']:.1%} of the time, "
        f"{model['layers_before_ms']:.2f} ms in the model and then {model['layers_after_ms']:.2f} ms; alone they "
        f"become {model['layer_ratio']:.2f} × as fast, so the model can gain at most {model['bound']:.3f} ×. It gained "
        f"{model['speedup']:.3f} ×, {model['part_of_bound']:.0%} of the time there is to save."
    )


def _plot(rows: list[Row], folder: Path, name: str) -> str:
    try:
        from fastmix.benchmarks import plots
    except ImportError:
        return "No plot: matplotlib is not installed."
    plots.draw(rows, folder / name)
    return f"![Time and ratios against size]({name})"


def _by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.ours["op"], []).append(row)
    return groups


def _ms(record: Record) -> str:
    return f"{record['median_ms']:.3f}"


def _threads(entry: dict[str, Any]) -> str:
    return f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"


def _size(record: Record) -> str:
    return record["case"].partition(" ")[2] or record["case"]


def _figure(record: Record | None, name: str) -> str:
    return "" if record is None or record[name] is None else f"{record[name]:.1f}"


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _table(rows: Iterable[Iterable[Any]], headers: Iterable[str], form: str = "pipe") -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return tabulate(cells, headers=list(headers), tablefmt=form, disable_numparse=True)

"""The command line: `fastmix doctor | bench | parity | trie`. Each command's body is imported when it is called."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastmix import __version__
from fastmix.testing import OPS


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastmix", description="Checks and measures fastmix on this machine.")
    parser.add_argument("--version", action="version", version=f"fastmix {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="what is installed, and what answers each op on each device")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="times the ops against their peers and the machine's limits")
    _add_ops(bench)
    bench.add_argument(
        "--full", action="store_true", help="every peer, torch.compile, more rounds, peak memory; some 20 minutes an op"
    )
    bench.add_argument("--threads", type=_positive, help="threads of PyTorch (default: its own choice)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="writes the records")
    bench.add_argument("--report", type=Path, metavar="DIR", help="writes report.md with plots")
    bench.set_defaults(run=_bench)

    parity = commands.add_parser("parity", help="compares the kernels with the PyTorch reference in float64")
    _add_ops(parity)
    parity.set_defaults(run=_parity)

    trie = commands.add_parser("trie", help="builds, describes and looks into files of prefix trees")
    _add_trie_commands(trie.add_subparsers(required=True, metavar="command"))
    return parser


def _add_trie_commands(commands: argparse._SubParsersAction) -> None:
    build = commands.add_parser("build", help="builds a trie and writes it to a file")
    build.add_argument("keys", type=Path, metavar="KEYS", help="JSON lines, one list of ints a line; or .npy, 2-D ints")
    build.add_argument("out", type=Path, metavar="OUT", help="the file, written beside its place and renamed")
    build.add_argument("--vocab-size", type=_positive, help="every token is smaller (default: the largest token + 1)")
    build.add_argument("--pad-id", type=int, help="what fills up the rows of a .npy behind their tokens")
    build.add_argument("--substrings", action="store_true", help="all substrings: each line or row is a passage")
    build.set_defaults(run=_trie, action="build")

    info = commands.add_parser("info", help="what a file holds")
    info.add_argument("file", type=Path, metavar="FILE")
    info.add_argument("--verify", action="store_true", help="compare the checksum of all bytes, however large the file")
    info.set_defaults(run=_trie, action="info")

    lookup = commands.add_parser("lookup", help="whether tokens are a prefix or a key; exit code 1 if they are neither")
    lookup.add_argument("file", type=Path, metavar="FILE")
    lookup.add_argument("tokens", type=int, nargs="*", metavar="TOKENS", help="ints; none: the empty prefix")
    lookup.set_defaults(run=_trie, action="lookup")


def _add_ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", type=_op, metavar="op", help=f"{', '.join(OPS)} (default: all)")
    parser.add_argument(
        "--device", type=_device, choices=("cpu", "cuda"), help="default: cuda if there is a device, else cpu"
    )


def _op(name: str) -> str:
    if name not in OPS:
        raise argparse.ArgumentTypeError(f"unknown op {name!r}; the ops are {', '.join(OPS)}")
    return name


def _device(name: str) -> str:
    if name == "cuda" and not _has_cuda():
        raise argparse.ArgumentTypeError("PyTorch sees no CUDA device here")
    return name


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _chosen_device(arguments: argparse.Namespace) -> str:
    return arguments.device or ("cuda" if _has_cuda() else "cpu")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def _doctor(arguments: argparse.Namespace) -> int:
    from fastmix import doctor

    return doctor.main()


def _bench(arguments: argparse.Namespace) -> int:
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP reads it once, when PyTorch is loaded. Spinning threads would stall each other on a loaded machine.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    from fastmix.benchmarks import run

    return run.main(
        arguments.ops or list(OPS),
        _chosen_device(arguments),
        arguments.full,
        arguments.threads,
        arguments.json,
        arguments.report,
    )


def _parity(arguments: argparse.Namespace) -> int:
    from fastmix.testing import run

    return run.main(arguments.ops or list(OPS), _chosen_device(arguments))


def _trie(arguments: argparse.Namespace) -> int:
    from fastmix import _trie_cli

    return _trie_cli.main(arguments)

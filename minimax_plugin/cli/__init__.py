# SPDX-License-Identifier: Apache-2.0
"""The ``minimax-plugin`` command. Each sub-command is one module, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from minimax_plugin import __version__

#: Sub-command -> one-line help. The module of the same name has ``add_arguments(parser)`` and ``run(args) -> int``.
COMMANDS = {
    "doctor": "check versions, registration and, with MODEL_DIR, whether a checkpoint is complete",
    "run": "run a program that does not import the plugin (trl, lm_eval, a script) as if it did",
    "train": "fine-tune with CISPO from a YAML file of settings",
    "tiny": "write a small, complete checkpoint of the MiniMax-M1 architecture with random weights",
}

#: Sub-commands whose arguments are parsed by somebody else: argparse would take `-m` and `--help` for its own. Their
#: modules have ``run_program(argv) -> int`` in place of ``run``.
PASSING_ON = ("run", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status: 0 success, 1 a fault was found, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in PASSING_ON and argv[1:] not in (["-h"], ["--help"]):
        return importlib.import_module(f"{__name__}.{argv[0]}").run_program(argv[1:])
    parser = argparse.ArgumentParser(prog="minimax-plugin", description="MiniMax-M1 for Hugging Face and vLLM.")
    parser.add_argument("--version", action="version", version=f"minimax-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            importlib.import_module(f"{__name__}.{name}").add_arguments(command)
    args = parser.parse_args(argv)
    return importlib.import_module(f"{__name__}.{args.command}").run(args)

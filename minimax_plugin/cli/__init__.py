# SPDX-License-Identifier: Apache-2.0
"""The ``minimax-plugin`` command. Each sub-command is one module, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Sub-command -> one-line help. The module of the same name has ``add_arguments(parser)`` and ``run(args) -> int``.
COMMANDS = {
    "doctor": "check versions, registration and, with MODEL_DIR, whether a checkpoint is complete",
    "tiny": "write a small, complete checkpoint of the MiniMax-M1 architecture with random weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status: 0 success, 1 a fault was found, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="minimax-plugin", description="MiniMax-M1 for Hugging Face and vLLM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            importlib.import_module(f"{__name__}.{name}").add_arguments(command)
    args = parser.parse_args(argv)
    return importlib.import_module(f"{__name__}.{args.command}").run(args)

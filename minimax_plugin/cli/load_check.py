# SPDX-License-Identifier: Apache-2.0
"""Does transformers load the small files of a checkpoint? Asked of transformers itself, after the pure checks.

The weights are not loaded: their headers say as much, see :mod:`minimax_plugin.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minimax_plugin.checkpoint import CONFIG_FILE, CheckpointReport, Fault
from minimax_plugin.side_files import GENERATION_FILE, SPECIAL_FILES, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE


def loading_faults(report: CheckpointReport) -> list[Fault]:
    """What transformers refuses of a folder that :func:`minimax_plugin.checkpoint.check_checkpoint` has looked at.

    Files with a fault in ``report`` are left out: they need no second line, and some would keep a reader waiting.
    """
    directory = report.directory
    faulty = {fault.file for fault in report.faults}
    if report.architecture is None:
        return []  # transformers reads config.json first, whatever it is to load
    faults = _tried(CONFIG_FILE, lambda auto: auto.AutoConfig.from_pretrained(directory))
    if faults or any(fault.kind == SPECIAL_FILES for fault in report.faults):
        return faults
    if (directory / GENERATION_FILE).is_file() and GENERATION_FILE not in faulty:
        faults += _tried(GENERATION_FILE, lambda auto: auto.GenerationConfig.from_pretrained(directory))
    if (directory / TOKENIZER_FILE).is_file() and not {TOKENIZER_FILE, TOKENIZER_CONFIG_FILE} & faulty:
        faults += _tried(
            "tokenizer files", lambda auto: auto.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        )
    return faults


def _tried(file: str, load: Callable[[Any], object]) -> list[Fault]:
    try:
        import transformers
    except Exception:  # a fault of the machine, which has a line of its own
        return []
    try:
        load(transformers)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        message = " ".join(str(error).split())
        return [Fault(file, "", f"transformers cannot load it ({type(error).__name__}: {message})")]
    return []

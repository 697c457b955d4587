# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint folder beside the weights: is each of them what its name says? Pure Python.

``tokenizer.json`` is parsed by the ``tokenizers`` library where that is installed. What the contents mean to
transformers is for transformers to say, see ``minimax-plugin doctor``.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimax_plugin.checkpoint_files import WEIGHTS_SUFFIX, file_problem, read_json
from minimax_plugin.config_fields import TOKEN_FIELDS, field_fault
from minimax_plugin.config_rules import shown
from minimax_plugin.faults import Fault

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"

#: What transformers and vLLM read of a folder; each of these is a JSON object.
_JSON_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    GENERATION_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
)

#: ``kind`` of the faults of pipes and devices.
SPECIAL_FILES = "entries are no regular files"

#: More entries than any checkpoint folder has.
_MAX_ENTRIES = 100_000


def side_file_faults(directory: Path, *, vocab_size: int | None) -> list[Fault]:
    """Everything wrong with the files beside weights and config.

    Args:
        directory: of the checkpoint.
        vocab_size: of the model, None where the config does not say; no token may have this id or a higher one.
    """
    faults = list(_special_files(directory))
    contents: dict[str, dict[str, Any]] = {}
    for name in _JSON_FILES:
        if os.path.lexists(directory / name) and file_problem(directory / name) != "no regular file":
            content = read_json(directory / name, faults)
            if content is not None:
                contents[name] = content
    if TOKENIZER_FILE in contents:
        faults += _tokenizer_faults(directory / TOKENIZER_FILE, contents[TOKENIZER_FILE], vocab_size)
    faults += _generation_faults(contents.get(GENERATION_FILE, {}), vocab_size)
    return faults


def _special_files(directory: Path) -> Iterator[Fault]:
    """Pipes and devices in the folder: opening one of them can wait for ever."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in itertools.islice(entries, _MAX_ENTRIES))
    except OSError as error:
        yield Fault(str(directory), "", f"a folder that cannot be listed ({error.strerror})", "a checkpoint directory")
        return
    for name in names:
        looked_at = name == CONFIG_FILE or name.endswith((WEIGHTS_SUFFIX, ".index.json"))
        if not looked_at and file_problem(directory / name) == "no regular file":
            yield Fault(name, "", "no regular file", "a file", kind=SPECIAL_FILES)


def _tokenizer_faults(path: Path, content: dict[str, Any], vocab_size: int | None) -> Iterator[Fault]:
    if not isinstance(content.get("model"), dict):
        yield Fault(path.name, "model", shown(content.get("model")), "an object")
        return
    if importlib.util.find_spec("tokenizers") is None:
        return
    import tokenizers

    try:
        ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        yield Fault(path.name, "", f"a file that the tokenizers library refuses ({error})", "a tokenizer")
        return
    highest = max(ids, default=0)
    if vocab_size is not None and highest >= vocab_size:
        yield Fault(path.name, "", f"a token of the id {highest}", f"ids below vocab_size = {vocab_size}")


def _generation_faults(content: dict[str, Any], vocab_size: int | None) -> Iterator[Fault]:
    for name in TOKEN_FIELDS:
        value = content.get(name)
        wrong = field_fault(name, value)
        if wrong is not None:
            yield Fault(GENERATION_FILE, "", wrong)
        elif vocab_size is not None and value is not None:
            ids = value if isinstance(value, list) else [value]
            if max(ids) >= vocab_size:
                yield Fault(GENERATION_FILE, name, shown(value), f"ids below vocab_size = {vocab_size}")

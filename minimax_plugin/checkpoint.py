# SPDX-License-Identifier: Apache-2.0
"""Is a checkpoint directory complete? Pure Python: reads ``config.json``, the index and the safetensors headers.

No tensor data is read, so the 413 shards (912 GB) of the released model are checked in seconds and without torch.
The checks name file, tensor or field, what was found and what was expected, and report every fault instead of the
first one. Nobody has to vouch for the directory: sizes are bounded, no file outside of it is opened, nothing hangs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimax_plugin.architecture import ORIGINAL_ARCHITECTURES, Architecture, TensorSpec
from minimax_plugin.checkpoint_files import (
    WEIGHTS_SUFFIX,
    file_problem,
    num_bytes,
    read_header,
    read_json,
    shard_name_problem,
)
from minimax_plugin.config_fields import CONVERTED_MODEL_TYPE, config_faults, field_fault
from minimax_plugin.config_rules import shown
from minimax_plugin.faults import CheckpointError, Fault, FaultList, count, summary
from minimax_plugin.side_files import CONFIG_FILE, side_file_faults

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "ORIGINAL_MODEL_TYPES",
    "SINGLE_FILE",
    "WEIGHTS_SUFFIX",
    "CheckpointError",
    "CheckpointReport",
    "Fault",
    "check_checkpoint",
    "read_safetensors_header",
    "require_complete",
    "require_safetensors",
    "require_shard_names",
    "require_sound_files",
    "require_sound_index",
    "weight_file_names",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: ``model_type`` values of checkpoints in the original format. The released configuration class writes its own name
#: (``MiniMaxM1``) into everything it saves, the released ``config.json`` says ``minimax_m1``.
ORIGINAL_MODEL_TYPES = (*ORIGINAL_ARCHITECTURES.values(), "MiniMaxM1")

#: ``model_type`` -> entry of ``architectures``. vLLM finds the model by any of them and reads the format from the type.
_ARCHITECTURES = {model_type: name for name, model_type in ORIGINAL_ARCHITECTURES.items()}
_ARCHITECTURES |= {"MiniMaxM1": _ARCHITECTURES["minimax_m1"], CONVERTED_MODEL_TYPE: "MiniMaxForCausalLM"}

#: What transformers saves besides causal language models. vLLM serves none of these.
_TRANSFORMERS_ONLY = tuple(
    name.replace("ForCausalLM", part)
    for name in ORIGINAL_ARCHITECTURES
    for part in ("Model", "ForSequenceClassification")
)

#: ``dtype`` (``torch_dtype`` before transformers 5) of a config -> safetensors dtype.
_SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

#: Files that hold weights in a format that runs code when it is read, or may.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_EXPECTED_NAME = f"the name of a {WEIGHTS_SUFFIX} file in this folder"


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`check_checkpoint` saw.

    ``notes`` say what was left unchecked and why; ``architecture`` is None where the config is at fault. ``faults``
    holds the first 10,000 faults, ``num_faults`` counts all.
    """

    directory: Path
    faults: list[Fault] = field(default_factory=FaultList)
    notes: list[str] = field(default_factory=list)
    architecture: Architecture | None = None
    num_files: int = 0
    num_tensors: int = 0
    total_size: int = 0

    @property
    def complete(self) -> bool:
        return not self.faults

    @property
    def num_faults(self) -> int:
        return count(self.faults)

    def lines(self) -> list[str]:
        """The faults, those of one kind in one line where they are many."""
        return summary(self.faults)


def check_checkpoint(directory: str | Path) -> CheckpointReport:
    """Check a checkpoint directory against its index and against :mod:`minimax_plugin.architecture`.

    Never raises for bad content; every fault is in the report.
    """
    directory = Path(directory)
    faults = FaultList()
    notes: list[str] = []
    problem = file_problem(directory)
    if problem != "a folder":
        faults.append(Fault(str(directory), "", problem or "a file", "a checkpoint directory"))
        return CheckpointReport(directory, faults)
    config = read_json(directory / CONFIG_FILE, faults)
    architecture = _read_architecture(config, faults, notes) if config is not None else None
    faults.extend(side_file_faults(directory, vocab_size=architecture.vocab_size if architecture else None))
    expected = _expected_tensors(config, architecture, notes) if config is not None else None

    weight_map, index_size = _read_index(directory, faults)
    stored, unreadable = _read_shards(directory, weight_map or {}, faults)
    total = sum(num_bytes(spec) for spec in stored.values())
    if expected is not None and weight_map is not None:
        _compare(weight_map, stored, unreadable, expected, faults)
    if index_size is not None and not faults and index_size != total:
        faults.append(Fault(INDEX_FILE, "metadata.total_size", str(index_size), f"{total}, the sum of all tensors"))
    return CheckpointReport(
        directory,
        faults,
        notes,
        architecture,
        num_files=len(set((weight_map or {}).values())),
        num_tensors=len(stored),
        total_size=total,
    )


def weight_file_names(variant: str | None = None) -> tuple[str, str]:
    """Names of the index and of the single file: where transformers looks for weights.

    ``variant`` is what it puts into the names of files in another precision, ``model.<variant>.safetensors``.
    """
    if variant is None:
        return INDEX_FILE, SINGLE_FILE
    return f"model.safetensors.index.{variant}.json", f"model.{variant}.safetensors"


def require_complete(directory: str | Path) -> CheckpointReport:
    """:func:`check_checkpoint`, raising where the checkpoint is not complete.

    Raises:
        CheckpointError: with one line per fault.
    """
    report = check_checkpoint(directory)
    _raise_if(report.faults, report.directory)
    return report


def require_sound_files(directory: str | Path, *, variant: str | None = None) -> None:
    """Check the files of a checkpoint directory against each other, not against any architecture.

    Every shard that the index names lies beside it and is whole, and holds the tensors that the index places in it. A
    path without safetensors files of the usual names (a repository id, another format) is nothing to check.

    Args:
        directory: of the files.
        variant: see :func:`weight_file_names`.

    Raises:
        CheckpointError: with one line per fault.
    """
    directory = Path(directory)
    index_file, single_file = weight_file_names(variant)
    if not directory.is_dir() or all(
        file_problem(directory / file) == "no such file" for file in (index_file, single_file)
    ):
        return
    faults = FaultList()
    weight_map, _ = _read_index(directory, faults, index_file, single_file)
    if weight_map is not None:
        _read_shards(directory, weight_map, faults)
    _raise_if(faults, directory)


def require_safetensors(directory: str | Path, *, variant: str | None = None, any_name: bool = False) -> None:
    """Refuse a folder without safetensors files, before a library falls back to reading pickles.

    Args:
        directory: to look into.
        variant: see :func:`weight_file_names`.
        any_name: take any file of the format, as vLLM does, instead of those names.

    Raises:
        CheckpointError: there is none; the message names the weights that are there instead.
    """
    directory = Path(directory)
    names = weight_file_names(variant)
    if any(file_problem(directory / name) != "no such file" for name in names):
        return
    others = sorted(path.name for pattern in (f"*{WEIGHTS_SUFFIX}", *_PICKLES) for path in directory.glob(pattern))
    if any_name and any(name.endswith(WEIGHTS_SUFFIX) for name in others):
        return
    found = f"only {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else "no weights"
    expected = f"{' or '.join(names)}: this package reads safetensors alone, because reading a pickle runs code"
    raise CheckpointError(directory, [Fault(str(directory), "", found, expected)])


def require_sound_index(path: str | Path) -> None:
    """Check the structure of an index file, wherever it lies, and the names of the shards in it. Opens no shard.

    Raises:
        CheckpointError: with one line per fault.
    """
    path = Path(path)
    faults = FaultList()
    content = read_json(path, faults)
    if content is not None:
        _parse_index(content, path.name, faults, needs_metadata=True)
    _raise_if(faults, path.parent)


def require_shard_names(names: set[str], source: str | Path) -> None:
    """Refuse shard names that lead out of the folder or to a file of another format, see :func:`shard_name_problem`.

    Raises:
        CheckpointError: with one line per fault.
    """
    _raise_if(FaultList(_name_faults(names, INDEX_FILE)), source)


def read_safetensors_header(path: str | Path) -> dict[str, TensorSpec]:
    """Names, shapes and safetensors dtypes of one file, in file order. Reads the header only.

    Raises:
        CheckpointError: the file is absent, truncated or not a safetensors file.
    """
    path = Path(path)
    faults: list[Fault] = []
    header = read_header(path, faults)
    _raise_if(faults, path.parent)
    assert header is not None
    return header


def _read_architecture(config: Mapping[str, Any], faults: list[Fault], notes: list[str]) -> Architecture | None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        faults.append(Fault(CONFIG_FILE, "model_type", shown(model_type), f"one of {', '.join(_ARCHITECTURES)}"))
        return None
    wrong = config_faults(config)
    faults.extend(Fault(CONFIG_FILE, "", line) for line in wrong)
    if not any(line.startswith("architectures") for line in wrong):
        _check_architectures(config.get("architectures"), _ARCHITECTURES[model_type], faults, notes)
    return None if wrong else Architecture.from_config(config)


def _check_architectures(stated: list[str] | None, expected: str, faults: list[Fault], notes: list[str]) -> None:
    """vLLM finds the model by ``architectures``, transformers by ``model_type``."""
    names = set(stated or ())
    served = names & set(_ARCHITECTURES.values())
    if not served and names.isdisjoint(_TRANSFORMERS_ONLY):
        found = shown(stated) if stated else "nothing"
        faults.append(Fault(CONFIG_FILE, "architectures", found, f"[{expected!r}], by which vLLM finds the model"))
    elif not served:
        notes.append(f"architectures is {shown(stated)}: for transformers, vLLM does not serve it")


def _expected_tensors(
    config: Mapping[str, Any], architecture: Architecture | None, notes: list[str]
) -> dict[str, TensorSpec] | None:
    """Tensors that the config promises, or None with a note where names and shapes follow other rules."""
    if architecture is None:
        return None
    if config.get("model_type") == CONVERTED_MODEL_TYPE:
        notes.append("model_type 'minimax' (converted -hf format): tensor names and shapes are not checked")
        return None
    if config.get("quantization_config"):
        notes.append("quantization_config is present: tensor names, shapes and dtypes are not checked")
        return None
    if set(config.get("architectures") or ()) & set(_TRANSFORMERS_ONLY):
        return None
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if name not in _SAFETENSORS_DTYPES:
        notes.append(f"config dtype {name!r} is none of {', '.join(_SAFETENSORS_DTYPES)}: dtypes checked as bfloat16")
    dtype = _SAFETENSORS_DTYPES.get(name, "BF16")
    return {
        tensor: TensorSpec(spec.shape, dtype if spec.dtype == "BF16" else spec.dtype)
        for tensor, spec in architecture.tensors().items()
    }


def _read_index(
    directory: Path, faults: list[Fault], index_file: str = INDEX_FILE, single_file: str = SINGLE_FILE
) -> tuple[dict[str, str] | None, int | None]:
    """Tensor name -> file name, and the total size in bytes that the index states (None without an index)."""
    for path in sorted(directory.glob(f"consolidated*{WEIGHTS_SUFFIX}")):
        faults.append(Fault(path.name, "", "it beside the weights", "it elsewhere: vLLM would read it in their place"))
    has_single = file_problem(directory / single_file) != "no such file"
    if file_problem(directory / index_file) == "no such file":
        if not has_single:
            faults.append(Fault(index_file, "", "no such file", f"{index_file} or {single_file} in {directory}"))
            return None, None
        header = read_header(directory / single_file, faults)
        return None if header is None else dict.fromkeys(header, single_file), None
    content = read_json(directory / index_file, faults)
    if content is None:
        return None, None
    weight_map, total_size = _parse_index(content, index_file, faults, needs_metadata=not has_single)
    if has_single and weight_map is not None and set(weight_map.values()) != {single_file}:
        expected = "one of the two: transformers reads this file and vLLM those of the index"
        found = f"it beside {index_file}, which does not name it alone"
        faults.append(Fault(single_file, "", found, expected))
    return weight_map, total_size


def _parse_index(
    index: Mapping[str, Any], file: str, faults: list[Fault], *, needs_metadata: bool
) -> tuple[dict[str, str] | None, int | None]:
    """The sound part of an index: entries whose files may be opened, and the total size if it is a number."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        found = f"a {type(weight_map).__name__}" if not isinstance(weight_map, dict) else "entries that are no strings"
        faults.append(Fault(file, "weight_map", found, "an object of tensor name -> file name"))
        return None, None
    if not weight_map:
        faults.append(Fault(file, "weight_map", "no tensors", "all tensors of the model"))
    refused = {name for name in set(weight_map.values()) if shard_name_problem(name) is not None}
    faults.extend(_name_faults(refused, file))
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        if metadata is not None or needs_metadata:
            faults.append(Fault(file, "metadata", shown(metadata), "an object, which transformers reads"))
        metadata = {}
    wrong_dtype = field_fault("dtype", metadata.get("dtype"))
    if wrong_dtype is not None:
        faults.append(Fault(file, "metadata", wrong_dtype))
    total_size = metadata.get("total_size")
    if total_size is not None and (not isinstance(total_size, int | float) or total_size != total_size // 1):
        faults.append(Fault(file, "metadata.total_size", shown(total_size), "a number of bytes"))
        total_size = None
    sound = {name: shard for name, shard in weight_map.items() if shard not in refused} if refused else weight_map
    return sound, None if total_size is None else int(total_size)


def _name_faults(names: set[str], file: str) -> list[Fault]:
    problems = {name: shard_name_problem(name) for name in sorted(names)}
    kind = f"of {len(names):,} shard names are refused"
    return [
        Fault(file, f"shard {shown(name)}", problem, _EXPECTED_NAME, kind)
        for name, problem in problems.items()
        if problem
    ]


def _read_shards(
    directory: Path, weight_map: Mapping[str, str], faults: list[Fault]
) -> tuple[dict[str, TensorSpec], set[str]]:
    """Tensors found in the shards, and the names of shards that could not be read (one fault each)."""
    stored: dict[str, TensorSpec] = {}
    unreadable: set[str] = set()
    names_by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names_by_file.setdefault(file, []).append(name)
    for file in sorted(names_by_file):
        header = read_header(directory / file, faults, num_shards=len(names_by_file))
        if header is None:
            unreadable.add(file)
            continue
        for name in names_by_file[file]:
            if name in header:
                stored[name] = header[name]
            else:
                expected = f"it here, as {INDEX_FILE} says"
                kind = "tensors are not where the index says"
                faults.append(Fault(file, f"tensor {name}", "no such tensor", expected, kind))
        for name in sorted(header.keys() - names_by_file[file]):
            found = f"it here, but {INDEX_FILE} places it in {weight_map.get(name, 'no file')}"
            kind = "tensors are where the index does not place them"
            faults.append(Fault(file, f"tensor {name}", found, "the file that the index names", kind))
    return stored, unreadable


def _compare(
    weight_map: Mapping[str, str],
    stored: Mapping[str, TensorSpec],
    unreadable: set[str],
    expected: Mapping[str, TensorSpec],
    faults: list[Fault],
) -> None:
    def fault(file: str, name: str, found: str, wanted: str, kind: str) -> None:
        faults.append(Fault(file, f"tensor {name}", found, wanted, f"of {len(expected):,} tensors {kind}"))

    for name, spec in expected.items():
        if name not in weight_map:
            fault(INDEX_FILE, name, "no such tensor", f"{spec.dtype} {list(spec.shape)}", "missing")
        elif weight_map[name] not in unreadable and name in stored:
            found = stored[name]
            if found.shape != spec.shape:
                fault(weight_map[name], name, f"shape {list(found.shape)}", str(list(spec.shape)), "of another shape")
            if found.dtype != spec.dtype:
                fault(weight_map[name], name, f"dtype {found.dtype}", spec.dtype, "of another dtype")
    kind = "unknown tensors"
    for name in sorted(stored.keys() - expected.keys()):
        wanted = "only tensors of the architecture"
        faults.append(Fault(weight_map[name], f"tensor {name}", "an unknown tensor", wanted, kind))


def _raise_if(faults: list[Fault], source: str | Path) -> None:
    if faults:
        raise CheckpointError(source, faults)

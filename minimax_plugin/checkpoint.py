# SPDX-License-Identifier: Apache-2.0
"""Is a checkpoint directory complete? Pure Python: reads ``config.json``, the index and the safetensors headers.

No tensor data is read, so the 413 shards (912 GB) of the released model are checked in seconds and without torch.
The checks name file, tensor or field, what was found and what was expected, and report every fault instead of the
first one.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimax_plugin.architecture import ORIGINAL_ARCHITECTURES, Architecture, TensorSpec

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: ``model_type`` values of checkpoints in the original format. The released configuration class writes its own name
#: (``MiniMaxM1``) into everything it saves, the released ``config.json`` says ``minimax_m1``.
ORIGINAL_MODEL_TYPES = (*ORIGINAL_ARCHITECTURES.values(), "MiniMaxM1")

#: ``dtype`` (``torch_dtype`` before transformers 5) of a config -> safetensors dtype.
_SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

#: Every dtype that safetensors 0.8 knows.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}

#: The safetensors format allows no larger header; a bigger number means that the file is something else.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a checkpoint. ``subject`` is a tensor, a config field or empty (the file as a whole)."""

    file: str
    subject: str
    found: str
    expected: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.subject}" if self.subject else self.file
        return f"{where}: found {self.found}, expected {self.expected}"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. ``faults`` holds every fault; the message has one line for each."""

    def __init__(self, directory: Path, faults: list[Fault]) -> None:
        self.faults = faults
        lines = "\n".join(f"  {fault}" for fault in faults)
        super().__init__(f"checkpoint {directory} has {len(faults)} fault(s):\n{lines}")


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`check_checkpoint` saw.

    ``notes`` say what was left unchecked and why; ``architecture`` is None where the config is at fault.
    """

    directory: Path
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    architecture: Architecture | None = None
    num_files: int = 0
    num_tensors: int = 0
    total_size: int = 0

    @property
    def complete(self) -> bool:
        return not self.faults


def check_checkpoint(directory: str | Path) -> CheckpointReport:
    """Check a checkpoint directory against its index and against :mod:`minimax_plugin.architecture`.

    Never raises for bad content; every fault is in the report.
    """
    directory = Path(directory)
    faults: list[Fault] = []
    notes: list[str] = []
    if not directory.is_dir():
        return CheckpointReport(directory, [Fault(str(directory), "", "no such directory", "a checkpoint directory")])
    config = _read_json(directory / CONFIG_FILE, faults)
    architecture = _read_architecture(config, faults) if config is not None else None
    expected = _expected_tensors(config, architecture, notes) if config is not None else None

    weight_map, index_size = _read_index(directory, faults)
    stored, unreadable = _read_shards(directory, weight_map or {}, faults)
    total = sum(_nbytes(spec) for spec in stored.values())
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


def require_complete(directory: str | Path) -> CheckpointReport:
    """:func:`check_checkpoint`, raising where the checkpoint is not complete.

    Raises:
        CheckpointError: with one line per fault.
    """
    report = check_checkpoint(directory)
    if report.faults:
        raise CheckpointError(report.directory, report.faults)
    return report


def require_sound_files(directory: str | Path) -> None:
    """Check the files of a checkpoint directory against each other, not against any architecture.

    Every shard that the index names is there and whole, and holds the tensors that the index places in it. A path
    without safetensors files of the usual names (a repository id, another format) is nothing to check.

    Raises:
        CheckpointError: with one line per fault.
    """
    directory = Path(directory)
    if not ((directory / INDEX_FILE).is_file() or (directory / SINGLE_FILE).is_file()):
        return
    faults: list[Fault] = []
    weight_map, _ = _read_index(directory, faults)
    if weight_map is not None:
        _read_shards(directory, weight_map, faults)
    if faults:
        raise CheckpointError(directory, faults)


def read_safetensors_header(path: str | Path) -> dict[str, TensorSpec]:
    """Names, shapes and safetensors dtypes of one file, in file order. Reads the header only.

    Raises:
        CheckpointError: the file is absent, truncated or not a safetensors file.
    """
    path = Path(path)
    faults: list[Fault] = []
    header = _read_header(path, faults)
    if faults:
        raise CheckpointError(path.parent, faults)
    return header


def _read_json(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        faults.append(Fault(path.name, "", "no such file", f"{path.name} in {path.parent}"))
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        faults.append(Fault(path.name, "", f"unreadable content ({error})", "a JSON object"))
        return None
    if not isinstance(content, dict):
        faults.append(Fault(path.name, "", f"a JSON {type(content).__name__}", "a JSON object"))
        return None
    return content


def _read_architecture(config: Mapping[str, Any], faults: list[Fault]) -> Architecture | None:
    model_type = config.get("model_type")
    if model_type not in (*ORIGINAL_MODEL_TYPES, "minimax"):
        known = ", ".join((*ORIGINAL_MODEL_TYPES, "minimax"))
        faults.append(Fault(CONFIG_FILE, "model_type", repr(model_type), f"one of {known}"))
        return None
    try:
        return Architecture.from_config(config)
    except (ValueError, TypeError) as error:
        faults.append(Fault(CONFIG_FILE, "", f"an impossible architecture ({error})", "a MiniMax-M1 architecture"))
        return None


def _expected_tensors(
    config: Mapping[str, Any], architecture: Architecture | None, notes: list[str]
) -> dict[str, TensorSpec] | None:
    """Tensors that the config promises, or None with a note where names and shapes follow other rules."""
    if architecture is None:
        return None
    if config.get("model_type") == "minimax":
        notes.append("model_type 'minimax' (converted -hf format): tensor names and shapes are not checked")
        return None
    if config.get("quantization_config"):
        notes.append("quantization_config is present: tensor names, shapes and dtypes are not checked")
        return None
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if name not in _SAFETENSORS_DTYPES:
        notes.append(f"config dtype {name!r} is none of {', '.join(_SAFETENSORS_DTYPES)}: dtypes checked as bfloat16")
    dtype = _SAFETENSORS_DTYPES.get(name, "BF16")
    return {
        tensor: TensorSpec(spec.shape, dtype if spec.dtype == "BF16" else spec.dtype)
        for tensor, spec in architecture.tensors().items()
    }


def _read_index(directory: Path, faults: list[Fault]) -> tuple[dict[str, str] | None, int | None]:
    """Tensor name -> file name, and the total size in bytes that the index states (None without an index)."""
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        single = directory / SINGLE_FILE
        if not single.exists():
            faults.append(Fault(INDEX_FILE, "", "no such file", f"{INDEX_FILE} or {SINGLE_FILE} in {directory}"))
            return None, None
        header_faults: list[Fault] = []
        header = _read_header(single, header_faults)
        faults.extend(header_faults)
        return (None, None) if header_faults else (dict.fromkeys(header, SINGLE_FILE), None)
    index = _read_json(index_path, faults)
    if index is None:
        return None, None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        found = f"a {type(weight_map).__name__}" if not isinstance(weight_map, dict) else "entries that are no strings"
        faults.append(Fault(INDEX_FILE, "weight_map", found, "an object of tensor name -> file name"))
        return None, None
    if (directory / SINGLE_FILE).is_file() and SINGLE_FILE not in weight_map.values():
        expected = "one of the two: transformers reads this file and vLLM those of the index"
        faults.append(Fault(SINGLE_FILE, "", f"it beside {INDEX_FILE}, which does not name it", expected))
    metadata = index.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total_size is not None and (not isinstance(total_size, int | float) or total_size != total_size // 1):
        faults.append(Fault(INDEX_FILE, "metadata.total_size", repr(total_size), "a number of bytes"))
        total_size = None
    return weight_map, total_size if total_size is None else int(total_size)


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
        shard_faults: list[Fault] = []
        header = _read_header(directory / file, shard_faults)
        if shard_faults:
            unreadable.add(file)
            faults.extend(shard_faults)
            continue
        for name in names_by_file[file]:
            if name in header:
                stored[name] = header[name]
            else:
                faults.append(Fault(file, f"tensor {name}", "no such tensor", f"it here, as {INDEX_FILE} says"))
        for name in sorted(header.keys() - names_by_file[file]):
            found = f"it here, but {INDEX_FILE} places it in {weight_map.get(name, 'no file')}"
            faults.append(Fault(file, f"tensor {name}", found, "the file that the index names"))
    return stored, unreadable


def _compare(
    weight_map: Mapping[str, str],
    stored: Mapping[str, TensorSpec],
    unreadable: set[str],
    expected: Mapping[str, TensorSpec],
    faults: list[Fault],
) -> None:
    for name, spec in expected.items():
        if name not in weight_map:
            faults.append(Fault(INDEX_FILE, f"tensor {name}", "no such tensor", f"{spec.dtype} {list(spec.shape)}"))
        elif weight_map[name] not in unreadable and name in stored:
            found = stored[name]
            if found.shape != spec.shape:
                faults.append(
                    Fault(weight_map[name], f"tensor {name}", f"shape {list(found.shape)}", str(list(spec.shape)))
                )
            if found.dtype != spec.dtype:
                faults.append(Fault(weight_map[name], f"tensor {name}", f"dtype {found.dtype}", spec.dtype))
    for name in sorted(stored.keys() - expected.keys()):
        faults.append(
            Fault(weight_map[name], f"tensor {name}", "an unknown tensor", "only tensors of the architecture")
        )


def _read_header(path: Path, faults: list[Fault]) -> dict[str, TensorSpec]:
    """The header of one safetensors file; on any fault, one entry in ``faults`` and an empty result."""

    def fault(found: str, expected: str) -> dict[str, TensorSpec]:
        faults.append(Fault(path.name, "", found, expected))
        return {}

    if not path.is_file():
        return fault("no such file", f"a safetensors file in {path.parent}")
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if prefix == b"version ":
            return fault(f"a Git LFS pointer of {size} bytes", "the file itself (git lfs pull, or download it again)")
        if len(prefix) < 8:
            return fault(f"{size} bytes", "a safetensors file of at least 8 bytes (download it again)")
        (header_size,) = struct.unpack("<Q", prefix)
        if header_size > _MAX_HEADER_BYTES:
            return fault(f"a header of {header_size} bytes", "a safetensors file")
        raw = stream.read(header_size)
    if len(raw) < header_size:
        return fault(f"{size} bytes", f"at least {8 + header_size} bytes: the file is truncated (download it again)")
    try:
        tensors, end = _parse_header(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return fault(f"a header that cannot be read ({error})", "a safetensors header")
    if size != 8 + header_size + end:
        state = "truncated" if size < 8 + header_size + end else "longer than its header says"
        return fault(f"{size} bytes", f"{8 + header_size + end} bytes: the file is {state} (download it again)")
    return tensors


def _parse_header(raw: bytes) -> tuple[dict[str, TensorSpec], int]:
    """Tensors of a safetensors header and the length of the data section that it describes."""
    tensors: dict[str, TensorSpec] = {}
    end = 0
    for name, entry in json.loads(raw).items():
        if name == "__metadata__":
            continue
        begin, stop = entry["data_offsets"]
        spec = TensorSpec(tuple(entry["shape"]), entry["dtype"])
        if stop - begin != _nbytes(spec):
            raise ValueError(f"tensor {name} of {spec.dtype} {list(spec.shape)} takes {stop - begin} bytes")
        tensors[name] = spec
        end = max(end, stop)
    return tensors, end


def _nbytes(spec: TensorSpec) -> int:
    if spec.dtype not in _BITS:
        raise ValueError(f"unknown safetensors dtype {spec.dtype!r}")
    return math.prod(spec.shape) * _BITS[spec.dtype] // 8

# SPDX-License-Identifier: Apache-2.0
"""Reading the files of a checkpoint folder that nobody vouches for, in pure Python.

Everything is bounded before it is read: kind of file, size, nesting. Headers are held to the safetensors format, and so
accepted only where the safetensors library accepts them. It lets a few things pass that the format rules out (names
that come twice, white space before the header, entries with other fields); this module does not.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

from minimax_plugin.architecture import TensorSpec
from minimax_plugin.config_rules import shown, structure_fault
from minimax_plugin.faults import Fault

WEIGHTS_SUFFIX = ".safetensors"

#: Far above every released file: the index of 8,243 tensors has 0.7 MB.
MAX_JSON_BYTES = 64_000_000

#: The safetensors format allows no larger header; a bigger number means that the file is something else.
_MAX_HEADER_BYTES = 100_000_000

#: Every dtype that safetensors 0.8 knows.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}

_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}

#: Sizes and offsets are unsigned 64-bit integers.
_SIZE_LIMIT = 2**64

#: The longest file name of the file systems in use.
_MAX_NAME_BYTES = 255


def shard_name_problem(name: str) -> str | None:
    """What makes a file name of an index one that nobody may open, or None.

    The rule of both backends: the name of a ``.safetensors`` file in the folder of the index. A path can lead out of
    the folder, and transformers unpickles every file of another suffix. Where the file lies is not asked: in the cache
    of a hub every shard is a symbolic link.
    """
    if not name:
        return "an empty name"
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "a name that is not Unicode"
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "a name with control characters"
    if "/" in name or "\\" in name or re.match("[A-Za-z]:", name):
        return "a path"
    if name.startswith("."):
        return "a hidden file"
    if not name.endswith(WEIGHTS_SUFFIX):
        return f"a file that is no {WEIGHTS_SUFFIX}"
    return f"a name of {len(encoded)} bytes" if len(encoded) > _MAX_NAME_BYTES else None


def file_problem(path: Path) -> str | None:
    """Why ``path`` cannot be read as a file, or None. Follows symbolic links and opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:
        return f"a file that cannot be looked at ({_reason(error)})"
    if stat.S_ISDIR(mode):
        return "a folder"
    return None if stat.S_ISREG(mode) else "no regular file"


def read_json(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
    """The JSON object in a file; on any fault, one entry in ``faults`` and None."""
    try:
        content = _load_json(path)
        nested = structure_fault("content", content)
        if nested is not None:
            raise _RefusedError(nested, "")
    except _RefusedError as refused:
        faults.append(Fault(path.name, "", *refused.args))
        return None
    return content


def read_header(path: Path, faults: list[Fault], *, num_shards: int = 1) -> dict[str, TensorSpec] | None:
    """The tensors of one safetensors file by name; on any fault, one entry in ``faults`` and None.

    ``num_shards`` is for the line that many faults of one kind share.
    """
    try:
        return _load_header(path)
    except _RefusedError as refused:
        found, expected, kind = refused.args
    except (OSError, ValueError) as error:
        found, expected, kind = f"a header that cannot be read ({_reason(error)})", "a safetensors header", "unreadable"
    faults.append(Fault(path.name, "", found, expected, f"of {num_shards:,} shards {kind}"))
    return None


class _RefusedError(Exception):
    """What was found, what was expected and, of a shard, in which state that leaves it."""


def _load_json(path: Path) -> dict[str, Any]:
    problem = file_problem(path)
    if problem is not None:
        raise _RefusedError(problem, f"{path.name} in {path.parent}")
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise _RefusedError(f"more than {MAX_JSON_BYTES:,} bytes", "a JSON object")
        content = json.loads(raw.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise _RefusedError(f"unreadable content ({_reason(error)})", "a JSON object") from None
    except RecursionError:
        raise _RefusedError("lists or objects nested too deeply", "a JSON object") from None
    if not isinstance(content, dict):
        raise _RefusedError(f"a JSON {type(content).__name__}", "a JSON object")
    return content


def _load_header(path: Path) -> dict[str, TensorSpec]:
    problem = file_problem(path)
    if problem is not None:
        raise _RefusedError(problem, f"a safetensors file in {path.parent}", "missing")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if prefix == b"version ":
            expected = "the file itself (git lfs pull, or download it again)"
            raise _RefusedError(f"a Git LFS pointer of {size} bytes", expected, "Git LFS pointers")
        if len(prefix) < 8:
            expected = "a safetensors file of at least 8 bytes (download it again)"
            raise _RefusedError(f"{size} bytes", expected, "truncated")
        (header_size,) = struct.unpack("<Q", prefix)
        if header_size > _MAX_HEADER_BYTES:
            raise _RefusedError(f"a header of {header_size} bytes", "a safetensors file", "unreadable")
        if size < 8 + header_size:
            expected = f"at least {8 + header_size} bytes: the file is truncated (download it again)"
            raise _RefusedError(f"{size} bytes", expected, "truncated")
        raw = stream.read(1) if header_size else b""
        if raw != b"{":
            raise ValueError(f"it begins with {raw!r} instead of '{{'")
        raw += stream.read(header_size - 1)
    tensors, end = parse_header(raw)
    whole = 8 + header_size + end
    if size != whole:
        state = "truncated" if size < whole else "longer than its header says"
        raise _RefusedError(f"{size} bytes", f"{whole} bytes: the file is {state} (download it again)", state)
    return tensors


def parse_header(raw: bytes) -> tuple[dict[str, TensorSpec], int]:
    """Tensors of a safetensors header by name, and the length of the data section that they describe.

    Raises:
        ValueError: not a header of the safetensors format.
    """
    text = raw.decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("it does not begin with '{'")
    try:
        header = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_unsigned,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("lists or objects nested too deeply") from None
    _check_metadata(header.pop("__metadata__", None))
    tensors: dict[str, TensorSpec] = {}
    extents: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        name.encode()  # a lone surrogate is no Unicode, and raises
        tensors[name], begin, stop = _parse_entry(name, entry)
        extents.append((begin, stop, name))
    end = 0
    for begin, stop, name in sorted(extents):
        if begin != end:
            state = "overlaps another" if begin < end else "leaves a hole before it"
            raise ValueError(f"tensor {shown(name)} at bytes {begin} to {stop} {state}")
        end = stop
    return tensors, end


def num_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor in a safetensors file.

    Raises:
        ValueError: an unknown dtype, a size beyond 64 bits, or no whole number of bytes.
    """
    if spec.dtype not in _BITS:
        raise ValueError(f"unknown safetensors dtype {shown(spec.dtype)}")
    elements = 1
    for length in spec.shape:  # in this order and with this limit, as the library does, before a zero can hide a size
        elements *= length
        if elements >= _SIZE_LIMIT:
            raise ValueError("a size beyond 64 bits")
    bits = elements * _BITS[spec.dtype]
    if bits >= _SIZE_LIMIT:
        raise ValueError("a size beyond 64 bits")
    if bits % 8:
        raise ValueError(f"{elements} values of {spec.dtype} do not fill whole bytes")
    return bits // 8


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    where = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_FIELDS:
        raise ValueError(f"{where} is {shown(entry)}, expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{where} has the dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(type(length) is int for length in shape):
        raise ValueError(f"{where} has the shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"{where} has the data_offsets {shown(offsets)}")
    spec = TensorSpec(tuple(shape), dtype)
    begin, stop = offsets
    try:
        expected = num_bytes(spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if stop - begin != expected:
        raise ValueError(
            f"{where} of {dtype} {shown(shape)} takes {stop - begin} bytes by its offsets and {expected} by its shape"
        )
    return spec, begin, stop


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ is {shown(metadata)}, expected an object of strings")
    for key, value in metadata.items():
        (key + value).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} comes twice")
    return content


def _unsigned(text: str) -> int:
    if text.startswith("-") or len(text) > 20 or int(text) >= _SIZE_LIMIT:
        raise ValueError(f"the number {shown(text)}, expected an unsigned 64-bit integer")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"the number {shown(text)}, expected an unsigned 64-bit integer")


def _reason(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)

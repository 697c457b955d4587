# SPDX-License-Identifier: Apache-2.0
"""Files that nobody vouches for: headers as the safetensors library takes them, names that stay in the folder, nothing
that hangs, and every fault one printable line.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from minimax_plugin.checkpoint_files import file_problem, parse_header, read_header, read_json, shard_name_problem
from minimax_plugin.faults import CheckpointError, Fault, FaultList, one_line, summary

BITS = {"F32": 32, "BF16": 16, "F16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F4": 4}


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def file_of(header: Any, data: int = 8) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def raw_entry(fields: bytes) -> bytes:
    return b'{"a":{' + fields + b"}}"


def verdicts(content: bytes, path: Path) -> tuple[str, str]:
    """What is wrong with a file, in the words of this package and of the safetensors library; empty if nothing is."""
    path.write_bytes(content)
    faults: list[Fault] = []
    header = read_header(path, faults)
    assert (header is None) == bool(faults) and len(faults) <= 1
    try:
        with safe_open(path, "pt") as reader:
            stored = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping
            library = ""
    except SafetensorError as error:
        library = str(error) or "refused"
    if header is not None and not library:
        assert {name: (list(spec.shape), spec.dtype) for name, spec in header.items()} == {
            name: (slice.get_shape(), slice.get_dtype()) for name, slice in stored.items()
        }
    return (faults[0].found + faults[0].expected if faults else ""), library


SOUND = {
    "one tensor": file_of({"a": entry()}),
    "metadata": file_of({"__metadata__": {"format": "pt"}, "a": entry()}),
    "null metadata": file_of({"__metadata__": None, "a": entry()}),
    "padded with spaces": file_of(json.dumps({"a": entry()}).encode() + b"   "),
    "scalar": file_of({"a": entry(shape=[], offsets=[0, 4])}, 4),
    "no elements": file_of({"a": entry(), "b": entry(shape=[0], offsets=[8, 8]), "c": entry(offsets=[8, 16])}, 16),
    "no elements at the start": file_of({"a": entry(), "b": entry(shape=[0, 3], offsets=[0, 0])}),
    "other order than the data": file_of({"b": entry(offsets=[8, 16]), "a": entry()}, 16),
    "four bits": file_of({"a": entry("F4", [4], [0, 2])}, 2),
    "surrogate pair": file_of(b'{"a\\ud83d\\ude00":' + json.dumps(entry()).encode() + b"}"),
    "no tensors": file_of({}, 0),
}
#: Refused by the library too.
DAMAGED = {
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "'b' at bytes 4 to 12 overlaps"),
    "same range": (file_of({"a": entry(), "b": entry()}), "overlaps another"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, 20), "'b' at bytes 12 to 20 leaves a hole"),
    "hole at the start": (file_of({"a": entry(offsets=[4, 12])}, 12), "'a' at bytes 4 to 12 leaves a hole"),
    "no elements inside": (file_of({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}), "overlaps another"),
    "backwards": (file_of({"a": entry(shape=[0], offsets=[4, 0])}, 0), "takes -4 bytes by its offsets and 0"),
    "shape against offsets": (file_of({"a": entry(shape=[3])}), "takes 8 bytes by its offsets and 12 by its shape"),
    "bytes after the data": (file_of({"a": entry()}, 9), "longer than its header says"),
    "truncated data": (file_of({"a": entry()}, 7), "truncated"),
    "float offset": (file_of({"a": entry(offsets=[0, 8.0])}), "the number '8.0', expected an unsigned"),
    "exponent": (file_of(raw_entry(b'"dtype":"F32","shape":[2],"data_offsets":[0,8e0]')), "the number '8e0'"),
    "boolean offset": (file_of({"a": entry(offsets=[False, 8])}), "has the data_offsets [False, 8]"),
    "negative offset": (file_of({"a": entry(offsets=[-8, 0])}), "the number '-8'"),
    "negative zero": (file_of(raw_entry(b'"dtype":"F32","shape":[2],"data_offsets":[-0,8]')), "the number '-0'"),
    "string offset": (file_of({"a": entry(offsets=["0", 8])}), "has the data_offsets ['0', 8]"),
    "three offsets": (file_of({"a": entry(offsets=[0, 8, 8])}), "has the data_offsets [0, 8, 8]"),
    "float length": (file_of({"a": entry(shape=[2.0])}), "the number '2.0'"),
    "boolean length": (file_of({"a": entry(shape=[True, 2])}), "has the shape [True, 2]"),
    "no shape": (file_of({"a": entry(shape=None)}), "has the shape None"),
    "over 64 bits": (file_of({"a": entry(shape=[2**40, 2**40])}), "a size beyond 64 bits"),
    "over 64 bits, then none": (file_of({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, 0), "beyond 64 bits"),
    "bits over 64 bits": (file_of({"a": entry(shape=[2**60], offsets=[0, 0])}, 0), "beyond 64 bits"),
    "length over 64 bits": (file_of({"a": entry(shape=[2**64], offsets=[0, 0])}, 0), "unsigned 64-bit integer"),
    "part of a byte": (file_of({"a": entry("F4", [3], [0, 2])}, 2), "do not fill whole bytes"),
    "unknown dtype": (file_of({"a": entry("F128")}), "unknown safetensors dtype 'F128'"),
    "dtype in small letters": (file_of({"a": entry("f32")}), "unknown safetensors dtype 'f32'"),
    "dtype of another type": (file_of({"a": entry(0)}), "has the dtype 0"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}), "expected an object of dtype, shape"),
    "entry is a number": (file_of({"a": 1}, 0), "'a' is 1, expected an object"),
    "dtype twice": (file_of(raw_entry(b'"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]')), "comes twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "a": entry()}), "expected an object of strings"),
    "metadata is a list": (file_of({"__metadata__": [], "a": entry()}), "expected an object of strings"),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}', 0), "'__metadata__' comes twice"),
    "empty header": (file_of(b"", 0), "begins with b'' instead of"),
    "list": (file_of([], 0), "begins with b'[' instead of"),
    "null": (file_of(None, 0), "begins with b'n' instead of"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}", 0), "begins with b'\\xef' instead of"),
    "two bytes per character": (file_of("{}".encode("utf-16-le"), 0), "cannot be read"),
    "no Unicode": (file_of(b'{"a\xff":' + json.dumps(entry()).encode() + b"}"), "cannot be read"),
    "lone surrogate": (file_of(b'{"a\\ud800":' + json.dumps(entry()).encode() + b"}"), "cannot be read"),
    "control character": (file_of(b'{"a\n":' + json.dumps(entry()).encode() + b"}"), "cannot be read"),
    "zero byte after the header": (file_of(json.dumps({"a": entry()}).encode() + b"\0"), "cannot be read"),
    "deep": (file_of(raw_entry(b'"x":' + b"[" * 100_000 + b"]" * 100_000)), "nested too deeply"),
    "NaN": (file_of(raw_entry(b'"x":NaN,"dtype":"F32","shape":[2],"data_offsets":[0,8]')), "the number 'NaN'"),
    "header larger than the file": (struct.pack("<Q", 99) + b"{}", "the file is truncated"),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes"),
}
#: Against the format, and taken by the library.
AGAINST_THE_FORMAT = {
    "white space in front": (file_of(b" " + json.dumps({"a": entry()}).encode()), "begins with b' '"),
    "name twice": (file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)), "'a' comes twice"),
    "other field": (file_of({"a": entry(x=1)}), "expected an object of dtype, shape and data_offsets"),
    "entry is a list": (file_of({"a": ["F32", [2], [0, 8]]}), "expected an object of dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_headers(case: str, tmp_path: Path) -> None:
    assert verdicts(SOUND[case], tmp_path / "a.safetensors") == ("", "")


@pytest.mark.parametrize("case", DAMAGED)
def test_headers_that_the_library_refuses(case: str, tmp_path: Path) -> None:
    content, expected = DAMAGED[case]
    ours, library = verdicts(content, tmp_path / "a.safetensors")
    assert expected in ours and "\n" not in ours
    assert library


@pytest.mark.parametrize("case", AGAINST_THE_FORMAT)
def test_headers_against_the_format(case: str, tmp_path: Path) -> None:
    content, expected = AGAINST_THE_FORMAT[case]
    ours, library = verdicts(content, tmp_path / "a.safetensors")
    assert expected in ours
    assert not library, "the library refuses it too: move the case"


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header in any order with data of any of the dtypes behind it, and the length of the data."""
    tensors, end = {}, 0
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), unique=True, min_size=1, max_size=4)):
        if name == "__metadata__":
            continue
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(st.lists(st.integers(0, 3), max_size=3))
        elements = 1
        for length in shape:
            elements *= length
        if elements * BITS[dtype] % 8:
            dtype = "U8"
        size = elements * BITS[dtype] // 8
        tensors[name] = entry(dtype, shape, [end, end + size])
        end += size
    return {name: tensors[name] for name in draw(st.permutations(list(tensors)))}, end


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**32, 2**61, 2**63, 2**64, 10**30]),
    st.floats(),
    st.sampled_from(["", "F32", "bf16", "BF16", "F4", "0", "__metadata__", "dtype"]),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)


@given(sound_headers())
def test_every_sound_header_is_taken(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    assert verdicts(file_of(*drawn), path) == ("", "")


def mutate(data: st.DataObject, header: dict[str, Any], name: str) -> None:
    """Change one value, most often into one that is almost right: the same number in another type, a shifted range."""
    tensor = header[name]
    begin, stop = tensor["data_offsets"]
    place = data.draw(st.sampled_from(["shift"] * 4 + ["retype"] * 4 + ["length", "metadata", *tensor]))
    if place == "shift":
        by = data.draw(st.sampled_from([-1, 1, 4]))
        tensor["data_offsets"] = [begin + by, stop + by]
    elif place == "retype":
        numbers = data.draw(st.sampled_from([tensor["shape"] or tensor["data_offsets"], tensor["data_offsets"]]))
        position = data.draw(st.integers(0, len(numbers) - 1))
        number = numbers[position]
        others: list[Any] = [float(number), str(number), -number, [number], *([bool(number)] if number < 2 else [])]
        numbers[position] = data.draw(st.sampled_from(others))
    elif place == "length":
        tensor["shape"] = [*tensor["shape"], data.draw(VALUES)]
    elif place == "metadata":
        header["__metadata__"] = data.draw(VALUES)
    else:
        tensor[place] = data.draw(VALUES)


@settings(max_examples=300)
@given(sound_headers(), st.data())
def test_what_the_library_refuses_is_never_complete(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int], data: st.DataObject
) -> None:
    """One value of the header changed, or one byte of the file, or the file cut or lengthened."""
    header, size = drawn
    changes_header = data.draw(st.integers(0, 3)) > 0
    if changes_header and header:
        mutate(data, header, sorted(header)[data.draw(st.integers(0, len(header) - 1))])
        content = bytearray(file_of(header, size + data.draw(st.sampled_from([0, 0, 0, 1, 4]))))
    else:
        content = bytearray(file_of(header, size))
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            del content[position:]
    ours, library = verdicts(bytes(content), tmp_path_factory.getbasetemp() / "mutated.safetensors")
    assert ours or not library, f"taken, but the library says {library}"


def test_parse_header_is_for_whole_headers() -> None:
    tensors, size = parse_header(json.dumps({"a": entry()}).encode())
    assert tensors["a"].shape == (2,) and size == 8
    with pytest.raises(ValueError, match="does not begin with '{'"):
        parse_header(b" {}")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00005.safetensors", "a b.safetensors", "ä.safetensors", "x..safetensors"]
)
def test_names_of_shards(name: str) -> None:
    assert shard_name_problem(name) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../model.safetensors", "a path"),
        ("/etc/model.safetensors", "a path"),
        ("a/../../b.safetensors", "a path"),
        ("sub/b.safetensors", "a path"),
        ("./b.safetensors", "a path"),
        ("..\\b.safetensors", "a path"),
        ("C:b.safetensors", "a path"),
        ("c:\\b.safetensors", "a path"),
        ("", "an empty name"),
        (".", "a hidden file"),
        ("..", "a hidden file"),
        (".safetensors", "a hidden file"),
        ("a\0.safetensors", "a name with control characters"),
        ("a\n.safetensors", "a name with control characters"),
        ("\ud800.safetensors", "a name that is not Unicode"),
        ("pytorch_model.bin", "a file that is no .safetensors"),
        ("a.safetensors.bin", "a file that is no .safetensors"),
        ("a.SAFETENSORS", "a file that is no .safetensors"),
        ("a.safetensors ", "a file that is no .safetensors"),
        ("safetensors", "a file that is no .safetensors"),
        ("ä" * 200 + ".safetensors", "a name of 412 bytes"),
    ],
)
def test_names_that_nobody_opens(name: str, problem: str) -> None:
    assert shard_name_problem(name) == problem


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert str(file_problem(tmp_path / "circle")).startswith("a file that cannot be looked at (")
    found = {name: file_problem(tmp_path / name) for name in ("pipe", "dangling", "file", "link", "none")}
    assert found == {
        "pipe": "no regular file",
        "dangling": "a link that leads nowhere",
        "file": None,
        "link": None,
        "none": "no such file",
    }
    assert file_problem(tmp_path) == "a folder"
    assert file_problem(tmp_path / ("a" * 300)) == "a file that cannot be looked at (File name too long)"
    assert str(file_problem(tmp_path / "a\0")).startswith("a file that cannot be looked at (")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "expected at most 32 lists and objects inside each other"),
        (b'{"a":' + b"9" * 5_000 + b"}", "unreadable content"),
        (b'{"a": "\xff"}', "unreadable content ('utf-8' codec"),
        (b"\xef\xbb\xbf{}", "unreadable content"),
        (b"", "unreadable content (Expecting value"),
        (b"3", "found a JSON int, expected a JSON object"),
        (b"{} " + b" " * 64_000_000, "found more than 64,000,000 bytes"),
    ],
    ids=["deep", "deeper than any", "long number", "no UTF-8", "byte order mark", "empty", "number", "huge"],
)
def test_json_that_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    faults: list[Fault] = []
    assert read_json(tmp_path / "a.json", faults) is None
    (fault,) = faults
    assert expected in str(fault) and str(fault).startswith("a.json: ") and "\n" not in str(fault)


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *args: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "a").write_text("{}")
    monkeypatch.setattr(Path, "open", denied)
    faults: list[Fault] = []
    assert read_json(tmp_path / "a", faults) is None and read_header(tmp_path / "a", faults) is None
    assert [fault.found for fault in faults] == [
        "unreadable content (Permission denied)",
        "a header that cannot be read (Permission denied)",
    ]


def test_lines_are_printable_and_short() -> None:
    assert one_line("tensor ä") == "tensor ä"
    assert one_line("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"
    assert one_line("a" * 5_000) == "a" * 1_000 + "… (5,000 characters)"
    assert str(Fault("f\n", "s\r", "x", "y")) == "f\\n: s\\r: found x, expected y"
    assert str(Fault("f", "", "all is lost")) == "f: all is lost"


def test_many_faults_of_one_kind_share_a_line() -> None:
    missing = [Fault(f"{number}.safetensors", "", "nothing", "it", "of 9 shards missing") for number in range(7)]
    other = Fault("config.json", "x", "1", "2")
    assert summary([*missing[:3], other]) == [str(fault) for fault in (*missing[:3], other)]
    assert summary([missing[0], other, *missing[1:]]) == [
        "7 of 9 shards missing: 0.safetensors, 1.safetensors, 2.safetensors … and 4 more; the first: found nothing, "
        "expected it",
        str(other),
    ]
    tensors = [Fault("index", f"tensor {number}", "nothing", "it", "tensors missing") for number in range(4)]
    assert summary(tensors)[0].startswith("index: 4 tensors missing: tensor 0, tensor 1, tensor 2 … and 1 more;")


def test_faults_without_end_are_counted() -> None:
    faults = FaultList(Fault("f", str(number), "x", "y", f"kind {number}") for number in range(20_000))
    assert (len(faults), faults.total) == (10_000, 20_000)
    lines = summary(faults)
    assert len(lines) == 51 and lines[-1] == "… and 19,950 more faults"
    assert "has 20000 fault(s)" in str(CheckpointError("d", faults))


def test_the_error_survives_the_way_between_processes() -> None:
    error = CheckpointError("d", [Fault("f", "s", "x", "y")])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.faults == error.faults

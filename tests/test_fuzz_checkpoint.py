# SPDX-License-Identifier: Apache-2.0
"""Damaged indexes and headers: transformers loads exactly the stored tensors, or one clear error says why not.

A file outside of the folder holds a value that no model may ever hold. Seeds are fixed; each failure names its own.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import random_tensors, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import minimax_plugin  # noqa: F401
from minimax_plugin.checkpoint import CheckpointError, check_checkpoint

pytestmark = pytest.mark.slow

CASES = 1_200
BATCHES = 12
BAIT = 7.0
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"

Json = Any


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(num_hidden_layers=2, attn_type_list=[0, 1], num_local_experts=2)
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    write_checkpoint(directory, config, random_tensors(config), num_shards=3)
    shard = directory / SHARD
    bait = {name: torch.full_like(tensor, BAIT) for name, tensor in load_file(shard).items()}
    save_file(bait, directory.parent / "outside.safetensors")
    torch.save(bait, directory / "bait.bin")
    return directory


@pytest.fixture
def alarm() -> Iterator[Callable[[int], int]]:
    """Gives up after so many seconds: what hangs is told from a busy machine."""

    def give_up(*_: Any) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    yield signal.alarm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def elsewhere(directory: Path) -> list[str]:
    """Names that lead to the bait."""
    bait = directory.parent / "outside.safetensors"
    return ["../outside.safetensors", str(bait), f"../{directory.name}/../outside.safetensors", "bait.bin"]


def strange_values(chance: random.Random, directory: Path) -> Json:
    """Something that does not belong where it is put."""
    return chance.choice(
        [
            *(
                None,
                True,
                False,
                0,
                -1,
                1,
                2**31,
                2**63,
                2**64,
                10**30,
                1.5,
                float("nan"),
                float("inf"),
                "",
                "x",
                [],
                {},
            ),
            *([0], [0, 8], {"a": 1}, "F32", "BF16", "I8", *elsewhere(directory), "a\0b"),
            *(SHARD, "MODEL.SAFETENSORS", "C:x.safetensors", "\ud800.safetensors"),
            *("a" * 5_000, json.loads("[" * 50 + "]" * 50)),
        ]
    )


def places(content: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated_json(chance: random.Random, content: Json, directory: Path) -> Json:
    """One to three changes: a value replaced, removed, doubled, moved or exchanged with another."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        found = list(places(content))
        if not found:
            break
        *way, key = chance.choice(found)
        holder = content
        for step in way:
            holder = holder[step]
        change = chance.randrange(7)
        if change <= 1:
            holder[key] = strange_values(chance, directory)
        elif change == 2:
            del holder[key]
        elif change == 3 and isinstance(holder, dict):
            holder[chance.choice([str(strange_values(chance, directory)), f"{key} ", "__metadata__", "metadata"])] = (
                holder[key]
            )
        elif change == 4:
            other = chance.choice(list(holder if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
        elif change == 5 and isinstance(holder[key], dict | list):
            holder[key] = copy.deepcopy(
                holder[chance.choice(list(holder if isinstance(holder, dict) else range(len(holder))))]
            )
        elif isinstance(holder[key], int):
            holder[key] += chance.choice([-8, -4, -1, 1, 4, 8])
    return content


def mixed_ranges(chance: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """Tensors of one shape exchange their bytes, which is sound, or share them, which leaves a hole."""
    names = [name for name in header if name != "__metadata__"]
    one = chance.choice(names)
    other = chance.choice([name for name in names if header[name]["shape"] == header[one]["shape"]])
    if chance.random() < 0.5:
        header[one], header[other] = header[other], header[one]
    else:
        header[one] = header[other]
    return header


def mutated_bytes(chance: random.Random, raw: bytes) -> bytes:
    content = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(len(content)) if content else 0
        change = chance.randrange(4)
        if change == 0 and content:
            content[position] = chance.randrange(256)
        elif change == 1:
            del content[position : position + chance.randint(1, 64)]
        elif change == 2:
            content[position:position] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        else:
            del content[position:]
    return bytes(content)


def damage(chance: random.Random, directory: Path) -> str:
    """Change one file of the folder and say which and how."""
    shard = chance.choice(sorted(directory.glob("model-*.safetensors")))
    raw = shard.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + size], raw[8 + size :]
    kinds = ["index", "index", "rename", "index bytes", "header", "header", "ranges", "header bytes", "prefix", "data"]
    kind = chance.choice(kinds)
    if kind == "index":
        content = mutated_json(chance, json.loads((directory / INDEX).read_text()), directory)
        (directory / INDEX).write_text(json.dumps(content))
    elif kind == "rename":
        content = json.loads((directory / INDEX).read_text())
        name = chance.choice([*elsewhere(directory), strange_values(chance, directory)])
        content["weight_map"] = {key: name if file == SHARD else file for key, file in content["weight_map"].items()}
        (directory / INDEX).write_text(json.dumps(content))
    elif kind == "index bytes":
        (directory / INDEX).write_bytes(mutated_bytes(chance, (directory / INDEX).read_bytes()))
    elif kind == "prefix":
        changed = chance.choice(
            [0, 1, size - 1, size + 1, size + 8, 2**31, 2**63, 2**64 - 1, chance.randrange(2 * size)]
        )
        shard.write_bytes(struct.pack("<Q", changed) + raw[8:])
    elif kind == "data":
        shard.write_bytes(raw[: chance.randrange(len(raw))] if chance.random() < 0.7 else raw + b"x")
    else:
        if kind == "ranges":
            changed_header = json.dumps(mixed_ranges(chance, json.loads(header))).encode()
        elif kind == "header":
            changed_header = json.dumps(mutated_json(chance, json.loads(header), directory)).encode()
        else:
            changed_header = mutated_bytes(chance, header)
        shard.write_bytes(struct.pack("<Q", len(changed_header)) + changed_header + data)
    return f"{kind} of {shard.name}"


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """What a folder holds, as the safetensors library reads it by the index."""
    tensors: dict[str, Tensor] = {}
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    for file in sorted(set(weight_map.values())):
        tensors |= {
            name: tensor for name, tensor in load_file(directory / file).items() if weight_map.get(name) == file
        }
    return tensors


def check_case(seed: int, intact: Path, directory: Path) -> bool:
    """Damage, load, compare; True if it loaded."""
    chance = random.Random(seed)
    shutil.copytree(intact, directory)
    shutil.copy(intact.parent / "outside.safetensors", directory.parent)
    what = damage(chance, directory)
    report = check_checkpoint(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except (CheckpointError, ValueError) as error:
        assert str(error) and len(str(error)) < 60_000, f"seed {seed}: {what}"
        assert error.__cause__ is None or not isinstance(error.__cause__, RecursionError), f"seed {seed}: {what}"
        assert not report.complete, f"seed {seed}: {what}: complete to the doctor, but {error}"
        return False
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {what}: {type(error).__name__}: {error}") from error
    compare(model, directory, f"seed {seed}: {what}")
    return True


def compare(model: torch.nn.Module, directory: Path, what: str) -> None:
    """Every parameter is bit for bit what the folder holds."""
    stored = stored_tensors(directory)
    for name, value in model.named_parameters():
        assert not (value == BAIT).any(), f"{what}: read from outside"
        if name in stored:
            assert torch.equal(value, stored[name].float()), f"{what}: {name}"
        else:
            layer, _, part = name.rpartition(".")
            names = ("w1", "w3") if part == "gate_up_proj" else ("w2",)
            experts = [torch.cat([stored[f"{layer}.{i}.{w}.weight"] for w in names]) for i in range(len(value))]
            assert torch.equal(value, torch.stack(experts).float()), f"{what}: {name}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_checkpoints(
    batch: int, intact: Path, tmp_path: Path, alarm: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"unpickles {file}")

    monkeypatch.setattr(torch, "load", refuse)
    per_batch = CASES // BATCHES
    loaded = 0
    for seed in range(batch * per_batch, (batch + 1) * per_batch):
        alarm(60)
        loaded += check_case(seed, intact, tmp_path / "model")
        shutil.rmtree(tmp_path / "model")
    assert 0 < loaded < per_batch, "either nothing is damaged or nothing is intact"


def test_the_comparison_sees_a_changed_value(intact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(intact, dtype=torch.float32)
    compare(model, intact, "intact")
    for name in ("lm_head.weight", "model.layers.1.block_sparse_moe.experts.down_proj"):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.view(-1)[5] += 1e-3
        with pytest.raises(AssertionError, match=f"changed: {name}"):
            compare(model, intact, "changed")
        with torch.no_grad():
            parameter.view(-1)[5] = stored_tensors(intact)["lm_head.weight"].float().view(-1)[5]

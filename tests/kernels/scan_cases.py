# SPDX-License-Identifier: Apache-2.0
"""The laws of lightning attention on the Triton kernels: interpreted if TRITON_INTERPRET=1, else compiled for a GPU.

Not collected by itself: ``test_scan_interpreter.py`` runs it in a process of its own, ``test_scan_gpu.py`` imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import interpreter_shim
import pytest
import torch
from law_tools import Setting, prefill
from lightning_laws import LAWS

from minimax_plugin.kernels import lightning, ops

INTERPRETED = lightning.interpreted()
if INTERPRETED:
    interpreter_shim.install()

DEVICE = "cpu" if INTERPRETED else "cuda"

#: Several chunks in a segment and several programs in a head, at sizes the interpreter finishes in seconds. A GPU runs
#: the released head_dim with the tiles of the launch table.
SMALL = "BT=16,BV=16" if INTERPRETED else ""
BASE = Setting(device=DEVICE) if INTERPRETED else Setting(device=DEVICE, head_dim=128, segment=256)

SETTINGS: dict[str, tuple[Setting, str]] = {
    "fp32": (BASE, SMALL),
    "bf16": (replace(BASE, dtype=torch.bfloat16, exact_states=False), SMALL),
    "bf16-high": (replace(BASE, dtype=torch.bfloat16, precision="high"), SMALL),
}

SLOW_SETTINGS: dict[str, tuple[Setting, str]] = {
    # The mantissa of tf32 has the 10 bits of fp16, so fp16 states are as rough as bf16 ones on a GPU only.
    "fp16": (replace(BASE, dtype=torch.float16, exact_states=INTERPRETED), SMALL),
    "fp32-high": (replace(BASE, precision="high"), SMALL),
    "head-dim-24": (replace(BASE, head_dim=24), SMALL),
    "head-dim-8": (replace(BASE, head_dim=8), ""),
    "launch-table": (replace(BASE, dtype=torch.bfloat16, exact_states=False, head_dim=64, segment=128), ""),
}

#: What the precision changes; the other laws hold in it once they hold in fp32.
HIGH_LAWS = ("prefill_is_the_recurrence", "segment_states_add_up")

#: What the dtype does not change.
DTYPE_FREE_LAWS = (
    "any_strides_give_the_same_bits",
    "has_initial_false_ignores_garbage",
    "nan_elsewhere_never_leaks",
    "padding_writes_zeros",
    "slots_may_be_far_apart",
    "steep_slopes_do_not_overflow",
    "untouched_slots_stay",
)


def cases() -> Sequence[object]:
    """Every law in every setting; on a GPU none is slow."""
    found = []
    for name, (setting, tiles) in (SETTINGS | SLOW_SETTINGS).items():
        for law_name, law in LAWS.items():
            slow = name in SLOW_SETTINGS or (name == "bf16-high" and law_name not in HIGH_LAWS)
            slow = slow or (name == "bf16" and law_name in DTYPE_FREE_LAWS)
            marks = [pytest.mark.slow] if INTERPRETED and slow else []
            found.append(pytest.param(law, setting, tiles, id=f"{law_name}-{name}", marks=marks))
    return found


@pytest.fixture(autouse=True)
def _force_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAX_LIGHTNING_BACKEND", "triton")


@pytest.mark.parametrize(("law", "setting", "tiles"), cases())
def test_kernels_obey(
    law: Callable[[Setting], None], setting: Setting, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lightning.TILES_VARIABLE, tiles)
    law(setting)


def test_segments_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """One segment or many: the state carried between them is the state of the serial walk."""
    monkeypatch.setenv(lightning.TILES_VARIABLE, SMALL)
    qkv, pool = BASE.qkv(140), BASE.states(1)
    whole = prefill(replace(BASE, segment=256), qkv, pool, (140,), [0])
    parts = prefill(replace(BASE, segment=32), qkv, pool, (140,), [0])
    torch.testing.assert_close(parts.out, whole.out, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts.pool, whole.pool, rtol=1e-5, atol=1e-4)


def test_slots_of_either_integer_type() -> None:
    qkv = BASE.qkv(5)
    results = []
    for dtype in (torch.int32, torch.int64):
        pool, out = BASE.states(3), torch.empty_like(qkv[..., : BASE.head_dim])
        slot, flag = torch.tensor([2], dtype=dtype, device=DEVICE), torch.tensor([True], device=DEVICE)
        ops.lightning_prefill(qkv, BASE.slopes_tensor(), pool, slot, flag, BASE.plan(5), out=out)
        results.append((out, pool))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_prefill_without_activation() -> None:
    qkv, pool = BASE.qkv(40), BASE.states(1)
    found, activated = pool.clone(), pool.clone()
    out, expected = (torch.empty_like(qkv[..., : BASE.head_dim]) for _ in range(2))
    slot, flag = torch.tensor([0], device=DEVICE), torch.tensor([True], device=DEVICE)
    rest = (slot, flag, BASE.plan(40))
    ops.lightning_prefill(qkv, BASE.slopes_tensor(), activated, *rest, out=expected)
    silu = torch.nn.functional.silu(qkv)
    ops.lightning_prefill(silu, BASE.slopes_tensor(), found, *rest, out=out, activation=None)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, activated, rtol=1e-5, atol=1e-5)


def test_a_head_dim_beyond_the_kernels_is_refused() -> None:
    wide = replace(BASE, head_dim=264, slopes=(0.5,))
    with pytest.raises(ValueError, match="head_dim is 264, expected at most 256 in the Triton kernels"):
        prefill(wide, wide.qkv(2), wide.states(1), (2,), [0])


def test_tiles_that_are_no_tiles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("BT", "BT=x", "BX=16"):
        monkeypatch.setenv(lightning.TILES_VARIABLE, value)
        with pytest.raises(ValueError, match=f"MINIMAX_LIGHTNING_TILES is '{value}', expected a list like"):
            prefill(BASE, BASE.qkv(2), BASE.states(1), (2,), [0])


def test_tiles_wider_than_the_state_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of columns would be launched, and the output never written."""
    for value in ("BV=256", "BV=24", "BV=0"):
        monkeypatch.setenv(lightning.TILES_VARIABLE, value)
        with pytest.raises(ValueError, match=f"MINIMAX_LIGHTNING_TILES is '{value}', expected BV to divide"):
            prefill(BASE, BASE.qkv(2), BASE.states(1), (2,), [0])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("BT=7", "BT to be one of 16, 32, 64, 128, 256"),
        ("BT=0", "BT to be one of 16, 32, 64, 128, 256"),
        ("BT=-16", "BT to be one of 16, 32, 64, 128, 256"),
        ("BT=1048576", "BT to be one of 16, 32, 64, 128, 256"),
        ("BV=8", "BV to be one of 16, 32, 64, 128, 256"),
        ("BT=16,warps=3", "warps to be one of 1, 2, 4, 8, 16, 32"),
        ("BT=16,warps=0", "warps to be one of 1, 2, 4, 8, 16, 32"),
        ("stages=0", "stages to be one of 1, 2, 3, 4, 5, 6, 7, 8"),
    ],
)
def test_tiles_that_do_not_compile_are_refused_before_they_are_compiled(
    value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lightning.TILES_VARIABLE, value)
    with pytest.raises(ValueError, match=f"^MINIMAX_LIGHTNING_TILES is '{value}', expected {expected}$"):
        prefill(BASE, BASE.qkv(2), BASE.states(1), (2,), [0])


def test_the_forced_backend_is_the_one_under_test() -> None:
    assert ops.lightning_backend(torch.device(DEVICE)) == "triton"

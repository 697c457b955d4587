# SPDX-License-Identifier: Apache-2.0
"""Lightning attention in Triton: the launches of the scan kernels and their fixed launch table.

Shapes: ``T`` packed tokens, ``H`` heads, ``D`` head_dim, ``N`` sequences, ``G`` plan segments, ``S`` state slots.

A sequence is cut into segments that run in parallel (:class:`minimax_plugin.kernels.plan.LightningPlan`):

1. ``segment_state_kernel``: what each segment adds to the state when it starts from zeros;
2. ``segment_scan_kernel``: adds these up along the sequence, in place, into the state that each segment starts from;
3. ``chunk_scan_kernel``: walks each segment in chunks, state in registers, and writes the outputs.

A sequence of one segment needs the third only. With ``reverse`` the same kernels walk from the last token to the first;
the three gradients are such scans with the roles of the tensors permuted (:mod:`minimax_plugin.kernels.reference`).
"""

import functools
import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimax_plugin.kernels.launch_config import LAUNCH_OPTIONS, LaunchConfig, on_device
from minimax_plugin.kernels.optional_triton import HAS_TRITON, INTERPRETED
from minimax_plugin.kernels.scan import chunk_scan_kernel, segment_scan_kernel, segment_state_kernel

#: Largest head_dim the kernels are made for; a larger state tile does not fit the registers.
MAX_HEAD_DIM = 256

#: Overrides fields of :class:`Tiles`, for tuning and for tests: ``"BT=16,BV=32,warps=4,stages=1"``.
TILES_VARIABLE = "MINIMAX_LIGHTNING_TILES"


class Cut(NamedTuple):
    """The segments of a :class:`minimax_plugin.kernels.plan.LightningPlan`."""

    segments: Tensor
    offsets: Tensor
    max_segments: int


@dataclass(frozen=True)
class Tiles:
    """How ``chunk_scan_kernel`` is launched: tokens of a chunk, columns of the state per program, warps, stages."""

    BT: int
    BV: int
    warps: int
    stages: int = 2


#: Values that the fields of :class:`Tiles` may have: what matrix units and the compiler take.
TILES_ALLOWED = {
    "BT": (16, 32, 64, 128, 256),
    "BV": (16, 32, 64, 128, 256),
    "warps": (1, 2, 4, 8, 16, 32),
    "stages": (1, 2, 3, 4, 5, 6, 7, 8),
}

#: Tiles by architecture and arithmetic, chosen by what the compiler reports (registers, spills, matrix instructions).
#: SiLU and the extra products of "high" need registers of their own. fp16 and fp32 are multiplied in tf32 or three
#: products of it, which needs smaller tiles.
TILES = {
    "sm_80": {
        "bf16": Tiles(64, 32, 8),
        "bf16 silu": Tiles(64, 32, 4),
        "bf16 high": Tiles(64, 32, 8),
        "bf16 silu high": Tiles(64, 32, 4),
        "fp16": Tiles(32, 32, 8),
        "fp32": Tiles(16, 32, 8),
    },
    "sm_90": {
        "bf16": Tiles(64, 64, 4),
        "bf16 silu": Tiles(64, 64, 8),
        "bf16 high": Tiles(64, 64, 8),
        "bf16 silu high": Tiles(64, 32, 8),
        "fp16": Tiles(32, 64, 8),
        "fp32": Tiles(16, 32, 8),
    },
    "sm_100": {
        "bf16": Tiles(64, 64, 8),
        "fp16": Tiles(32, 64, 8),
        "fp32": Tiles(16, 32, 8),
    },
    "gfx942": {
        "bf16": Tiles(64, 64, 4),
        "fp16": Tiles(32, 32, 4),
        "fp32": Tiles(16, 32, 4),
    },
}

#: An architecture without a row of its own runs the smallest tiles.
DEFAULT_ARCHITECTURE = "sm_80"


def interpreted() -> bool:
    """Whether Triton runs the kernels in its interpreter, on CPU tensors."""
    return HAS_TRITON and INTERPRETED


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    cut: Cut,
    out: Tensor,
    *,
    has_initial: bool,
    precision: str,
    activation: str = "",
) -> None:
    """Outputs of packed sequences; ``state`` [N, H, D, D] holds the initial states and receives the final ones."""
    pool = _Pool(state, initial="always" if has_initial else "zeros")
    launch = _Launch(q, slopes, cut, pool, precision, activation=activation == "silu")
    launch.chunk_scan(q, k, v, out, launch.starts(k, v), store=True)


def backward(
    grad_o: Tensor,
    carry: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cut: Cut,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    precision: str,
) -> None:
    """Gradients of q, k and v; ``carry`` holds those of the final states and receives those of the initial ones."""
    dq, dk, dv = grads
    states = carry if initial_state is None else initial_state.contiguous()
    before = _Launch(q, slopes, cut, _Pool(states, initial="zeros" if initial_state is None else "always"), precision)
    before.chunk_scan(grad_o, v, k, dq, before.starts(k, v), transposed=True)
    after = _Launch(q, slopes, cut, _Pool(carry, initial="always"), precision, reverse=True)
    starts = after.starts(q, grad_o)
    after.chunk_scan(v, grad_o, q, dk, starts, transposed=True)
    after.chunk_scan(k, q, grad_o, dv, starts, store=True)


def segment_state(
    k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, cut: Cut, *, reverse: bool, precision: str
) -> None:
    """Write into ``state`` [N, H, D, D] what every packed sequence leaves when it starts from zeros."""
    launch = _Launch(k, slopes, cut, _Pool(state, initial="zeros"), precision, reverse=reverse)
    launch.starts(k, v, keep_last=True)


def prefill(
    qkv: Tensor,
    slopes: Tensor,
    state_pool: Tensor,
    slot_ids: Tensor,
    has_initial: Tensor,
    cut: Cut,
    out: Tensor,
    sumsq: Tensor | None,
    checkpoint_slots: Tensor | None,
    *,
    activation: str,
    precision: str,
    null_slot: int,
) -> None:
    """Launch :func:`minimax_plugin.kernels.ops.lightning_prefill`, whose arguments these are, already checked."""
    pool = _Pool(state_pool, "flags", slot_ids.contiguous(), has_initial.contiguous(), null_slot)
    launch = _Launch(qkv, slopes, cut, pool, precision, activation=activation == "silu")
    q, k, v = qkv.split(out.shape[-1], dim=-1)
    checkpoints = None if checkpoint_slots is None else checkpoint_slots.contiguous()
    launch.chunk_scan(q, k, v, out, launch.starts(k, v), store=True, checkpoints=checkpoints, sumsq=sumsq)


@dataclass(frozen=True)
class _Pool:
    """Where the states at the ends of the sequences live, and which of them count."""

    states: Tensor
    initial: str
    slots: Tensor | None = None
    has_initial: Tensor | None = None
    null_slot: int = -1


class _Launch:
    """One call: what all its kernels share."""

    def __init__(
        self,
        like: Tensor,
        slopes: Tensor,
        cut: Cut,
        pool: _Pool,
        precision: str,
        *,
        activation: bool = False,
        reverse: bool = False,
    ) -> None:
        self.slopes, self.cut, self.pool, self.reverse = slopes, cut, pool, reverse
        self.num_heads, self.head_dim = pool.states.shape[1], pool.states.shape[2]
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim is {self.head_dim}, expected at most {MAX_HEAD_DIM} in the Triton kernels; "
                "MINIMAX_LIGHTNING_BACKEND=torch has no limit"
            )
        self.device = like.device
        self.architecture = architecture_of(like.device)
        self.tiles = choose_tiles(self.architecture, like.dtype, self.head_dim, precision, activation)
        self.arithmetic = _arithmetic(self.architecture, like.dtype, precision)
        self.common = {
            "num_heads": self.num_heads,
            "D": self.head_dim,
            "BD": _padded(self.head_dim),
            "BT": self.tiles.BT,
            "ACT": activation,
            "REVERSE": reverse,
            **self.arithmetic,
        }

    def starts(self, k: Tensor, v: Tensor, *, keep_last: bool = False) -> Tensor | None:
        """State [G, H, D, D] that every segment starts from; None if no sequence has a second segment.

        With ``keep_last`` the states after the last segments are written to the pool as well.
        """
        num_segments = self.cut.segments.shape[0]
        if num_segments == 0 or (self.cut.max_segments <= 1 and not keep_last):
            return None
        k, v = _rows(k), _rows(v)
        shape = (num_segments, self.num_heads, self.head_dim, self.head_dim)
        starts = torch.empty(shape, dtype=torch.float32, device=self.device)
        tile = _segment_tile(self.head_dim)
        blocks = (self.common["BD"] // tile["BK"]) * (self.common["BD"] // tile["BV"])
        with on_device(self.device):
            segment_state_kernel[(num_segments * self.num_heads * blocks,)](
                k,
                v,
                starts,
                self.slopes,
                self.cut.segments,
                self.cut.offsets,
                self.pool.slots,
                k.stride(1),
                v.stride(1),
                self.pool.null_slot,
                k.stride(0),
                v.stride(0),
                **self.common,
                **tile,
                ALL=keep_last,
                num_warps=_segment_warps(self.head_dim),
                **LAUNCH_OPTIONS,
                num_stages=self.tiles.stages,
            )
            segment_scan_kernel[((self.cut.offsets.shape[0] - 1) * self.num_heads * _scan_blocks(self.head_dim),)](
                starts,
                self.pool.states,
                self.slopes,
                self.cut.segments,
                self.cut.offsets,
                self.pool.slots,
                self.pool.has_initial,
                self.pool.states.stride(0),
                self.pool.null_slot,
                num_heads=self.num_heads,
                SIZE=self.head_dim**2,
                BLOCK=SCAN_BLOCK,
                REVERSE=self.reverse,
                INITIAL=self.pool.initial,
                ALL=keep_last,
                num_warps=SCAN_WARPS,
                **LAUNCH_OPTIONS,
            )
        return starts

    def chunk_scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        starts: Tensor | None,
        *,
        store: bool = False,
        transposed: bool = False,
        checkpoints: Tensor | None = None,
        sumsq: Tensor | None = None,
    ) -> None:
        """Outputs of all segments; with ``store`` also the states at the ends of the sequences and at checkpoints.

        ``transposed`` reads the states as [D_v, D_k].
        """
        num_segments = self.cut.segments.shape[0]
        if num_segments == 0:
            return
        q, k, v = _rows(q), _rows(k), _rows(v)
        blocks = self.common["BD"] // self.tiles.BV
        partial = None
        if sumsq is not None:
            partial = torch.empty((blocks, *sumsq.shape), dtype=torch.float32, device=self.device)
        with on_device(self.device):
            chunk_scan_kernel[(num_segments * self.num_heads * blocks,)](
                q,
                k,
                v,
                out,
                self.slopes,
                self.cut.segments,
                self.cut.offsets,
                self.pool.states,
                starts,
                self.pool.slots,
                self.pool.has_initial,
                checkpoints,
                partial,
                q.stride(1),
                k.stride(1),
                v.stride(1),
                out.stride(1),
                self.pool.states.stride(0),
                0 if partial is None else partial.stride(0),
                self.pool.null_slot,
                q.stride(0),
                k.stride(0),
                v.stride(0),
                out.stride(0),
                **self.common,
                BV=self.tiles.BV,
                TRANSPOSED=transposed,
                INITIAL=self.pool.initial,
                STORE=store,
                num_warps=self.tiles.warps,
                **LAUNCH_OPTIONS,
                num_stages=self.tiles.stages,
            )
        if sumsq is not None and partial is not None:
            torch.sum(partial, dim=0, out=sumsq)


def launch_configs(architecture: str) -> list[LaunchConfig]:
    """The forms that prefill, training and context parallelism launch at the shapes of MiniMax-M1."""
    configs = []
    for dtype, precision in ((torch.bfloat16, "default"), (torch.bfloat16, "high"), (torch.float16, "default")):
        configs += _forms(architecture, dtype, precision, all_roles=dtype == torch.bfloat16)
    return configs + _forms(architecture, torch.float32, "default", all_roles=False)


def architecture_of(device: torch.device) -> str:
    """Row of :data:`TILES` for a device."""
    return _architecture(device.index) if device.type == "cuda" else DEFAULT_ARCHITECTURE


@functools.cache
def _architecture(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, DEFAULT_ARCHITECTURE)


def choose_tiles(architecture: str, dtype: torch.dtype, head_dim: int, precision: str, activation: bool) -> Tiles:
    """Row of the launch table, narrowed to the head_dim, with the overrides of ``MINIMAX_LIGHTNING_TILES``."""
    overrides = os.environ.get(TILES_VARIABLE, "")
    return _choose_tiles(architecture, dtype, head_dim, precision == "high", activation, overrides)


@functools.cache
def _choose_tiles(
    architecture: str, dtype: torch.dtype, head_dim: int, high: bool, activation: bool, overrides: str
) -> Tiles:
    table = TILES[architecture]
    if dtype == torch.bfloat16:
        name = "bf16" + " silu" * activation + " high" * high
        tiles = table.get(name, table["bf16"])
    else:
        tiles = table["fp16" if dtype == torch.float16 and not high else "fp32"]
    padded = _padded(head_dim)
    # Twice the rows of the state leave room for half the columns.
    columns = tiles.BV if padded <= 128 else max(16, tiles.BV // 2)
    tiles = replace(tiles, BV=min(columns, padded), warps=tiles.warps if padded > 64 else 4)
    if not overrides:
        return tiles
    try:
        fields = {name.strip(): int(value) for name, value in (item.split("=") for item in overrides.split(","))}
        tiles = replace(tiles, **fields)
    except (TypeError, ValueError):
        raise ValueError(
            f"{TILES_VARIABLE} is {overrides!r}, expected a list like 'BT=64,BV=64,warps=4,stages=2'"
        ) from None
    if tiles.BV <= 0 or padded % tiles.BV:
        raise ValueError(f"{TILES_VARIABLE} is {overrides!r}, expected BV to divide {padded}, the padded head_dim")
    for name, allowed in TILES_ALLOWED.items():
        if name in fields and fields[name] not in allowed:
            values = ", ".join(map(str, allowed))
            raise ValueError(f"{TILES_VARIABLE} is {overrides!r}, expected {name} to be one of {values}")
    return tiles


def _arithmetic(architecture: str, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """How matrix products round: bf16 operands as they are, everything else by the named mode."""
    mode = "tf32" if dtype == torch.float16 and precision == "default" else "tf32x3"
    # CDNA multiplies fp32 matrices natively.
    return {"HIGH": precision == "high", "DOT": "ieee" if architecture.startswith("gfx") else mode}


#: ``segment_scan_kernel``: elements of one program, and its warps.
SCAN_BLOCK, SCAN_WARPS = 1024, 4


def _scan_blocks(head_dim: int) -> int:
    return -(-(head_dim**2) // SCAN_BLOCK)


def _segment_tile(head_dim: int) -> dict[str, int]:
    side = min(_padded(head_dim), 128)
    return {"BK": side, "BV": side}


def _segment_warps(head_dim: int) -> int:
    return 8 if head_dim > 64 else 4


def _padded(head_dim: int) -> int:
    """head_dim as the kernels see it: a power of two that the matrix units accept."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """``x`` as the kernels read it; a stride that 32-bit offsets inside a tile cannot span is copied away."""
    return x if x.stride(-1) == 1 and abs(x.stride(0)) < 2**24 else x.contiguous()


def _forms(architecture: str, dtype: torch.dtype, precision: str, *, all_roles: bool) -> list[LaunchConfig]:
    heads, dim = 64, 128
    name = f"{str(dtype).removeprefix('torch.')} {precision}"
    tiles = {act: choose_tiles(architecture, dtype, dim, precision, act) for act in (False, True)}
    common = {"num_heads": heads, "D": dim, "BD": dim, **_arithmetic(architecture, dtype, precision)}
    cut: dict[str, Any] = {"slopes_ptr": torch.float32, "segments_ptr": torch.int32, "offsets_ptr": torch.int32}
    states: dict[str, Any] = {
        "state_ptr": torch.float32,
        "state_slot": heads * dim * dim,
        "null_slot": -1,
        "starts_ptr": torch.float32,
    }
    serving: dict[str, Any] = {"slots_ptr": torch.int32, "has_initial_ptr": torch.bool}
    training: dict[str, Any] = dict.fromkeys(serving)

    def launch(packed: bool) -> dict[str, Any]:
        return {"num_stages": tiles[packed].stages, "matrix_units": dtype == torch.bfloat16}

    def scan(role: str, pool: dict[str, Any], sumsq: bool = False, **constants: Any) -> LaunchConfig:
        packed = constants["ACT"]
        tensors = {f"{x}_ptr": dtype for x in ("q", "k", "v", "out")}
        strides = {"q_head": dim, "k_head": dim, "v_head": dim, "out_head": dim, "sumsq_block": 2**20 if sumsq else 0}
        if packed:
            strides |= {"q_head": 3 * dim, "k_head": 3 * dim, "v_head": 3 * dim}
        extra = {"checkpoints_ptr": torch.int32 if sumsq else None, "sumsq_ptr": torch.float32 if sumsq else None}
        token = heads * dim * (3 if packed else 1)
        tokens = {"q_token": token, "k_token": token, "v_token": token, "out_token": heads * dim}
        return LaunchConfig(
            name=f"scan {role} {name}",
            kernel=chunk_scan_kernel,
            arguments={**tensors, **cut, **states, **pool, **strides, **extra},
            constants={**common, **tokens, "BT": tiles[packed].BT, "BV": tiles[packed].BV, **constants},
            num_warps=tiles[packed].warps,
            **launch(packed),
        )

    def state(role: str, pool: dict[str, Any], **constants: Any) -> LaunchConfig:
        packed = constants["ACT"]
        token, head = (heads * 3 * dim, 3 * dim) if packed else (heads * dim, dim)
        tokens = {"k_token": token, "v_token": token, "BT": tiles[packed].BT}
        return LaunchConfig(
            name=f"state {role} {name}",
            kernel=segment_state_kernel,
            arguments={"k_ptr": dtype, "v_ptr": dtype, **cut, **states, **pool, "k_head": head, "v_head": head},
            constants={**common, **tokens, **_segment_tile(dim), "ALL": False, **constants},
            num_warps=_segment_warps(dim),
            **launch(packed),
        )

    fixed: dict[str, Any] = {"REVERSE": False, "TRANSPOSED": False, "STORE": True}
    forms = [
        scan("prefill", serving, **fixed, ACT=True, INITIAL="flags"),
        scan("prefill all", serving, True, **fixed, ACT=True, INITIAL="flags"),
        scan("prefill short", serving | {"starts_ptr": None}, **fixed, ACT=True, INITIAL="flags"),
        scan("forward", training, **fixed, ACT=False, INITIAL="always"),
        scan("dv", training, **fixed | {"REVERSE": True}, ACT=False, INITIAL="always"),
        state("prefill", serving, ACT=True, REVERSE=False),
    ]
    if all_roles:
        turned: dict[str, Any] = {"TRANSPOSED": True, "STORE": False, "ACT": False, "INITIAL": "always"}
        forms += [
            scan("packed", training, **fixed, ACT=True, INITIAL="zeros"),
            scan("dq", training, REVERSE=False, **turned),
            scan("dk", training, REVERSE=True, **turned),
            state("packed", training, ACT=True, REVERSE=False),
            state("stretch", training, ACT=False, REVERSE=False, ALL=True),
            state("forward", training, ACT=False, REVERSE=False),
            state("backward", training, ACT=False, REVERSE=True),
        ]
    if (dtype, precision) == (torch.bfloat16, "default"):
        sizes = {"num_heads": heads, "SIZE": dim * dim, "BLOCK": SCAN_BLOCK}
        for role, pool, initial in (("prefill", serving, "flags"), ("backward", training, "always")):
            forms.append(
                LaunchConfig(
                    name=f"segments {role}",
                    kernel=segment_scan_kernel,
                    arguments={**cut, **states, **pool},
                    constants={**sizes, "INITIAL": initial, "REVERSE": role == "backward", "ALL": False},
                    num_warps=SCAN_WARPS,
                )
            )
    return forms

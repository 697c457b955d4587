# SPDX-License-Identifier: Apache-2.0
"""The other implementations of lightning attention that ``benchmarks/kernels.py`` measures beside ours.

None of their code is here. Each is imported where it is installed, or read from a file or folder that the user names;
what is neither is reported as absent with the reason. All get activated q, k, v, no ``1 / sqrt(D)`` scale and the
slopes of MiniMax-M1, laid out beforehand as they like best, so that only their kernels are timed.

Shapes: ``T`` packed tokens, ``N`` sequences, ``H`` heads, ``D`` head_dim, ``S`` state slots.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_lightning import original_block_loop

Call = Callable[[], Tensor]

#: (q, k, v [T, H, D], slopes [H], bounds of the sequences) -> call that returns the output [T, H, D].
Prefill = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Call]

#: (q, k, v [N, H, D], slopes [H], states [S, H, D, D], slots [N]) -> call that returns the output [N, H, D].
Decode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Call]

#: (q, k, v [1, T, H, D] leaves, slopes [H]) -> call that returns the output [1, T, H, D], differentiable.
Train = Callable[[Tensor, Tensor, Tensor, Tensor], Call]


@dataclass(frozen=True)
class Peer:
    """One implementation and the sections it can take part in; ``absent`` says why all of it is missing."""

    name: str
    sections: tuple[str, ...]
    prefill: Prefill | None = None
    decode: Decode | None = None
    train: Train | None = None
    absent: str = ""


#: The block loop of the released module, rewritten here; it runs on any device.
ORIGINAL = "original block loop"


def load_peers(paths: dict[str, Path | None], *, on_gpu: bool) -> list[Peer]:
    """All peers; ``paths`` may name a place for "fla" (folder), "vllm", "seg_la" and "opennlplab" (files).

    Without a GPU nothing but the original loop can run: the others are looked for, not imported.
    """
    loaders: list[tuple[str, str, Callable[[Path | None], dict[str, Any]], Peer]] = [
        ("fla", "fla", _load_fla, Peer("fla", ("prefill", "decode", "train"))),
        ("vllm", "vllm", _load_vllm, Peer("vLLM lightning_attn", ("prefill", "decode"))),
        ("seg_la", "sglang", _load_seg_la, Peer("SGLang seg_la", ("prefill", "decode"))),
        ("opennlplab", "lightning_attn", _load_opennlplab, Peer("OpenNLPLab", ("prefill", "train"))),
    ]
    peers = []
    for key, package, load, peer in loaders:
        path = paths.get(key)
        try:
            if path is None and importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}")
            peers.append(dataclasses.replace(peer, **load(path)) if on_gpu else peer)
        # A peer may fail to import in ways of its own; none of them may stop the measurement of the others.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            peers.append(dataclasses.replace(peer, absent=f"{type(error).__name__}: {reason}"))
    return [*peers, Peer(ORIGINAL, ("prefill", "train"), prefill=_prefill_original, train=_train_original)]


def _prefill_original(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Sequence[int]) -> Call:
    parts = list(zip(bounds, bounds[1:], strict=False))
    return lambda: torch.cat([original_block_loop(q[a:b], k[a:b], v[a:b], slopes)[0] for a, b in parts])


def _train_original(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Call:
    # In-place writes into a fresh tensor are differentiable, so the loop trains as the released module does.
    return lambda: original_block_loop(q[0], k[0], v[0], slopes)[0].unsqueeze(0)


def _load_fla(path: Path | None) -> dict[str, Any]:
    if path is not None:
        sys.path.append(str(path))
    ops = importlib.import_module("fla.ops.simple_gla")

    def prefill(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Sequence[int]) -> Call:
        packed = [x.contiguous().unsqueeze(0) for x in (q, k, v)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.long, device=q.device) if len(bounds) > 2 else None
        options = {"g_gamma": -slopes, "scale": 1.0, "cu_seqlens": cu_seqlens, "output_final_state": True}
        return lambda: ops.chunk_simple_gla(*packed, **options)[0][0]

    def decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor, slots: Tensor) -> Call:
        single = [x.contiguous().unsqueeze(1) for x in (q, k, v)]
        # It has no slots: the states are gathered beforehand, and putting them back is not timed either.
        options = {"g_gamma": -slopes, "scale": 1.0, "initial_state": states[slots.long()], "output_final_state": True}
        return lambda: ops.fused_recurrent_simple_gla(*single, **options)[0][:, 0]

    def train(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Call:
        return lambda: ops.chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0)[0]

    return {"prefill": prefill, "decode": decode, "train": train}


def _load_vllm(path: Path | None) -> dict[str, Any]:
    module = (
        importlib.import_module("vllm.model_executor.layers.lightning_attn") if path is None else _vllm_from_file(path)
    )

    def prefill(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Sequence[int]) -> Call:
        parts = [
            [x[a:b].transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v)]
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        empty = torch.zeros(1, q.shape[1], q.shape[2], v.shape[2], device=q.device)

        def run() -> Tensor:
            outputs = [module.lightning_attention(*part, slopes, kv_history=empty)[0] for part in parts]
            return torch.cat([out[0].transpose(0, 1) for out in outputs])

        return run

    def decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor, slots: Tensor) -> Call:
        single = [x.contiguous().unsqueeze(2) for x in (q, k, v)]
        return lambda: module.linear_decode_forward_triton(*single, states, slopes, slots, 32).reshape(q.shape)

    return {"prefill": prefill, "decode": decode}


def _vllm_from_file(path: Path) -> ModuleType:
    """The file with stand-ins for the three modules of vLLM that it takes single names from."""
    import triton
    import triton.language

    stubs: dict[str, Any] = {
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cuda=lambda: False)),
        "vllm.triton_utils": SimpleNamespace(tl=triton.language, triton=triton),
        "vllm.v1.attention.backends.utils": SimpleNamespace(PAD_SLOT_ID=-1),
    }
    added = [stub for stub in stubs if stub not in sys.modules]
    sys.modules.update({stub: stubs[stub] for stub in added})
    try:
        return _from_file(path)
    finally:
        for stub in added:
            del sys.modules[stub]


def _load_seg_la(path: Path | None) -> dict[str, Any]:
    module = importlib.import_module("sglang.srt.layers.attention.linear.seg_la") if path is None else _from_file(path)

    def metadata(bounds: Sequence[int], slots: Tensor, continued: bool) -> Any:
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        values = {
            "batch_size": len(lengths),
            "max_q_length": max(lengths),
            "q_offsets": torch.tensor(bounds, dtype=torch.int32, device=slots.device),
            "s_offsets": slots,
            "q_lengths": torch.tensor(lengths, dtype=torch.int32, device=slots.device),
            "s_scales": torch.full_like(slots, int(continued)),
        }
        known = {field.name for field in dataclasses.fields(module.SegLaMeta)}
        return module.SegLaMeta(**{key: value for key, value in values.items() if key in known})

    def prefill(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Sequence[int]) -> Call:
        packed = [x.contiguous() for x in (q, k, v)]
        slots = torch.arange(len(bounds) - 1, dtype=torch.int32, device=q.device)
        states = torch.zeros(len(bounds) - 1, q.shape[1], q.shape[2], v.shape[2], device=q.device)
        meta = metadata(bounds, slots, continued=False)
        return lambda: module.seg_la_fwd(*packed, states, slopes, meta, softmax_scale=1.0)

    def decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor, slots: Tensor) -> Call:
        packed = [x.contiguous() for x in (q, k, v)]
        meta = metadata(range(q.shape[0] + 1), slots, continued=True)
        return lambda: module.seg_la_fwd(*packed, states, slopes, meta, softmax_scale=1.0)

    return {"prefill": prefill, "decode": decode}


def _load_opennlplab(path: Path | None) -> dict[str, Any]:
    if path is None:
        function = importlib.import_module("lightning_attn.ops").lightning_attn_func
    else:
        function = _from_file(path).lightning_attn2

    def train(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Call:
        slope = slopes.reshape(-1, 1, 1).contiguous()
        return lambda: function(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), slope).transpose(1, 2)

    def prefill(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Sequence[int]) -> Call:
        slope = slopes.reshape(-1, 1, 1).contiguous()
        parts = [
            [x[a:b].transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v)]
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return lambda: torch.cat([function(*part, slope)[0].transpose(0, 1) for part in parts])

    return {"prefill": prefill, "train": train}


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

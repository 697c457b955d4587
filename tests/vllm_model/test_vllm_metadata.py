# SPDX-License-Identifier: Apache-2.0
"""The metadata builder and the lightning layer over its rows, without an engine.

The last tests play a scheduler: requests come, are cut into chunks, decode, leave their slots dirty behind, and every
output must equal the float64 recurrence of its own sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recurrence import recurrence, split_heads
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from minimax_plugin.vllm_model import compat  # noqa: E402
from minimax_plugin.vllm_model.metadata import (  # noqa: E402
    LightningBackend,
    LightningMetadata,
    LightningMetadataBuilder,
)

NUM_SLOTS = 24

#: What runners hand over under speculative decoding, and the field of :class:`Row` it comes from.
COUNTS = (("num_accepted_tokens", "accepted"), ("num_decode_draft_tokens_cpu", "drafts"))


@dataclass
class Row:
    """One request in a step: tokens computed before, tokens now, length of its prompt, its slots in order."""

    computed: int
    query: int
    prompt: int
    slots: Sequence[int]
    drafts: int = -1
    accepted: int = 1


@pytest.fixture
def layer(tiny_model: Any) -> Any:
    """Lightning layer 0 over a pool of NaN, as a block may hold any stale bytes."""
    layer = tiny_model.model.layers[0].self_attn
    shape = (NUM_SLOTS, *layer.state_shape)
    pages = torch.full((NUM_SLOTS, 2 * torch.Size(shape[1:]).numel()), float("nan"))
    layer.bind_kv_cache(pages.view(torch.int8)[:, None, None, :])
    return layer


def _builder(config: Any, layer: Any, *, drafts: int = 0) -> LightningMetadataBuilder:
    builder = LightningMetadataBuilder(layer.get_kv_cache_spec(config), [layer.prefix], config, torch.device("cpu"))
    builder.num_spec_tokens, builder.use_spec_decode = drafts, drafts > 0
    builder.reorder_batch_threshold = 1 + drafts
    builder.state_indices_tensor_d = torch.zeros((builder.decode_cudagraph_max_bs, 1 + drafts), dtype=torch.int32)
    if drafts:
        builder.supports_update_block_table = False
        builder.decode_num_accepted_tokens = torch.zeros(builder.decode_cudagraph_max_bs, dtype=torch.int32)
        builder._read_slots = torch.zeros(builder.decode_cudagraph_max_bs, dtype=torch.int32)
    return builder


def _common(rows: Sequence[Row]) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    queries = torch.tensor([row.query for row in rows], dtype=torch.int32)
    bounds = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()
    lengths = torch.tensor([row.computed + row.query for row in rows], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=bounds,
        query_start_loc_cpu=bounds,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(rows),
        num_actual_tokens=int(bounds[-1]),
        max_query_len=int(queries.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=torch.tensor([list(row.slots) for row in rows], dtype=torch.int32),
        slot_mapping=torch.zeros(int(bounds[-1]), dtype=torch.int64),
        is_prefilling=torch.tensor([row.computed < row.prompt for row in rows]),
    )


def _build(builder: LightningMetadataBuilder, rows: Sequence[Row]) -> LightningMetadata:
    extra: dict[str, Any] = {}
    if builder.use_spec_decode:
        extra = {name: torch.tensor([getattr(row, key) for row in rows], dtype=torch.int32) for name, key in COUNTS}
    return builder.build(0, _common(rows), **extra)


@pytest.fixture
def config(tiny_config_of_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tiny_config_of_vllm.cache_config, "mamba_cache_mode", "none")
    return tiny_config_of_vllm


def test_runners_know_the_builder_by_its_base_class() -> None:
    """With another base, the runners keep the counts of accepted tokens to themselves."""
    assert issubclass(LightningMetadataBuilder, compat.Mamba2AttentionMetadataBuilder)
    assert LightningBackend.get_builder_cls() is LightningMetadataBuilder
    assert LightningBackend.is_ssm()


def test_rows_of_a_mixed_step(config: Any, layer: Any) -> None:
    rows = [
        Row(computed=40, query=1, prompt=30, slots=[3]),  # decode
        Row(computed=29, query=1, prompt=30, slots=[4]),  # last token of a prompt
        Row(computed=64, query=70, prompt=200, slots=[5]),  # chunk of a prompt
        Row(computed=0, query=1, prompt=1, slots=[6]),  # prompt of one token
        Row(computed=0, query=1500, prompt=2000, slots=[7]),  # first chunk
    ]
    metadata = _build(_builder(config, layer), rows)
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (2, 2)
    assert (metadata.num_prefills, metadata.num_prefill_tokens) == (3, 1571)
    assert metadata.state_indices_tensor_d[:, 0].tolist() == [3, 4]
    assert metadata.state_indices_tensor_p.tolist() == [5, 6, 7]
    assert metadata.has_initial_states_p.tolist() == [True, False, False]
    assert metadata.plan is not None
    assert metadata.plan.cu_seqlens.tolist() == [0, 70, 71, 1571]
    # Segments end at multiples of 1,024 of the sequence, not of the chunk.
    assert metadata.plan.segments.tolist() == [[0, 0, 70], [1, 70, 71], [2, 71, 1095], [2, 1095, 1571]]
    assert metadata.fresh_rows is None and metadata.late_decodes is None and metadata.read_slots_d is None


def test_a_prompt_of_one_token_among_decodes_starts_from_zeros(config: Any, layer: Any) -> None:
    """A decode graph is replayed for such a step by its shape alone, and a decode reads its slot as it is."""
    rows = [Row(9, 1, 4, [3]), Row(0, 1, 1, [4]), Row(7, 1, 2, [5]), Row(29, 1, 30, [6])]
    metadata = _build(_builder(config, layer), rows)
    assert metadata.num_decodes == 4 and metadata.num_prefills == 0
    states = layer.state_pool.states
    # The last token of a prompt that came in chunks goes on from its state.
    assert not states[4].any() and states[[3, 5, 6]].isnan().all()


def test_another_layer_group_clears_its_own_slots(config: Any, layer: Any) -> None:
    builder = _builder(config, layer)
    metadata = _build(builder, [Row(9, 1, 4, [3]), Row(0, 1, 1, [4])])
    table = torch.tensor([[8], [9]], dtype=torch.int32)
    updated = builder.update_block_table(metadata, table, torch.zeros(2, dtype=torch.int64))
    assert updated.state_indices_tensor_d[:, 0].tolist() == [8, 9]
    assert not layer.state_pool.states[9].any() and layer.state_pool.states[8].isnan().all()


def test_drafted_rows_continue_after_their_last_accepted_token(config: Any, layer: Any) -> None:
    rows = [Row(20, 4, 8, [3, 4, 5, 6], drafts=3, accepted=3), Row(30, 4, 8, [7, 8, 9, 10], drafts=3, accepted=1)]
    metadata = _build(_builder(config, layer, drafts=3), rows)
    assert metadata.read_slots_d is not None
    assert metadata.read_slots_d.tolist() == [5, 7]
    assert metadata.state_indices_tensor_d.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_a_drafted_prompt_of_one_token_leaves_the_prefill(config: Any, layer: Any) -> None:
    """The scheduler pads such a prompt with placeholders; a prefill would fold them into its state."""
    rows = [
        Row(20, 4, 8, [3, 4, 5, 6], drafts=3),
        Row(0, 50, 50, [7, 8, 9, 10]),
        Row(0, 4, 1, [11, 12, 13, 14], drafts=3),
        Row(0, 4, 4, [15, 16, 17, 18]),  # a prompt of four tokens is a prefill like any other
    ]
    metadata = _build(_builder(config, layer, drafts=3), rows)
    assert metadata.num_decodes == 1 and metadata.num_prefills == 3
    assert metadata.state_indices_tensor_p.tolist() == [7, 0, 15]
    late = metadata.late_decodes
    assert late is not None
    assert late.tokens.tolist() == [50, 51, 52, 53]
    assert late.cu_seqlens.tolist() == [0, 4]
    assert late.read_slots.tolist() == [0]
    assert late.write_slots.tolist() == [[11, 12, 13, 14]]


def test_late_decodes_leave_the_block_table_alone(config: Any, layer: Any) -> None:
    """The slots of the prefill rows are a view of it, and it serves the other layer groups and the steps to come."""
    rows = [Row(0, 4, 9, [7, 8, 9, 10]), Row(30, 1, 8, [11, 12, 13, 14], drafts=0, accepted=3)]
    common, table = _common(rows), [list(row.slots) for row in rows]
    counts: dict[str, Any] = {
        name: torch.tensor([getattr(row, key) for row in rows], dtype=torch.int32) for name, key in COUNTS
    }
    metadata = _builder(config, layer, drafts=3).build(0, common, **counts)
    assert metadata.late_decodes is not None and metadata.state_indices_tensor_p.tolist() == [7, 0]
    assert common.block_table_tensor.tolist() == table


def test_a_decode_graph_wider_than_the_step_reads_no_row_behind_it(layer: Any) -> None:
    """Slots are laid out for the captured batch, here of four rows; the step has two tokens."""
    layer.state_pool.states[:4] = 0
    slots = torch.tensor([[3], [0], [0], [0]], dtype=torch.int32)
    qkv = torch.randn(2, layer.num_heads, 3 * layer.head_dim)
    out, sumsq = torch.full((2, layer.num_heads, layer.head_dim), float("nan")), torch.empty(2, layer.num_heads)
    metadata: Any = SimpleNamespace(
        num_decodes=4, num_decode_tokens=4, state_indices_tensor_d=slots, read_slots_d=None, plan=None
    )
    layer.attend(qkv, out, sumsq, metadata)
    q, k, v = split_heads(qkv[:1])
    assert torch.allclose(out[:1].double(), recurrence(q, k, v, layer.slopes)[0], rtol=1e-4, atol=1e-5)
    assert not out[1].any()


def test_decodes_behind_a_prompt_continue_after_their_last_accepted_token(config: Any, layer: Any) -> None:
    """Model Runner V2 sorts a chunk of 1 + K prompt tokens before decodes without drafts."""
    rows = [
        Row(20, 4, 8, [3, 4, 5, 6], drafts=3, accepted=2),
        Row(0, 4, 9, [7, 8, 9, 10]),
        Row(30, 1, 8, [11, 12, 13, 14], drafts=0, accepted=3),
    ]
    metadata = _build(_builder(config, layer, drafts=3), rows)
    assert metadata.num_decodes == 1 and metadata.state_indices_tensor_p.tolist() == [7, 0]
    assert metadata.late_decodes is not None
    assert metadata.late_decodes.tokens.tolist() == [4]
    assert metadata.late_decodes.read_slots.tolist() == [13]
    assert metadata.late_decodes.write_slots.tolist() == [[11, 12, 13, 14]]


def test_recomputed_tokens_do_not_pass_for_drafts(config: Any, layer: Any) -> None:
    """A preempted request is past its prompt; a prefill keeps the state after its last token, as the next step asks."""
    rows = [Row(30, 3, 8, [3, 4, 5, 6]), Row(20, 4, 8, [7, 8, 9, 10], drafts=3, accepted=2)]
    metadata = _build(_builder(config, layer, drafts=3), rows)
    assert metadata.num_decodes == 0 and metadata.state_indices_tensor_p.tolist() == [3, 0]
    assert metadata.late_decodes is not None
    assert metadata.late_decodes.read_slots.tolist() == [8]


def test_model_runner_v2_says_which_prompts_are_padded(
    config: Any, layer: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a row then decodes, from zeros instead of what its slot holds."""
    from vllm.v1.worker.gpu.model_states import init_model_state

    monkeypatch.setattr(compat.MambaHybridModelState, "__init__", lambda *_: None)
    state = init_model_state(config, tiny_model, None, torch.device("cpu"))
    seen: list[Any] = []
    monkeypatch.setattr(compat.MambaHybridModelState, "prepare_attn", lambda self, batch, *_, **__: seen.append(batch))
    for known, expected in ((None, [False, True, False]), ([False, False, True], [False, True, True])):
        batch = SimpleNamespace(
            num_draft_tokens_per_req=np.array([3, 3, 0]),
            is_prefilling_np=np.array([False, True, True]),
            prefill_runs_as_decode_np=None if known is None else np.array(known),
        )
        state.prepare_attn(batch, "mode")
        assert seen.pop().prefill_runs_as_decode_np.tolist() == expected
    untouched = SimpleNamespace(num_draft_tokens_per_req=None)
    state.prepare_attn(untouched)
    assert seen == [untouched]

    rows = [Row(20, 4, 8, [3, 4, 5, 6], drafts=3, accepted=2), Row(0, 4, 0, [7, 8, 9, 10], drafts=3)]
    metadata = _build(_builder(config, layer, drafts=3), rows)
    assert metadata.num_decodes == 2 and metadata.late_decodes is None
    assert metadata.read_slots_d is not None and metadata.read_slots_d.tolist() == [4, 0]


def test_drafts_need_the_counts_of_accepted_tokens(config: Any, layer: Any) -> None:
    """vLLM's builder would take every token of the step before for accepted."""
    builder = _builder(config, layer, drafts=3)
    with pytest.raises(RuntimeError, match="does not say how many drafts were accepted"):
        builder.build(0, _common([Row(20, 4, 8, [3, 4, 5, 6])]))


@pytest.mark.parametrize(
    ("version", "drafts", "v2", "forgets"),
    [
        ((0, 31), 3, False, True),
        ((0, 31), 3, True, False),
        ((0, 31), 0, False, False),
        ((0, 31), None, False, False),
        ((0, 32), 3, False, False),
        ((1, 0), 3, False, False),
        (None, 3, False, False),
    ],
)
def test_drafts_are_refused_where_their_counts_are_forgotten(
    version: tuple[int, ...] | None,
    drafts: int | None,
    v2: bool,
    forgets: bool,
    config: Any,
    layer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Model Runner V1 of vLLM 0.31 hands the counts over in steps with drafts only."""
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    drafting: Any = SimpleNamespace(num_speculative_tokens=drafts, use_v2_model_runner=v2)
    assert compat.forgets_accepted_drafts(drafting) is forgets
    monkeypatch.setattr(compat, "forgets_accepted_drafts", lambda asked: asked is config and forgets)
    with pytest.raises(ValueError, match="forgets how many drafts were accepted") if forgets else nullcontext():
        _builder(config, layer)


def test_full_graphs_find_their_slots_where_they_were_captured(config: Any, layer: Any) -> None:
    from vllm.config import CUDAGraphMode

    builder = _builder(config, layer)
    builder.compilation_config = type("Config", (), {"cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY})()
    first = _build(builder, [Row(9, 1, 4, [3]), Row(8, 1, 4, [5])]).state_indices_tensor_d
    assert first.tolist() == [[3], [5]]
    second = _build(builder, [Row(10, 1, 4, [6]), Row(0, 0, 0, [0])]).state_indices_tensor_d
    assert second.data_ptr() == first.data_ptr() and second.tolist() == [[6], [0]]


def test_full_graphs_with_drafts_find_the_slots_they_continue_from(config: Any, layer: Any) -> None:
    from vllm.config import CUDAGraphMode

    builder = _builder(config, layer, drafts=1)
    builder.compilation_config = type("Config", (), {"cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY})()
    captured = builder.build_for_cudagraph_capture(_common([Row(0, 2, 0, [0, 0]), Row(0, 2, 0, [0, 0])]))
    rows = [Row(9, 2, 4, [3, 4], drafts=1, accepted=2), Row(0, 0, 0, [0, 0], accepted=1)]
    replayed = _build(builder, rows)
    for before, after, expected in (
        (captured.read_slots_d, replayed.read_slots_d, [4, 0]),
        (captured.state_indices_tensor_d, replayed.state_indices_tensor_d, [[3, 4], [0, 0]]),
    ):
        assert before is not None and after is not None
        assert after.data_ptr() == before.data_ptr() and after.tolist() == expected


def test_full_graphs_with_drafts_only_under_runner_v2(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    support = LightningMetadataBuilder.get_cudagraph_support
    assert support(config, None) == AttentionCGSupport.UNIFORM_BATCH
    drafting = type("Config", (), {"num_speculative_tokens": 3})()
    for v2, expected in (
        (True, AttentionCGSupport.UNIFORM_BATCH),
        (False, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
    ):
        monkeypatch.setattr(compat, "uses_v2_model_runner", lambda _, v2=v2: v2)
        assert support(drafting, None) == expected


@dataclass(eq=False)
class Request:
    """A sequence that is played through the layer: its inputs, how far it got, what came out."""

    qkv: Tensor
    prompt: int
    slots: list[int]
    computed: int = 0
    accepted: int = 1
    outputs: list[Tensor] = field(default_factory=list)

    def reference(self, heads: int, slopes: Tensor) -> Tensor:
        q, k, v = torch.nn.functional.silu(self.qkv).view(-1, heads, self.qkv.shape[1] // heads).chunk(3, -1)
        return recurrence(q, k, v, slopes)[0]


def _step(layer: Any, metadata: LightningMetadata, parts: list[Tensor], padding: int = 0) -> Tensor:
    packed = torch.cat([*parts, torch.full((padding, parts[0].shape[1]), float("nan"))])
    qkv = packed.view(packed.shape[0], layer.num_heads, -1)
    out = torch.full((*qkv.shape[:2], layer.head_dim), float("nan"))
    sumsq = torch.full(qkv.shape[:2], float("nan"))
    layer.attend(qkv, out, sumsq, metadata)
    torch.testing.assert_close(sumsq, out.square().sum(-1))
    assert not out[packed.shape[0] - padding :].any()
    return out


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_every_sequence_its_own_recurrence(config: Any, layer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    width = 3 * layer.num_heads * layer.head_dim
    builder = _builder(config, layer)
    free = list(range(1, NUM_SLOTS))
    running: list[Request] = []
    finished = 0
    while finished < 12:
        while len(running) < 5 and pick(0, 2):
            length = pick(1, 3) if pick(0, 1) else pick(4, 150)
            prompt = 1 if length == 1 else pick(1, length)
            qkv = torch.randn(length, width, generator=generator)
            running.append(Request(qkv, prompt, [free.pop(pick(0, len(free) - 1))]))
        planned = []
        for request in running:
            left = request.prompt - request.computed
            query = 1 if left <= 0 else (left if pick(0, 1) else pick(1, left))
            row = Row(request.computed, query, request.prompt, request.slots)
            region = 0 if left <= 0 else (3 if not request.computed else (1 if query == 1 else 2))
            planned.append((region, row, request))
        if not planned:
            continue
        planned.sort(key=lambda item: item[0])
        metadata = _build(builder, [row for _, row, _ in planned])
        parts = [request.qkv[row.computed : row.computed + row.query] for _, row, request in planned]
        out = _step(layer, metadata, parts, padding=pick(0, 3))
        for part, (_, row, request) in zip(
            out[: sum(row.query for _, row, _ in planned)].split([row.query for _, row, _ in planned]),
            planned,
            strict=True,
        ):
            request.outputs.append(part)
            request.computed += row.query
            if request.computed == len(request.qkv):
                expected = request.reference(layer.num_heads, layer.slopes)
                torch.testing.assert_close(torch.cat(request.outputs).double(), expected, rtol=1e-4, atol=1e-4)
                free.extend(request.slots)
                running.remove(request)
                finished += 1


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("seed", range(4))
def test_any_acceptance_gives_every_sequence_its_own_recurrence(
    config: Any, layer: Any, seed: int, runner: str
) -> None:
    """Speculative decoding: rejected drafts must leave no trace, in whatever order the rows stand."""
    generator = torch.Generator().manual_seed(seed)
    drafts, width = 2, 3 * layer.num_heads * layer.head_dim
    builder = _builder(config, layer, drafts=drafts)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    prompts = [1, 40, 1, 3, 7]
    requests = [
        Request(torch.randn(prompt + 30, width, generator=generator), prompt, list(range(1 + 3 * i, 4 + 3 * i)))
        for i, prompt in enumerate(prompts)
    ]
    waiting = [requests.pop() for _ in range(3)]
    running = requests
    for _ in range(10):
        if waiting and pick(0, 1):
            running.append(waiting.pop())
        stepping = [r for r in running if r.computed] + [r for r in running if not r.computed]
        if runner == "v2":  # which sorts by drafts and numbers of tokens, here in any order at all
            stepping = [stepping[i] for i in torch.randperm(len(stepping), generator=generator).tolist()]
        rows, parts = [], []
        for request in stepping:
            padded = not request.computed and request.prompt == 1
            proposed = drafts if padded else (drafts * pick(0, 1) if request.computed else -1)
            query = request.prompt if proposed < 0 else 1 + proposed
            truth = request.qkv[request.computed : request.computed + (query if proposed < 0 else 1)]
            parts.append(torch.cat([truth, torch.randn(query - len(truth), width, generator=generator)]))
            prompt = 0 if padded and runner == "v2" else request.prompt
            rows.append(Row(request.computed, query, prompt, request.slots, proposed, request.accepted))
        keep = [pick(1, row.query) if row.drafts > 0 else row.query for row in rows]
        for part, row, kept, request in zip(parts, rows, keep, stepping, strict=True):
            if row.drafts > 0:  # accepted drafts are those that equal the sequence
                part[:kept] = request.qkv[request.computed : request.computed + kept]
        out = _step(layer, _build(builder, rows), parts)
        for part, row, kept, request in zip(out.split([row.query for row in rows]), rows, keep, stepping, strict=True):
            request.outputs.append(part[:kept])
            request.computed += kept
            request.accepted = kept if row.drafts > 0 else 1
    for request in running:
        if request.computed:
            expected = request.reference(layer.num_heads, layer.slopes)[: request.computed]
            torch.testing.assert_close(torch.cat(request.outputs).double(), expected, rtol=1e-4, atol=1e-4)

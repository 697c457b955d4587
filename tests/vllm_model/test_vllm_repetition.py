# SPDX-License-Identifier: Apache-2.0
"""The repetition stop as a logits processor of both model runners, driven as they drive it."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_engine_process import INTERPRETED_TRITON_ENV, EngineProcess

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from minimax_plugin.vllm_model.compat import logits_processor_base
from minimax_plugin.vllm_model.repetition import (
    RepetitionStop,
    RepetitionStopV1,
    RepetitionStopV2,
    take_stopped,
)

VOCAB = 13
EOS = 12
LIMIT = 3
ROWS = 4


def params(name: str, **extra: Any) -> SimpleNamespace:
    """What the processors read of ``SamplingParams``."""
    asked = {"repetition_stop_tokens": LIMIT, "repetition_stop_prob": 0.9, "repetition_stop_name": name} | extra
    return SimpleNamespace(
        extra_args={key: value for key, value in asked.items() if value is not None},
        eos_token_id=EOS,
        all_stop_token_ids={EOS},
        ignore_eos=False,
    )


@dataclass
class Request:
    """A request whose tokens and probabilities are known in advance."""

    name: str
    params: SimpleNamespace
    prompt: int
    tokens: list[int]
    probabilities: list[float]
    output: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) == len(self.tokens) or EOS in self.output

    def logits(self, generated: int | None = None) -> Tensor:
        """[V] for the token after the first ``generated``, by default after all."""
        index = len(self.output) if generated is None else max(generated, 0)
        token, probability = self.tokens[index], self.probabilities[index]
        rest = torch.rand(VOCAB)
        rest[token] = 0
        all_of_them = rest / rest.sum() * (1 - probability)
        all_of_them[token] = probability
        return all_of_them.log()

    def sample(self, logits: Tensor) -> None:
        forced = torch.isfinite(logits).sum() == 1
        self.output.append(int(logits.argmax()) if forced else self.tokens[len(self.output)])

    def expected(self) -> list[int]:
        limit = self.params.extra_args.get("repetition_stop_tokens", math.inf)
        run = 0
        for index, probability in enumerate(self.probabilities):
            run = run + 1 if probability > 0.9 else 0
            if run == limit and index + 1 < len(self.tokens):
                return [*self.tokens[: index + 1], EOS]
        return self.tokens


def make_requests(rng: random.Random, count: int) -> list[Request]:
    """Half of them certain most of the time; every fifth does not ask to be stopped."""
    requests = []
    for index in range(count):
        length = rng.randrange(4, 16)
        sure = rng.choice([0.9, 0.5])
        requests.append(
            Request(
                name=f"r{index}",
                params=params(f"r{index}", **({"repetition_stop_tokens": None} if index % 5 == 4 else {})),
                prompt=rng.randrange(1, 5),
                tokens=[rng.randrange(VOCAB - 1) for _ in range(length)],
                probabilities=[0.97 if rng.random() < sure else rng.choice([0.3, 0.89]) for _ in range(length)],
            )
        )
    return requests


def check(requests: list[Request], stopped: set[str]) -> None:
    assert any(EOS in request.output for request in requests), "nothing was stopped"
    assert any(EOS not in request.output for request in requests), "everything was stopped"
    for request in requests:
        assert request.output == request.expected(), request
    assert stopped == {request.name for request in requests if EOS in request.output}
    assert take_stopped() == set()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    take_stopped()
    yield
    take_stopped()


def v1_processor() -> Any:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=ROWS))
    return RepetitionStop(config, torch.device("cpu"), False)


@pytest.mark.parametrize("seed", range(6))
def test_v1(seed: int) -> None:
    """Requests enter and leave the batch, also to come back later, and change rows as the runner condenses it."""
    torch.manual_seed(seed)
    rng, processor = random.Random(seed), v1_processor()
    assert isinstance(processor, RepetitionStopV1)
    requests = make_requests(rng, 20)
    waiting = list(requests)
    rows: list[Any] = [None] * ROWS
    stopped: set[str] = set()
    while waiting or any(rows):
        removed: list[int] = []
        added: list[Any] = []
        moved: list[Any] = []
        for row, request in enumerate(rows):
            if request is not None and (request.done or rng.random() < 0.15):
                removed.append(row)
                rows[row] = None
                if not request.done:
                    request.output = list(request.output)  # a runner makes a new list for a request that comes back
                    waiting.insert(rng.randrange(len(waiting) + 1), request)
        for row in range(ROWS):
            if rows[row] is None and waiting and rng.random() < 0.8:
                rows[row] = waiting.pop(0)
                added.append((row, rows[row].params, None, rows[row].output))
                removed = [other for other in removed if other != row]  # the runner reuses the row at once
        filled = [row for row in range(ROWS) if rows[row] is not None]
        for target in range(len(filled)):
            if rows[target] is None:
                source = max(row for row in range(ROWS) if rows[row] is not None)
                rows[target], rows[source] = rows[source], None
                moved.append((source, target, MoveDirectionality.UNIDIRECTIONAL))
        if len(filled) > 1 and rng.random() < 0.5:
            rows[0], rows[1] = rows[1], rows[0]
            moved.append((0, 1, MoveDirectionality.SWAP))
        size = len(filled)
        changed = removed or added or moved
        with torch.inference_mode():
            processor.update_state(BatchUpdate(size, removed, added, moved) if changed else None)
        batch = [request for request in rows[:size] if request is not None]
        if not batch:
            continue
        with torch.inference_mode():
            logits = processor.apply(torch.stack([request.logits() for request in batch]))
        for request, row in zip(batch, logits, strict=True):
            if rng.random() < 0.9:  # else the sample is discarded, as in the middle of a prefill
                request.sample(row)
        if rng.random() < 0.1:
            stopped |= take_stopped()
    check(requests, stopped | take_stopped())


@pytest.mark.parametrize("seed", range(6))
def test_v2(seed: int) -> None:
    """Requests that were preempted come back in another slot and are prefilled again in chunks."""
    if logits_processor_base(v2=True) is object:
        pytest.skip("this vLLM takes no logits processors with Model Runner V2")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    lengths = [torch.zeros(ROWS, dtype=torch.int32).numpy() for _ in range(2)]
    states = SimpleNamespace(
        max_num_reqs=ROWS,
        device=torch.device("cpu"),
        prompt_len=SimpleNamespace(np=lengths[0]),
        prefill_len=SimpleNamespace(np=lengths[1]),
    )
    processor = RepetitionStop(SimpleNamespace(speculative_config=None), states)
    assert isinstance(processor, RepetitionStopV2)
    requests = make_requests(rng, 20)
    waiting = list(requests)
    slots: list[Any] = [None] * ROWS
    computed = [0] * ROWS
    while waiting or any(slots):
        for slot, request in enumerate(slots):
            if request is not None and (request.done or rng.random() < 0.15):
                slots[slot] = None
                if not request.done:
                    # Another process sends a copy, with the same name.
                    request.params = copy.deepcopy(request.params) if rng.random() < 0.5 else request.params
                    waiting.insert(rng.randrange(len(waiting) + 1), request)
            if slots[slot] is None and waiting and rng.random() < 0.8:
                slots[slot], computed[slot] = waiting.pop(0), 0
                lengths[0][slot] = slots[slot].prompt
                lengths[1][slot] = slots[slot].prompt + len(slots[slot].output)
                processor.add_request(slot, slots[slot].params)
        batch = [slot for slot in range(ROWS) if slots[slot] is not None]
        rng.shuffle(batch)
        if not batch:
            continue
        fed, rows = [], []
        for slot in batch:
            request = slots[slot]
            length = request.prompt + len(request.output)
            computed[slot] = min(length, computed[slot] + (rng.randrange(1, 6) if computed[slot] < length else 1))
            history = [request.tokens[0]] * request.prompt + request.output
            fed.append(history[computed[slot] - 1])
            rows.append(request.logits(computed[slot] - request.prompt))
        ends = torch.tensor([computed[slot] for slot in batch])
        context = SimpleNamespace(
            idx_mapping_np=torch.tensor(batch).numpy(),
            pos=ends - 1,
            input_ids=torch.tensor(fed, dtype=torch.int32),
            seq_lens_upper_bound_np=ends.numpy(),
        )
        with torch.inference_mode():
            logits = processor.apply(torch.stack(rows), context)
        for slot, row in zip(batch, logits, strict=True):
            request = slots[slot]
            if computed[slot] == request.prompt + len(request.output):
                request.sample(row)
    check(requests, take_stopped())


def test_requests_that_do_not_ask_cost_nothing() -> None:
    processor = v1_processor()
    asks_nothing = params("a", repetition_stop_tokens=None)
    processor.update_state(BatchUpdate(1, [], [(0, asks_nothing, None, [1, 1, 1, 1, 1])], []))
    logits = torch.full((1, VOCAB), float("nan"))
    assert processor.apply(logits) is logits


def test_parked_requests_make_room() -> None:
    """Requests that finish look like ones that may come back; their number is bounded, their reports are kept."""
    processor = v1_processor()
    for index in range(200):
        output = [5] * LIMIT
        processor.update_state(BatchUpdate(1, [0] if index else [], [(0, params(f"n{index}"), None, output)], []))
        for length in range(LIMIT + 1):
            output[:] = [5] * length
            logits = torch.zeros(1, VOCAB)
            logits[0, 5] = 20.0
            processor.apply(logits)
    assert processor.requests._runs.size <= 1 + 8 * ROWS
    assert take_stopped() == {f"n{index}" for index in range(200)}


def test_values_are_checked_when_a_request_arrives() -> None:
    from vllm import SamplingParams

    def validate(**values: Any) -> None:
        ignore_eos = values.pop("ignore_eos", False)
        RepetitionStop.validate_params(SamplingParams(extra_args=values, ignore_eos=ignore_eos))

    validate(something_else=1)
    validate(repetition_stop_tokens=3)
    validate(repetition_stop_tokens=3, repetition_stop_token_id=5, ignore_eos=True)
    with pytest.raises(ValueError, match=r"repetition_stop_tokens.* is 0, expected a whole number of at least 1"):
        validate(repetition_stop_tokens=0)
    with pytest.raises(ValueError, match=r"repetition_stop_prob.* is 0.3, expected a number of at least 0.5"):
        validate(repetition_stop_tokens=3, repetition_stop_prob=0.3)
    with pytest.raises(ValueError, match="ignore_eos=True makes the end token end nothing"):
        validate(repetition_stop_tokens=3, ignore_eos=True)


def test_v2_refuses_speculative_decoding() -> None:
    with pytest.raises(ValueError, match="speculative decoding"):
        RepetitionStopV2(SimpleNamespace(speculative_config=object()), None)


def test_no_entry_point() -> None:
    """Engines load every class of this group, and Model Runner V2 refuses those with the interface of V1."""
    from importlib.metadata import distribution

    groups = {entry.group for entry in distribution("minimax-plugin").entry_points}
    assert "vllm.logits_processors" not in groups


@pytest.mark.slow
def test_model_runner_v2(tiny_checkpoint: Path, vllm_cache: Path, tmp_path: Path) -> None:
    """A whole engine, its Triton kernels interpreted: 16 of 16 sequences end where a count after the fact says."""
    path = tmp_path / "sure"
    shutil.copytree(tiny_checkpoint, path)
    (weights,) = path.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 24
    save_file(tensors, weights)
    prompts = [[20 + index, *range(index % 5)] for index in range(16)]
    stop = 3
    limits = [None if index % 4 == 3 else 4 + index % 3 for index in range(16)]
    asked = [
        {} if limit is None else {"repetition_stop_tokens": limit, "repetition_stop_token_id": stop} for limit in limits
    ]
    engine = EngineProcess(
        path,
        vllm_cache,
        env=INTERPRETED_TRITON_ENV,
        max_num_seqs=8,
        logits_processors=["minimax_plugin.vllm_model.repetition:RepetitionStop"],
    )
    with engine:
        assert engine.facts()["runner"].endswith(".cpu.model_runner")
        free = engine.generate(prompts, 24, stop=stop)
        stopped = engine.generate(prompts, 24, extra_args=asked, stop=stop)
    cut = 0
    for limit, before, after in zip(limits, free, stopped, strict=True):
        likely = [value > math.log(0.99) for value in before.logprobs]
        limit = limit or 1000
        end = next((i for i in range(limit, len(likely)) if all(likely[i - limit : i])), None)
        assert after.tokens == (before.tokens if end is None else [*before.tokens[:end], stop])
        cut += end is not None
    assert 3 <= cut <= 12, "loops and sequences without one are needed"


def test_values_sent_over_http_arrive() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    asked = {"repetition_stop_tokens": 3000, "repetition_stop_prob": 0.99}
    request = CompletionRequest.model_validate({"model": "m", "prompt": "1, 2, ", "vllm_xargs": asked})
    arrived = request.to_sampling_params(max_tokens=40_000, default_sampling_params={})
    assert arrived.extra_args == asked
    RepetitionStop.validate_params(arrived)

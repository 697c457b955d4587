# SPDX-License-Identifier: Apache-2.0
"""Rollouts with vLLM whose weights are exactly those of the trainer, and a check that they are.

TRL builds its ``VLLMGeneration`` inside ``GRPOTrainer.__init__`` and leaves no place for engine arguments of one's own;
:func:`exact_generation` puts :class:`ExactVLLMGeneration` in its place for the duration of that call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import trl.generation.vllm_generation as trl_generation
import trl.trainer.grpo_trainer as trl_grpo
from torch import Tensor

from minimax_plugin.cispo.merged_weights import full_parameters
from minimax_plugin.cispo.repetition import RepetitionRule, changed_probabilities
from minimax_plugin.cispo.weight_sync import check_vllm_version, reload_weights

logger = logging.getLogger(__name__)

#: Engine arguments that TRL sets -> what sets them in the trainer's config; None where TRL leaves no choice.
TRL_ENGINE_ARGUMENTS: dict[str, str | None] = {
    "model": "the model of the trainer",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
    "max_num_seqs": "per_device_train_batch_size and steps_per_generation",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "model_impl": "vllm_model_impl",
    "distributed_executor_backend": None,
    "seed": None,
    "max_num_batched_tokens": None,
    "logprobs_mode": None,
    "quantization": None,
    "trust_remote_code": "trust_remote_code",
}

#: What vLLM's kernels for experts on a CPU pack weights in.
_CPU_EXPERT_ALIGNMENT = 32


def check_engine_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse engine arguments that TRL sets itself. Needs no vLLM.

    Raises:
        ValueError: one of them; the message names it and what sets it instead.
    """
    for name in arguments:
        if name in TRL_ENGINE_ARGUMENTS:
            field = TRL_ENGINE_ARGUMENTS[name]
            instead = f"set {field}" if field else "its value there cannot be changed"
            raise ValueError(
                f"vllm_llm_kwargs has {name}={arguments[name]!r}, which TRL passes to vLLM itself; leave it out, {instead}"
            )


def check_server_device(device_type: str) -> None:
    """Refuse TRL's server mode where it cannot work, before a model is loaded.

    Raises:
        ValueError: the trainer does not run on a CUDA device.
    """
    if device_type != "cuda":
        raise ValueError(
            f"vllm_mode is 'server' and the trainer runs on {device_type!r}, but TRL sends weights to a vLLM server with "
            "NCCL, from CUDA devices only; set vllm_mode='colocate'"
        )


def check_expert_sizes(config: Any, tensor_parallel_size: int = 1) -> None:
    """Refuse a mixture of experts that vLLM's CPU kernels cannot hold or cannot be given new weights for.

    Args:
        config: of the model, from transformers.
        tensor_parallel_size: processes that each expert is divided among.

    Raises:
        ValueError: the hidden size, or the width of an expert on one process, is not a multiple of 32.
    """
    config = config.get_text_config()
    if not any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return
    width = next(n for n in ("moe_intermediate_size", "intermediate_size") if getattr(config, n, None))
    for name, parts in (("hidden_size", 1), (width, tensor_parallel_size)):
        size = getattr(config, name)
        if size % (parts * _CPU_EXPERT_ALIGNMENT):
            divided = f" on each of {parts} processes" if parts > 1 else ""
            raise ValueError(
                f"{name} is {size}, but vLLM's experts on a CPU need multiples of {_CPU_EXPERT_ALIGNMENT}{divided}; "
                "choose other sizes, or set use_vllm=False"
            )


@contextmanager
def exact_generation(
    engine_arguments: Mapping[str, Any] | None = None, repetition: RepetitionRule | None = None
) -> Iterator[None]:
    """Let ``GRPOTrainer.__init__`` build an :class:`ExactVLLMGeneration`.

    Args:
        engine_arguments: further arguments of ``vllm.LLM`` in colocate mode.
        repetition: when to stop completions that repeat themselves.
    """
    check_engine_arguments(engine_arguments or {})
    original = trl_grpo.VLLMGeneration
    trl_grpo.VLLMGeneration = functools.partial(
        ExactVLLMGeneration, engine_arguments=engine_arguments, repetition=repetition
    )
    try:
        yield
    finally:
        trl_grpo.VLLMGeneration = original


class ExactVLLMGeneration(trl_generation.VLLMGeneration):
    """TRL's generation with vLLM, its weights replaced exactly, with engine arguments and a stop for repetition.

    Arguments are those of ``trl.generation.vllm_generation.VLLMGeneration`` and these:

    Args:
        engine_arguments: further arguments of ``vllm.LLM`` in colocate mode, ``{"dtype": "float32"}`` for instance.
        repetition: when to stop completions that repeat themselves, None for never.

    Attributes:
        stopped: for each completion of the last call of ``generate``, whether the repetition stop ended it. The end
            token that did so is not part of the completion.

    Raises:
        ValueError: an engine argument is unknown or TRL sets it too; the model has no folder that vLLM can start from;
            its experts do not fit vLLM's CPU kernels.
        ImportError: vLLM is too old.
    """

    def __init__(
        self,
        *args: Any,
        engine_arguments: Mapping[str, Any] | None = None,
        repetition: RepetitionRule | None = None,
        **kwargs: Any,
    ) -> None:
        self._engine_arguments = dict(engine_arguments or {})
        self._repetition = repetition
        self.stopped: list[bool] = []
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode != "colocate":
            super()._init_vllm()
            return
        import vllm
        from vllm.platforms import current_platform

        check_vllm_version(vllm.__version__)
        if not self.model.name_or_path:
            raise ValueError(
                "the model has no name_or_path, so vLLM has no checkpoint to start from; save it with save_pretrained "
                "and load it from there"
            )
        if current_platform.is_cpu():
            check_expert_sizes(self.model.config, self.tensor_parallel_size)
        _check_argument_names(self._engine_arguments, vllm.EngineArgs)
        original = trl_generation.LLM
        trl_generation.LLM = self._start_engine
        try:
            super()._init_vllm()
        finally:
            trl_generation.LLM = original

    def _start_engine(self, **arguments: Any) -> Any:
        from vllm import LLM

        twice = sorted(arguments.keys() & self._engine_arguments.keys())
        if twice:
            raise ValueError(f"vllm_llm_kwargs has {', '.join(twice)}, which this TRL passes to vLLM itself; leave it out")
        arguments |= self._engine_arguments
        if self._repetition is not None:
            arguments["logits_processors"] = [*(arguments.get("logits_processors") or []), RepetitionRule.processor]
        return LLM(**arguments)

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in the model without adapters, full tensors, one at a time; adapters merged into copies."""
        sharded_by_fsdp1 = self._dist.fsdp_version == 1
        if sharded_by_fsdp1 and hasattr(self.model, "peft_config"):
            raise ValueError("adapters under FSDP version 1 cannot be merged exactly; set fsdp_version to 2")
        if sharded_by_fsdp1:
            yield from super()._iter_named_params()
        elif self._dist.is_zero3 and not hasattr(self.model, "peft_config"):
            yield from super()._iter_named_params()
        else:
            # Under ZeRO-3 an adapter needs all of the model at once, as in TRL; elsewhere nothing is gathered here.
            with self._dist.gather_params(list(self.model.parameters())):
                yield from full_parameters(self.model, device=self.accelerator.device)

    def sync_weights(self) -> None:
        """Give the engine the weights of the trainer, and forget what it cached with the old ones."""
        if self.mode != "colocate":
            super().sync_weights()
            return
        if self.enable_sleep_mode:
            trl_generation.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        with torch.no_grad():
            reload_weights(self.llm.llm_engine.model_executor.driver_worker.model_runner, self._iter_named_params())
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still runs requests, so states computed with the old weights stay in its cache")

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        """As in TRL; completions that the repetition stop ended come without the end token that did it."""
        if self._repetition is None:
            self.stopped = [False] * len(prompts)
            return super().generate(prompts, *args, **kwargs)
        if self.mode != "colocate":
            with self._asking_server():
                prompt_ids, *rest = super().generate(prompts, *args, **kwargs)
            ends = [self._repetition.end([step[0] for step in steps]) for steps in rest[1]]
        else:
            with self._naming_requests() as names:
                prompt_ids, *rest = super().generate(prompts, *args, **kwargs)
            stopped = self._repetition.take_stopped()
            first = len(prompts) * self._rank_in_tp_group()
            ends = [
                len(ids) - 1 if name in stopped else None
                for ids, name in zip(rest[0], names[first : first + len(prompts)], strict=True)
            ]
        self.stopped = [end is not None for end in ends]
        return prompt_ids, *([row[:end] for row, end in zip(rows, ends, strict=True)] for rows in rest)

    @contextmanager
    def _naming_requests(self) -> Iterator[list[str]]:
        """Ask for the stop under a name of its own for every request of the next ``llm.generate``."""
        assert self._repetition is not None
        names: list[str] = []
        generate = self.llm.generate

        def generate_named(prompts: list[Any], sampling_params: Any, **kwargs: Any) -> Any:
            batch = uuid.uuid4().hex
            names[:] = [f"{batch}-{index}" for index in range(len(prompts))]
            each = []
            for name in names:
                params = sampling_params.clone()
                params.extra_args = (params.extra_args or {}) | self._repetition.extra_args(name)
                each.append(params)
            return generate(prompts, sampling_params=each, **kwargs)

        self.llm.generate = generate_named
        try:
            yield names
        finally:
            del self.llm.generate

    @contextmanager
    def _asking_server(self) -> Iterator[None]:
        """A server that was started with the logits processor stops early; completions are cut in any case."""
        assert self._repetition is not None
        original = self.generation_kwargs
        extra = self._repetition.extra_args(None) | original.get("vllm_xargs", {})
        self.generation_kwargs = original | {"vllm_xargs": extra}
        try:
            yield
        finally:
            self.generation_kwargs = original

    def _rank_in_tp_group(self) -> int:
        return torch.distributed.get_rank(group=self.tp_group) if self.tensor_parallel_size > 1 else 0


def _check_argument_names(arguments: Mapping[str, Any], engine_args: type) -> None:
    known = {field.name for field in dataclasses.fields(engine_args)}
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise ValueError(f"vllm_llm_kwargs has {', '.join(unknown)}, which this vLLM does not know")


@dataclasses.dataclass(frozen=True)
class RolloutAgreement:
    """How close the probabilities of a rollout are to those of the training forward pass.

    Attributes:
        pearson: correlation of token probabilities (Figure 3 of the report); nan where one of them never varies.
        mean: mean of |difference of log-probabilities|.
        maximum: its maximum.
        tokens: number of tokens.
    """

    pearson: float
    mean: float
    maximum: float
    tokens: int


def rollout_agreement(
    rollout_logps: Tensor, training_logps: Tensor, mask: Tensor, gather: Callable[[Tensor], Tensor] = lambda x: x
) -> RolloutAgreement:
    """Compare log-probabilities, all [B, T], where ``mask`` is set and the rollout has one (is not nan).

    Args:
        rollout_logps: of the engine that sampled.
        training_logps: of the training forward pass with the same weights.
        mask: completion tokens that the policy generated.
        gather: concatenates a tensor [1, n] over processes.
    """
    mask = mask.bool() & ~torch.isnan(rollout_logps)
    x, y = (logps[mask].double().exp() for logps in (rollout_logps, training_logps))
    difference = (rollout_logps - training_logps)[mask].abs().double()
    sums = torch.stack([torch.full_like(x, 1.0).sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    largest = difference.max() if difference.numel() else difference.sum()
    rows = gather(torch.cat([sums, difference.sum()[None], largest[None]])[None])
    n, sx, sy, sxx, syy, sxy, total = rows[:, :7].sum(0).tolist()
    variances = (n * sxx - sx * sx) * (n * syy - sy * sy)
    pearson = (n * sxy - sx * sy) / variances**0.5 if variances > 0 else float("nan")
    return RolloutAgreement(pearson, total / n if n else 0.0, rows[:, 7].max().item(), int(n))


def judge_agreement(agreement: RolloutAgreement, threshold: float, *, mode: str, causes: list[str]) -> None:
    """Warn or raise where a rollout is too far from training.

    Args:
        agreement: of the first rollout.
        threshold: lowest accepted correlation.
        mode: "warn" or "error".
        causes: what in the configuration may explain it, appended to the general causes.

    Raises:
        ValueError: the correlation is below the threshold and ``mode`` is "error".
    """
    if agreement.tokens == 0 or not agreement.pearson < threshold:
        logger.info("rollout and training agree: %s", agreement)
        return
    listed = "; ".join([*causes, *_GENERAL_CAUSES])
    message = (
        f"the first rollout does not match the training forward pass: correlation of token probabilities "
        f"{agreement.pearson:.5f}, expected at least {threshold}; |difference of log-probabilities| mean "
        f"{agreement.mean:.3g}, max {agreement.maximum:.3g} over {agreement.tokens} tokens. Likely causes: {listed}"
    )
    if mode == "error":
        raise ValueError(f"{message}. rollout_check='warn' or 'off' goes on all the same")
    logger.warning("%s", message)


_GENERAL_CAUSES = [
    "vLLM in a lower precision than the trainer (vllm_llm_kwargs={'dtype': 'float32'} tells whether it is that)",
    "a language model head that is fp32 on one side only",
    "a vLLM release that takes new weights otherwise",
    "a model class that computes left-padded batches otherwise than single sequences",
]


def likely_causes(args: Any) -> list[str]:
    """Fields of the trainer's config that make vLLM sample from another distribution than the trainer scores.

    Args:
        args: a ``GRPOConfig``.
    """
    causes = [f"{name}={value}" for name, value in changed_probabilities(args).items() if name != "temperature"]
    if not args.cast_lm_head_to_fp32:
        causes.append("cast_lm_head_to_fp32=False")
    return causes

# SPDX-License-Identifier: Apache-2.0
"""Rollouts with vLLM whose weights are exactly those of the trainer, and a check that they are.

TRL builds its ``VLLMGeneration`` inside ``GRPOTrainer.__init__`` and leaves no place for engine arguments of one's own;
:func:`exact_generation` puts :class:`ExactVLLMGeneration` in its place for the duration of that call.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import trl.generation.vllm_generation as trl_generation
import trl.trainer.grpo_trainer as trl_grpo
from torch import Tensor

from minimax_plugin.cispo.merged_weights import full_parameters
from minimax_plugin.cispo.metrics import Mismatch
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


def check_vllm_settings(args: Any, model_config: Any) -> None:
    """Refuse settings that cannot work, before a model is loaded. Imports no vLLM.

    Args:
        args: a ``CISPOConfig``.
        model_config: of the model, from transformers.

    Raises:
        ValueError: further engine arguments without an engine of the trainer's own, or that TRL sets; server mode
            without CUDA; experts that vLLM cannot hold on a CPU.
        ImportError: vLLM is not installed.
    """
    colocated = args.use_vllm and args.vllm_mode == "colocate"
    if args.vllm_llm_kwargs and not colocated:
        raise ValueError(
            f"vllm_llm_kwargs is {args.vllm_llm_kwargs}, but the trainer starts no vLLM engine; set use_vllm=True and "
            "vllm_mode='colocate', or leave it out"
        )
    check_engine_arguments(args.vllm_llm_kwargs or {})
    if not args.use_vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "use_vllm is True, but vLLM is not installed: pip install 'minimax-plugin[vllm]'", name="vllm"
        )
    if not colocated and args.device.type != "cuda":
        raise ValueError(
            f"vllm_mode is {args.vllm_mode!r} and the trainer runs on {args.device.type!r}, but TRL sends weights to a "
            "vLLM server with NCCL, from CUDA devices only; set vllm_mode='colocate'"
        )
    if colocated and args.device.type == "cpu" and not torch.cuda.is_available():
        check_expert_sizes(model_config, args.vllm_tensor_parallel_size)


def check_engine_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse engine arguments that TRL sets itself.

    Raises:
        ValueError: one of them; the message names it and what sets it instead.
    """
    for name in arguments:
        if name in TRL_ENGINE_ARGUMENTS:
            field = TRL_ENGINE_ARGUMENTS[name]
            instead = f"set {field}" if field else "its value there cannot be changed"
            raise ValueError(
                f"vllm_llm_kwargs has {name}={arguments[name]!r}, which TRL passes to vLLM itself; leave it out, "
                f"{instead}"
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
    engine_arguments: Mapping[str, Any] | None = None,
    repetition: RepetitionRule | None = None,
    *,
    return_routes: bool = False,
) -> Iterator[None]:
    """Let ``GRPOTrainer.__init__`` build an :class:`ExactVLLMGeneration`.

    Args:
        engine_arguments: further arguments of ``vllm.LLM`` in colocate mode.
        repetition: when to stop completions that repeat themselves.
        return_routes: ask the engine which experts the tokens went to.
    """
    check_engine_arguments(engine_arguments or {})
    original = trl_grpo.VLLMGeneration
    trl_grpo.VLLMGeneration = functools.partial(
        ExactVLLMGeneration,
        engine_arguments=engine_arguments,
        repetition=repetition,
        return_routes=return_routes,
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
        return_routes: ask the engine which experts the tokens went to; where it cannot tell, a warning says why.

    Attributes:
        stopped: for each completion of the last call of ``generate``, whether the repetition stop ended it. The end
            token that did so is not part of the completion.
        returns_routes: whether the engine tells which experts the tokens went to.
        routes: where it does, for each of them the experts [tokens, layers, K] of prompt and completion.

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
        return_routes: bool = False,
        **kwargs: Any,
    ) -> None:
        self._engine_arguments = dict(engine_arguments or {})
        self._repetition = repetition
        self.returns_routes = return_routes
        self.stopped: list[bool] = []
        self.generation_kwargs: dict[str, Any]
        self.routes: list[Any] | None = None
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode != "colocate":
            if self.returns_routes:
                logger.warning("router replay: TRL's client of a vLLM server hands on no routes")
                self.returns_routes = False
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
            raise ValueError(
                f"vllm_llm_kwargs has {', '.join(twice)}, which this TRL passes to vLLM itself; leave it out"
            )
        arguments |= self._engine_arguments
        if self._repetition is not None:
            arguments["logits_processors"] = [*(arguments.get("logits_processors") or []), RepetitionRule.processor]
        if not self.returns_routes:
            return LLM(**arguments)
        try:
            with_routes = engine_arguments_for_routes(arguments)
        except ValueError as error:
            logger.warning("router replay: this vLLM engine returns no routes: %s", error)
            self.returns_routes = False
            return LLM(**arguments)
        return _remembering_routes(LLM)(**with_routes)

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in the model without adapters, full tensors, one at a time; adapters merged into copies."""
        has_adapter = hasattr(self.model, "peft_config")
        sharded_by_fsdp1 = self._dist.fsdp_version == 1
        if sharded_by_fsdp1 and has_adapter:
            raise ValueError("adapters under FSDP version 1 cannot be merged exactly; set fsdp_version to 2")
        if sharded_by_fsdp1 or (self._dist.is_zero3 and not has_adapter):
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
        result = self._generate_stopped(prompts, *args, **kwargs)
        if self.returns_routes and self.mode == "colocate":
            first = len(prompts) * self._rank_in_tp_group()
            self.routes = self.llm.routes[first : first + len(prompts)]
        return result

    def _generate_stopped(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
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
        rule = self._repetition
        assert rule is not None
        names: list[str] = []
        generate = self.llm.generate

        def generate_named(prompts: list[Any], sampling_params: Any, **kwargs: Any) -> Any:
            batch = uuid.uuid4().hex
            names[:] = [f"{batch}-{index}" for index in range(len(prompts))]
            each = []
            for name in names:
                params = sampling_params.clone()
                params.extra_args = (params.extra_args or {}) | rule.extra_args(name)
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
        original: dict[str, Any] = self.generation_kwargs
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


def engine_arguments_for_routes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The engine arguments with those that make vLLM return the experts of every token (0.32 and later).

    Raises:
        ValueError: this vLLM, its model runner or these arguments do not allow it; the message says which.
    """
    from vllm import EngineArgs

    wanted = {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    if wanted.keys() - {field.name for field in dataclasses.fields(EngineArgs)}:
        raise ValueError("this release of vLLM has no enable_return_routed_experts")
    if arguments.get("enable_prefix_caching") is False:
        raise ValueError("it needs prefix caching, and vllm_llm_kwargs has enable_prefix_caching=False")
    arguments = dict(arguments) | wanted
    try:
        EngineArgs(**arguments).create_engine_config()
    except ValueError as error:
        wrapped = re.search(r"Value error, (.*?) \[type=", str(error), re.DOTALL)  # pydantic's
        raise ValueError(wrapped[1] if wrapped else str(error)) from error
    return arguments


def _remembering_routes(llm_class: Any) -> Any:
    """A ``vllm.LLM`` that keeps the routes of the completions of its last call of ``generate``."""

    class RoutedLLM(llm_class):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().generate(*args, **kwargs)
            self.routes = [completion.routed_experts for output in outputs for completion in output.outputs]
            return outputs

    return RoutedLLM


def judge_first_rollout(mismatch: Mismatch, args: Any) -> None:
    """Warn or raise where the first rollout is too far from the training forward pass with the same weights.

    Args:
        mismatch: of the first rollout.
        args: a ``CISPOConfig``, for ``rollout_check``, ``rollout_check_pearson`` and what may explain a mismatch.

    Raises:
        ValueError: the correlation is too low and ``rollout_check`` is "error".
    """
    pearson = mismatch.prob_pearson
    # A side that does not vary has no correlation; then the difference tells.
    agree = (
        mismatch.logp_diff_mean <= _CONSTANT_TOLERANCE if math.isnan(pearson) else pearson >= args.rollout_check_pearson
    )
    if args.rollout_check == "off" or agree:
        return
    causes = "; ".join([*_causes_in_config(args), *_GENERAL_CAUSES])
    message = (
        f"the first rollout does not match the training forward pass: correlation of token probabilities "
        f"{pearson:.5f}, expected at least {args.rollout_check_pearson}; |difference of log-probabilities| mean "
        f"{mismatch.logp_diff_mean:.3g}, 99th percentile {mismatch.logp_diff_p99:.3g}, max "
        f"{mismatch.logp_diff_max:.3g} over {mismatch.tokens} tokens. Likely causes: {causes}"
    )
    if args.rollout_check == "error":
        raise ValueError(f"{message}. rollout_check='warn' goes on all the same")
    logger.warning("%s", message)


#: Mean |difference of log-probabilities| up to which probabilities that do not vary count as the same.
_CONSTANT_TOLERANCE = 0.01

_GENERAL_CAUSES = [
    "vLLM in a lower precision than the trainer (vllm_llm_kwargs={'dtype': 'float32'} tells whether it is that)",
    "a language model head that is fp32 on one side only",
    "a vLLM release that takes new weights otherwise",
    "a model class that computes left-padded batches otherwise than single sequences",
]


def _causes_in_config(args: Any) -> list[str]:
    """Fields that make vLLM sample from another distribution than the trainer scores."""
    # The trainer divides by the temperature too.
    causes = [f"{name}={value}" for name, value in changed_probabilities(args).items() if name != "temperature"]
    if not args.cast_lm_head_to_fp32:
        causes.append("cast_lm_head_to_fp32=False")
    return causes

# SPDX-License-Identifier: Apache-2.0
"""The repetition stop of the trainer: the same rule in vLLM and in ``generate``, its end tokens outside the loss.

A completion that is stopped loses the end token that was forced, so that the loss never sees it, and then ends like one
that ran into the length limit: TRL counts it as truncated, and ``mask_truncated_completions`` masks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minimax_plugin.repetition import RepetitionStop, check_repetition_values, repetition_end

#: Names of the fields of ``CISPOConfig``.
FIELDS = ("repetition_stop_tokens", "repetition_stop_prob")


@dataclass(frozen=True)
class RepetitionRule:
    """Stop after ``tokens`` consecutive tokens whose probability before temperature is above ``probability``."""

    #: Class path of the logits processor of vLLM, for either model runner.
    processor = "minimax_plugin.vllm_model.repetition:RepetitionStop"

    tokens: int
    probability: float

    @classmethod
    def from_config(cls, args: Any) -> RepetitionRule | None:
        """The rule of a ``CISPOConfig``; None where no completion can become long enough to be stopped.

        Raises:
            ValueError: a value is out of range, or the mode of generation cannot apply the rule.
        """
        tokens, probability = (getattr(args, name) for name in FIELDS)
        if tokens is None:
            return None
        check_repetition_values(tokens, probability, names=FIELDS)
        if max([args.max_completion_length, *(args.length_stages or [])]) <= tokens:
            return None
        if args.use_transformers_continuous_batching:
            raise ValueError(
                f"repetition_stop_tokens is {tokens}, but continuous batching takes no logits processor; set one of "
                "repetition_stop_tokens=None and use_transformers_continuous_batching=False"
            )
        if args.use_vllm and args.vllm_mode == "server":
            _require_model_probabilities(args)
        return cls(tokens, probability)

    def extra_args(self, name: str | None) -> dict[str, Any]:
        """``SamplingParams.extra_args`` of one request, which :meth:`take_stopped` reports under ``name``."""
        asked: dict[str, Any] = dict(zip(FIELDS, (self.tokens, self.probability), strict=True))
        return asked if name is None else asked | {"repetition_stop_name": name}

    def take_stopped(self) -> set[str]:
        """Names of the requests to vLLM in this process that were stopped since the last call."""
        from minimax_plugin.vllm_model.repetition import take_stopped

        return take_stopped()

    def end(self, logprobs: Sequence[float | None]) -> int | None:
        """Number of tokens before the stop, from log-probabilities before temperature; None without a stop."""
        return repetition_end(logprobs, self.tokens, self.probability)

    @contextmanager
    def in_generate(self, model: Any, eos_token_id: int) -> Iterator[list[int | None]]:
        """Apply the rule to one call of ``model.generate``.

        Yields:
            A list that afterwards holds, per sequence, how many tokens come before the forced end token; None for a
            sequence without one.
        """
        kept: list[int | None] = []
        generate = model.generate

        def generate_with_stop(*args: Any, **kwargs: Any) -> Any:
            stop = RepetitionStop(self.tokens, self.probability, eos_token_id)
            kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or []), stop]
            output = generate(*args, **kwargs)
            kept[:] = stop.kept_tokens()
            return output

        model.generate = generate_with_stop
        try:
            yield kept
        finally:
            del model.generate


def strip_forced_end(completions: list[list[int]], kept: Sequence[int | None]) -> tuple[list[list[int]], list[bool]]:
    """Completions without forced end tokens, and which had one.

    Args:
        completions: token ids up to and with the end token.
        kept: from :meth:`RepetitionRule.in_generate`. A number beyond the end of its completion was counted on padding.
    """
    stopped = [count is not None and count + 1 == len(ids) for ids, count in zip(completions, kept, strict=True)]
    return [ids[:-1] if cut else ids for ids, cut in zip(completions, stopped, strict=True)], stopped


def changed_probabilities(args: Any) -> dict[str, Any]:
    """Fields of a ``GRPOConfig`` that make an engine sample from other probabilities than the model's, with values."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    values = {name: getattr(args, name) for name in neutral}
    return {name: value for name, value in values.items() if value is not None and value != neutral[name]}


def _require_model_probabilities(args: Any) -> None:
    changed = changed_probabilities(args)
    if changed:
        listed = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise ValueError(
            f"repetition_stop_tokens is {args.repetition_stop_tokens} with {listed}: a vLLM server reports "
            "probabilities after these only, and the rule is about those before; leave them out, or set "
            "repetition_stop_tokens=None"
        )

# SPDX-License-Identifier: Apache-2.0
"""Refuses what cannot be trained, before a model is loaded where possible, and rewards that are none."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import AutoConfig
from trl.trainer.utils import get_callable_name, is_async_callable

from minimax_plugin.cispo.config import CISPOConfig
from minimax_plugin.cispo.rollout import check_vllm_settings
from minimax_plugin.cispo.schedule import check_stages

logger = logging.getLogger(__name__)

#: What the trainer hands to reward functions besides the columns of the dataset.
REWARD_ARGUMENTS = {
    *("prompts", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
}


def check_before_loading(
    model: Any,
    args: CISPOConfig,
    reward_funcs: Sequence[Any],
    train_dataset: Any,
    *,
    peft_config: Any = None,
    rollout_func: Any = None,
    environment_factory: Any = None,
) -> None:
    """Check the arguments of the trainer against each other and against the model's config.

    Args:
        model: path or model, as the trainer got it.
        reward_funcs: reward functions, models and names of models.
        train_dataset: the prompts, or None.
        peft_config, rollout_func, environment_factory: as given to the trainer.

    Raises:
        ValueError: what does not fit; the message names it and says what to do.
        ImportError: vLLM is asked for and not installed.
    """
    if args.importance_base == "sampler" and not (args.use_vllm or rollout_func):
        raise ValueError(
            "importance_base is 'sampler', which needs the log-probabilities that vLLM sampled with; set use_vllm=True "
            "or importance_base='train'"
        )
    owns_prompts = environment_factory is not None
    if owns_prompts and (args.zero_variance == "refill" or args.retire_solved_at is not None):
        raise ValueError(
            "zero_variance='refill' and retire_solved_at draw prompts from the dataset, but with environment_factory "
            "the environment makes them; use zero_variance='drop' and retire_solved_at=None"
        )
    if train_dataset is not None:
        _check_dataset(args, reward_funcs, train_dataset, free=owns_prompts or rollout_func is not None)
    _check_adapter(peft_config)
    _check_reference(model, args, peft_config)
    config = _config_of(model, args)
    _check_model_config(config, args)
    check_vllm_settings(args, config)


def checked_reward(function: Any, name: str) -> Any:
    """A reward function whose results are checked; a reward model is returned as it is.

    ``None`` keeps TRL's meaning: the function does not apply to this completion.
    """
    if isinstance(function, nn.Module):
        return function
    if is_async_callable(function):

        @functools.wraps(function, updated=())
        async def checked_async(prompts: Sequence[Any], **kwargs: Any) -> list[float | None]:
            return _checked_rewards(await function(prompts=prompts, **kwargs), name, len(prompts))

        return checked_async

    @functools.wraps(function, updated=())
    def checked(prompts: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return _checked_rewards(function(prompts=prompts, **kwargs), name, len(prompts))

    return checked


def _checked_rewards(rewards: Any, name: str, count: int) -> list[float | None]:
    if not isinstance(rewards, Iterable):
        raise ValueError(f"reward function {name!r} returned {rewards!r}, expected a list of {count} rewards")
    rewards = list(rewards)
    if len(rewards) != count:
        raise ValueError(
            f"reward function {name!r} returned {len(rewards)} rewards for {count} completions, expected one each"
        )
    for index, reward in enumerate(rewards):
        try:
            usable = reward is None or math.isfinite(reward)
        except TypeError:
            usable = False
        if not usable:
            raise ValueError(
                f"reward function {name!r} returned {reward!r} for completion {index}, expected a finite number, or "
                "None where it does not apply"
            )
    return rewards


def _check_dataset(args: CISPOConfig, reward_funcs: Sequence[Any], dataset: Any, *, free: bool) -> None:
    if (args.zero_variance == "refill" or args.retire_solved_at is not None) and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"zero_variance={args.zero_variance!r} and retire_solved_at={args.retire_solved_at} draw prompts by index, "
            f"which an {type(dataset).__name__} does not allow; use a datasets.Dataset, or zero_variance='drop' and "
            "retire_solved_at=None"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None or free:  # a stream need not know its columns, and a rollout function may add some
        return
    if "prompt" not in columns:
        raise ValueError(f"the dataset has the columns {sorted(columns)}, expected one named 'prompt'")
    for function in reward_funcs:
        if isinstance(function, str | nn.Module):
            continue
        missing = _required_arguments(function) - REWARD_ARGUMENTS - set(columns)
        if missing:
            raise ValueError(
                f"reward function {get_callable_name(function)!r} needs the columns {sorted(missing)}, but the dataset "
                f"has {sorted(columns)}; add them or give the arguments defaults"
            )


def _required_arguments(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty}


def _check_adapter(peft_config: Any) -> None:
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str):
        hit = targets != "all-linear" and re.fullmatch(targets, "lm_head") is not None
    else:
        hit = any(name.split(".")[-1] == "lm_head" for name in targets or ())
    if hit or "lm_head" in (getattr(peft_config, "modules_to_save", None) or ()):
        raise ValueError(
            f"the adapter covers lm_head (target_modules={targets!r}, modules_to_save="
            f"{getattr(peft_config, 'modules_to_save', None)!r}), whose weight the log-probabilities are computed from "
            "directly, so that it would not be trained; leave lm_head out"
        )


def _check_reference(model: Any, args: CISPOConfig, peft_config: Any) -> None:
    if args.beta == 0.0 or isinstance(model, str) or peft_config is not None or hasattr(model, "peft_config"):
        return
    if not getattr(model.config, "name_or_path", ""):
        raise ValueError(
            f"beta is {args.beta}, which needs a reference model, but the model was not loaded from a path that one "
            "could be loaded from; pass the path of a checkpoint as model, or set beta=0.0"
        )


def _config_of(model: Any, args: CISPOConfig) -> Any:
    if not isinstance(model, str):
        return model.config
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return AutoConfig.from_pretrained(
        model,
        trust_remote_code=options.get("trust_remote_code", args.trust_remote_code),
        revision=options.get("revision"),
    )


def _check_model_config(config: Any, args: CISPOConfig) -> None:
    text = config.get_text_config()
    if args.cast_lm_head_to_fp32 and getattr(text, "tie_word_embeddings", False):
        raise ValueError(
            "cast_lm_head_to_fp32 is True, but the model's head is its embedding (tie_word_embeddings), which would "
            "become fp32 too; set cast_lm_head_to_fp32=False"
        )
    if args.length_stages is not None:
        check_stages(args.length_stages, getattr(text, "max_position_embeddings", None))
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if args.use_transformers_continuous_batching and kinds:
        raise ValueError(
            f"use_transformers_continuous_batching is True, but transformers' continuous batching knows no {kinds} "
            "layers, which this model has; set it to False, or use_vllm=True"
        )
    if args.router_aux_loss_coef is None and getattr(text, "router_aux_loss_coef", None):
        logger.warning(
            "router_aux_loss_coef is None, so the model config's %s is used: it moves weights even when no group has "
            "any variance",
            text.router_aux_loss_coef,
        )

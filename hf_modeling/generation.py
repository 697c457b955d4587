# SPDX-License-Identifier: Apache-2.0
"""What ``generate`` has to know about the family: its cache, its end of sequence, the unused rows of its LM head."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache

from minimax_plugin.architecture import EOS_TOKEN_ID, PAD_TOKEN_ID, RELEASED_VOCAB_SIZE
from minimax_plugin.hf_modeling.cache import adopt_cache
from minimax_plugin.vocabulary import padding_ids

logger = logging.getLogger(__name__)

#: File that transformers would run in place of ``generate`` with ``trust_remote_code=True``.
CUSTOM_GENERATE = "custom_generate/generate.py"


class MiniMaxM1GenerationMixin:
    """Goes before ``GenerationMixin`` in the bases of a model."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # transformers answers no for every class with "minimax" in its name, because of its own MiniMax class, and then
        # ignores static caches and refuses assisted generation.
        return True

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            # Before the first forward pass: a model without a softmax layer is asked for its length sooner.
            adopt_cache(cache, self.config.layer_types)  # type: ignore[attr-defined]
        return result

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Fill in what the released checkpoint leaves out, without touching anything a checkpoint states.

        The released config.json has no end of sequence and the repository has no generation_config.json, so that
        ``generate`` would not stop before its token limit. Sampling is not switched on. A ``generate`` function that
        comes with the checkpoint (``custom_generate/generate.py``) is not run, whatever ``trust_remote_code`` is; name
        its repository in ``generate(custom_generate=...)`` to run it.
        """
        if kwargs.get("trust_remote_code"):
            kwargs["trust_remote_code"] = False
            for source in args:
                if isinstance(source, str | os.PathLike) and (file := Path(source, CUSTOM_GENERATE)).is_file():
                    logger.warning("%s is not run: generate needs no code of the checkpoint", file)
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        generation_config = self.generation_config  # type: ignore[attr-defined]
        if generation_config is None:
            return
        config = self.config  # type: ignore[attr-defined]
        if generation_config.suppress_tokens is None:
            embedding = self.get_input_embeddings().weight  # type: ignore[attr-defined]
            whole = embedding.full_tensor() if isinstance(embedding, DTensor) else embedding
            generation_config.suppress_tokens = padding_ids(config, whole.detach()) or None
        if config.vocab_size != RELEASED_VOCAB_SIZE:
            return
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = EOS_TOKEN_ID
        if generation_config.pad_token_id is None:
            generation_config.pad_token_id = PAD_TOKEN_ID

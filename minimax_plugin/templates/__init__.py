# SPDX-License-Identifier: Apache-2.0
"""Chat templates, read by both backends.

``minimax_m1.jinja`` renders what the template of the released checkpoint renders for the inputs that one can take, and
takes in addition: content given as a string, several text parts, tool calls of the assistant, markers around generated
text (``{% generation %}``).
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE_PATH = Path(__file__).parent / "minimax_m1.jinja"


def chat_template() -> str:
    """The chat template as text."""
    return CHAT_TEMPLATE_PATH.read_text(encoding="utf-8")

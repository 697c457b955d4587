# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 and MiniMax-Text-01 for Hugging Face transformers and vLLM.

Importing the package registers the Hugging Face classes, before or after transformers is imported, and imports neither
transformers nor torch itself. vLLM finds the plugin through its entry point; nothing here imports vLLM.
"""

from minimax_plugin.registration import register_hf_with_library

__version__ = "0.1.0"

register_hf_with_library()

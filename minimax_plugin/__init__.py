# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 and MiniMax-Text-01 for Hugging Face transformers and vLLM.

Importing the package registers the Hugging Face classes. vLLM finds the plugin through its entry point; nothing here
imports vLLM.
"""

import warnings

from minimax_plugin.registration import register_hf

__version__ = "0.1.0"

try:
    register_hf()
except Exception as error:  # `minimax-plugin doctor` is part of this package and has to be able to explain it
    warnings.warn(
        f"MiniMax-M1 is unknown to transformers ({type(error).__name__}: {error}); run `minimax-plugin doctor`",
        RuntimeWarning,
        stacklevel=2,
    )

# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 for Hugging Face transformers."""

# Registration follows the import of transformers and needs every module of this package whole. Imported by the first of
# them, transformers would trigger it while that one is half done.
import transformers  # noqa: F401

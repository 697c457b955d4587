# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M1 for Hugging Face transformers."""

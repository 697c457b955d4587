# SPDX-License-Identifier: Apache-2.0
"""placeholder"""
HAS_TRITON = False


def interpreted() -> bool:
    return False

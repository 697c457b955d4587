# SPDX-License-Identifier: Apache-2.0
"""``python -m minimax_plugin`` does what the ``minimax-plugin`` script does."""

import sys

from minimax_plugin.cli import main

sys.exit(main())

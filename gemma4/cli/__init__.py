# SPDX-License-Identifier: Apache-2.0
"""The `gemma4` command."""

from gemma4.cli.main import EXIT_ERROR, EXIT_INTERRUPTED, main

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "main"]

# SPDX-License-Identifier: Apache-2.0
"""The `gemma4` command."""

from gemma4.cli.main import main

__all__ = ["main"]

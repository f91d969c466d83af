# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.cli.demo."""

from gemma4.cli.demo import RIDDLE, STORY, run_demo, show_speed

__all__ = ["RIDDLE", "STORY", "run_demo", "show_speed"]

# SPDX-License-Identifier: Apache-2.0
"""From a prompt to sampled text: options, the loop, sampling, pieces of text, streams."""

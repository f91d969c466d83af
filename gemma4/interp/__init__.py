# SPDX-License-Identifier: Apache-2.0
"""Looking inside: activation sites, caches, hooks, lenses, plots."""

# SPDX-License-Identifier: Apache-2.0
"""Datasets of activations: run a model over a corpus once, and read what it showed as often as you like.

    from gemma4 import harvest
    harvest.harvest(model, "text.jsonl", "blocks.{5,12}.hook_resid_post", out="acts", workers=2)
    dataset = harvest.open("acts")
    dataset["blocks.5.hook_resid_post"][:100]

Stopped anyhow and run again, a harvest resumes; its bytes do not depend on the number of workers.
"""

from gemma4.harvest.dataset import Column, Dataset, SiteStats
from gemma4.harvest.dataset import open_harvest as open
from gemma4.harvest.export import to_delphi, to_parquet, to_saelens, to_zarr
from gemma4.harvest.run import Harvested, Progress, harvest

__all__ = [
    "Column",
    "Dataset",
    "Harvested",
    "Progress",
    "SiteStats",
    "harvest",
    "open",
    "to_delphi",
    "to_parquet",
    "to_saelens",
    "to_zarr",
]

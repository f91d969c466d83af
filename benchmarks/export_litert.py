# SPDX-License-Identifier: Apache-2.0
"""Export a Hugging Face directory of a Gemma 4 to a .litertlm file for LiteRT-LM, with litert-torch.

    PYTHON benchmarks/export_litert.py DIR OUT                                4 bits in blocks of 32, as Q4_0 has them
    PYTHON benchmarks/export_litert.py DIR OUT --recipe gemma4_mixed48        4 bits, one scale a row

PYTHON is the interpreter of an environment with litert-torch and tensorflow-cpu (benchmarks/README.md); nothing else
of this repository is needed there. Recipes are those of ai-edge-quantizer for Gemma 4: per-layer maps keep 8 bits. DIR
must be of the multimodal class, whose text model is exported. OUT gets model.litertlm.
"""

import argparse
import json
import tempfile
from pathlib import Path


def join_recipe(name: str) -> list[dict[str, object]]:
    """The rules of a recipe of ai-edge-quantizer.

    It has a list for each section of the file, and the exporter takes one for all. Both embedders have the same list,
    which speaks of other operations than the model's.
    """
    from ai_edge_quantizer import recipe

    if not hasattr(recipe, name):
        known = ", ".join(key for key in dir(recipe) if key.startswith("gemma4"))
        raise SystemExit(f"ai-edge-quantizer has no recipe {name}; for Gemma 4 it has {known}")
    sections = getattr(recipe, name)()
    return [*sections["tf_lite_embedder"], *sections["tf_lite_prefill_decode"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("out", type=Path, help="directory to write model.litertlm into")
    parser.add_argument("--recipe", default="gemma4_mixed48_b32")
    parser.add_argument("--prompt", type=int, default=512, help="positions of a step of prefill")
    parser.add_argument("--context", type=int, default=1024, help="positions of the cache")
    args = parser.parse_args()
    if not (config := args.model / "config.json").is_file():
        parser.error(f"{args.model} is no Hugging Face directory: it has no config.json")
    if "text_config" not in json.loads(config.read_text()):
        parser.error(
            f"{args.model} is of the text-only class, which litert-torch does not export; write the multimodal"
        )
    rules = join_recipe(args.recipe)
    from litert_torch.generative.export_hf.export import export

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"  # the exporter tells a file from a name by its ending
        recipe.write_text(json.dumps(rules))
        export(
            model=str(args.model),
            output_dir=str(args.out),
            quantization_recipe=str(recipe),
            externalize_embedder=True,
            use_jinja_template=False,
            prefill_lengths=[args.prompt],
            cache_length=args.context,
        )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Makes the two small models that ship with gemma4 (`tiny-e`, `tiny-moe`): data, tokenizer, training, evaluation.

Run the modules from `tools/`, for example `python -m train_tiny.evaluate --model DIR`; see README.md.
"""

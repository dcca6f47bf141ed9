#!/usr/bin/env python
"""Phase 2: train all denoising blocks, or some of them, beside a table that phase 1 made.

python scripts/train_blocks.py recipes/demo.yaml --blocks 0,2-3
"""

from transformers import TrainingArguments

from noprop_hf.arguments import (
    BlockArguments,
    ModelArguments,
    PretrainingArguments,
    ShareArguments,
    parse_arguments,
)
from noprop_hf.data import DataArguments
from noprop_hf.training import train_blocks


def main() -> None:
    types = (ModelArguments, DataArguments, PretrainingArguments, BlockArguments, ShareArguments, TrainingArguments)
    model_args, data_args, _, block_args, _, training_args = parse_arguments(types, __doc__)
    train_blocks(data_args, block_args, training_args, model_args)


if __name__ == "__main__":
    main()

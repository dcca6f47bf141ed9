#!/usr/bin/env python
"""Phase 1: make the frozen embedding table and the model directory around it.

python scripts/pretrain_embeddings.py recipes/demo.yaml
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
from noprop_hf.training import pretrain_embeddings


def main() -> None:
    types = (ModelArguments, DataArguments, PretrainingArguments, BlockArguments, ShareArguments, TrainingArguments)
    model_args, data_args, pretraining_args, _, _, training_args = parse_arguments(types, __doc__)
    pretrain_embeddings(model_args, data_args, pretraining_args, training_args)


if __name__ == "__main__":
    main()

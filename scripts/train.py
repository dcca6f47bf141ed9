#!/usr/bin/env python
"""The main job from one recipe: pretrain the table, train all blocks, evaluate, write samples.

python scripts/train.py recipes/demo.yaml
python scripts/train.py recipes/demo.yaml --max_steps 1000 --output_dir runs/longer
"""

from pathlib import Path

from transformers import TrainingArguments

from noprop_hf import NoPropConfig
from noprop_hf.arguments import (
    BlockArguments,
    ModelArguments,
    PretrainingArguments,
    ShareArguments,
    parse_arguments,
    parse_blocks,
)
from noprop_hf.data import DataArguments
from noprop_hf.evaluation import report
from noprop_hf.hub import push_model, write_card
from noprop_hf.shards_noprop import missing_shards
from noprop_hf.training import pretrain_embeddings, train_blocks


TEMPLATE = Path(__file__).parent.parent / "model_card.md"


def main() -> None:
    types = (ModelArguments, DataArguments, PretrainingArguments, BlockArguments, ShareArguments, TrainingArguments)
    model_args, data_args, pretraining_args, block_args, share_args, training_args = parse_arguments(types, __doc__)
    if training_args.push_to_hub and not training_args.hub_model_id:
        raise SystemExit("Say where --push_to_hub goes: --hub_model_id user/name.")
    parse_blocks(block_args.blocks, model_args.num_blocks or NoPropConfig().num_blocks)  # before the long work
    pretrain_embeddings(model_args, data_args, pretraining_args, training_args)
    directory = train_blocks(data_args, block_args, training_args, model_args)
    missing = missing_shards(directory)
    if missing:
        print(f"The model in {directory} still misses {', '.join(missing)}: train the other blocks to evaluate it.")
        return
    print(report(directory, data_args, block_args, training_args.per_device_eval_batch_size, training_args.seed))
    if training_args.push_to_hub:
        write_card(directory, training_args.hub_model_id, TEMPLATE, share_args.license, share_args.language)
        token, private = training_args.hub_token, training_args.hub_private_repo
        print(f"Uploaded: {push_model(directory, training_args.hub_model_id, private, token, update=True)}")


if __name__ == "__main__":
    main()

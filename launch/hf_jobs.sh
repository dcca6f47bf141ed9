#!/usr/bin/env bash
# Jobs on the Hub's machines: one job for phase 1, then one job for each block. The repository is their meeting place.
#   launch/hf_jobs.sh user/name recipes/t4_wikitext103.yaml 10 t4-small
# Needs `hf auth login`; FLAVOR is one of `hf jobs hardware`.
set -euo pipefail
repository=$1 recipe=$2 num_blocks=$3 flavor=$4
source=${SOURCE:?the address of this repository, for git clone}
setup="git clone --depth 1 $source noprop && cd noprop && pip install -c constraints.txt -e ."
jobs="--secrets HF_TOKEN --env GOMP_SPINCOUNT=4000"
share="--push_to_hub true --hub_model_id $repository"

# On a second run, the repository already holds phase 1, and jobs of trained blocks end at once.
python scripts/status.py "$repository" || hf jobs run --flavor "$flavor" $jobs --timeout 12h python:3.11 \
  bash -c "$setup && accelerate launch scripts/pretrain_embeddings.py $recipe $share"
for ((block = 0; block < num_blocks; block++)); do
  hf jobs run --detach --flavor "$flavor" $jobs --timeout 24h python:3.11 \
    bash -c "$setup && accelerate launch scripts/train_blocks.py $recipe $share --blocks $block"
done
echo "See the state of each block: python scripts/status.py $repository"

#!/usr/bin/env python
"""What training one block of the T4 recipe keeps in memory, counted on the CPU through autograd's saved-tensor hooks.

python benchmarks/block_memory.py
"""

import torch

from noprop_hf import DenoisingBlock, NoPropConfig
from noprop_hf.modeling_noprop import TokenTable


def saved_bytes(block: DenoisingBlock, table: TokenTable, batch_size: int) -> int:
    """Bytes that one forward pass over windows of 128 tokens saves for the backward pass, weights left out."""
    own = {tensor.data_ptr() for tensor in [*block.parameters(), *table.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(block.config.vocab_size, (batch_size, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = block(tokens, tokens, table).loss
    total = sum(size for pointer, size in saved.items() if pointer not in own)
    del loss  # alive until here, so that no address is used twice
    return total


def main() -> None:
    torch.manual_seed(0)
    config = NoPropConfig()  # the recipe's shape
    block, table = DenoisingBlock(config, config.num_blocks // 2).train(), TokenTable(config)
    per_token = (saved_bytes(block, table, 8) - saved_bytes(block, table, 4)) / (4 * 128)
    parameters = block.num_parameters()
    megabytes = {
        "parameters, gradients and Adam's state, fp32": parameters * 16,
        "frozen table, fp32": table.weight.nbytes,
        "activations of 128 windows of 128 tokens": per_token * 128 * 128,
    }
    print(f"a block has {parameters:,} parameters and keeps {per_token / 1000:.0f} kB per token")
    for name, size in megabytes.items():
        print(f"{size / 1e6:8,.0f} MB  {name}")


if __name__ == "__main__":
    main()

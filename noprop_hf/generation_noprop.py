"""Generation: the denoising chain, and `generate` with it."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateOutput

from .cache_noprop import BlockCache
from .compatibility_noprop import CACHE
from .noise_noprop import sample_evidence


class Beliefs:
    """The chain's belief about the next token, block by block.

    Blocks are independent estimates of one posterior, so block b refines the belief of the blocks before it instead of
    replacing it: the belief at block b is the normalised geometric mean of the distributions of blocks 0 to b, each
    updated by Bayes' rule to the evidence `s_b` (block b itself through its head, which was trained at that level). In
    logits, `l_b = (mean_{j<=b} a_j + s_b) E^T + mean_{j<=b} bias_j`, where `a_j` is a block's answer without evidence.
    With a router, the mean of the answers has the router's weights. On pure noise this is the predictive distribution
    of the first blocks.

    Args:
        block_logits (`(..., num_blocks)`, *optional*): logits of the blocks' weights; equal weights when not given.
    """

    def __init__(self, block_logits: torch.Tensor | None = None):
        self.block_logits = block_logits
        self.count = 0
        self.answer: torch.Tensor | float = 0.0  # the mean of the blocks so far
        self.bias: torch.Tensor | float = 0.0

    def refine(
        self, head: nn.Module, context: torch.Tensor, evidence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Fold the next block into the belief.

        Args:
            head ([`DenoisingHead`]): the head of the block.
            context (`(..., hidden_size)`): the block's context states, in a shape that expands to that of the evidence.
            evidence (`(..., hidden_size)`): evidence at the block's level, in float32.

        Returns:
            The belief without the evidence, `(..., hidden_size)`, its bias, `(vocab_size,)`, and the block's answer on
            pure noise, a point in the shape of `context` and a bias; all in float32.
        """
        self.count += 1
        device = evidence.device  # blocks may lie on several devices
        alone, bias = (tensor.float().to(device) for tensor in head(context))
        informed, _ = head(context.expand_as(evidence), evidence)
        answer = informed.float().to(device) - evidence
        share: torch.Tensor | float = 1 / self.count  # of this block among the blocks so far
        if self.block_logits is not None:
            share = self.block_logits[..., : self.count].to(device).float().softmax(-1)[..., -1:]
        belief = self.answer + share * (answer - self.answer)
        self.answer = self.answer + share * (alone - self.answer)
        self.bias = self.bias + (bias - self.bias) / self.count
        return belief, self.bias, (alone, bias)


class NoPropGenerationMixin(GenerationMixin):
    """`generate` of transformers with a second mode, which runs the chain from pure noise for every token.

    The chain is part of `forward` (`decoding_mode="denoising"` returns the last block's distribution at the end of a
    sampled trajectory), so streaming, stopping, caching and scores are those of [`GenerationMixin`].
    """

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        decoding_mode: str | None = None,
        num_inference_blocks: int | None = None,
        num_trajectories: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """Generate token ids; see [`~transformers.GenerationMixin.generate`] for the common arguments.

        `decoding_mode`, `num_inference_blocks`, `num_trajectories` and `seed` can also be set in the
        [`GenerationConfig`].

        Args:
            decoding_mode (`str`, *optional*): `"predictive"` (default) decodes from the deterministic predictive
                distribution; `"denoising"` runs the chain of blocks from pure noise for every token. With the chain,
                `do_sample=True` draws from the chain's distribution, and `do_sample=False` takes the likeliest token of
                the averaged trajectories.
            num_inference_blocks (`int`, *optional*): run only the first blocks.
            num_trajectories (`int`, *optional*): trajectories of the chain to average for each token.
            seed (`int`, *optional*): seed of all random numbers in the call, which then leaves torch's global random
                state unchanged.
            generator (`torch.Generator`, *optional*): source of the chain's randomness (not of `do_sample`).
        """
        chain_arguments = {
            "decoding_mode": decoding_mode,
            "num_inference_blocks": num_inference_blocks,
            "num_trajectories": num_trajectories,
            "generator": generator,
        }
        kwargs |= {name: value for name, value in chain_arguments.items() if value is not None}
        for name in {"cache", "past_key_values"} & kwargs.keys():  # two names of one argument
            kwargs[CACHE] = kwargs.pop(name)
        if seed is None:
            seed = getattr(generation_config or self.generation_config, "seed", None)
        if seed is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args, **kwargs
    ) -> tuple[GenerationConfig, dict]:
        """Pass the chain's arguments in the configuration to `forward`, as stock code does with `output_attentions`."""
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        for name in ("decoding_mode", "num_inference_blocks", "num_trajectories"):
            value = getattr(generation_config, name, None)
            if value is not None:
                model_kwargs.setdefault(name, value)
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args) -> None:
        """Replace the default cache by one that blocks running side by side can fill."""
        is_given = CACHE in model_kwargs
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = None if is_given else model_kwargs.get(CACHE)
        if cache is not None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs[CACHE] = BlockCache(config=self.config)

    @torch.no_grad()
    def denoise(
        self,
        context_states: Sequence[torch.Tensor],
        num_trajectories: int = 1,
        generator: torch.Generator | None = None,
        block_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the chain from pure noise, and average the last block's distributions over the trajectories.

        Args:
            context_states: the context states of the blocks to run, `(..., hidden_size)` each.
            num_trajectories: number of independent chains.
            block_logits (`(..., num_blocks)`, *optional*): see [`Beliefs`].

        Returns:
            `torch.Tensor` of shape `(..., vocab_size)`: log-probabilities of the next token.
        """
        *_, (log_probs, _) = self.chain(context_states, num_trajectories, generator, block_logits)
        return log_probs.logsumexp(0) - math.log(num_trajectories)

    @torch.no_grad()
    def chain(
        self,
        context_states: Sequence[torch.Tensor],
        num_trajectories: int = 1,
        generator: torch.Generator | None = None,
        block_logits: torch.Tensor | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Run the chain: `s_{b+1} = s_b + D e_y + sqrt(D) eps`, with `y` drawn from the belief at block b.

        The paper moves to the mean embedding (NoProp, arXiv 2503.24322, section 2). Drawing a token instead makes a
        step of any size exact when the belief is the true posterior.

        Yields:
            The belief at a block as log-probabilities `(num_trajectories, ..., vocab_size)`, and the tokens
            `(num_trajectories, ...)` that the evidence has just moved towards (None at pure noise).
        """
        if not isinstance(num_trajectories, int) or num_trajectories < 1:
            raise ValueError(f"`num_trajectories` must be a positive integer, got {num_trajectories}.")
        blocks, table = self.model.blocks[: len(context_states)], self.model.embed_tokens.forward
        shape = (num_trajectories, *context_states[0].shape)
        evidence, level = torch.zeros(shape, device=context_states[0].device), 0.0
        log_probs = tokens = None
        beliefs = Beliefs(block_logits)
        for block, context in zip(blocks, context_states, strict=True):
            if block.level > level:
                tokens = sample_categorical(log_probs, generator)
                evidence = evidence + sample_evidence(table(tokens, are_targets=True), block.level - level, generator)
                level = block.level
            belief, bias, _ = beliefs.refine(block.head, context, evidence)
            log_probs = table(belief + evidence, bias).log_softmax(-1)
            yield log_probs, tokens


def sample_categorical(log_probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one index `(...)` from each row of log-probabilities `(..., num_classes)`."""
    rows = log_probs.flatten(0, -2).exp()
    if generator is not None:
        rows = rows.to(generator.device)
    tokens = torch.multinomial(rows, 1, generator=generator).to(log_probs.device)
    return tokens.view(log_probs.shape[:-1])

"""Measure the perplexity of a model, and the variational bound of its chain, split by block.

    %(prog)s runs/demo
    %(prog)s runs/demo --test_file my_text.txt

The default corpus is that of the model's training. With `--packing false`, each row is a separate text, and the command
prints the `perplexity` metric of `evaluate` for these texts.
"""

from dataclasses import dataclass, field

from ..data import DataArguments, load_corpus, load_tokenizer, tokenize
from ..evaluation import evaluate_model, load_model, perplexity
from ..perplexity import Perplexity
from ..recipes import entry_point, parse_arguments


@dataclass
class EvaluationArguments:
    split: str | None = field(
        default=None,
        metadata={
            "help": "Split to measure. Default: test, or validation where there is no test split.",
            "choices": ["test", "validation", "train"],
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Windows evaluated at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise of the bound."})

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {self.batch_size}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}.")


@entry_point
def main() -> None:
    name, args, data_args = parse_arguments((EvaluationArguments, DataArguments), __doc__, model=True)
    model = load_model(name)
    tokenizer = load_tokenizer(name, model.config.vocab_size)
    corpus = load_corpus(data_args)
    split = args.split or ("test" if "test" in corpus else "validation")
    if split not in corpus:
        raise SystemExit(f"The corpus has no {split!r} split, only {', '.join(corpus)}: choose one with --split.")
    corpus = {split: corpus[split]}
    if not data_args.packing:
        texts = [row[data_args.text_column_name] or "" for row in corpus[split]]
        lengths = map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        shortest = 2 if tokenizer.bos_token_id is None else 1  # without a start, the first token is not predicted
        texts = [text for text, length in zip(texts, lengths, strict=True) if length >= shortest]
        if not texts:
            raise SystemExit(f"No text of the {split} split has a token to predict: choose another --split.")
        result = Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, batch_size=args.batch_size)
        print(f"{len(result['perplexities'])} texts of {split}")
        print(f"  mean perplexity          {result['mean_perplexity']:.6f}")
        return
    rows = tokenize(corpus, tokenizer, data_args)[split]
    nats = evaluate_model(model, rows, tokenizer, args.batch_size, args.seed)
    print(f"{nats.num_tokens} tokens of {split}")
    for name, value in (("predictive distribution", nats.predictive), ("bound of the chain", nats.bound)):
        print(f"  {name:24} {value:.4f} nats per token, perplexity {perplexity(value):.2f}")
    for block, (gain, error) in enumerate(zip(nats.block_nats, nats.block_errors, strict=True)):
        print(f"    block {block}: {gain:+.4f} ± {error:.4f} (alone on pure noise: {nats.context[block]:.4f})")

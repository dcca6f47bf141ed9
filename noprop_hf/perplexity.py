"""Perplexity of texts, as a metric of `evaluate`."""

from collections.abc import Iterator

import evaluate
import torch
from datasets import Features, Value
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .data import load_tokenizer


class Perplexity(evaluate.Metric):
    """The `perplexity` metric of `evaluate`, without its download.

    Inputs and outputs of `compute` are those of that metric, plus `stride` for texts longer than the model's window:

        >>> Perplexity().compute(predictions=["One text.", "Another one."], model_id="runs/demo")
        {'perplexities': [...], 'mean_perplexity': ...}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity: the exponential of a model's mean negative log-likelihood of a text, by token.",
            citation="",
            inputs_description=(
                "predictions (list of str): the texts. model_id (str): a causal model of transformers; or model and "
                "tokenizer, if they are loaded already. "
                "batch_size (int, 16). add_start_token (bool): predict the first token as well, after bos; default: "
                "if the tokenizer has a bos token. device (str): default: a GPU if available. max_length (int): the "
                "longest window in tokens, bos included; longer texts are cut off or, with stride (int), read in "
                "windows that advance by that many tokens, each token predicted once."
            ),
            features=Features({"predictions": Value("string")}),
        )

    @torch.no_grad()
    def _compute(
        self,
        predictions: list[str],
        model_id: str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        add_start_token: bool | None = None,
        device: str | None = None,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> dict[str, list[float] | float]:
        if stride is not None and (max_length is None or not 0 < stride < max_length):
            raise ValueError(f"`stride` ({stride}) must be positive and less than `max_length` ({max_length}).")
        if model is None or tokenizer is None:
            if model_id is None:
                raise ValueError("Give a `model_id`, or a `model` with its `tokenizer`.")
            model, tokenizer = AutoModelForCausalLM.from_pretrained(model_id), load_tokenizer(model_id)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device or model.device).eval()
        device = model.device
        bos = tokenizer.bos_token_id
        add_start_token = bos is not None if add_start_token is None else add_start_token
        if add_start_token and bos is None:
            raise ValueError(
                f"{model.name_or_path} was trained without a token that begins a text: use `add_start_token=False`."
            )

        windows = []  # text index, token ids, and labels: the ids, with -100 for tokens that are context only
        for text, ids in enumerate(tokenizer(predictions, add_special_tokens=False, verbose=False)["input_ids"]):
            ids = torch.tensor([bos, *ids] if add_start_token else ids)
            if len(ids) < 2:
                raise ValueError(f"Text {text} ({predictions[text]!r}) is too short: it has no token to predict.")
            for begin, end, first in _sliding_windows(len(ids), max_length, stride):
                labels = ids[begin:end].clone()
                labels[: first - begin] = -100
                windows.append((text, ids[begin:end], labels))

        nats, counts = torch.zeros(len(predictions)), torch.zeros(len(predictions))
        for start in tqdm(range(0, len(windows), batch_size), desc="Perplexity", leave=False):
            texts, rows, labels = zip(*windows[start : start + batch_size], strict=True)
            input_ids = pad_sequence(rows, batch_first=True).to(device)
            attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
            targets = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:].to(device)
            logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            nats.index_add_(0, torch.tensor(texts), losses.view_as(targets).sum(1).cpu())
            counts.index_add_(0, torch.tensor(texts), (targets != -100).sum(1).float().cpu())
        perplexities = (nats / counts).exp()
        return {"perplexities": perplexities.tolist(), "mean_perplexity": perplexities.mean().item()}


def _sliding_windows(length: int, max_length: int | None, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield the begin and end of each window over a text of `length` tokens, and the first token it predicts."""
    begin, first = 0, 1
    while first < length:
        end = length if max_length is None else min(begin + max_length, length)
        yield begin, end, first
        if stride is None:
            return
        begin, first = begin + stride, end

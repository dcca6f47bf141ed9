"""Tools that other people wrote, on a model directory: the perplexity metric, lm-eval, peft, trainers, the server."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from conftest import run_python, sentences
from noprop_hf.perplexity import Perplexity


TEXTS = [*sentences(4, seed=9), "the", "birds sang " * 12]


@pytest.fixture(scope="module")
def directory(writer, tokenizer, tmp_path_factory) -> str:
    """A saved model."""
    path = str(tmp_path_factory.mktemp("model"))
    writer.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# --- perplexity -------------------------------------------------------------------------------------------------------


def stock_perplexity(texts: list[str], model_id: str, batch_size: int, add_start_token: bool) -> list[float]:
    """The calls of the published `perplexity` metric of `evaluate`, which cannot be downloaded here."""
    model = AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    encodings = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        truncation=False,
        return_tensors="pt",
        return_attention_mask=True,
    )
    perplexities = []
    for start in range(0, len(texts), batch_size):
        batch = encodings["input_ids"][start : start + batch_size]
        mask = encodings["attention_mask"][start : start + batch_size]
        if add_start_token:
            bos = torch.tensor([[tokenizer.bos_token_id]] * len(batch))
            batch = torch.cat([bos, batch], dim=1)
            mask = torch.cat([torch.ones_like(bos), mask], dim=1)
        with torch.no_grad():
            logits = model(batch, attention_mask=mask).logits
        losses = nn.CrossEntropyLoss(reduction="none")(logits[:, :-1].transpose(1, 2), batch[:, 1:])
        mask = mask[:, 1:]
        perplexities += torch.exp((losses * mask).sum(1) / mask.sum(1)).tolist()
    return perplexities


@pytest.mark.parametrize("add_start_token", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_that_of_the_stock_metric(directory, add_start_token, batch_size):
    texts = TEXTS if add_start_token else [text for text in TEXTS if text != "the"]
    ours = Perplexity().compute(
        predictions=texts, model_id=directory, batch_size=batch_size, add_start_token=add_start_token
    )
    stock = stock_perplexity(texts, directory, batch_size, add_start_token)
    assert ours["perplexities"] == pytest.approx(stock, abs=1e-3, rel=1e-6)
    assert ours["mean_perplexity"] == pytest.approx(sum(stock) / len(stock), rel=1e-6)
    one_by_one = stock_perplexity(texts, directory, 1, add_start_token)
    assert stock == pytest.approx(one_by_one, rel=1e-5)  # padding changes nothing


def test_long_texts_in_sliding_windows(directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(directory)
    text = " ".join(sentences(6))
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    # by hand: windows of 10 that move on by 4; a token is predicted in the first window it is in
    nats, predicted, begin = 0.0, 1, 0
    while predicted < len(ids):
        window = ids[begin : begin + 10]
        log_probs = model(window[None]).logits[0]
        for position in range(predicted, min(begin + 10, len(ids))):
            nats -= log_probs[position - begin - 1, ids[position]].item()
        predicted, begin = min(begin + 10, len(ids)), begin + 4
    result = Perplexity().compute(predictions=[text], model_id=directory, max_length=10, stride=4)
    assert result["perplexities"][0] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    cut = Perplexity().compute(predictions=[text], model_id=directory, max_length=10)
    loss = model(ids[None, :10], labels=ids[None, :10]).loss
    assert cut["perplexities"][0] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_perplexity_of_nothing(directory):
    with pytest.raises(ValueError, match="Text 1 .* too short"):
        Perplexity().compute(predictions=["the cat", "a"], model_id=directory, add_start_token=False)
    with pytest.raises(ValueError, match="stride"):
        Perplexity().compute(predictions=["the cat"], model_id=directory, max_length=4, stride=4)


@pytest.mark.slow
def test_the_script_gives_the_same(directory, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(TEXTS) + "\n")
    files = [f"--{split}_file={tmp_path / split}.txt" for split in ("train", "test")]
    options = [*files, "--packing", "false", "--validation_split_percentage", "50", "--batch_size", "4"]
    output = run_python("scripts/evaluate_perplexity.py", directory, *options)
    stock = stock_perplexity(TEXTS, directory, 4, True)
    assert float(output.split()[-1]) == pytest.approx(sum(stock) / len(stock), abs=1e-4)


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def test_lm_eval(directory, tmp_path, tokenizer):
    """`--model hf` with local tasks: loglikelihood, rolling loglikelihood and generate_until requests."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": text, "question": " ".join(text.split()[:2]), "choices": ["cat", "old dogs"], "gold": 1}
        for text in sentences(5)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
"""
    tasks = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}]\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n",
        "until": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{text}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    }
    (tmp_path / "tasks").mkdir()
    for name, task in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: noprop_{name}\n{common}{task}")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={directory},dtype=float32",
        tasks=[f"noprop_{name}" for name in tasks],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=2,
        device="cpu",
        log_samples=True,
    )
    model = AutoModelForCausalLM.from_pretrained(directory)

    def log_likelihood(context: str, continuation: str) -> float:
        head = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
        ids = torch.tensor([head + tokenizer(continuation)["input_ids"]])
        log_probs = model(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[len(head) - 1 :]
        return log_probs.sum().item()

    for sample in results["samples"]["noprop_choice"]:
        values = [response[0] for response in sample["filtered_resps"]]
        expected = [log_likelihood(sample["doc"]["question"], " " + choice) for choice in sample["doc"]["choices"]]
        assert values == pytest.approx(expected, abs=1e-3)
    rolled = [sample["filtered_resps"][0] for sample in results["samples"]["noprop_rolling"]]
    short = [row["text"] for row in rows if len(tokenizer(row["text"])["input_ids"]) < 31]
    assert short and [value for value, row in zip(rolled, rows, strict=True) if row["text"] in short] == pytest.approx(
        [log_likelihood("", text) for text in short], abs=1e-3
    )
    for sample in results["samples"]["noprop_until"]:
        prompt = tokenizer(sample["doc"]["question"], return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert sample["filtered_resps"][0] == tokenizer.decode(output, skip_special_tokens=True).split(".")[0]


# --- training with other people's tools -------------------------------------------------------------------------------


def training_rows(tokenizer) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in sentences(200)]


def train(model: nn.Module, tokenizer, output_dir: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=5,
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(tokenizer),
        eval_dataset=training_rows(tokenizer)[:20],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_stock_trainer_fine_tunes_end_to_end(directory, tokenizer, tmp_path, checkpointing):
    model = AutoModelForCausalLM.from_pretrained(directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = train(
        model, tokenizer, tmp_path / "run", activation_checkpointing=checkpointing, eval_strategy="steps", eval_steps=15
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    after = model.state_dict()
    for name in before:
        trained = not name.startswith("model.embed_tokens") and "correction.0" not in name
        assert torch.equal(before[name], after[name]) != trained or "correction.0" in name, name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-30")
    input_ids = torch.arange(10)[None]
    assert torch.equal(loaded(input_ids).logits, model.eval()(input_ids).logits)


def test_lora_on_one_block(directory, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(directory)
    config = peft.LoraConfig(
        r=2, target_modules=r"model\.blocks\.1\..*\.(q_proj|v_proj|up_proj)", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable and all(".blocks.1." in name and "lora_" in name for name in trainable)
    trainer = train(adapted, tokenizer, tmp_path / "run")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    input_ids = torch.arange(10)[None]
    assert torch.allclose(fresh(input_ids).logits, adapted.eval()(input_ids).logits, atol=1e-6)
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(input_ids).logits, fresh(input_ids).logits, atol=1e-5)
    output = fresh.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 13)


# --- trl: each trainer against as many steps of plain gradient descent, written out -----------------------------------


def trl_arguments(output_dir: Path) -> dict:
    return {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,  # all rows, so that their order is of no matter
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def check_descent(trainer: Trainer, model: nn.Module, losses: list[Callable[[nn.Module], torch.Tensor]]) -> None:
    """Compare a trainer that has trained with as many steps of a copy of its model from before, by `losses`."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer, expected = torch.optim.SGD(model.train().parameters(), lr=0.1), []
    for loss in losses:
        optimizer.zero_grad()
        expected.append(loss(model))
        expected[-1].backward()
        optimizer.step()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([loss.item() for loss in expected], abs=2e-4)
    after = trainer.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-4)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("q_proj.weight") for name in moved)
    assert not any("embed_tokens" in name for name in moved)


def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def completion_nats(model: nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """The negative log-probabilities of completions, `(batch, longest)`, zero where there is none."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    labels = [[-100] * len(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
    mask = padded([[1] * len(row) for row in rows])
    logits = model(padded(rows), attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), padded(labels, -100)[:, 1:], reduction="none")


@pytest.mark.parametrize("by_path", [False, True])
def test_sft_of_trl(directory, tokenizer, tmp_path, by_path):
    trl = pytest.importorskip("trl")
    model = AutoModelForCausalLM.from_pretrained(directory)
    trainer = trl.SFTTrainer(
        directory if by_path else copy.deepcopy(model),
        args=trl.SFTConfig(**trl_arguments(tmp_path), max_length=24),
        train_dataset=Dataset.from_dict({"text": sentences(4)}),
        processing_class=tokenizer,
    )
    rows = trainer.train_dataset["input_ids"]
    trainer.train()

    def loss(model: nn.Module) -> torch.Tensor:
        nats = completion_nats(model, [row[:1] for row in rows], [row[1:] for row in rows])
        return nats.sum() / sum(len(row) - 1 for row in rows)

    check_descent(trainer, model, [loss] * 3)


def test_dpo_of_trl(directory, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    model, reference = (AutoModelForCausalLM.from_pretrained(directory) for _ in range(2))
    texts, worse = sentences(4), sentences(4, seed=1)
    rows = {"prompt": ["the cat"] * 4, "chosen": [f" {text}" for text in texts], "rejected": [f" {t}" for t in worse]}
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        args=trl.DPOConfig(**trl_arguments(tmp_path), beta=0.5),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    prompts, chosen, rejected = (trainer.train_dataset[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
    trainer.train()

    def loss(model: nn.Module) -> torch.Tensor:
        gains = []
        for completions in (chosen, rejected):
            with torch.no_grad():
                nats = completion_nats(reference, prompts, completions)
            gains.append((nats - completion_nats(model, prompts, completions)).sum(1))
        return -F.logsigmoid(0.5 * (gains[0] - gains[1])).mean()

    check_descent(trainer, model, [loss] * 3)


def test_grpo_of_trl(directory, tokenizer, tmp_path):
    """Completions are drawn by `generate`; what the reward was given is what the written-out steps learn from."""
    trl = pytest.importorskip("trl")
    model = AutoModelForCausalLM.from_pretrained(directory)
    drawn = []

    def reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
        rewards = [float(sum(token % 7 for token in row)) for row in completion_ids]
        drawn.append((completion_ids, torch.tensor(rewards)))
        return rewards

    def make_trainer(**options) -> Trainer:
        return trl.GRPOTrainer(
            copy.deepcopy(model),
            reward_funcs=reward,
            args=trl.GRPOConfig(**trl_arguments(tmp_path), num_generations=4, max_completion_length=6, **options),
            train_dataset=Dataset.from_dict({"prompt": ["the cat"] * 4}),
            processing_class=tokenizer,
        )

    with pytest.raises(AttributeError, match="no attribute 'lm_head'"):
        make_trainer(cast_lm_head_to_fp32=True)
    trainer = make_trainer()
    trainer.train()
    prompt = tokenizer("the cat")["input_ids"]

    def loss(model: nn.Module, completions: list[list[int]], rewards: torch.Tensor) -> torch.Tensor:
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        nats = completion_nats(model, [prompt] * 4, completions).sum(1)
        count = sum(len(completion) for completion in completions)
        value = -sum(a * len(c) for a, c in zip(advantages, completions, strict=True))  # the ratio of the policies is 1
        return (advantages @ (nats - nats.detach()) + value) / count

    assert len(drawn) == 3
    check_descent(trainer, model, [lambda model, drawn=one: loss(model, *drawn) for one in drawn])


def test_reward_trainer_of_trl(directory, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    trainer = trl.RewardTrainer(
        directory,
        args=trl.RewardConfig(**trl_arguments(tmp_path)),
        train_dataset=Dataset.from_dict({"chosen": sentences(4), "rejected": sentences(4, seed=1)}),
        processing_class=tokenizer,
    )
    model = copy.deepcopy(trainer.model)
    chosen, rejected = (trainer.train_dataset[f"{name}_ids"] for name in ("chosen", "rejected"))
    trainer.train()

    def loss(model: nn.Module) -> torch.Tensor:
        scores = [torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows]) for rows in (chosen, rejected)]
        return -F.logsigmoid(scores[0] - scores[1]).mean()

    check_descent(trainer, model, [loss] * 3)


# --- classifiers ------------------------------------------------------------------------------------------------------


def test_a_classifier_of_texts_learns(directory, tokenizer, tmp_path):
    """Whether a text speaks of a cat, from a directory of a causal model, saved and loaded again."""
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    texts = sentences(120)
    rows = [{**tokenizer(text), "labels": int("cat" in text)} for text in texts]
    assert 30 < sum(row["labels"] for row in rows) < 90
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-60")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits)
    labels = torch.tensor([row["labels"] for row in rows])
    assert (logits.argmax(-1) == labels).float().mean() > 0.9
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts[:20])
    assert [one["label"] for one in found] == [f"LABEL_{label}" for label in logits[:20].argmax(-1).tolist()]


def test_a_classifier_of_tokens(directory):
    model, info = AutoModelForTokenClassification.from_pretrained(directory, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    base, input_ids = AutoModel.from_pretrained(directory), torch.arange(1, 15).view(2, 7)
    labels = (input_ids % 3).masked_fill(input_ids == 4, -100)
    expected = F.linear(base(input_ids).last_hidden_state, model.score.weight, model.score.bias)
    output = model.eval()(input_ids, labels=labels)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected.flatten(0, 1), labels.flatten()))


@pytest.mark.slow
def test_sentence_transformers(directory):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    words = Transformer(directory)
    embedder = sentence_transformers.SentenceTransformer(
        modules=[words, Pooling(words.get_word_embedding_dimension(), "mean")], device="cpu"
    )
    found = embedder.encode(TEXTS, convert_to_tensor=True)
    base, tokenizer = AutoModel.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        encoded = [tokenizer(text, truncation=True, return_tensors="pt") for text in TEXTS]
        states = [base(**inputs).last_hidden_state[0] for inputs in encoded]
    torch.testing.assert_close(found, torch.stack([one.mean(0) for one in states]), atol=1e-5, rtol=1e-4)


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_the_server_of_transformers_knows_stock_classes_alone(directory):
    """So does `transformers chat`, its client. When this fails, they may work, and `docs/tools.md` changes."""
    from transformers.cli.serving.model_manager import ModelManager

    with pytest.raises(AttributeError, match="transformers has no attribute NoPropForCausalLM"):
        ModelManager(device="cpu", trust_remote_code=True).load_model_and_processor(directory)

"""`generate` as `GenerationMixin` offers it, and our own arguments of it."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer, TextStreamer, pipeline

from conftest import sentences
from noprop_hf import NoPropForCausalLM
from noprop_hf.compatibility_noprop import CACHE


PROMPT = torch.tensor([[3, 7, 11, 4], [9, 2, 5, 8]])


def generate(model: NoPropForCausalLM, prompt: torch.Tensor = PROMPT, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(prompt, **options)


def test_beam_search_finds_the_likeliest_continuation(model):
    """With as many beams as there are prefixes, beam search is exhaustive: checked against all continuations."""
    prompt = PROMPT[:1]
    best = generate(model, prompt, num_beams=50, max_new_tokens=2, length_penalty=0.0)
    first = model(prompt).logits[0, -1]
    continued = torch.cat([prompt.expand(50, -1), torch.arange(50)[:, None]], dim=1)
    joint = first[:, None] + model(continued).logits[:, -1]
    assert best[0, -2:].tolist() == [joint.argmax().item() // 50, joint.argmax().item() % 50]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.02, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 2},
        {"decoding_mode": "denoising"},
        {"decoding_mode": "denoising", "do_sample": True, "num_return_sequences": 2, "num_trajectories": 2},
        {"num_inference_blocks": 1},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_modes_with_and_without_cache(model, options):
    prompt = PROMPT[:1] if "prompt_lookup_num_tokens" in options else PROMPT
    outputs = []
    for use_cache in (True,) if "prompt_lookup_num_tokens" in options else (True, False):
        torch.manual_seed(0)
        outputs.append(generate(model, prompt, use_cache=use_cache, **options))
    assert outputs[0].shape == (len(prompt) * options.get("num_return_sequences", 1), 10)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    if options.get("no_repeat_ngram_size") == 2:
        for row in outputs[0].tolist():
            pairs = list(zip(row[:-1], row[1:], strict=True))
            assert len(pairs) == len(set(pairs))
    if options.get("prompt_lookup_num_tokens"):
        assert torch.equal(outputs[0], generate(model, prompt))


def test_top_k_keeps_to_the_likeliest(model):
    likely = model(PROMPT[:1]).logits[0, -1].topk(3).indices.tolist()
    output = generate(model, PROMPT[:1], do_sample=True, top_k=3, max_new_tokens=1, num_return_sequences=200, seed=1)
    assert set(output[:, -1].tolist()) == set(likely)


def test_scores_are_the_logits(model):
    output = generate(model, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert len(output.scores) == 6 and isinstance(output[CACHE], DynamicCache)
    for step in range(6):
        expected = model(output.sequences[:, : 4 + step]).logits[:, -1]
        assert torch.allclose(output.scores[step], expected, atol=1e-5)
        assert torch.allclose(output.logits[step], expected, atol=1e-5)
    transition = model.compute_transition_scores(output.sequences, output.scores)
    assert torch.allclose(
        transition.sum(-1).exp(),
        torch.stack([output.scores[i].gather(1, output.sequences[:, 4 + i, None])[:, 0] for i in range(6)])
        .sum(0)
        .exp(),
    )


def test_left_padded_prompts(model):
    short = PROMPT[:1, :2]
    batch = torch.cat([torch.cat([torch.zeros(1, 2, dtype=torch.long), short], dim=1), PROMPT[1:]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    together = generate(model, batch, attention_mask=mask)
    assert torch.equal(together[0, 4:], generate(model, short)[0, 2:])
    assert torch.equal(together[1], generate(model, PROMPT[1:])[0])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_conversation_goes_on_from_its_cache(model, name):
    whole = generate(model, PROMPT)
    cache = DynamicCache(config=model.config)
    first = generate(model, PROMPT, max_new_tokens=3, **{name: cache})
    assert cache.get_seq_length() == 6
    second = generate(model, first, max_new_tokens=3, **{name: cache})
    assert torch.equal(second, whole)


def test_static_cache(model):
    expected = generate(model)
    assert torch.equal(generate(model, cache_implementation="static", disable_compile=True), expected)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(generate(model, cache=cache, disable_compile=True), expected)


def test_end_of_text_and_stopping_criteria(model, tokenizer):
    free = generate(model, PROMPT[:1])
    stop = free[0, 6].item()
    output = generate(model, PROMPT[:1], eos_token_id=stop)
    assert output[0].tolist() == free[0, : free[0, 4:].tolist().index(stop) + 5].tolist()
    limited = generate(model, PROMPT[:1], stopping_criteria=[lambda ids, scores: ids.shape[1] >= 6])
    assert limited.shape[1] == 6


def test_stop_strings_and_streamers(writer, tokenizer, capsys):
    inputs = tokenizer(sentences(1)[0], return_tensors="pt")
    options = {"max_new_tokens": 30, "do_sample": True, "seed": 5}
    text = tokenizer.decode(writer.generate(**inputs, **options)[0])
    continuation = text[len(sentences(1)[0]) :]
    stop = next(letter for letter in continuation[len(continuation) // 2 :] if letter.isalpha() and letter.isascii())
    stopped = tokenizer.decode(writer.generate(**inputs, **options, stop_strings=[stop], tokenizer=tokenizer)[0])
    assert text.startswith(stopped) and stop in stopped[len(sentences(1)[0]) :] and len(stopped) < len(text)

    writer.generate(**inputs, **options, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer)
    writer.generate(**inputs, **options, streamer=streamer)
    assert "".join(streamer) == text


def test_pipeline(writer, tokenizer, tmp_path):
    writer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)
    write.tokenizer.padding_side = "left"  # which older versions leave to their user
    prompts = [sentences(2)[0], sentences(2)[1][:9]]
    outputs = write(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output[0]["generated_text"].startswith(prompt)
        alone = writer.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert output[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)


# --- our own arguments ------------------------------------------------------------------------------------------------


def test_own_arguments_are_kept_in_the_generation_config(model, tmp_path):
    kept = GenerationConfig(decoding_mode="denoising", num_trajectories=3, num_inference_blocks=2, seed=4)
    plain = NoPropForCausalLM(model.config)
    model.generation_config = kept
    model.save_pretrained(tmp_path)
    loaded = NoPropForCausalLM.from_pretrained(tmp_path)
    seen = []
    denoise = NoPropForCausalLM.denoise

    def spy(self, context_states, num_trajectories, *args):
        seen.append((len(context_states), num_trajectories))
        return denoise(self, context_states, num_trajectories, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoPropForCausalLM, "denoise", spy)
        for target, options in ((loaded, {}), (plain, {"generation_config": kept})):
            first = generate(target, do_sample=True, max_new_tokens=1, **options)
            assert torch.equal(generate(target, do_sample=True, max_new_tokens=1, **options), first)  # the seed is kept
            generate(target, max_new_tokens=1, num_trajectories=1, **options)
    assert seen == [(2, 3), (2, 3), (2, 1)] * 2


def test_a_seed_fixes_everything_and_leaves_the_global_state(model):
    options = {"do_sample": True, "decoding_mode": "denoising", "max_new_tokens": 8}
    state = torch.get_rng_state()
    first = generate(model, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(generate(model, seed=3, **options), first)
    assert not torch.equal(generate(model, seed=4, **options), first)


@pytest.mark.parametrize(
    "options",
    [
        {"num_trajectories": 0, "decoding_mode": "denoising"},
        {"num_trajectories": 1.5, "decoding_mode": "denoising"},
        {"num_inference_blocks": 0},
        {"num_inference_blocks": 1.5},
    ],
)
def test_numbers_of_nothing(model, options):
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must be .*, got {next(iter(options.values()))}"):
        generate(model, **options)


def test_a_misspelt_argument_is_told(model):
    with pytest.raises(ValueError, match="num_trajectory"):
        generate(model, num_trajectory=3)

import pytest

from noprop_hf import NoPropConfig


def test_levels_are_resolved_and_stored(tmp_path):
    config = NoPropConfig(num_blocks=4, noise_schedule="cosine")
    # a / (1 - a) with a = cos^2(pi/2 (1 - b/4)): Nichol and Dhariwal 2021, eq. 17
    assert config.noise_levels == pytest.approx([0, 0.1716, 1.0, 5.8284], abs=1e-4)
    config.save_pretrained(tmp_path)
    assert NoPropConfig.from_pretrained(tmp_path).noise_levels == config.noise_levels


@pytest.mark.parametrize("schedule", ["information", "cosine"])
@pytest.mark.parametrize("num_blocks", [1, 2, 7])
def test_levels_start_at_pure_noise_and_do_not_decrease(schedule, num_blocks):
    levels = NoPropConfig(num_blocks=num_blocks, noise_schedule=schedule).noise_levels
    assert len(levels) == num_blocks
    assert levels[0] == 0
    assert levels == sorted(levels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_schedule": "quadratic"}, "'information' or 'cosine'"),
        ({"num_blocks": 3, "noise_levels": [0.0, 0.1]}, "one signal-to-noise ratio per block"),
        ({"num_blocks": 3, "noise_levels": [0.0, 0.2, 0.1]}, "must not decrease"),
        ({"num_blocks": 2, "noise_levels": [0.0, float("nan")]}, "finite"),
        ({"num_blocks": 2, "noise_levels": [0.0, float("inf")]}, "finite"),
        ({"num_blocks": 2, "noise_levels": [0.1, 0.2]}, "pure noise"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "multiple of `num_attention_heads`"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "even"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_blocks": 0}, "`num_blocks` must be a positive integer"),
        ({"vocab_size": -5}, "`vocab_size` must be a positive integer"),
        ({"num_blocks": 10**9}, "`num_blocks` must be a positive integer of at most"),
        ({"num_blocks": 100, "num_layers_per_block": 100}, "more than 1,000 layers"),
        ({"hidden_size": 10**9}, "`hidden_size` must be"),
        ({"head_dim": 10**9}, "attention head must be"),
        ({"num_labels": 10**10}, "`num_labels` must be"),
        ({"rope_parameters": {"rope_type": "fancy"}}, "must be one of default, dynamic, .*: got 'fancy'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "do not fit .*factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "x"}}, "do not fit"),
        ({"rope_parameters": {"rope_theta": 0}}, "`rope_theta` .* must be positive"),
        ({"hidden_act": "step"}, "`hidden_act` must be"),
        ({"rms_norm_eps": "small"}, "`rms_norm_eps` must be between 0 and 1"),
        ({"attention_dropout": float("nan")}, "`attention_dropout` must be between 0 and 1"),
        ({"loss_type": "hinge"}, "'cross_entropy' or 'mse'"),
        ({"denoising_weight": 1.5}, "between 0 and 1"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NoPropConfig(**fields)

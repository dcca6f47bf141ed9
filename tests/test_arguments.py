import pytest

from noprop_hf.arguments import parse_blocks
from noprop_hf.recipes import Recipe, parse_recipe


def parse(tmp_path, recipe: str, *arguments: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(recipe)
    return parse_recipe("test", [str(tmp_path / "recipe.yaml"), *arguments])


def test_recipe_and_command_line(tmp_path):
    recipe = """
    dataset_name: cpython-docs
    output_dir: out
    learning_rate: 1e-3
    packing: false
    hidden_size: 64
    sample_prompts: ["two words", "-dash"]
    save_total_limit: null
    lr_scheduler_type: cosine
    """
    model, data, _, block, _, training, run = parse(tmp_path, recipe, "--learning_rate", "0.5", "--blocks", "1-2")
    assert (model.hidden_size, model.num_blocks) == (64, None)
    assert data.packing is False and run.dry_run is False
    assert training.learning_rate == 0.5
    assert training.lr_scheduler_type == "cosine"
    assert training.save_total_limit is None
    assert block.blocks == "1-2"
    assert block.sample_prompts == ["two words", "-dash"]


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("train_file: a.txt\nvalidation_file: b.txt\ntest_file: c.txt", {"dataset_name": "x"}),
        ("train_file: a.txt\nvalidation_file: b.txt", {"train_file": "d.txt"}),
        ("dataset_name: x\ndataset_config_name: y\ntest_file: c.txt", {"train_file": "d.txt", "test_file": "e.txt"}),
        ("dataset_name: x\ndataset_config_name: y", {"dataset_name": "z"}),
    ],
)
def test_data_of_the_command_line_take_the_place_of_all_of_the_recipe(tmp_path, recipe, given):
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    data = parse(tmp_path, recipe + "\nmax_length: 32\noutput_dir: out", *words).data
    names = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
    assert {name: getattr(data, name) for name in names if getattr(data, name)} == given and data.max_length == 32


def test_no_recipe():
    _, data, _, _, _, training, run = parse_recipe("test", ["--dataset_name", "x", "--dry_run", "--output_dir", "y"])
    assert run.dry_run is True and run.processes == 1
    assert data.dataset_name == "x" and training.output_dir == "y"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rte: 1", "no argument 'learning_rte'. Did you mean 'learning_rate'?"),
        ("just words", "not a recipe"),
        ("max_length: many", "max_length"),
        ("max_length: 1\ndataset_name: x", "at least 2"),
        ("dataset_name: x\nmlm_probability: 2", "between 0 and 1"),
    ],
)
def test_bad_recipes(tmp_path, capsys, recipe, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, recipe)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[hf_secret]", "{a: hf_secret}"])
def test_a_token_of_a_wrong_kind_is_not_shown(tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        parse(tmp_path, f"hub_token: {value}")
    assert "hub_token must not be" in (error := capsys.readouterr().err) and "secret" not in error


def test_missing_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_recipe("test", ["nowhere.yaml"])
    assert "no recipe 'nowhere.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "blocks"), [("all", [0, 1, 2, 3]), ("0", [0]), ("0,2-3", [0, 2, 3]), ("3, 1,1", [1, 3])]
)
def test_parse_blocks(text, blocks):
    assert parse_blocks(text, 4) == blocks


@pytest.mark.parametrize("text", ["4", "0,9", "2-4"])
def test_blocks_out_of_range(text):
    with pytest.raises(ValueError, match="the model has 4 blocks, 0 to 3"):
        parse_blocks(text, 4)


@pytest.mark.parametrize("text", ["", "one", "1-", "-1", "3-1", "1,,2"])
def test_blocks_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="blocks"):
        parse_blocks(text, 4)


def test_shipped_recipes_are_read(request):
    recipes = sorted((request.config.rootpath / "recipes").glob("*.yaml"))
    assert len(recipes) >= 2
    for recipe in recipes:
        data = ["--train_file", "my.txt"] if recipe.stem == "plentiful" else []
        parse_recipe("test", [str(recipe), "--fp16", "false", *data])


def test_recipes_of_the_package_have_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for word in ("demo", "recipes/demo.yaml", "./recipes/demo.yaml"):
        assert parse_recipe("test", [word, "--use_cpu", "true"]).model.hidden_size == 128
    for path in (tmp_path / "demo", tmp_path / "recipes" / "demo.yaml"):  # a file has precedence
        path.parent.mkdir(exist_ok=True)
        path.write_text("hidden_size: 32\ntrain_file: text.txt\n")
        assert parse_recipe("test", [str(path.relative_to(tmp_path)), "--use_cpu", "true"]).model.hidden_size == 32
    for word in ("demos", "runs/demo.yaml", "../recipes/demo", "recipes"):
        with pytest.raises(SystemExit):
            parse_recipe("test", [word, "--use_cpu", "true"])
        assert "no recipe" in (said := capsys.readouterr().err) and "demo, plentiful, seed, t4_wikitext103" in said


REFUSED = [
    ("push_to_hub: true", "--hub_model_id user/name"),
    ("take_over: true", "add --push_to_hub true"),
    ("back_up: true", "--back_up is for blocks that workers claim"),
    ("streaming: true\nnum_train_epochs: 1", "a positive --max_steps"),
    ("streaming: true\nmax_steps: 5\npretraining_max_steps: -1", "a positive --pretraining_max_steps"),
    ("eval_steps: 5", "add --eval_strategy steps"),
    ("validation_file: x.txt\nvalidation_split_percentage: 5", "leave one argument out"),
    ("loss_type: mse\nsampled_softmax: true", "leave --sampled_softmax out"),
    ("embeddings_from: x\nblock_initialization: pretraining", "add --block_initialization random"),
    ("mlm_probability: 0.3", "leave --mlm_probability out"),
    ("block_data: cluster", "`block_data` must be 'shared' or 'clusters'"),
    ("vocab_size: 258", "--vocab_size must be at least 259"),
    ("hidden_size: 15", "multiple of `num_attention_heads`"),
    ("noise_schedule: cosin", "`noise_schedule` must be"),
    ("use_cpu: true\nfp16: true\nbf16: true", "At most one of fp16 and bf16"),
]
ACCEPTED = [
    "push_to_hub: true\nhub_model_id: user/name\ntake_over: true",
    "streaming: true\nmax_steps: 5",
    "streaming: true\nmax_steps: 5\npretraining_max_steps: -1\nembeddings_from: x",
    "eval_steps: 5\neval_strategy: 'no'",
    "validation_file: x.txt",
    "vocab_size: 259",
    "vocab_size: 99\ntokenizer_name: x",
    "loss_type: mse\nsampled_softmax: false",
    "embeddings_from: x\nnum_attention_heads: 5\npretraining_max_steps: 5",
    "mlm_probability: 0.3\npretraining_objective: mlm",
    "block_data: clusters\nnum_pretraining_layers: 4\nnum_layers_per_block: 2",
    "block_data: clusters\nembeddings_from: x",
]


@pytest.mark.parametrize(("recipe", "message"), REFUSED)
def test_senseless_combinations(tmp_path, capsys, recipe, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, f"dataset_name: x\noutput_dir: {tmp_path}\n{recipe}")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ACCEPTED)
def test_their_neighbours_are_accepted(tmp_path, recipe):
    parse(tmp_path, f"dataset_name: x\noutput_dir: {tmp_path}\n{recipe}")


def test_what_the_command_line_gives_counts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "dataset_name: x\noutput_dir: y", "--eval_steps", "5")
    assert "add --eval_strategy steps" in capsys.readouterr().err
    parse(tmp_path, "dataset_name: x\noutput_dir: y\neval_steps: 5", "--eval_strategy", "no")


def test_unknown_argument(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "dataset_name: x", "--learning_rte=3")
    assert "no argument '--learning_rte'. Did you mean '--learning_rate'?" in capsys.readouterr().err


def test_help_has_groups(capsys):
    with pytest.raises(SystemExit):
        parse_recipe("test", ["--help"])
    text = capsys.readouterr().out
    order = [
        "usage: ",
        "The run as a whole",
        "The model to build",
        "The training and",
        "Phase 1",
        "Phase 2",
        "Trainer:",
    ]
    places = [text.index(words) for words in [*order, "--learning_rate"]]
    assert places == sorted(places)
    assert text.count("  --learning_rate ") == text.count("  --dry_run ") == 1


def test_a_dry_run_needs_one_process_of_a_launch(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as done:
        parse(tmp_path, "dataset_name: x\noutput_dir: y", "--dry_run")
    assert done.value.code == 0
    monkeypatch.setenv("RANK", "0")
    assert parse(tmp_path, "dataset_name: x\noutput_dir: y", "--dry_run").run.processes == 2

import pytest

from noprop_hf.arguments import Recipe, parse_blocks, parse_recipe


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
    model, data, _, block, _, training = parse(tmp_path, recipe, "--learning_rate", "0.5", "--blocks", "1-2")
    assert (model.hidden_size, model.num_blocks) == (64, None)
    assert data.packing is False
    assert training.learning_rate == 0.5
    assert training.lr_scheduler_type == "cosine"
    assert training.save_total_limit is None
    assert block.blocks == "1-2"
    assert block.sample_prompts == ["two words", "-dash"]


def test_no_recipe():
    _, data, _, _, _, training = parse_recipe("test", ["--dataset_name", "x", "--output_dir", "y"])
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
        parse_recipe("test", [str(recipe), "--fp16", "false"])

import gc
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory


# Nothing in the tests may reach for the network: what is not on this machine is an error, at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Every vector instruction of the processor is taken to work: torch would compile programs for ten seconds to find out.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import datasets
import pytest
import torch
from datasets import DatasetDict
from transformers import TrainingArguments

from hub_server import hub_server
from noprop_hf import NoPropConfig, NoPropForCausalLM
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments
from noprop_hf.data import DataArguments, load_corpus, load_tokenizer, train_tokenizer
from noprop_hf.model_directory import create_model_directory, load_table, read_metadata
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD
from noprop_hf.training import train_blocks
from warm_python import WarmPython


ROOT = Path(__file__).parent.parent
# The files that take longest begin first, so that no process is left alone with one of them.
LONGEST = "benchmarks parallel conformance documents end_to_end checkpoints manipulations trunk".split()
WORDS = "the cat sat on a mat while old dogs slept near warm stones and birds sang over green hills".split()


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def quiet_and_cached(tmp_path_factory):
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True, scope="module")
def freeze():
    """Take what exists out of garbage collection.

    Every training collects garbage, which takes longer than a test with all modules that earlier tests have imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def trackio_folder(tmp_path_factory):
    """Where trackio writes. It asks for that when it is imported, which other libraries do as well."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture
def config() -> NoPropConfig:
    return NoPropConfig(
        vocab_size=50,
        hidden_size=16,
        num_blocks=3,
        num_layers_per_block=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )


@pytest.fixture
def model(config) -> NoPropForCausalLM:
    """A model whose every part does something: the zeros it starts from are replaced."""
    torch.manual_seed(0)
    model = NoPropForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.blocks.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


MODEL = ModelArguments(
    vocab_size=300,
    hidden_size=16,
    num_blocks=4,
    num_layers_per_block=1,
    num_attention_heads=2,
    intermediate_size=24,
    attention_dropout=0.1,
)
BLOCKS = BlockArguments(sample_prompts=["the cat"], sample_max_new_tokens=4)


def arguments(output_dir: Path, **options) -> TrainingArguments:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5e-3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 2,
        "disable_tqdm": True,
        "seed": 11,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(output_dir), **(defaults | options))


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of random words."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, 8), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) + "." for row in rows]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "train.txt"
    path.write_text("\n".join(sentences(400)) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def corpus(corpus_file) -> DatasetDict:
    return load_corpus(DataArguments(train_file=corpus_file))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return train_tokenizer(corpus["train"]["text"], vocab_size=300, model_max_length=32)


@pytest.fixture(scope="session")
def writer(tokenizer) -> NoPropForCausalLM:
    """A model of the tokenizer's vocabulary."""
    torch.manual_seed(1)
    config = NoPropConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_blocks=2,
        num_layers_per_block=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = NoPropForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.blocks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def data(corpus_file) -> DataArguments:
    return DataArguments(train_file=corpus_file, max_length=16, max_eval_samples=40)


@pytest.fixture(scope="session")
def phase1(data, tmp_path_factory) -> Path:
    """A model directory without blocks."""
    directory = tmp_path_factory.mktemp("phase1") / "model"
    return pretrain_embeddings(MODEL, data, PretrainingArguments(pretraining_max_steps=8), arguments(directory))


@pytest.fixture
def directory(phase1, tmp_path) -> Path:
    return Path(shutil.copytree(phase1, tmp_path / "model"))


def reconfigure(directory: Path, **fields) -> NoPropConfig:
    """Write a model directory without blocks anew, around the same table, for a configuration with other fields."""
    config = NoPropConfig.from_pretrained(directory)
    table, data = load_table(directory, config), read_metadata(directory / EMBEDDINGS_SHARD)["data"]
    config = NoPropConfig(**config.to_dict() | fields)
    create_model_directory(directory, config, load_tokenizer(str(directory)), table, {"data": data})
    return config


@pytest.fixture(scope="session")
def trained(phase1, data, tmp_path_factory) -> Path:
    """All four blocks trained in order."""
    directory = Path(shutil.copytree(phase1, tmp_path_factory.mktemp("trained") / "model"))
    return train_blocks(data, BLOCKS, arguments(directory), MODEL)


class Programs:
    """Processes that have loaded the libraries, begun when a test first needs them, and the Hub that they know alone.

    A fresh interpreter takes seconds to load them.
    """

    def __init__(self):
        self.stack = ExitStack()
        self.hub = self.stack.enter_context(hub_server())
        self.home = Path(self.stack.enter_context(TemporaryDirectory()), "home")
        changes = {"HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.home)}
        changes |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **changes}
        self.environment.pop("HF_TOKEN", None)

    @cached_property
    def ours(self) -> WarmPython:
        python = WarmPython(self.environment)
        self.stack.callback(python.close)
        return python

    @cached_property
    def stock(self) -> WarmPython:
        """Without our package."""
        modules = ("transformers.pipelines", "transformers.trainer", "transformers.models.llama.modeling_llama")
        python = WarmPython(self.environment | {"PYTHONPATH": ""}, modules)
        self.stack.callback(python.close)
        return python

    def forget(self) -> None:
        """Empty the Hub and all caches."""
        self.hub.reset()
        shutil.rmtree(self.home, ignore_errors=True)


@cache
def programs() -> Programs:
    return Programs()


@pytest.fixture(autouse=True, scope="session")
def close_programs(trackio_folder):
    yield programs()
    programs().stack.close()


def copy_project(folder: Path) -> None:
    """Copy the tracked files of the project, without the results of benchmarks."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if not name.startswith("benchmarks/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def run_process(command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command; returns its exit status and all it prints."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540
    )
    return done.returncode, done.stdout


def run_python(*command: str, cwd: Path = ROOT, fails: bool = False, **variables: str) -> str:
    """Run a script, code (`-c`) or a module (`-m`) in a process of its own, and insist on its success or failure.

    Args:
        variables: more of the environment.

    Returns:
        All that it prints.
    """
    status, output = programs().ours.run(*command, cwd=cwd, variables=[variables])
    assert (status != 0) == fails, output
    return output


def tokens(*shape: int, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(7))

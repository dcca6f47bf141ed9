"""The weight files of a model: one for the table, one per block, under the standard index of transformers."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    PushToHubMixin,
    cached_file,
    logging,
)

from .compatibility_noprop import CONVERTS_WEIGHTS
from .configuration_noprop import NoPropConfig


AUTO_MAP = {  # the classes that `trust_remote_code` loads from a directory with these files
    "AutoConfig": "configuration_noprop.NoPropConfig",
    "AutoModel": "modeling_noprop.NoPropModel",
    "AutoModelForCausalLM": "modeling_noprop.NoPropForCausalLM",
    "AutoModelForMaskedLM": "modeling_noprop.NoPropForPreTraining",
    "AutoModelForPreTraining": "modeling_noprop.NoPropForPreTraining",
    "AutoModelForSequenceClassification": "modeling_noprop.NoPropForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_noprop.NoPropForTokenClassification",
}
CONTENT_HASH = "content_sha256"  # in the metadata of a shard that training wrote
EMBEDDINGS_SHARD = "embeddings.safetensors"
FLOATING_TYPES = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
TABLE_WEIGHT = "embed_tokens.weight"  # the plain name of the table
HIDDEN_SHARDS = (
    f"holds {SAFE_WEIGHTS_NAME}, which hides the files that {SAFE_WEIGHTS_INDEX_NAME} names: remove one of the two"
)
BAD_INDEX = f"holds no readable {SAFE_WEIGHTS_INDEX_NAME}: restore it"
CLUSTER_WEIGHTS = ("topics", "centroids", "prices")  # of the router
TRUNK_PREFIX = "embed_tokens.trunk."
CHANGED_CONFIG = "holds a table and a config.json that do not belong together: restore those of its training"
NO_MODEL = "Give the directory of a whole model, such as the --output_dir of its training"
PRETRAINING_FOLDER = "pretraining"  # the model of phase 1, in the directory of the model made with it
PRETRAINING_FOLDERS = (PRETRAINING_FOLDER, "masked_lm")  # the second is its name in directories of before 0.2


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Hide the progress bar of transformers while a single file is written."""
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def block_shard(block_index: int) -> str:
    """Return the name of the file with a block's weights."""
    return f"block-{block_index:02d}.safetensors"


def shard_of(weight_name: str) -> str:
    """Return the name of the file that a weight of [`NoPropForCausalLM`] or [`NoPropModel`] belongs to."""
    block = re.match(r"(?:model\.)?blocks\.(\d+)\.", weight_name)
    return block_shard(int(block[1])) if block else EMBEDDINGS_SHARD


def shard_index(state_dict: dict[str, torch.Tensor]) -> dict:
    """Return the content of the index file for the weights of a model, which may be on the meta device."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state_dict.values())},
        "weight_map": {name: shard_of(name) for name in state_dict},
    }


def plain_name(weight_name: str) -> str:
    """Return the name of a weight in [`NoPropModel`], given that or the name in [`NoPropForCausalLM`]."""
    return weight_name.removeprefix("model.")


def content_hash(tensors: Iterable[tuple[str, bytes | bytearray]]) -> str:
    """Hash names and bytes of tensors, which must come in the order of their names."""
    digest = hashlib.sha256()
    for name, data in tensors:
        digest.update(name.encode() + b"\0")
        digest.update(data)
    return digest.hexdigest()


def clusters_hash(router: Mapping[str, torch.Tensor]) -> str:
    """Hash what decides the cluster of a window.

    Args:
        router: the weights of the router, by their names in it.
    """
    tensors = {name: router[name].float().cpu().contiguous() for name in CLUSTER_WEIGHTS}
    return content_hash((name, tensor.numpy().tobytes()) for name, tensor in tensors.items())


def trunk_hash(trunk: Mapping[str, torch.Tensor]) -> str:
    """Hash the weights of a trunk, by their names in it."""
    digest = hashlib.sha256()
    for name in sorted(trunk):
        digest.update(trunk[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pretraining_folder(directory: Path) -> Path:
    """Return the folder of the model of phase 1 in a model directory."""
    folders = [directory / name for name in PRETRAINING_FOLDERS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def fingerprint(config: NoPropConfig, table: torch.Tensor) -> str:
    """Hash what a block depends on besides data and seed: architecture, objective and frozen table."""
    # All declared fields of the configuration, except token ids and switches that do not affect weights.
    ignored = {"use_cache", "max_position_embeddings"} | {f"{name}_token_id" for name in ("pad", "bos", "eos", "mask")}
    fields = {name: getattr(config, name) for name in NoPropConfig.__annotations__ if name not in ignored}
    # As in version 0.1, so that the fingerprints of its models stay valid.
    fields["context_source"] = "embeddings"
    if config.block_data == "shared":
        del fields["block_data"]
    if config.trunk_config is None:
        del fields["trunk_config"]
    if config.num_running_blocks != config.num_blocks:  # early exit: another function
        fields["num_hidden_layers"] = config.num_hidden_layers
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(table.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Shard:
    """The content of a safetensors file.

    Attributes:
        metadata: the metadata, strings by name.
        tensors: the type, by its name in safetensors, and the shape of every tensor, by name.
        content_hash: the hash of the tensors.
        is_finite: whether all floating-point numbers are finite.
        table (`(vocab_size, hidden_size)`): the embedding table, if the file holds one.
        clusters: the weights of the router that decide the cluster of a window, by name, if the file holds them.
        trunk: the hash of the weights of the trunk, if the file holds them.
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    content_hash: str = ""
    is_finite: bool = True
    table: torch.Tensor | None = None
    clusters: dict[str, torch.Tensor] = field(default_factory=dict)
    trunk: str | None = None


def read_shard(path: Path) -> Shard | None:
    """Read a safetensors file, one tensor at a time.

    The safetensors package is not used, since model files import only torch and transformers.

    Returns:
        The content, or None if the file is damaged: if its header cannot be read, or records another length or hash.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                return None
            entries = json.loads(file.read(start - 8))
            metadata = {name: str(value) for name, value in entries.pop("__metadata__", {}).items()}
            shard = Shard(metadata, {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()})
            end = 0
            for begin, stop in sorted(entry["data_offsets"] for entry in entries.values()):
                if begin != end or stop < begin:
                    return None
                end = stop
            if start + end != size:
                return None
            spans = {name: entries[name]["data_offsets"] for name in sorted(entries)}
            trunk = hashlib.sha256()
            shard.content_hash = content_hash(
                (name, _read_tensor(file, start + begin, stop - begin, name, shard, trunk))
                for name, (begin, stop) in spans.items()
            )
            if any(plain_name(name).startswith(TRUNK_PREFIX) for name in spans):
                shard.trunk = trunk.hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, RecursionError):
        return None
    return shard if metadata.get(CONTENT_HASH, shard.content_hash) == shard.content_hash else None


def _read_tensor(file: BufferedReader, begin: int, length: int, name: str, shard: Shard, trunk: Any) -> bytearray:
    """Read the bytes of a tensor, record in the shard whether it is finite, and keep the table and the clusters.

    The bytes of the weights of the trunk are added to the hash `trunk`.
    """
    data = bytearray(length)
    file.seek(begin)
    file.readinto(data)
    kind, shape = shard.tensors[name]
    if plain_name(name).startswith(TRUNK_PREFIX):
        trunk.update(data)
    if kind in FLOATING_TYPES and math.prod(shape) > 0:
        tensor = torch.frombuffer(data, dtype=FLOATING_TYPES[kind]).view(shape)
        shard.is_finite &= bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())
        if plain_name(name) == TABLE_WEIGHT:
            shard.table = tensor
        if plain_name(name) in (f"router.{weight}" for weight in CLUSTER_WEIGHTS):
            shard.clusters[plain_name(name).removeprefix("router.")] = tensor
    return data


def weight_type(table: Shard) -> str | None:
    """Return the type of the table in a shard, which is that of all weights of the model."""
    return next((kind for name, (kind, _) in table.tensors.items() if plain_name(name) == TABLE_WEIGHT), None)


def placement_fault(
    shard: Shard,
    shapes: Mapping[str, tuple[int, ...] | None],
    provenance: Mapping[str, str],
    kind: str | None = None,
) -> str | None:
    """Find the reason why a weight file does not belong to a model, from the file's header alone.

    Args:
        shard: the file, of which only metadata and tensors are used.
        shapes: the expected shapes of the tensors, by plain names; None allows any shape.
        provenance: the expected metadata. Metadata that the file lacks are not a fault, since other tools that save
            models do not write them.
        kind: the type of the model's weights; when not given, any floating-point type that is the same for all.

    Returns:
        The fault, as the predicate of a sentence about the file, or None.
    """
    counts = Counter(plain_name(name) for name in shard.tensors)
    lacking = [name for name in shapes if name not in counts]
    if lacking:
        return f"lacks {listed(lacking)}"
    # A tensor counts twice if it has both its plain name and the one with a prefix.
    foreign = [name for name, count in counts.items() if name not in shapes or count > 1]
    if foreign:
        return f"holds tensors that do not belong there: {listed(foreign)}"
    stored = {plain_name(name): entry for name, entry in shard.tensors.items()}
    for name, expected in shapes.items():
        stored_kind, shape = stored[name]
        if expected is not None and shape != tuple(expected):
            return f"holds {name}, which is of size {shape}, but the configuration asks for {tuple(expected)}"
        kind = kind or stored_kind
        if stored_kind != kind or stored_kind not in FLOATING_TYPES:
            return f"holds {name} of type {stored_kind}, not of the floating-point type of the other weights"
    metadata = shard.metadata
    if "block" in provenance and metadata.get("block", provenance["block"]) != provenance["block"]:
        return f"was trained as block {metadata['block']}"
    if any(metadata.get(name, value) != value for name, value in provenance.items()):
        return "was trained with another table, another configuration, other data, other clusters or another trunk"
    if "steps" in metadata and not _number(metadata["steps"]) > 0:
        return "was trained for 0 steps"
    for name, figure in metadata.items():
        if name.endswith("_nats") and not math.isfinite(_number(figure)):
            return f"is the result of a training that diverged: {name} is {figure[:20]}"
    return None


def shard_fault(
    shard: Shard | None,
    shapes: Mapping[str, tuple[int, ...] | None],
    provenance: Mapping[str, str],
    kind: str | None = None,
) -> str | None:
    """Find the reason why a weight file does not belong to a model, from header and content.

    Args:
        shard: the file; None if it is damaged.
        shapes, provenance, kind: as for [`placement_fault`].

    Returns:
        The fault, as the predicate of a sentence about the file, or None.
    """
    if shard is None:
        return "is damaged"
    fault = placement_fault(shard, shapes, provenance, kind)
    return fault if fault or shard.is_finite else "holds weights that are not finite"


def index_fault(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Find the reason why the index in a folder does not list the weights of a whole model.

    Returns:
        The fault, as the predicate of a sentence about the model, or None.
    """
    weight_map = read_index(folder)
    if weight_map is None:
        return BAD_INDEX
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return HIDDEN_SHARDS
    names = {plain_name(name) for name in weight_map}
    lacking = [name for name in shapes if name not in names]
    foreign = sorted(name for name in names if is_part(name) and name not in shapes)
    if EMBEDDINGS_SHARD in weight_map.values():  # in the layout of this package
        foreign += sorted(name for name, file in weight_map.items() if file != shard_of(name))
    if lacking or foreign:
        fault = f"lacks {listed(lacking)}" if lacking else f"names {listed(foreign)}"
        return f"is not a whole model: {SAFE_WEIGHTS_INDEX_NAME} {fault}, unlike its configuration. Restore both files"
    return None


def model_fault(folder: Path, config: NoPropConfig, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Find the reason why the safetensors files that loading reads from a folder are not a whole model.

    Args:
        folder: the folder; without safetensors files it has no fault.
        config: the configuration that is saved with the files.
        shapes: the shapes of the model's weights, by plain names. Weights of other names, such as those of a
            classifier, may be saved with them.

    Returns:
        The fault, as the predicate of a sentence about the model, or None.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() and index.is_file():
        return HIDDEN_SHARDS
    if index.is_file():
        weight_map = read_index(folder)
        if weight_map is None:
            return BAD_INDEX
        files = sorted(set(weight_map.values()))
    elif single.is_file():
        weight_map, files = {}, [single.name]
    else:
        return None
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        return (
            f"is not fully trained: {', '.join(missing)} missing. Train these blocks, which --blocks selects by "
            "number, or copy the files from where they were trained"
        )
    read = {name: read_shard(folder / name) for name in files}
    shards = {name: shard for name, shard in read.items() if shard is not None}
    damaged = [name for name in files if name not in shards]
    if damaged:
        return (
            f"holds weights that are corrupted: {', '.join(damaged)}. Restore the file, train its block again, or "
            "download it again with `force_download=True`"
        )
    if getattr(config, "quantization_config", None) is not None:  # quantized weights have other names and types
        return None

    table = next((shard for shard in shards.values() if shard.table is not None), None)
    provenance, kind = {}, None
    if table is not None and table.table is not None:
        kind = weight_type(table)
        if any("fingerprint" in shard.metadata for shard in shards.values()):
            provenance["fingerprint"] = fingerprint(config, table.table)
        if "data" in table.metadata:
            provenance["data"] = table.metadata["data"]
        if len(table.clusters) == len(CLUSTER_WEIGHTS):
            provenance["clusters"] = clusters_hash(table.clusters)
        if table.trunk is not None:
            provenance["trunk"] = table.trunk
        if table.metadata.get("fingerprint", provenance.get("fingerprint")) != provenance.get("fingerprint"):
            return CHANGED_CONFIG
    if weight_map and (fault := index_fault(folder, shapes)):
        return fault
    blocks = {block_shard(index): index for index in range(config.num_blocks)}
    for name, shard in shards.items():
        expected = {
            plain_name(weight): shapes.get(plain_name(weight)) for weight in weight_map if weight_map[weight] == name
        }
        if not weight_map:
            others = (plain_name(weight) for weight in shard.tensors)
            expected = {**shapes, **{weight: None for weight in others if weight not in shapes and not is_part(weight)}}
        metadata = dict(provenance)
        if name in blocks:
            metadata["block"] = str(blocks[name])
        fault = shard_fault(shard, expected, metadata, kind)
        if fault:
            remedy = "Restore that file, or remove it and train it again" if weight_map else NO_MODEL
            return f"is not a whole model: {name} {fault}. {remedy}"
    return None


def read_index(folder: Path) -> dict[str, str] | None:
    """Read the file of every weight from the index in a folder; None if the index is damaged."""
    try:
        weight_map = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        is_valid = bool(weight_map) and all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return weight_map if is_valid else None


def is_part(name: str) -> bool:
    """Check whether a weight of this plain name belongs to the table, the router or a block."""
    return name.startswith(("embed_tokens.", "router.", "blocks."))


def listed(names: Sequence[str]) -> str:
    """Format names for a message: the first one, and the number of the others."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class ShardedFilesMixin(PushToHubMixin):
    """Save a model with one file for the table and one per block, and load only files that are a whole model."""

    _is_sharded = False  # whether the weights are those of the table and the blocks
    _subfolders: tuple[str, ...] = ()  # folders of a model directory to look for such a model in

    @classmethod
    def _weight_shapes(cls, config: NoPropConfig) -> dict[str, torch.Size]:
        """Return the shapes of the weights that a saved model must hold, by plain names."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save as every model of transformers, with one file for the table and one per block under the index."""
        self.config.auto_map = dict(AUTO_MAP)
        if (
            not getattr(type(self.base_model), "_is_sharded", False)
            or kwargs.get("variant")
            or getattr(self, "_hf_peft_config_loaded", False)
        ):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub=push_to_hub, **kwargs)
            return
        commit_arguments = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
        commit = {name: kwargs.pop(name) for name in commit_arguments if name in kwargs}
        kwargs["max_shard_size"] = "1000TB"
        if CONVERTS_WEIGHTS:
            kwargs["save_original_format"] = False  # the names of a trunk's weights are those of its modules
        state_dict = self.state_dict() if state_dict is None else state_dict
        index = shard_index(state_dict)
        directory = Path(save_directory)
        shards = sorted(set(index["weight_map"].values()))
        for shard in shards:
            tensors = {name: tensor for name, tensor in state_dict.items() if shard_of(name) == shard}
            with without_progress_bar():
                super().save_pretrained(directory, is_main_process, tensors, **kwargs)
            if is_main_process:
                (directory / SAFE_WEIGHTS_NAME).replace(directory / shard)
        if is_main_process:
            for stale in directory.glob("block-*.safetensors"):
                if stale.name not in shards:
                    stale.unlink()
            (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(commit.pop("repo_id", directory.name), token=kwargs.get("token"), **commit)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a model as every model of transformers, and refuse files that are not a whole model.

        Raises:
            OSError: if the files are not those of the configuration that is saved with them, blocks are missing or not
                trained, or weights are corrupted.
        """
        name = pretrained_model_name_or_path
        if name is not None and not kwargs.get("subfolder"):
            nested = (folder for folder in cls._subfolders if find_config(name, folder, kwargs) is not None)
            kwargs["subfolder"] = next(nested, "")
        if name is None or kwargs.get("state_dict") is not None:  # the weights come from the caller
            return super().from_pretrained(name, *model_args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        folder = Path(str(name), kwargs.get("subfolder") or "")
        is_local = folder.is_dir()
        shapes = cls._check_files(name, folder, kwargs) if is_local else {}
        try:
            model, info = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        except Exception as error:
            if not is_local:  # the error does not name the damaged file, which is in the cache now
                cls._check_download(name, kwargs, error)
            raise
        if not is_local:
            shapes = cls._check_download(name, kwargs)
        lacking = sorted(weight for weight in info["missing_keys"] if plain_name(weight) in shapes)
        foreign = sorted(weight for weight in info["unexpected_keys"] if shapes and is_part(plain_name(weight)))
        if lacking or foreign:  # in files of other formats
            fault = f"lacks {listed(lacking)}" if lacking else f"holds weights of another model: {listed(foreign)}"
            raise OSError(f"{name} is not a whole model: it {fault}.")
        return (model, info) if with_info else model

    @classmethod
    def _check_download(cls, name: str | Path, options: dict, cause: Exception | None = None) -> dict[str, torch.Size]:
        """Check the files of a repository as [`_check_files`] does, once they are in the cache."""
        config = find_config(name, options.get("subfolder") or "", options)
        return {} if config is None else cls._check_files(name, Path(config).parent, options, cause)

    @classmethod
    def _check_files(
        cls, name: str | Path, folder: Path, options: dict, cause: Exception | None = None
    ) -> dict[str, torch.Size]:
        """Check that a folder holds a whole model.

        Args:
            name: the directory or repository that a message names.
            options: the options of loading.
            cause: the loading error that led to the check.

        Returns:
            The shapes of the weights that the model must hold, by plain names.

        Raises:
            OSError: if the folder holds another model or part of one.
        """
        if not (folder / CONFIG_NAME).is_file():
            return {}
        fields, _ = NoPropConfig.get_config_dict(folder)
        kind, expected = fields.get("model_type"), cls.config_class.model_type
        if kind != expected:
            raise OSError(f"{name} holds a model of type {kind!r}, not of type {expected!r}.") from cause
        config = NoPropConfig.from_dict(fields)
        shapes = cls._weight_shapes(config)
        # A variant and weights of another format are in other files.
        if not options.get("variant") and not options.get("gguf_file") and options.get("use_safetensors") is not False:
            fault = model_fault(folder, config, shapes)
            if fault is not None:
                raise OSError(f"{name} {fault}.") from cause
        return {} if getattr(config, "quantization_config", None) is not None else shapes


def find_config(name_or_path: str | Path, subfolder: str, options: dict) -> str | None:
    """Return the path of the configuration in a folder of a directory or repository.

    Args:
        options: the options of loading, of which those that select the repository's files are used.
    """
    names = ("cache_dir", "revision", "token", "local_files_only")
    lookup = {name: options[name] for name in names if name in options}
    return cached_file(
        name_or_path, CONFIG_NAME, subfolder=subfolder, _raise_exceptions_for_missing_entries=False, **lookup
    )

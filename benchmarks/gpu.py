#!/usr/bin/env python
"""Measure everything that needs a GPU, section by section: under ten minutes on one NVIDIA GPU.

python benchmarks/gpu.py                      # every section without results of these files on this device
python benchmarks/gpu.py --only memory speed  # these sections
python benchmarks/gpu.py --again              # also sections with results

The script needs torch, transformers, accelerate and a clone of the repository, and no network: the text comes from
Python's standard library. Most of the tests need more packages, which the section `tests` lists. Without a GPU, all
sections run at toy size on the CPU, as a check of the script; figures that need a GPU are null there, with the reason.

precision   losses of phase 1 and a block in float16, bfloat16 and float32, and steps that overflowed
memory      peaks of the allocator: a block and end to end, each with and without gradient checkpointing
speed       tokens per second of the same, and the places where a step waits for the GPU
t4          whether steps of the T4 recipe fit into 15 GB, and their peaks
tests       the tests marked `gpu`
decoding    tokens per second and those of a stock model: blocks side by side, one by one, and compiled
"""

import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers
import yaml
from torch import nn
from transformers import CompileConfig, HfArgumentParser, PreTrainedModel


sys.path.insert(0, str(Path(__file__).parent.parent))  # the package need not be installed

from common import (
    EndToEnd,
    OneBlock,
    Peak,
    PhaseOne,
    Training,
    commit,
    device_name,
    generate,
    measure,
    models,
    random_text,
)
from noprop_hf import NoPropConfig


ROOT = Path(__file__).parent.parent
Make = Callable[[NoPropConfig], nn.Module]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T4_BYTES = 15 * 10**9  # of its 16 GB, without the ECC bits and the context of CUDA
COMPILING_SECONDS = 120  # no compilation starts after this time


@dataclass
class GpuArguments:
    only: list[str] | None = field(default=None, metadata={"help": "Sections to run; all when not given."})
    again: bool = field(default=False, metadata={"help": "Also run sections that have results."})
    results: str = field(default="benchmarks/results/gpu", metadata={"help": "Folder of the .json of each section."})

    def __post_init__(self):
        unknown = sorted({*(self.only or ())} - {*SECTIONS})
        if unknown:
            raise SystemExit(f"--only takes {', '.join(SECTIONS)}; not {', '.join(unknown)}.")


@dataclass
class Setting:
    """Sizes of the measurements: on a GPU those of the T4 recipe, on a CPU toy sizes."""

    device: torch.device
    config: NoPropConfig
    batch_size: int  # windows, of training for memory and speed and of the T4
    max_length: int
    learning_rate: float
    max_grad_norm: float
    precision_batch_size: int = 64
    precision_steps: int = 200
    timed_seconds: float = 2
    repeats: int = 3
    decoding_batch_sizes: tuple[int, ...] = (1, 8, 32)
    prompt_length: int = 128
    new_tokens: int = 64

    @classmethod
    def of(cls, device: torch.device) -> "Setting":
        recipe = yaml.safe_load((ROOT / "recipes" / "t4_wikitext103.yaml").read_text())
        optimizer: dict[str, Any] = {name: recipe[name] for name in ("learning_rate", "max_grad_norm")}
        if device.type == "cuda":
            sizes = {name: recipe[name] for name in vars(NoPropConfig()) if name in recipe}
            config = NoPropConfig(**sizes, max_position_embeddings=recipe["max_length"])  # BERT's vocabulary by default
            return cls(device, config, recipe["per_device_train_batch_size"], recipe["max_length"], **optimizer)
        sizes = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        config = NoPropConfig(**sizes, num_blocks=2, num_layers_per_block=1, max_position_embeddings=64)
        toy: dict[str, Any] = {"precision_batch_size": 8, "precision_steps": 20, "timed_seconds": 0.01, "repeats": 1}
        return cls(device, config, 4, 32, **optimizer, **toy, decoding_batch_sizes=(2,), prompt_length=8, new_tokens=6)

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def lacks(self, precision: str) -> bool:
        return self.has_gpu and precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False)

    def text(self, batch_size: int) -> torch.Tensor:
        """Create a batch of random windows, `(batch_size, max_length)`."""
        return random_text(self.config.vocab_size, batch_size, self.max_length).to(self.device)


PHASES: dict[str, Make] = {"phase_1": PhaseOne, "block": OneBlock}


def with_checkpointing(make: Make, config: NoPropConfig) -> nn.Module:
    model = make(config)
    for module in model.children():
        if getattr(module, "supports_gradient_checkpointing", False):
            module.gradient_checkpointing_enable({"use_reentrant": False})
    return model


VARIANTS: dict[str, Make] = {
    "block": OneBlock,
    "block_checkpointed": partial(with_checkpointing, OneBlock),
    "end_to_end": EndToEnd,
    "end_to_end_checkpointed": partial(with_checkpointing, EndToEnd),
}


def prepare(make: Make, setting: Setting, precision: torch.dtype = torch.float16) -> Training:
    """Create a model, always with the same weights, and its optimizer as in the recipe."""
    torch.manual_seed(0)
    model = make(setting.config).to(setting.device).train()
    return Training(model, precision, setting.learning_rate, setting.max_grad_norm)


def release() -> None:
    """Free the memory of earlier models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def null(reason: str) -> dict[str, Any]:
    """Create the record of a figure that cannot be measured here."""
    return {"value": None, "reason": reason}


ONLY_GPU: dict[str, Any] = null("needs a GPU")
NO_BFLOAT16: dict[str, Any] = null("this GPU has no bfloat16")


def no_memory(error: torch.OutOfMemoryError) -> dict[str, Any]:
    return null(str(error).partition(". ")[0])


def shown(figure: Any) -> str:
    if isinstance(figure, dict) and "reason" in figure:
        return f"unknown ({figure['reason']})"
    return f"{figure:,.0f}"


# --- precision --------------------------------------------------------------------------------------------------------


def library_words(vocab_size: int, count: int) -> torch.Tensor:
    """Return words and signs of Python's standard library as ids by frequency; rare ones share the last id."""
    words: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        words += re.findall(r"\w+|[^\w ]", path.read_text(encoding="utf-8", errors="ignore"))
        if len(words) >= count:
            break
    numbers = {word: number for number, (word, _) in enumerate(Counter(words).most_common(vocab_size - 1))}
    text = torch.tensor([numbers.get(word, vocab_size - 1) for word in words])
    return text.repeat(-(-count // len(text)))[:count]


def precision(setting: Setting) -> Iterator[dict[str, Any]]:
    """Train on the same batches from the same weights with the same noise, in each precision."""
    shape = (setting.precision_steps, setting.precision_batch_size, setting.max_length)
    text = library_words(setting.config.vocab_size, shape[0] * shape[1] * shape[2])
    counts = text.bincount(minlength=setting.config.vocab_size) + 1
    batches = text.view(-1, setting.max_length)[
        torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(0))
    ]
    batches = batches.view(shape).to(setting.device)
    result: dict[str, Any] = {"tokens_per_step": shape[1] * shape[2]}
    for phase, make in PHASES.items():
        result[phase] = {}
        for name, dtype in PRECISIONS.items():
            if setting.lacks(name):
                result[phase][name] = NO_BFLOAT16
                continue
            training = prepare(make, setting, dtype)
            if isinstance(training.model, OneBlock):
                training.model.table.log_prior.copy_((counts / counts.sum()).log())
                training.model.block.head.bias.data.copy_(training.model.table.log_prior)
            result[phase][name] = losses_and_overflows(training, batches, setting.learning_rate)
            tell(f"precision: {phase} in {name}: {result[phase][name]['last_nats']:.4f} nats at the end")
            yield result
        whole = result[phase]["float32"]
        for losses in result[phase].values():
            if "nats" in losses:
                gaps = [abs(a - b) for a, b in zip(losses["nats"], whole["nats"], strict=True)]
                losses |= {"largest_gap": max(gaps), "last_gap": losses["last_nats"] - whole["last_nats"]}
        yield result


def losses_and_overflows(training: Training, batches: torch.Tensor, learning_rate: float) -> dict[str, Any]:
    """Train on each batch once, with a warm-up over the first tenth."""
    torch.manual_seed(1)  # the noise of the blocks
    losses, overflows = [], 0
    warmup = max(1, len(batches) // 10)
    for step, tokens in enumerate(batches):
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / warmup)
        scale = training.scaler.get_scale()
        losses.append(training.step(tokens))
        overflows += training.scaler.get_scale() < scale
    nats = torch.stack(losses).float()
    return {
        "nats": [round(value, 5) for value in nats.tolist()],
        "last_nats": nats[-warmup:].mean().item(),
        "steps_not_finite": int((~nats.isfinite()).sum()),
        "overflow_steps": overflows,
        "final_scale": training.scaler.get_scale(),
    }


# --- memory and speed of training -------------------------------------------------------------------------------------


def memory(setting: Setting) -> Iterator[dict[str, Any]]:
    """Run two steps of each kind in float16, with half of the recipe's batch and with all of it.

    The two peaks give fixed memory and memory per token. Bytes saved by autograd are counted as well, also on a CPU.
    """
    result: dict[str, Any] = {}
    for kind, make in VARIANTS.items():
        row: dict[str, Any] = {}
        for batch_size in (setting.batch_size // 2, setting.batch_size):
            tokens = setting.text(batch_size)
            row[f"{batch_size}_windows"] = {
                "peak_bytes": peak_bytes(make, setting, tokens),
                **saved(make, setting, tokens),
            }
        peaks = [figures["peak_bytes"] for figures in row.values()]
        if all(isinstance(peak, int) for peak in peaks):
            row["bytes_per_token"] = (
                (peaks[1] - peaks[0]) / (setting.batch_size - setting.batch_size // 2) / setting.max_length
            )
            row["fixed_bytes"] = peaks[1] - row["bytes_per_token"] * setting.batch_size * setting.max_length
        result[kind] = row
        tell(f"memory: {kind}: bytes at the peak: {shown(peaks[-1])}")
        yield result


def peak_bytes(make: Make, setting: Setting, tokens: torch.Tensor) -> int | dict[str, Any]:
    release()
    peak = Peak(setting.device.type)
    try:
        training = prepare(make, setting)
        for _ in range(2):
            training.step(tokens)
    except torch.OutOfMemoryError as error:
        return no_memory(error)
    return peak.bytes() if setting.has_gpu else ONLY_GPU


def saved(make: Make, setting: Setting, tokens: torch.Tensor) -> dict[str, Any]:
    """Count the bytes that autograd saves in a step, with the function of `--dry_run`."""
    missing = missing_packages()
    if missing:
        return {"saved_bytes": null(f"noprop_hf.planning needs {' '.join(missing)}")}
    from noprop_hf.planning import saved_bytes

    release()
    training = prepare(make, setting)
    try:
        return {"saved_bytes": saved_bytes(partial(training.loss, tokens), [training.model])}
    except torch.OutOfMemoryError as error:
        return {"saved_bytes": no_memory(error)}


def speed(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure tokens per second, as the median of some runs, and the waits of one step."""
    result: dict[str, Any] = {"num_blocks": setting.config.num_blocks}
    for name in ("float16", "bfloat16"):
        if setting.lacks(name):
            result[name] = NO_BFLOAT16
            continue
        rows: dict[str, Any] = {}
        result[name] = rows
        for kind, make in {**PHASES, **VARIANTS}.items():
            release()
            rows[kind] = speed_and_waits(make, setting, PRECISIONS[name])
            tell(f"speed: {kind} in {name}: tokens per second: {shown(rows[kind]['tokens_per_second'])}")
            yield result
        block, whole = (rows[kind]["tokens_per_second"] for kind in ("block", "end_to_end"))
        if isinstance(block, float) and isinstance(whole, float):
            rows["ratio_time_per_token"] = setting.config.num_blocks * whole / block
            yield result


def speed_and_waits(make: Make, setting: Setting, precision: torch.dtype) -> dict[str, Any]:
    try:
        training, tokens = prepare(make, setting, precision), setting.text(setting.batch_size)
        rate = tokens_per_second(training, tokens, setting)
        return {"tokens_per_second": rate, "waits": waits(partial(training.step, tokens), setting)}
    except torch.OutOfMemoryError as error:
        return {"tokens_per_second": no_memory(error)}


def tokens_per_second(training: Training, tokens: torch.Tensor, setting: Setting) -> float:
    def wait() -> None:
        if setting.has_gpu:
            torch.cuda.synchronize()

    def time_of(steps: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(steps):
            training.step(tokens)
        wait()
        return time.perf_counter() - begin

    time_of(3)  # to warm up
    steps = max(1, int(setting.timed_seconds / time_of(1)))
    return steps * tokens.numel() / median(time_of(steps) for _ in range(setting.repeats))


def waits(step: Callable[[], Any], setting: Setting) -> dict[str, Any]:
    """Count the waits of the host for the GPU in a step, by place."""
    if not setting.has_gpu:
        return ONLY_GPU
    torch.cuda.synchronize()
    with recorded_waits() as stacks:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(stacks)
    return {"count": len(stacks), "places": [{"times": n, "stack": stack} for stack, n in places.most_common()]}


@contextmanager
def recorded_waits(depth: int = 4) -> Iterator[list[tuple[str, ...]]]:
    """Record the innermost lines of the stack at each warning of torch about a wait for the GPU."""
    stacks: list[tuple[str, ...]] = []

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchroniz" in str(message):
            frames = [
                frame for frame in traceback.extract_stack() if frame.filename not in (warnings.__file__, __file__)
            ]
            stacks.append(tuple(f"{importable(f.filename)}:{f.lineno}: {f.line}" for f in reversed(frames[-depth:])))

    with warnings.catch_warnings(), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        yield stacks


def importable(filename: str) -> str:
    """Shorten the path of a module to the part below its folder of `sys.path`, which is the same on all machines."""
    folders = [folder for folder in sys.path if folder and Path(folder) in Path(filename).parents]
    return Path(filename).relative_to(max(folders, key=len)).as_posix() if folders else filename


# --- a T4 -------------------------------------------------------------------------------------------------------------


def t4(setting: Setting) -> Iterator[dict[str, Any]]:
    """Run two float16 steps in 15 GB, with the recipe's batch and then with twice as many windows until memory ends."""
    result: dict[str, Any] = {"limit_bytes": T4_BYTES if setting.has_gpu else ONLY_GPU}
    if setting.has_gpu:
        release()
        total = torch.cuda.get_device_properties(setting.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_BYTES / total))
    try:
        for phase, make in PHASES.items():
            rows: dict[str, Any] = {}
            result[phase] = rows
            for batch_size in [setting.batch_size * 2**power for power in range(6 if setting.has_gpu else 2)]:
                release()
                rows[f"{batch_size}_windows"] = row = steps_in_limit(make, setting, batch_size)
                reserved = shown(row["reserved_bytes"])
                tell(f"t4: {phase}, {batch_size} windows: fits: {row['fits']}, bytes reserved: {reserved}")
                yield result
                if not row["fits"]:
                    break
    finally:
        if setting.has_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


def steps_in_limit(make: Make, setting: Setting, batch_size: int) -> dict[str, Any]:
    if setting.has_gpu:
        torch.cuda.reset_peak_memory_stats()
    fits = True
    try:
        training = prepare(make, setting)
        tokens = setting.text(batch_size)
        for _ in range(2):
            training.step(tokens)
    except torch.OutOfMemoryError:
        fits = False
    if not setting.has_gpu:
        return {"fits": fits, "peak_bytes": ONLY_GPU, "reserved_bytes": ONLY_GPU}
    peaks = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return {"fits": fits} | peaks


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoding(setting: Setting) -> Iterator[dict[str, Any]]:
    """Compare decoding with a stock model as deep and with as many parameters, in the same precision.

    Both have random weights, on a GPU in float16. Compiled models decode with a static cache; compilation is timed
    separately.
    """
    setting.config.max_position_embeddings = max(
        setting.config.max_position_embeddings, setting.prompt_length + setting.new_tokens + 1
    )
    found = models(setting.config, setting.device)
    prompts = {
        size: torch.randint(setting.config.vocab_size, (size, setting.prompt_length), device=setting.device)
        for size in setting.decoding_batch_sizes
    }
    result: dict[str, Any] = {"prompt_length": setting.prompt_length, "new_tokens": setting.new_tokens}
    for size, prompt in prompts.items():
        with torch.no_grad():
            times = measure(found, prompt, setting.new_tokens, setting.repeats)
        row: dict[str, Any] = {
            kind: {"tokens_per_second": size * setting.new_tokens / own["others"]} for kind, own in times.items()
        }
        result[f"batch_{size}"] = row
        rates = ", ".join(f"{kind} {shown(figures['tokens_per_second'])}" for kind, figures in row.items())
        tell(f"decoding: batch {size}: tokens per second: {rates}")
        row["ratio_tokens_per_second"] = row["ours"]["tokens_per_second"] / row["stock"]["tokens_per_second"]
        yield result
    begin = time.perf_counter()
    for size, prompt in prompts.items():
        row = result[f"batch_{size}"]
        for name, model in found.items():
            kind = f"{name}_compiled"
            if time.perf_counter() - begin > COMPILING_SECONDS:
                row[kind] = {"tokens_per_second": null(f"no compilation starts after {COMPILING_SECONDS} s")}
                continue
            try:
                row[kind] = compiled(model, prompt, setting)
            except RuntimeError as error:  # including errors of the compiler
                row[kind] = {"tokens_per_second": null(f"{type(error).__name__}: {error}"[:2000])}
            tell(f"decoding: batch {size}, {kind}: tokens per second: {shown(row[kind]['tokens_per_second'])}")
            yield result
    yield result


def compiled(model: PreTrainedModel, prompts: torch.Tensor, setting: Setting) -> dict[str, Any]:
    """Measure tokens per second with compiled steps; on a CPU they are only traced, since compiling takes minutes."""
    torch._dynamo.reset()  # compile each batch size separately
    config = CompileConfig() if setting.has_gpu else CompileConfig(backend="eager")
    config._compile_all_devices = True
    write = partial(generate, model, prompts, 1 + setting.new_tokens, cache_implementation="static")
    begin = time.perf_counter()
    for _ in range(2):  # the second run records CUDA graphs
        write(compile_config=config)
    seconds = time.perf_counter() - begin
    best = min(write(compile_config=config)["others"] for _ in range(setting.repeats))
    return {"tokens_per_second": len(prompts) * setting.new_tokens / best, "compiling_seconds": seconds}


# --- tests ------------------------------------------------------------------------------------------------------------


def tests(setting: Setting) -> Iterator[dict[str, Any]]:
    """Run all tests marked `gpu` or, if packages are missing, those that do not need them."""
    if find_spec("pytest") is None:
        yield {"skipped": "pytest is not installed, so no test was run."}
        return
    missing = missing_packages()
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    if missing:
        files, command = [ROOT / "tests" / "test_gpu.py"], [*command, "--noconftest"]
    command += [str(path.relative_to(ROOT)) for path in files]
    process = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
    )
    lines = process.stdout.strip().splitlines()
    result = {
        "files": [path.name for path in files],
        "status": process.returncode,
        "summary": lines[-1] if lines else "",
    }
    if process.returncode:
        result["output"] = process.stdout[-8000:]
    if missing:
        names = shlex.join(missing)
        result |= {"missing_packages": missing, "note": f"Tests of other files need {names}, carried here as wheels."}
        tell(
            f"tests: only tests/test_gpu.py runs, since other tests need {names}. With a network: "
            f"`pip download --python-version {'.'.join(platform.python_version_tuple()[:2])} --only-binary :all: "
            f"--dest wheels {names}`; then here: `pip install --no-index --find-links wheels {names}`."
        )
    tell(f"tests: {result['summary']}")
    yield result


def missing_packages() -> list[str]:
    """List the requirements of the package that are not installed."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    missing = []
    for requirement in setup["options"]["install_requires"].split():
        try:
            importlib.metadata.version(re.split(r"[<>=]", requirement)[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


# --- sections ---------------------------------------------------------------------------------------------------------


SECTIONS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    section.__name__: section for section in (precision, memory, speed, t4, tests, decoding)
}


def circumstances(device: torch.device) -> dict[str, Any]:
    """Collect the dependencies of the figures; a change of any but the commit makes results obsolete."""
    files = [*ROOT.glob("noprop_hf/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "recipes" / "t4_wikitext103.yaml"]
    files += ROOT.glob("tests/*.py")
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files)))
    return {
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
        },
        "files": content.hexdigest()[:16],
        "commit": commit(),
    }


def is_measured(path: Path, now: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    return record["complete"] and all(record[name] == now[name] for name in ("device", "versions", "files"))


def run(section: str, setting: Setting, path: Path, now: dict[str, Any]) -> bool:
    """Measure a section, writing the results after every part, and return whether it succeeded."""
    begin = time.perf_counter()
    record = {"section": section, **now, "is_toy": not setting.has_gpu, "complete": False, "seconds": 0.0, "result": {}}

    def write() -> None:
        record["seconds"] = round(time.perf_counter() - begin, 1)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(path)

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for result in SECTIONS[section](setting):
            record["result"] = result
            write()
        record["complete"] = True
    except Exception:  # the other sections are still run
        record["error"] = traceback.format_exc()
        print(record["error"], file=sys.stderr)
    write()
    return record["complete"]


def main() -> None:
    (args,) = HfArgumentParser(GpuArguments, description=__doc__).parse_args_into_dataclasses()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = circumstances(device)
    tell(f"{now['device']}, torch {torch.__version__}, transformers {transformers.__version__}")
    failed = []
    for section in args.only or SECTIONS:
        path = Path(args.results, f"{section}.json")
        if not args.again and is_measured(path, now):
            tell(f"{section}: {path} is measured already; --again repeats it")
            continue
        tell(f"{section} ...")
        release()
        if not run(section, Setting.of(device), path, now):
            failed.append(section)
        tell(f"{section}: written to {path}")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}. Their files hold the error and the results before it.")


if __name__ == "__main__":
    main()

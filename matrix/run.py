"""Test the versions of `cells.yaml`, and write what came of it to benchmarks/results/versions.md.

    python matrix/run.py [--environments .matrix]

The newest cell trains a model and publishes it in a directory. Every cell then loads it without `noprop_hf`
(`test_published.py`); and every cell that runs the package trains a model of its own, whose directory the newest cell
and this one must agree on, and runs the tests of the model.
"""

import argparse
import configparser
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml


ROOT = Path(__file__).parent.parent
MODEL_TESTS = "configuration modeling generation side_by_side noise trunk".split()
PUBLISHED_TESTS = ROOT / "matrix" / "test_published.py"
TABLE = ROOT / "benchmarks" / "results" / "versions.md"
HEADER = """Written by `make matrix`: tests passed in each cell of [`matrix/cells.yaml`](../../matrix/cells.yaml), a
virtual environment of its own. *Published* is one directory made with the newest versions and loaded without
`noprop_hf` ([`test_published.py`](../../matrix/test_published.py)); *trained* is a directory trained in the cell, which
the newest versions must read alike; *model* are the tests of the model files. A cell that is not listed has not run to
its end.

| python | torch | transformers | huggingface_hub | published | trained | model |
| --- | --- | --- | --- | --- | --- | --- |
"""


class Cell:
    """A virtual environment, made when it is missing."""

    def __init__(self, environments: Path, requirements: list[str], package: bool = True):
        self.package = package
        self.python = environments / "-".join(requirements).replace("==", "-") / "bin" / "python"
        done = self.python.parent.parent / "installed"
        if done.exists():
            return
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        needed = setup["options"]["install_requires"].split() if package else ["safetensors", "numpy"]
        print(f"Installing {' '.join(requirements)} in {self.python.parent.parent}", flush=True)
        venv.create(self.python.parent.parent, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pytest", "jinja2"]
        subprocess.run([self.python, *install, *requirements, *needed], check=True)
        done.touch()

    def run(self, *command: str | Path, home: Path, package: bool = False, **variables: str) -> tuple[bool, str]:
        """Run Python in the environment; whether it succeeded, and what it printed."""
        home.mkdir(exist_ok=True)
        own = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | own | variables | {"PYTHONPATH": str(ROOT) if package else ""}
        done = subprocess.run(
            [self.python, *command], cwd=ROOT if package else home, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            print(done.stdout[-6000:], done.stderr[-3000:], sep="\n", flush=True)
        return done.returncode == 0, done.stdout

    def test(self, *files: str | Path, home: Path, **options) -> tuple[bool, str]:
        """Run tests; whether they passed, and how many of them in words."""
        options_of_pytest = ["-p", "no:cacheprovider", "-o", "addopts=", "-q", "-m", "not slow"]
        passed, output = self.run("-m", "pytest", *options_of_pytest, *files, home=home, **options)
        counts = {name: count for count, name in re.findall(r"(\d+) (passed|failed|error)", output)}
        return passed, f"{counts.get('passed', 0)} passed" if passed else ", ".join(f"{counts[n]} {n}" for n in counts)


def train(cell: Cell, folder: Path, home: Path) -> tuple[bool, Path]:
    """Train both phases of `tiny.yaml` on the README by the script; whether it succeeded, and the directory."""
    folder.mkdir()
    text, directory = folder / "readme.txt", folder / "model"
    shutil.copy(ROOT / "README.md", text)
    command: list[str | Path] = [
        "scripts/train.py",
        "matrix/tiny.yaml",
        "--train_file",
        text,
        "--output_dir",
        directory,
    ]
    succeeded, _ = cell.run(*command, package=True, home=home)
    return succeeded, directory


def expect(cell: Cell, directory: Path, home: Path) -> Path:
    """What a cell observes of a directory, as a file."""
    path = directory / "expected.json"
    _, output = cell.run(PUBLISHED_TESTS, directory, home=home)
    path.write_text(output.splitlines()[-1] if output else "{}", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=ROOT / ".matrix", help="Where virtual environments are.")
    environments = parser.parse_args().environments.absolute()
    *others, newest = (
        Cell(environments, **cell) for cell in yaml.safe_load((ROOT / "matrix" / "cells.yaml").read_text())
    )
    rows, all_passed = [], True
    with TemporaryDirectory() as name:
        folder = Path(name)
        succeeded, published = train(newest, folder / "newest", folder / "home-newest")
        if not succeeded:
            raise SystemExit("The newest cell cannot train.")
        expected = expect(newest, published, folder / "home-newest")
        for number, cell in enumerate([*others, newest]):
            home = folder / f"home-{number}"
            _, versions = cell.run(
                "-c",
                "import platform, torch, transformers, huggingface_hub as hub; v = torch.__version__.split('+')[0];"
                "print(platform.python_version(), v, transformers.__version__, hub.__version__)",
                home=home,
            )
            outcomes = [cell.test(PUBLISHED_TESTS, home=home, PUBLISHED=str(published), EXPECTED=str(expected))]
            if cell.package:
                succeeded, directory = train(cell, folder / str(number), home)
                outcome = (False, "failed")
                if succeeded:
                    reference = expect(newest, directory, folder / "home-newest")
                    variables = {"PUBLISHED": str(directory), "EXPECTED": str(reference)}
                    outcome = cell.test(PUBLISHED_TESTS, "-k", "same", home=home, **variables)
                tests = [f"tests/test_{test}.py" for test in MODEL_TESTS]
                outcomes += [outcome, cell.test(*tests, home=home, package=True)]
            all_passed &= all(passed for passed, _ in outcomes)
            texts = [text for _, text in outcomes] + ["–"] * (3 - len(outcomes))
            rows.append("| " + " | ".join([*versions.split(), *texts]) + " |")
            print(rows[-1], flush=True)
            TABLE.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    if not all_passed:
        raise SystemExit("Some tests failed.")


if __name__ == "__main__":
    main()

"""Kept figures and the code they depend on, in small repositories made by hand."""

import json
import subprocess
from pathlib import Path

import pytest

import results
from conftest import ROOT
from results import current_commit, figures, report, sources


FILES = {
    "benchmarks/speed.py": "from common import watch\nimport numpy\n\ndef run():\n    from package import late\n",
    "benchmarks/common.py": "import package.early as early\n",
    "benchmarks/memory.py": 'SCRIPT = "scripts/train.py"\nKEPT = "benchmarks/results/largest.json"\n',
    "scripts/train.py": "import package.alone\n",
    "package/__init__.py": "from .core import thing\n",
    "package/core.py": "",
    "package/early.py": "from . import helper\nfrom .nested.deep import x\n",
    "package/late.py": "",
    "package/helper.py": "",
    "package/alone.py": "",
    "package/unused.py": "from . import late\n",
    "package/nested/__init__.py": "",
    "package/nested/deep.py": "from ..core import thing\n",
}
SPEED = ["benchmarks/common.py", "benchmarks/speed.py", "package/__init__.py", "package/core.py", "package/early.py"]
SPEED += ["package/helper.py", "package/late.py", "package/nested/__init__.py", "package/nested/deep.py"]


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def write(root: Path, name: str, content: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


def save(root: Path) -> str:
    git(root, "add", ".")
    git(root, "commit", "--message", "a change")
    return git(root, "rev-parse", "HEAD").strip()


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "repository"
    for name, content in FILES.items():
        write(root, name, content)
    git(root, "init", "--quiet")
    return root


def test_a_benchmark_depends_on_what_it_imports_and_runs(root):
    assert sources(root / "benchmarks" / "speed.py", root) == SPEED
    memory = ["benchmarks/memory.py", "package/__init__.py", "package/alone.py", "package/core.py", "scripts/train.py"]
    assert sources(root / "benchmarks" / "memory.py", root) == memory


def test_figures_older_than_their_code_are_listed_with_what_changed(root):
    first = save(root)
    write(root, "package/late.py", "changed = True")
    write(root, "package/unused.py", "changed = True")
    second = save(root)
    write(root, "package/alone.py", "changed = True  # not committed")
    write(root, "package/nested/deep.py", "changed = True  # not committed")
    rows = [{"commit": sha, "method": sha and sha[:2], "num_blocks": 4} for sha in (first, second, None, "f" * 40)]
    write(root, "benchmarks/results/speed_compiled.json", rows)
    models = {"words": {"small": {"commit": [first, first, f"{first}-dirty"], "nats": [1, 2, 3]}, "setting": {"n": 1}}}
    write(root, "benchmarks/results/speed/quality.json", models)
    write(root, "benchmarks/results/largest.json", {"commit": second, "parameters": 7})
    write(root, "benchmarks/results/orphan.json", {"figure": 1})
    one, two = first[:7], second[:7]
    changed = f"measured at {one}, 2 of 9 files changed since: package/late.py, package/nested/deep.py"
    assert report(root).splitlines() == [
        "benchmarks/results/largest.json (benchmarks/memory.py)",
        "  all",
        f"    measured at {two}, 1 of 5 files changed since: package/alone.py",
        "benchmarks/results/orphan.json (no benchmark of this name)",
        "  all",
        "    measured at an unknown commit",
        "benchmarks/results/speed/quality.json (benchmarks/speed.py)",
        "  words, small",
        f"    {changed}",
        "  words, small",
        f"    {changed.replace(one, f'{one} with uncommitted changes')}",
        "benchmarks/results/speed_compiled.json (benchmarks/speed.py)",
        f"  {first[:2]}, num_blocks 4",
        f"    {changed}",
        f"  {second[:2]}, num_blocks 4",
        f"    measured at {two}, 1 of 9 files changed since: package/nested/deep.py",
        "  num_blocks 4",
        "    measured at an unknown commit",
        "  ff, num_blocks 4",
        "    measured at fffffff, which this clone lacks: it is on no branch of this clone",
    ]


def test_the_commit_of_a_run_is_marked_if_its_own_code_was_changed(root):
    head, script = save(root), root / "benchmarks" / "speed.py"
    write(root, "benchmarks/results/speed.json", [])
    write(root, "package/alone.py", "changed = True")
    assert current_commit(script, root) == head
    assert current_commit(root / "benchmarks" / "memory.py", root) == f"{head}-dirty"
    assert current_commit(Path("/usr/bin/pytest"), root) == f"{head}-dirty"
    write(root, "package/late.py", "changed = True")
    assert current_commit(script, root) == f"{head}-dirty"


def test_shallow_clones_and_copies_without_git(root, tmp_path, monkeypatch):
    first = save(root)
    write(root, "benchmarks/results/speed.json", [{"commit": first, "device": "CPU"}])
    second = save(root)
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", root.as_uri(), str(shallow))
    assert f"measured at {first[:7]}, which this clone lacks: run `git fetch --unshallow`" in report(shallow)
    assert current_commit(shallow / "benchmarks" / "speed.py", shallow) == second

    inner = root / "copy"  # a copy of the files inside of another repository has no commits of its own
    git(root, "worktree", "add", "--quiet", "--detach", str(inner))
    (inner / ".git").unlink()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for copy in (inner, Path(tmp_path / "empty")):
        copy.mkdir(exist_ok=True)
        assert (
            report(copy) == f"{copy} is not a git repository: the ages of the kept figures are known in a clone only."
        )
        assert current_commit(copy / "benchmarks" / "speed.py", copy) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert "is not a git repository" in report(root) and current_commit(root / "benchmarks" / "speed.py", root) is None


def test_every_kept_figure_has_a_commit():
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.json")):
        kept = json.loads(path.read_text())
        found = [commit for _, commits in figures(kept) for commit in commits]
        assert found and all(isinstance(commit, str) and len(commit) >= 40 for commit in found), path
        rows = kept if isinstance(kept, list) else []
        assert all("commit" in row for row in rows), path
        assert results.benchmark_of(path, ROOT) is not None

#!/usr/bin/env python
"""List the kept figures, the commit that each was measured at, and the files it depends on that have changed since.

python benchmarks/results.py

A figure is an entry of a file in benchmarks/results with a field `commit`: the commit that the benchmark ran at, with
`-dirty` if files that it depends on had uncommitted changes; null if unknown; for several runs, a list. A benchmark
depends on every file of the repository that it imports, also within functions, and on the scripts and recipes that it
names. Needs Python and git only.
"""

import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
# Fields by which the rows of a table differ.
KEYS = (
    "device",
    "shape",
    "method",
    "softmax",
    "num_blocks",
    "tokens",
    "batch_size",
    "prompt_length",
    "workers",
    "epochs",
)


def git(root: Path, *arguments: str) -> str | None:
    """Return the output of git in a folder, or None if git or the repository is missing, or git fails."""
    try:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None


def is_repository(root: Path) -> bool:
    """Check whether a folder is the top of a git repository."""
    top = git(root, "rev-parse", "--show-toplevel")
    return top is not None and Path(top.strip()).resolve() == root.resolve()


# --- what a benchmark depends on --------------------------------------------------------------------------------------


def sources(script: Path, root: Path = ROOT) -> list[str]:
    """Collect the files of the repository that a benchmark depends on, as paths relative to `root`.

    Found without running them: the imports of each file, and strings that are the name of a script or recipe.
    """
    named: dict[str, list[Path]] = {}
    for folder in ("scripts", "recipes", "launch", "benchmarks"):
        for path in (root / folder).glob("*.*"):
            named.setdefault(path.name, []).append(path)
    found, waiting = set(), [script]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            waiting += imported(node, path, root)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                waiting += named.get(node.value.rpartition("/")[2], []) if node.value.endswith((".py", ".yaml")) else []
    return sorted(path.relative_to(root).as_posix() for path in found)


def imported(node: ast.AST, path: Path, root: Path) -> list[Path]:
    """Return the files of the repository that a statement in the file `path` imports."""
    if isinstance(node, ast.Import):
        names, folders = [alias.name for alias in node.names], [path.parent, root]
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        names = [module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)]
        folders = [path.parents[node.level - 1]] if node.level else [path.parent, root]
    else:
        return []
    files = []
    for name in filter(None, names):
        for folder in folders:
            parts = name.split(".")
            packages = [folder.joinpath(*parts[: count + 1], "__init__.py") for count in range(len(parts))]
            found = [file for file in (*packages, folder.joinpath(*parts).with_suffix(".py")) if file.is_file()]
            files += found
            if found:
                break
    return files


def current_commit(script: Path, root: Path = ROOT) -> str | None:
    """Return the commit of the working tree, with `-dirty` if files that a benchmark depends on differ from it.

    Args:
        script: the benchmark. If it is not one of this repository, all files count.

    Returns:
        None outside of a git repository.
    """
    head = git(root, "rev-parse", "HEAD") if is_repository(root) else None
    if head is None:
        return None
    files = sources(script, root) if script.parent == root / "benchmarks" else ["."]
    return head.strip() + ("-dirty" if git(root, "status", "--porcelain", "--", *files) else "")


# --- kept figures -----------------------------------------------------------------------------------------------------


def figures(kept: Any, name: str = "") -> Iterator[tuple[str, list[str | None]]]:
    """Yield the name of each figure in the content of a file of results, with its commits."""
    if isinstance(kept, dict) and "commit" in kept:
        commits = kept["commit"] if isinstance(kept["commit"], list) else [kept["commit"]]
        yield name or "all", list(dict.fromkeys(commits))
    elif isinstance(kept, dict):
        for key, value in kept.items():
            yield from figures(value, f"{name}, {key}" if name else key)
    elif isinstance(kept, list):
        for number, row in enumerate(kept):
            if isinstance(row, dict):
                label = ", ".join(
                    row[key] if isinstance(row[key], str) else f"{key} {row[key]}"
                    for key in KEYS
                    if row.get(key) is not None
                )
                yield from figures(row, ", ".join(filter(None, (name, label or f"row {number}"))))


def benchmark_of(path: Path, root: Path) -> Path | None:
    """Return the benchmark that writes a file of results: the longest one whose name begins that of the file."""
    name = path.relative_to(root / "benchmarks" / "results").with_suffix("").as_posix()
    scripts = sorted((root / "benchmarks").glob("*.py"), key=lambda script: len(script.stem), reverse=True)
    mentions = (script for script in scripts if f"{path.stem}.json" in script.read_text(encoding="utf-8"))
    return next((script for script in scripts if name.startswith(script.stem)), next(mentions, None))


def age(commit: str | None, files: list[str], root: Path) -> str:
    """Say which of the files have changed since a commit."""
    if commit is None:
        return "measured at an unknown commit"
    sha, _, dirty = commit.partition("-")
    at = f"measured at {sha[:7]}" + (" with uncommitted changes" if dirty else "")
    if git(root, "cat-file", "-e", f"{sha}^{{commit}}") is None:
        shallow = (git(root, "rev-parse", "--is-shallow-repository") or "").strip() == "true"
        fetch = "run `git fetch --unshallow`" if shallow else "it is on no branch of this clone"
        return f"{at}, which this clone lacks: {fetch}"
    changed = (git(root, "diff", "--name-only", sha, "--", *files) or "").split()
    if not changed:
        return f"{at}, nothing changed since"
    return f"{at}, {len(changed)} of {len(files)} files changed since: {', '.join(changed)}"


def report(root: Path = ROOT) -> str:
    """List the figures of each file of results by their commits."""
    if not is_repository(root):
        return f"{root} is not a git repository: the ages of the kept figures are known in a clone only."
    lines = []
    for path in sorted((root / "benchmarks" / "results").rglob("*.json")):
        script = benchmark_of(path, root)
        groups: dict[str | None, list[str]] = {}
        for name, commits in figures(json.loads(path.read_text(encoding="utf-8"))):
            for commit in commits:
                groups.setdefault(commit, []).append(name)
        files = sources(script, root) if script else []
        writer = script.relative_to(root) if script else "no benchmark of this name"
        lines.append(f"{path.relative_to(root)} ({writer})")
        for commit, names in (groups or {None: ["all"]}).items():
            lines += [f"  {name}" for name in names] + [f"    {age(commit, files, root)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())

#!/usr/bin/env python
"""Draw the learning curves of a run that is going on or has ended: phase 1, all blocks, and the bound by block.

python scripts/plot_run.py runs/demo
python scripts/plot_run.py runs/demo --save curves.png
"""

import argparse
from pathlib import Path


try:
    from noprop_hf.plotting import draw_run
except ModuleNotFoundError as error:
    raise SystemExit(f"Curves are drawn with matplotlib ({error}): pip install matplotlib.") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a model directory")
    parser.add_argument("--save", type=Path, help="write the picture here; curves.png in the directory if not given")
    args = parser.parse_args()
    try:
        figure = draw_run(args.directory)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    path = args.save or args.directory / "curves.png"
    figure.savefig(path, dpi=120)
    print(f"The picture is in {path}.")


if __name__ == "__main__":
    main()

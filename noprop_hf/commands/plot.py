"""Plot the learning curves of a running or finished training: phase 1, all blocks, and the bound by block.

%(prog)s runs/demo
%(prog)s runs/demo --save curves.png
"""

from pathlib import Path

from ..recipes import NO_MATPLOTLIB, command_line, entry_point, picture


@entry_point
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("directory", type=Path, help="a model directory")
    parser.add_argument("--save", type=picture, help="image file to write; default: curves.png in the directory")
    args = parser.parse_args()
    if not args.directory.is_dir():
        parser.error(f"{args.directory} is not a directory: give the --output_dir of a run.")
    try:
        from ..plotting import draw_run
    except ModuleNotFoundError as error:
        if "matplotlib" not in str(error):
            raise
        parser.error(NO_MATPLOTLIB)
    path = args.save or args.directory / "curves.png"
    draw_run(args.directory).savefig(path, dpi=120)
    print(f"Saved the plot to {path}.")

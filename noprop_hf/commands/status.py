"""List the blocks of a model directory or a repository of the Hub, and which of them are trained.

%(prog)s runs/demo
%(prog)s user/name
"""

from pathlib import Path

from ..recipes import command_line, entry_point
from ..status import local_status, remote_status


@entry_point
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", help="a model directory, or a repository of the Hub")
    parser.add_argument("--token", help="access token of a private repository")
    args = parser.parse_args()
    is_local = Path(args.model).is_dir()
    blocks = local_status(Path(args.model)) if is_local else remote_status(args.model, args.token)
    for index, block in enumerate(blocks):
        print(f"block {index:2d}  {block.state:8s}  {block.details}".rstrip())
    done = sum(block.state == "done" for block in blocks)
    print(f"{done} of {len(blocks)} blocks are done")

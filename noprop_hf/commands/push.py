"""Upload the code, weights, tokenizer and card of a model to the Hub, in one commit.

%(prog)s runs/demo user/name --license apache-2.0 --language en
%(prog)s runs/demo user/name --dry_run
"""

from pathlib import Path

from ..hub import card_files, check_repo_id, files_left_out, files_to_push, push_model, write_card
from ..layout import RESULTS_FILE
from ..recipes import command_line, entry_point


@entry_point
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", type=Path, help="a model directory with all blocks")
    parser.add_argument("repo_id", help="the repository, as user/name")
    parser.add_argument("--license", help="licence of the model, by its identifier on the Hub")
    parser.add_argument("--language", help="language of the text, by its ISO 639-1 code")
    parser.add_argument("--private", action="store_true", default=None, help="create the repository as private")
    parser.add_argument("--update", action="store_true", help="commit to a repository that already holds a model")
    parser.add_argument("--token", help="access token; default: that of `hf auth login`")
    parser.add_argument("--commit_message", default="Upload NoProp model")
    parser.add_argument("--dry_run", action="store_true", help="list the files to upload, and upload nothing")
    args = parser.parse_args()

    check_repo_id(args.repo_id)
    files = files_to_push(args.model)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    left_out = files_left_out(args.model, files)
    if left_out:
        print(f"Not uploaded, as they are not part of the model: {', '.join(left_out)}")
    has_card = (args.model / RESULTS_FILE).is_file()
    if not has_card:
        print(f"{args.model} has no {RESULTS_FILE}, so no card is written: `noprop train` writes that file.")
    card = (args.model, args.repo_id, args.license, args.language)
    if args.dry_run:
        if has_card:
            sizes |= {name: len(content) for name, content in card_files(*card).items()}
        for name, size in sizes.items():
            print(f"{size:12,}  {name}")
        print(f"to be uploaded to {args.repo_id} in one commit")
        return
    if has_card:
        write_card(*card)
    url = push_model(args.model, args.repo_id, args.private, args.token, args.update, args.commit_message)
    print(f"Uploaded: {url}")

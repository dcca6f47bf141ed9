"""Show how the chain of blocks turns noise into tokens, in the terminal and as an image.

%(prog)s runs/demo "Return the"
%(prog)s runs/demo "Return the" --save chain.png
"""

from rich.console import Console

from ..data import load_tokenizer
from ..evaluation import load_model
from ..recipes import command_line, entry_point, number, picture
from ..watching import figure, table, watch


LEGEND = (
    "For every token, each block predicts a distribution: its belief. Block 0 reads the text so far and pure noise. "
    "Then a token is sampled from the belief, the evidence moves a little towards that token (\u03b3: signal-to-noise "
    "ratio), and the next block updates the belief. The output token is sampled from the last belief."
)


@entry_point
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", help="a model directory, or a repository of the Hub")
    parser.add_argument("prompt", help="the text to continue, without a trailing space, which belongs to the next word")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=8)
    parser.add_argument("--num_candidates", type=number(int, 1), default=4, help="tokens shown for each block")
    parser.add_argument("--num_inference_blocks", type=number(int, 1), help="number of blocks to run; default: all")
    parser.add_argument("--num_trajectories", type=number(int, 1), default=1, help="chains to average")
    parser.add_argument("--temperature", type=number(float, 0), default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--save", type=picture, help="image file to write, such as chain.png")
    args = vars(parser.parse_args())

    name, save, num_candidates = args.pop("model"), args.pop("save"), args.pop("num_candidates")
    console, tokens = Console(), []
    model = load_model(name, args["num_inference_blocks"])
    tokenizer = load_tokenizer(name, model.config.vocab_size)
    console.print(LEGEND, markup=False)
    for token in watch(model, tokenizer, **args):
        tokens.append(token)
        console.print(table(token, num_candidates))
    console.print(args["prompt"] + (tokens[-1].text if tokens else ""), markup=False)
    if save and tokens:
        figure(args["prompt"], tokens).savefig(save, dpi=120)
        console.print(f"Saved the image to {save}.", markup=False)

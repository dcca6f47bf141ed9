"""Continue a prompt.

%(prog)s runs/demo "Return the"
%(prog)s runs/demo "Return the" --decoding_mode denoising --num_trajectories 4
"""

from transformers import TextStreamer, set_seed

from ..data import load_tokenizer
from ..evaluation import encode_prompt, load_model
from ..recipes import command_line, entry_point, number


@entry_point
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", help="a model directory, or a repository of the Hub")
    parser.add_argument("prompt", help="the text to continue, without a trailing space, which belongs to the next word")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=100)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=number(float, 1e-5), default=1.0)
    parser.add_argument("--top_k", type=number(int, 0), default=50)
    parser.add_argument("--top_p", type=number(float, 0, 1, excluded=True), default=1.0)
    parser.add_argument("--decoding_mode", choices=["predictive", "denoising"], default="predictive")
    parser.add_argument("--num_trajectories", type=number(int, 1), default=1, help="chains to average (denoising)")
    parser.add_argument("--num_inference_blocks", type=number(int, 1), help="number of blocks to run; default: all")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model = load_model(args.model, args.num_inference_blocks)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    model.generate(
        encode_prompt(args.prompt, tokenizer).to(model.device),
        max_new_tokens=args.max_new_tokens,
        decoding_mode=args.decoding_mode,
        num_trajectories=args.num_trajectories,
        num_inference_blocks=args.num_inference_blocks,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **({"do_sample": False} if args.greedy else sampling),
    )

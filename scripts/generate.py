#!/usr/bin/env python
"""Continue a prompt.

python scripts/generate.py runs/demo "Return the "
python scripts/generate.py runs/demo "Return the " --decoding_mode denoising --num_trajectories 4
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, TextStreamer, set_seed

import noprop_hf  # noqa: F401  registers the model
from noprop_hf.data import load_tokenizer
from noprop_hf.evaluation import encode_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a repository of the Hub")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--decoding_mode", choices=["predictive", "denoising"], default="predictive")
    parser.add_argument("--num_trajectories", type=int, default=1, help="chains to average (denoising)")
    parser.add_argument("--num_inference_blocks", type=int, default=None, help="run only the first blocks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = load_tokenizer(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
        input_ids = encode_prompt(args.prompt, tokenizer).to(device)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    model.generate(
        input_ids,
        max_new_tokens=args.max_new_tokens,
        decoding_mode=args.decoding_mode,
        num_trajectories=args.num_trajectories,
        num_inference_blocks=args.num_inference_blocks,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **({"do_sample": False} if args.greedy else sampling),
    )


if __name__ == "__main__":
    main()

"""`python -m noprop_hf` is the command `noprop`, also for `accelerate launch -m noprop_hf`."""

from noprop_command import main


if __name__ == "__main__":
    main()

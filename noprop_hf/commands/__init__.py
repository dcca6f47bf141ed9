"""The commands of `noprop`, a module each, whose `main` is also that of the script of the same purpose."""

"""Commands for people who work on or try out cutehop, run from the repository root: `python -m tools.demo`."""

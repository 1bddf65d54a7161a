"""`python -m guardfold`: the same as the `guardfold` command."""

from .cli import main

main()

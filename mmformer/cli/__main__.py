"""`python -m mmformer.cli`."""

from mmformer.cli import main

main()

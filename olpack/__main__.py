"""`python -m olpack`."""

from olpack.cli import main

main()

"""`python -m edgekd`."""

from edgekd.cli.main import main

main()

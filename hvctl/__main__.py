"""`python -m hvctl` is the `hvctl` command."""

from hvctl.cli.main import main

main()

"""`python -m fusedopt` is the `fusedopt` command."""

from .cli import main

main()

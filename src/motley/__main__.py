"""`python -m motley` equals `motley`."""

from motley.cli import main

main()

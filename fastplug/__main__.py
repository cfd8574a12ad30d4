"""``python -m fastplug``."""

from fastplug.cli import main

main()

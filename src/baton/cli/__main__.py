"""`python -m baton.cli`, for where a launcher wants a module: `torchrun -m baton.cli train handoff ...`."""

from baton.cli import main

main()

"""`python -m fathom`, which is what torchrun starts: `torchrun -m fathom train …`."""

from fathom.cli import main

main()

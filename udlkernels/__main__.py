"""`python -m udlkernels` is the command `udlkernels`."""

from udlkernels.cli import main

if __name__ == "__main__":
    main()

"""`python -m reasonkv`: the command line."""

from reasonkv.cli import main

if __name__ == "__main__":
    main()

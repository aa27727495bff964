"""`python -m coeffdiff`, which is also what `accelerate launch -m coeffdiff` starts."""

from coeffdiff.cli.root import main

if __name__ == "__main__":
    main()

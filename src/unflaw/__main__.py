"""`python -m unflaw`: the command line, also where no script is installed."""

from unflaw.cli import main

if __name__ == "__main__":
    main()

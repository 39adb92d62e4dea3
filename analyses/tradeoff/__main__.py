"""`python -m analyses.tradeoff`."""

from analyses.tradeoff.command import main

if __name__ == "__main__":
    main()

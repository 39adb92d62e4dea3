"""`python -m analyses.tofu_pair`."""

from analyses.tofu_pair.command import main

if __name__ == "__main__":
    main()

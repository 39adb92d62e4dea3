"""`python -m analyses.dissecting`."""

from analyses.dissecting.command import main

if __name__ == "__main__":
    main()

"""`python -m analyses.muse_runs`."""

from analyses.muse_runs.command import main

if __name__ == "__main__":
    main()

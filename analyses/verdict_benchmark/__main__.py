"""`python -m analyses.verdict_benchmark`."""

from analyses.verdict_benchmark.command import main

if __name__ == "__main__":
    main()

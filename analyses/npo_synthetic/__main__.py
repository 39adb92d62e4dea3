"""`python -m analyses.npo_synthetic`."""

from analyses.npo_synthetic.command import main

if __name__ == "__main__":
    main()

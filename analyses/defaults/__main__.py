"""Run the command line."""

from analyses.defaults.command import main

if __name__ == "__main__":
    main()

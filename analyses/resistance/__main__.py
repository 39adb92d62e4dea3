"""Run the command line."""

from analyses.resistance.command import main

if __name__ == "__main__":
    main()

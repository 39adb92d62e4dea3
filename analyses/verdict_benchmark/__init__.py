"""Hold the verdict to models whose truth is known by construction."""

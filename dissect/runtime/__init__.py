"""The machine: processes, memory and precision."""

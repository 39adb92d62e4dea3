"""The MUSE benchmark."""

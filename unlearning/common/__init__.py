"""What both packages share: errors, run directories, the bootstrap, progress bars."""

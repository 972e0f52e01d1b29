"""The page's commands, one file each."""

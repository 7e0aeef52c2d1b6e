"""Starting runs: on this box through torchrun. Importing it imports no torch, so that it is quick on login nodes."""

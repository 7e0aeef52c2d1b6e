"""The `data` command: what lies there, what it looks like, how quick it is; and data to begin with."""

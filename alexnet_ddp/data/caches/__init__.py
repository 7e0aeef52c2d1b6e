"""Records kept near: on the node's disk, in its memory, on the device."""

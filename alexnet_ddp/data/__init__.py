"""From files to batches: where samples lie, their order, their pixels."""

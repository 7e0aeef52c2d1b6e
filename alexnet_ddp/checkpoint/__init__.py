"""Checkpoints: what is saved (`state`), how one lies on the disk (`store`, `files`), which one a run goes
on from and which ones it keeps (`choose`), and saving in the background (`writer`). For rank 0 alone.
"""

"""Where every sample lies: one sorted table over folders, tars, tars in tars and packs, and reads from them."""

from alexnet_ddp.data.index.index import Index, check_pair, open_index, summary

__all__ = ["Index", "check_pair", "open_index", "summary"]

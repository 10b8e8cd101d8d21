"""Joins a recallnb server to QQ: what people write goes to the server, its answers go back.

Only `qq` and `check` know of ncatbot and NapCat; everything else runs and is tested without them."""

__version__ = "0.1.0"

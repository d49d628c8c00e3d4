"""One module per kind of store: each has `write` and `search`, and is found by `core.export`."""

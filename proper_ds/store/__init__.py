"""The adapter store: packs of many users' adapters and the catalog that commits them."""

"""Ray: gangs of ranks, and actors that work through units. The only importer of ray."""

"""Tests of proper_ds.pipeline and the run folder."""

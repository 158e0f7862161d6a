"""Studies: many runs of one YAML under the same rules, compared, swept, and read on test users once."""

"""The tabletop simulator and one raw-format writer per source: a converter's inverse. Knows schemas."""

"""Episode columns -> new columns, one file per stage. Knows schemas, video and models."""

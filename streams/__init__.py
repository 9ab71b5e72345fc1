"""Reading what is on disk: datasets, target arrays, shards, windows. What a trainer imports. Knows schemas, video."""

"""Order, cache keys, journal, Dask, datasets on disk, checks, reports. Knows every folder but trainer."""

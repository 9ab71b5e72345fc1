"""Stream -> recipe -> checkpoint, one file per recipe; evaluation. Knows schemas, models, streams, samples."""

"""Stream -> recipe -> checkpoint, one file per recipe; closed-loop evaluation. Knows schemas, models, streams, samples."""

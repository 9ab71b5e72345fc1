"""What data is: episodes, embodiments, features, rotations, chunks, normalisers. numpy only."""

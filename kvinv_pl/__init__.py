"""KV Inversion: change what the subject of a picture is doing."""

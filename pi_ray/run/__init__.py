"""One run on disk: its directory, its artifacts (written whole or not at all, hashed), its rows, and object storage behind a URL."""

"""The KV-cache: block pool and prefix hashes, which load no torch, and the pages."""

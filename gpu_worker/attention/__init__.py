"""Paged attention: one signature (`interface`), several implementations, one `choice`."""

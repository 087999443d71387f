"""A site's part in a run: what it asks, receives and publishes, without a framework."""

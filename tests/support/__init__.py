"""What several test modules share: runs, sites, relays, frames and small models."""

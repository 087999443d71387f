"""A server and its sites as processes of this machine."""

"""Keys, kits, the allow-list, and the door of an encrypted server."""

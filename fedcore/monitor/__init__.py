"""How a run stands, asked and shown."""

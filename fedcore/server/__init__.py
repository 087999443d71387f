"""The server: rounds, participation, selection, aggregation, the run store and the process around them."""

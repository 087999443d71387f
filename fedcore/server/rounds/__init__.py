"""When a round begins and closes, and which sites take part: state machines without I/O or a clock."""

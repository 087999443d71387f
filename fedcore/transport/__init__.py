"""Links between the server and the sites."""

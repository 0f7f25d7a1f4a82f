"""What the server answers to, a file for each contract, with `routes(state)` as its face."""

"""What a model can be trained for; a new objective is a file here and a line in `table`."""

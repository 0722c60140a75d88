"""What uses the program and its maps: the structure of the picture, so far."""

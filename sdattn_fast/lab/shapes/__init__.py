"""The shapes world: coloured shapes on a grid, their captions, and a judge of what a picture shows."""

"""The objects world: scenes of pictograms, on which attention control is known to work."""

"""Choosing heads and tuning programs for a model and a set of prompts."""

"""Backends: "triton", "cuda", "cpu", "reference". Each is one module; none imports another."""

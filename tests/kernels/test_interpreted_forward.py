"""The Triton kernels of the forward pass, in Triton's interpreter."""

from interpreted import FORWARD, Interpreted


class TestForward(Interpreted):
    names = FORWARD
